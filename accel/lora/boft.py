"""BOFT: `….oft_blocks` of four axes (LyCORIS), or `….boft_R` with `….boft_s` (peft).

The weight is turned by a product of block-diagonal rotations, each between a permutation and its
inverse, so that few parameters reach across the whole of it, as in a butterfly network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import DAMAGED, OTHER_MODEL, Format, Layer, Source, split
from .oft import check_blocks, constraint_of, has_blocks, rescaled, rotations

_PEFT = re.compile(r"(?P<layer>.+)\.(?P<part>boft_[Rs])(?:\.[^.]+)?")
_PEFT_PARTS = frozenset({"boft_R", "boft_s"})


@dataclass(frozen=True)
class Butterfly:
    """delta = rescale * turned(base) - base, for one parameter [O, I, *k].

    Stage i interleaves the halves of every `b` 2**i rows, in pieces of `piece` rows, turns every b
    rows by its rotation, and undoes the interleaving. Rows are the outputs, or with `by_input` the
    flattened inputs.

    blocks:     [m, n, b, b] for m stages of n rotations: Cayley's, of blocks - blocks.T
    constraint: the largest norm of all that is skew in the blocks together, None for no limit
    rescale:    [O] or any shape of as many; None for ones

    Strength goes from the identity to the rotation within each stage, as in LyCORIS (ComfyUI weighs
    the whole by it once more), and from 1 to `rescale`, so that 0 is off.
    """

    target: str
    blocks: Tensor
    constraint: float | None
    rescale: Tensor | None
    piece: int = 1
    by_input: bool = False

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            turned = rotations(self.blocks.to(base.device).float(), self.constraint)
            eye = torch.eye(turned.shape[-1], device=base.device)
            rows = base.flatten(1)
            rows = start = rows.T if self.by_input else rows
            for stage, rotation in enumerate(turned):
                rows = self._turn(rows, stage, torch.lerp(eye, rotation, strength))
            change = rows - start
            change = (change.T if self.by_input else change).reshape(base.shape)
            rescale = self.rescale
            if rescale is not None:
                rescale = 1.0 + (rescale.to(base.device).float() - 1.0) * strength
            return rescaled(change, base, rescale)

    def _turn(self, rows: Tensor, stage: int, rotation: Tensor) -> Tensor:
        size = rotation.shape[-1]
        half = (size << stage) // (2 * self.piece)
        mixed = half > 1
        if mixed:
            rows = rows.unflatten(0, (-1, 2, half, self.piece)).transpose(1, 2).flatten(0, 3)
        rows = (rotation @ rows.unflatten(0, (-1, size))).flatten(0, 1)
        if mixed:
            rows = rows.unflatten(0, (-1, half, 2, self.piece)).transpose(1, 2).flatten(0, 3)
        return rows


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    return split(key, _PEFT)  # `oft_blocks` and `rescale` are parts that OFT has too


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    return has_blocks(parts, 4) or parts.keys() == _PEFT_PARTS


def _check(layer: Layer) -> str | None:
    if "oft_blocks" in layer.keys:
        return check_blocks(layer) or _stages(layer.shapes["oft_blocks"])
    blocks, scale = layer.shapes["boft_R"], layer.shapes["boft_s"]
    own = layer.own
    if len(blocks) != 4 or 0 in blocks or blocks[-1] != blocks[-2]:
        return f"is damaged (boft_R {list(blocks)} are not square); {DAMAGED}"
    if (blocks[1] * blocks[2], math.prod(scale)) != (math.prod(own[1:]), own[0]):
        return (
            f"turns {blocks[1] * blocks[2]} inputs and scales {math.prod(scale)} outputs of a "
            f"parameter {list(own)}; {OTHER_MODEL}"
        )
    return _stages(blocks)


def _stages(blocks: tuple[int, ...]) -> str | None:
    stages, number, size, _ = blocks
    if stages == 1 or (size % 2 == 0 and number % (1 << (stages - 1)) == 0):
        return None
    return f"is damaged ({stages} stages do not halve {number} blocks of {size}); {DAMAGED}"


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Butterfly]:
    for layer in layers:
        keys = layer.keys
        if "boft_R" in keys:
            # peft takes half of the blocks' skew part, and Cayley's rotation the other way round.
            blocks = source.read(keys["boft_R"]).float() * -0.5
            piece = max(blocks.shape[-1] // 2, 1)
            yield Butterfly(
                layer.target, blocks, None, source.read(keys["boft_s"]), piece, by_input=True
            )
            continue
        blocks = source.read(keys["oft_blocks"])
        rescale = source.read(keys["rescale"]) if "rescale" in keys else None
        constraint = constraint_of(layer, blocks.shape[1] * blocks.shape[2], source)
        yield Butterfly(layer.target, blocks, constraint, rescale)


BOFT = Format("BOFT", _parse, _owns, _check, _read)
