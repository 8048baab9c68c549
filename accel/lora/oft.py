"""OFT: `….oft_blocks` of three axes (kohya, LyCORIS' Diag-OFT) or `….oft_R.weight` (peft).

The weight is turned by a block-diagonal rotation: its outputs by kohya's and LyCORIS', its inputs
by peft's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidLora
from .configuration import configuration, damaged, number
from .format import DAMAGED, OTHER_MODEL, Format, Layer, Patch, Source, split

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>oft_blocks|rescale)")
_PEFT = re.compile(r"(?P<layer>.+)\.(?P<part>oft_R)(?:\.[^.]+)?\.weight")

MOST_TERMS = 64
"""Of a series whose number a file gives: trainers take five."""


@dataclass(frozen=True)
class OutputRotation:
    """delta = rescale * (R.T @ base) - base along the outputs of one parameter [O, I, *k].

    R is block-diagonal, Cayley's rotation of each of `blocks` - `blocks`.T.

    blocks:     [n, b, b], O = n b
    constraint: the largest norm of all that is skew in the blocks together, None for no limit
    rescale:    [O, 1, …] or None

    Strength weighs the whole of it. So do kohya and LyCORIS, but for `rescale`, which theirs leaves
    on at 0. (ComfyUI weighs it twice: a strength of 0.5 is 0.25 there.)
    """

    target: str
    blocks: Tensor
    constraint: float | None
    rescale: Tensor | None

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            turned = rotations(self.blocks.to(base.device).float(), self.constraint)
            turned.diagonal(dim1=-2, dim2=-1).sub_(1.0)  # of R - I the small part is not lost
            rows = base.reshape(*self.blocks.shape[:2], -1)
            change = (turned.transpose(1, 2) @ rows).reshape(base.shape)
            return rescaled(change, base, self.rescale) * strength


@dataclass(frozen=True)
class InputRotation:
    """delta = base @ R.T - base over the flattened inputs of one parameter [O, I, *k].

    rotations: [n, b, b] in fp32, I * prod(k) = n b; n = 1 serves every block of b.
    """

    target: str
    rotations: Tensor

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            turned = self.rotations.to(base.device)
            size = turned.shape[-1]
            less = turned - torch.eye(size, device=base.device)
            columns = base.reshape(base.shape[0], -1, size).transpose(0, 1)  # [n, O, b]
            change = columns @ (less * strength).transpose(1, 2)
            return change.transpose(0, 1).reshape(base.shape)


def rotations(blocks: Tensor, constraint: float | None) -> Tensor:
    """(I + Q) (I - Q)^-1 of every Q = blocks - blocks.T, [..., b, b] in fp32.

    Where the norm of all Q is above `constraint`, they are shortened to it.
    """
    skew = blocks - blocks.transpose(-1, -2)
    if constraint is not None:
        norm = torch.linalg.vector_norm(skew) + 1e-8
        skew = torch.where(norm > constraint, skew * (constraint / norm), skew)
    eye = torch.eye(blocks.shape[-1], device=blocks.device)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def rescaled(change: Tensor, base: Tensor, rescale: Tensor | None) -> Tensor:
    """The change of `base` whose outputs are, after `change`, multiplied by `rescale`."""
    if rescale is None:
        return change
    factor = rescale.to(base.device).float().reshape(-1, *(1,) * (base.dim() - 1))
    return factor * change + (factor - 1) * base


def constraint_of(layer: Layer, outputs: int, source: Source) -> float | None:
    """The alpha of these formats: the limit for each output. 0, as none, is no limit."""
    key = layer.keys.get("alpha")
    return (source.number(key) * outputs or None) if key else None


def has_blocks(parts: Mapping[str, tuple[int, ...]], axes: int) -> bool:
    """Whether parts are `oft_blocks` of so many axes and what may be beside it."""
    known = {"oft_blocks"} <= parts.keys() <= {"oft_blocks", "rescale", "alpha"}
    return known and len(parts["oft_blocks"]) == axes


def check_blocks(layer: Layer) -> str | None:
    """`Format.check` of `oft_blocks` [*, n, b, b] and of `rescale`."""
    blocks, own = layer.shapes["oft_blocks"], layer.own
    if 0 in blocks or blocks[-1] != blocks[-2]:
        return f"is damaged (oft_blocks {list(blocks)} are not square); {DAMAGED}"
    outputs = blocks[-3] * blocks[-2]
    if outputs != own[0]:
        return f"turns {outputs} outputs where the model's parameter has {own[0]}; {OTHER_MODEL}"
    rescale = layer.shapes.get("rescale")
    if rescale is not None and math.prod(rescale) != own[0]:
        return f"is damaged (rescale {list(rescale)} for {own[0]} outputs); {DAMAGED}"
    return None


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    return split(key, _KEY) or split(key, _PEFT)


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    return has_blocks(parts, 3) or parts.keys() == {"oft_R"}


def _check(layer: Layer) -> str | None:
    if "oft_blocks" in layer.keys:
        return check_blocks(layer)
    inputs = math.prod(layer.own[1:])
    found = layer.shapes["oft_R"]
    size = _size(found)
    if size is None:
        return f"is damaged (oft_R {list(found)} are no triangles); {DAMAGED}"
    # One triangle may serve every block.
    if inputs % size or found[0] not in (1, inputs // size):
        return f"turns {found[0] * size} inputs where the parameter has {inputs}; {OTHER_MODEL}"
    return None


def _size(shape: tuple[int, ...]) -> int | None:
    """b of [n, b (b - 1) / 2]: blocks of which the part above the diagonal is stored."""
    if len(shape) != 2 or 0 in shape:
        return None
    size = (1 + math.isqrt(1 + 8 * shape[1])) // 2
    return size if size * (size - 1) // 2 == shape[1] else None


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Patch]:
    trained = None
    for layer in layers:
        if "oft_R" in layer.keys:
            trained = trained or _Trained(source)
            yield InputRotation(layer.target, trained.rotations(source.read(layer.keys["oft_R"])))
            continue
        blocks = source.read(layer.keys["oft_blocks"])
        rescale = source.read(layer.keys["rescale"]) if "rescale" in layer.keys else None
        constraint = constraint_of(layer, blocks.shape[0] * blocks.shape[1], source)
        yield OutputRotation(layer.target, blocks, constraint, rescale)


class _Trained:
    """How peft made rotations of its triangles, by its configuration."""

    def __init__(self, source: Source) -> None:
        config = configuration(source)
        if "use_cayley_neumann" not in config:
            raise InvalidLora(
                f"LoRA {source.title!r}: how its rotations were made stands in peft's "
                "adapter_config.json; keep it beside the file"
            )
        self._series = config["use_cayley_neumann"] is True
        terms = config.get("num_cayley_neumann_terms")
        self._terms = int(number(source, "num_cayley_neumann_terms", terms)) if self._series else 1
        if not 1 <= self._terms <= MOST_TERMS:
            raise damaged(source, "num_cayley_neumann_terms")
        self._eps = None
        if config.get("coft") is True:
            self._eps = number(source, "eps", config.get("eps"))

    def rotations(self, triangles: Tensor) -> Tensor:
        """[n, b (b - 1) / 2], above the diagonal row by row -> [n, b, b] in fp32."""
        triangles = triangles.float()
        size = _size(tuple(triangles.shape))
        assert size is not None
        skew = torch.zeros(triangles.shape[0], size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        skew[:, rows, columns] = triangles
        skew = skew - skew.transpose(1, 2)
        if self._eps is not None:
            limit = self._eps / math.sqrt(len(skew))
            norm = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            skew = torch.where(norm <= limit, skew, skew * (limit / norm))
        eye = torch.eye(size)
        if not self._series:
            return torch.linalg.solve(eye + skew, eye - skew, left=False)
        # (I + Q) (I + Q + Q² + …), cut off: every power counts twice but the first and the last.
        # Two terms have no last one, and three have as many powers as four.
        last = max(self._terms - 1, 3) if self._terms > 2 else self._terms
        total, power = eye.repeat(len(skew), 1, 1), eye
        for exponent in range(1, last + 1 if self._terms > 2 else self._terms):
            power = power @ skew
            total = total + power * (1.0 if exponent == last else 2.0)
        return total


OFT = Format("OFT", _parse, _owns, _check, _read)
