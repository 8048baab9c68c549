"""LyCORIS LoHa: `….hada_w1_a`, `….hada_w1_b`, `….hada_t1` and the same of `w2`, `t2`.

The change is the product, element by element, of two low-rank ones.
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
from .lowrank import mismatch, tucker

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>hada_(?:w[12]_[ab]|t[12]))")
_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = frozenset({"hada_t1", "hada_t2"})


@dataclass(frozen=True)
class Hadamard:
    """delta = (a1 @ b1) * (a2 @ b2) * scale, for one parameter [O, I, *k].

    target: canonical parameter name.
    a:      two of [O, r]; with cores [r, O]
    b:      two of [r, I * prod(k)]; with cores [r, I]
    cores:  two of [r, r, *k], tucker's, or none
    """

    target: str
    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None
    scale: float

    @property
    def products(self) -> list[tuple[Tensor, Tensor]] | None:
        """The a [O, r] and b [r, I * prod(k)] as they are stored; None with cores between them."""
        if self.cores is not None:
            return None
        return [(a.flatten(1), b.flatten(1)) for a, b in zip(self.a, self.b, strict=True)]

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            first, second = (self._half(index, base.device) for index in range(2))
            return (first * second * (self.scale * strength)).reshape(base.shape)

    def _half(self, index: int, device: torch.device | str) -> Tensor:
        # First as they are: asked for both, PyTorch converts on the CPU, and sends more bytes.
        a, b = (factor[index].to(device).float().flatten(1) for factor in (self.a, self.b))
        if self.cores is None:
            return a @ b
        return tucker(self.cores[index].to(device).float(), a, b)


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    return split(key, _KEY)


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    found = parts.keys() - {"alpha"}
    return found in (_FACTORS, _FACTORS | _CORES)


def _check(layer: Layer) -> str | None:
    outputs, inputs, *kernel = layer.own
    for half in "12":
        a, b = layer.shapes[f"hada_w{half}_a"], layer.shapes[f"hada_w{half}_b"]
        core = layer.shapes.get(f"hada_t{half}")
        if not _multiply(a, b, core):
            named = [f"hada_w{half}_a {list(a)}", f"hada_w{half}_b {list(b)}"]
            named += [f"hada_t{half} {list(core)}"] if core else []
            return f"is damaged ({', '.join(named)} do not multiply); {DAMAGED}"
        if core is None:
            if (a[0], b[1]) != (outputs, inputs * math.prod(kernel)):
                return mismatch(b[1], a[0], (), layer.own)
        elif (a[1], b[1], core[2:]) != (outputs, inputs, tuple(kernel)):
            return mismatch(b[1], a[1], core[2:], layer.own)
    return None


def _multiply(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None) -> bool:
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
        return False
    if core is None:
        return a[1] == b[0]
    return len(core) >= 2 and 0 not in core and core[:2] == (a[0], b[0])


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Hadamard]:
    scale = LycorisScale(source)
    for layer in layers:
        keys = layer.keys
        cores = None
        if "hada_t1" in keys:
            cores = (source.read(keys["hada_t1"]), source.read(keys["hada_t2"]))
        yield Hadamard(
            layer.target,
            (source.read(keys["hada_w1_a"]), source.read(keys["hada_w2_a"])),
            (source.read(keys["hada_w1_b"]), source.read(keys["hada_w2_b"])),
            cores,
            scale.of(layer, layer.shapes["hada_w1_b"][0]),
        )


LOHA = Format("LoHa", _parse, _owns, _check, _read, additive=True)
