"""LyCORIS LoKr: `….lokr_w1`, `….lokr_w2`, either whole or as `…_a`, `…_b`, and `….lokr_t2`.

The change is the Kronecker product of a small matrix and a larger one.
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
from .lowrank import kernel_of, mismatch, tucker

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lokr_(?:w[12](?:_[ab])?|t2))")
_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """One side of the product: whole, `a @ b`, or with tucker's core.

    whole: [o, i, *k]. a: [o, r], b: [r, i, *k]; with core [r, r, *k] a: [r, o], b: [r, i].
    """

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """None of a whole one."""
        return None if self.b is None else self.b.shape[0]

    def made(self, device: torch.device | str) -> Tensor:
        """[o, i, *k] in fp32 on `device`."""
        # First as they are: asked for both, PyTorch converts on the CPU, and sends more bytes.
        if self.whole is not None:
            return self.whole.to(device).float()
        assert self.a is not None and self.b is not None
        a, b = self.a.to(device).float(), self.b.to(device).float()
        if self.core is not None:
            return tucker(self.core.to(device).float(), a, b)
        return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


@dataclass(frozen=True)
class Kronecker:
    """delta = kron(first, second) * scale, for one parameter [O, I, *k].

    target: canonical parameter name. first: [o1, i1]. second: [o2, i2, *k]; O = o1 o2, I = i1 i2.
    """

    target: str
    first: Factor
    second: Factor
    scale: float

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            first, second = self.first.made(base.device), self.second.made(base.device)
            # The scale goes to the smaller factor, not to the full-size product.
            first = first * (self.scale * strength)
            # [o1, 1, i1, 1, …] times [o2, 1, i2, *k] is [o1, o2, i1, i2, *k].
            first = first.reshape(len(first), 1, -1, *(1,) * (second.dim() - 1))
            return (first * second[:, None]).reshape(base.shape)


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    return split(key, _KEY)


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    found = parts.keys() - {"alpha"}
    return any(found == one | other for one in _FIRST for other in _SECOND)


def _check(layer: Layer) -> str | None:
    found: list[Shape] = []
    for side in "12":
        made = _made(layer.shapes, side)
        if made is None or len(made) < 2 or (side == "1" and len(made) != 2):
            named = [
                f"{p} {list(s)}" for p, s in layer.shapes.items() if p[5:7] in ("w" + side, "t2")
            ]
            return f"is damaged ({', '.join(named)} do not multiply); {DAMAGED}"
        found.append(made)
    first, second = found
    outputs, inputs, kernel = first[0] * second[0], first[1] * second[1], second[2:]
    own = tuple(layer.own)
    flat = (outputs, inputs) == (own[0], math.prod(own[1:])) and not kernel
    if flat or ((outputs, inputs) == own[:2] and kernel_of(kernel) == kernel_of(own[2:])):
        return None
    return mismatch(inputs, outputs, kernel, own)


def _made(parts: Mapping[str, Shape], side: str) -> Shape | None:
    """The shape of one side, or None if its factors have no product, or one is empty."""
    if any(0 in shape for shape in parts.values()):
        return None
    whole = parts.get(f"lokr_w{side}")
    if whole is not None:
        return whole
    a, b = parts[f"lokr_w{side}_a"], parts[f"lokr_w{side}_b"]
    core = parts.get("lokr_t2") if side == "2" else None
    if core is not None:
        fit = len(a) == len(b) == 2 and len(core) >= 2 and core[:2] == (a[0], b[0])
        return (a[1], b[1], *core[2:]) if fit else None
    fit = len(a) == 2 and len(b) >= 2 and a[1] == b[0]
    return (a[0], *b[1:]) if fit else None


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Kronecker]:
    scale = LycorisScale(source)
    for layer in layers:
        keys = layer.keys

        def part(name: str, keys: Mapping[str, str] = keys) -> Tensor | None:
            return source.read(keys[name]) if name in keys else None

        first = Factor(part("lokr_w1"), part("lokr_w1_a"), part("lokr_w1_b"))
        second = Factor(part("lokr_w2"), part("lokr_w2_a"), part("lokr_w2_b"), part("lokr_t2"))
        yield Kronecker(layer.target, first, second, scale.of(layer, first.rank or second.rank))


LOKR = Format("LoKr", _parse, _owns, _check, _read, additive=True)
