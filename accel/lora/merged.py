"""One patch on merged projections (`to_qkv`), taken apart into the model's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .format import Patch
from .full import Difference, Replacement
from .lowrank import LowRank


@dataclass(frozen=True)
class Rows:
    """The outputs from `start` of an additive patch on a parameter of `shape` [O, I]."""

    target: str
    whole: Patch
    shape: tuple[int, ...]
    start: int

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        # An additive change asks its base for no values.
        blank = torch.empty(1, device=base.device).expand(self.shape)
        return self.whole.delta(blank, strength).narrow(0, self.start, base.shape[0])


def take_apart(
    patch: Patch, targets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> list[Patch]:
    """The patches of `targets`, whose outputs follow one another in an additive `patch`."""
    found: list[Patch] = []
    start = 0
    whole = stacked([shapes[target] for target in targets])
    for target in targets:
        end = start + shapes[target][0]
        if isinstance(patch, LowRank):
            found.append(replace(patch, target=target, up=patch.up[start:end]))
        elif isinstance(patch, (Difference, Replacement)):
            found.append(replace(patch, target=target, value=patch.value[start:end]))
        else:
            found.append(Rows(target, patch, whole, start))
        start = end
    return found


def stacked(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of parameters one below the other."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
