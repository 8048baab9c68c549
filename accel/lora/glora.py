"""LyCORIS GLoRA: `….a1.weight`, `….a2.weight`, `….b1.weight`, `….b2.weight`, `….bm.weight`.

The change is low-rank, plus the weight itself times something low-rank.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration import LycorisScale
from .format import DAMAGED, Format, Layer, Source, split
from .lowrank import LowRank, check

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>[ab][12]|bm)\.weight")
_FACTORS = frozenset({"a1", "a2", "b1", "b2"})


@dataclass(frozen=True)
class Generalised:
    """delta = base @ inner @ outer * scale + beside's, along the inputs of one [O, I, *k].

    inner: [I, r]. outer: [r, I]. scale: of base's part; `beside` has its own.
    """

    inner: Tensor
    outer: Tensor
    beside: LowRank
    scale: float

    @property
    def target(self) -> str:
        """Canonical name of the parameter."""
        return self.beside.target

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            inner = self.inner.to(base.device).float().flatten(1) * (self.scale * strength)
            outer = self.outer.to(base.device).float().flatten(1)
            by_input = base.movedim(1, -1)  # [O, *k, I]
            return (by_input @ inner @ outer).movedim(-1, 1) + self.beside.delta(base, strength)


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    return split(key, _KEY)


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    return _FACTORS <= parts.keys() <= _FACTORS | {"bm", "alpha"}


def _order(layer: Layer, inputs: int) -> tuple[str, str, str, str] | None:
    """The parts as (inner, outer, up, down), or None if the a's do not multiply.

    LyCORIS has turned the factors of both products round since its first files.
    """
    shapes = layer.shapes
    a1, a2, b1, b2 = (shapes[part] for part in ("a1", "a2", "b1", "b2"))
    if any(len(shape) < 2 or 0 in shape for shape in (a1, a2, b1, b2)):
        return None
    if a1[:2] == (inputs, a2[0]) and a2[1] == inputs and b1[1] == b2[0]:
        return "a1", "a2", "b1", "b2"
    if a2[:2] == (inputs, a1[0]) and a1[1] == inputs and b2[1] == b1[0]:
        return "a2", "a1", "b2", "b1"
    return None


def _check(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    assert layer.target is not None
    inputs = shapes[layer.target][1]
    order = _order(layer, inputs)
    if order is None:
        named = ", ".join(f"{part} {list(layer.shapes[part])}" for part in sorted(_FACTORS))
        return f"is damaged ({named} do not multiply over {inputs} inputs); {DAMAGED}"
    return check(layer, shapes, order[2], order[3], "bm")


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Generalised]:
    scales = LycorisScale(source)
    for layer in layers:
        assert layer.target is not None
        keys, a1, a2 = layer.keys, layer.shapes["a1"], layer.shapes["a2"]
        order = _order(layer, max(a1[0], a2[0]))
        assert order is not None
        inner, outer, up, down = (source.read(keys[part]) for part in order)
        rank = inner.shape[1]
        scale = scales.of(layer, rank)
        mid = source.read(keys["bm"]) if "bm" in keys else None
        beside = LowRank(layer.target, up, down, mid, scale * down.shape[0])
        yield Generalised(inner, outer, beside, scale)


GLORA = Format("GLoRA", _parse, _owns, _check, _read)
