"""Low-rank adapters, for every format that stores a product of two (or, tucker, three) factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import DAMAGED, OTHER_MODEL, Layer


@dataclass(frozen=True)
class LowRank:
    """delta = up @ mid @ down * alpha / rank, for one linear or convolution parameter [O, I, *k].

    target: canonical parameter name.
    up:     [O, r] or [O, r, 1, 1]
    down:   [r, I], [r, I, *k] or, flat, [r, I * prod(k)]; with `mid` [r, I] or [r, I, 1, 1]
    mid:    [r, r, *k] or None: the tucker core of a convolution
    alpha:  None for a scale of 1
    """

    target: str
    up: Tensor
    down: Tensor
    mid: Tensor | None
    alpha: float | None

    @property
    def rank(self) -> int:
        """Rank of this layer, the r of alpha / r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def products(self) -> list[tuple[Tensor, Tensor]] | None:
        """up [O, r] and down [r, I * prod(k)] as they are stored; None with a core between them."""
        if self.mid is not None:
            return None
        return [(self.up.flatten(1), self.down.flatten(1))]

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            # First as they are: asked for both, PyTorch converts on the CPU, and sends more bytes.
            up = self.up.to(base.device).float().flatten(1)
            down = self.down.to(base.device).float().flatten(1)
            if self.mid is not None:
                mid = self.mid.to(base.device).float().flatten(2)
                # [r, r', k] x [r', I] -> [r, I, k]: what `down` of a plain convolution holds.
                down = (down.T @ mid).flatten(1)
            # The scale goes to the smaller factor, not to the full-size product.
            return ((up * (self.scale * strength)) @ down).reshape(base.shape)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[r, r', *k] x [r, O] x [r', I] -> [O, I, *k]."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def check(
    layer: Layer,
    up_part: str,
    down_part: str,
    mid_part: str | None = None,
) -> str | None:
    """`Format.check` for a layer whose factors are the named parts."""
    up, down = layer.shapes[up_part], layer.shapes[down_part]
    mid = layer.shapes.get(mid_part) if mid_part else None
    if not _multiply(up, mid, down):
        factors = [up_part, down_part, *([mid_part] if mid and mid_part else [])]
        listed = ", ".join(f"{part} {list(layer.shapes[part])}" for part in factors)
        return f"is damaged ({listed} do not multiply); {DAMAGED}"
    out_features, in_features, *kernel = layer.own
    taps = math.prod(kernel)
    own_kernel = (down if mid is None else mid)[2:]
    flat = len(down) == 2 and mid is None and down[1] == in_features * taps
    same = down[1] == in_features and kernel_of(own_kernel) == kernel_of(kernel)
    if up[0] == out_features and (flat or same):
        return None
    return mismatch(down[1], up[0], own_kernel, layer.own)


def mismatch(inputs: int, outputs: int, kernel: Sequence[int], shape: Sequence[int]) -> str:
    """What is said of a layer that maps other features than the parameter of `shape` does."""
    return (
        f"maps {_features(inputs, outputs, kernel)} where the model's parameter maps "
        f"{_features(shape[1], shape[0], shape[2:])}; {OTHER_MODEL}"
    )


def _multiply(up: tuple[int, ...], mid: tuple[int, ...] | None, down: tuple[int, ...]) -> bool:
    """Whether factors of these shapes have a product, and none of them is empty."""
    if min(len(up), len(down)) < 2 or 0 in (*up, *down) or math.prod(up[2:]) != 1:
        return False
    if mid is None:
        return up[1] == down[0]
    return (
        len(mid) > 2 and 0 not in mid and (up[1], down[0]) == mid[:2] and math.prod(down[2:]) == 1
    )


def kernel_of(kernel: Sequence[int]) -> tuple[int, ...]:
    """A kernel without its size-1 form: a 1x1 convolution is a linear layer."""
    return () if math.prod(kernel) == 1 else tuple(kernel)


def _features(inputs: int, outputs: int, kernel: Sequence[int]) -> str:
    size = f" ({'x'.join(map(str, kernel))})" if kernel_of(kernel) else ""
    return f"{inputs} -> {outputs} features{size}"
