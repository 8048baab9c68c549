"""LyCORIS GLoRA: `….a1.weight`, `….a2.weight`, `….b1.weight`, `….b2.weight`, `….bm.weight`.

The change is low-rank, plus the weight itself times something low-rank.
"""

from __future__ import annotations

import math
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


def _order(layer: Layer) -> tuple[str, str, str, str] | None:
    """The parts as (inner, outer, up, down), or None if the a's do not multiply.

    LyCORIS has turned the factors of both products round since its first files.
    """
    shapes, inputs = layer.shapes, layer.own[1]
    for order in (("a1", "a2", "b1", "b2"), ("a2", "a1", "b2", "b1")):
        inner, outer, up, down = (shapes[part] for part in order)
        if any(len(shape) < 2 or 0 in shape for shape in (inner, outer, up, down)):
            return None
        plain = math.prod(inner[2:]) == math.prod(outer[2:]) == 1
        if plain and inner[:2] == (inputs, outer[0]) and outer[1] == inputs and up[1] == down[0]:
            return order
    return None


def _check(layer: Layer) -> str | None:
    order = _order(layer)
    if order is None:
        named = ", ".join(f"{part} {list(layer.shapes[part])}" for part in sorted(_FACTORS))
        return f"is damaged ({named} do not multiply over {layer.own[1]} inputs); {DAMAGED}"
    return check(layer, order[2], order[3], "bm")


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Generalised]:
    scales = LycorisScale(source)
    for layer in layers:
        keys, order = layer.keys, _order(layer)
        assert order is not None
        inner, outer, up, down = (source.read(keys[part]) for part in order)
        rank = inner.shape[1]
        scale = scales.of(layer, rank)
        mid = source.read(keys["bm"]) if "bm" in keys else None
        beside = LowRank(layer.target, up, down, mid, scale * down.shape[0])
        yield Generalised(inner, outer, beside, scale)


GLORA = Format("GLoRA", _parse, _owns, _check, _read)
