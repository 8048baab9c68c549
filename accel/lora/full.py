"""Full differences: `….diff`, `….diff_b`, norms' `….w_norm`, `….b_norm`, and whole parameters.

The latter are `….set_weight`, and what peft trains in full beside its factors:
`base_model.model.….weight`, `….bias` and `….modules_to_save.….weight`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import OTHER_MODEL, Format, Layer, Patch, Source, split
from .lowrank import kernel_of

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>diff(?:_b)?|[wb]_norm|set_weight)")
_WHOLE = re.compile(
    r"(?P<layer>base_model\.model\..+?|.+?(?=\.modules_to_save\.))"
    r"(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<of>weight|bias)"
)
_DIFFERENCES = frozenset({"diff", "diff_b", "w_norm", "b_norm"})

BIAS_PARTS = frozenset({"diff_b", "b_norm", "set_bias"})
"""Parts that are of a layer's bias, whatever adapts its weight."""


@dataclass(frozen=True)
class Difference:
    """delta = value * scale, for a parameter of any shape."""

    target: str
    value: Tensor
    scale: float = 1.0

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            value = self.value.to(base.device).float()
            return (value * (self.scale * strength)).reshape(base.shape)


@dataclass(frozen=True)
class Replacement:
    """delta = value - base: at strength 1 the parameter is `value`. Of any shape."""

    target: str
    value: Tensor

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            value = self.value.to(base.device).float().reshape(base.shape)
            return (value - base) * strength


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    whole = _WHOLE.fullmatch(key)
    return (whole["layer"], f"set_{whole['of']}") if whole else split(key, _KEY)


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    # Trainers of other formats leave an alpha beside a difference too; it scales nothing.
    found = parts.keys() - {"alpha"}
    return len(found) == 1 and found <= _DIFFERENCES | {"set_weight", "set_bias"}


def _check(layer: Layer) -> str | None:
    own = layer.own
    found = next(shape for part, shape in layer.shapes.items() if part != "alpha")
    if found[:2] == own[:2] and kernel_of(found[2:]) == kernel_of(own[2:]):
        return None
    return f"holds {list(found)} where the model's parameter is {list(own)}; {OTHER_MODEL}"


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Patch]:
    for layer in layers:
        part = next(part for part in layer.keys if part != "alpha")
        value = source.read(layer.keys[part])
        yield (Difference if part in _DIFFERENCES else Replacement)(layer.target, value)


FULL = Format("full difference", _parse, _owns, _check, _read, vectors=True, additive=True)
