"""Operators that only look at a tensor in another way. They cost nothing where strides allow."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Shape, op


def _sliced(shapes: Any, attrs: dict[str, Any]) -> Shape:
    shape = list(shapes[0])
    shape[attrs["dim"]] = attrs["length"]
    return tuple(shape)


@op(shape=lambda shapes, attrs: tuple(attrs["shape"]), view=True, sizes=("shape",))
def reshape(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    """x with the same elements in another shape."""
    return x.reshape(shape)


@op(shape=lambda shapes, attrs: tuple(shapes[0][d] for d in attrs["dims"]), view=True)
def permute(x: torch.Tensor, *, dims: tuple[int, ...]) -> torch.Tensor:
    """x with its dimensions in another order."""
    return x.permute(dims)


@op(shape=lambda shapes, attrs: tuple(attrs["shape"]), view=True, sizes=("shape",))
def expand(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    """x broadcast to `shape`."""
    return x.expand(shape)


@op(shape=_sliced, view=True, sizes=("start", "length"))
def slice_dim(x: torch.Tensor, *, dim: int, start: int, length: int) -> torch.Tensor:
    """`length` entries of dimension `dim` (never negative) from `start` on."""
    return x.narrow(dim, start, length)


@op(shape=lambda shapes, attrs: shapes[0][1:], view=True)
def result(x: torch.Tensor | tuple[torch.Tensor, ...], *, index: int) -> torch.Tensor:
    """One of an operator's several results."""
    return x[index]
