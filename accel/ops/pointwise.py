"""Pointwise operators that passes look for by name; all others stay ATen's own."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InvalidPlan
from .registry import Shape, op


def _broadcast(shapes: Any, attrs: dict[str, Any]) -> Shape:
    columns = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    wide = [{size for size in sizes if size != 1} for sizes in columns]
    if any(len(sizes) > 1 for sizes in wide):
        raise InvalidPlan(f"shapes {' and '.join(map(str, shapes))} do not broadcast")
    return tuple(sizes.pop() if sizes else 1 for sizes in reversed(wide))


def _same(shapes: Any, attrs: dict[str, Any]) -> Shape:
    return tuple(shapes[0])


@op(shape=_broadcast)
def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a + b`, broadcast."""
    return a + b


@op(shape=_broadcast)
def mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a * b`, broadcast."""
    return a * b


@op(shape=_same)
def silu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)`."""
    return F.silu(x)


@op(shape=_same)
def gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """The exact (erf) GELU, or its tanh form."""
    return F.gelu(x, approximate=approximate)


@op(shape=_same, output_dtype="dtype")
def cast(x: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype."""
    return x.to(dtype)


@op(shape=_same)
def residual_add(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """`x + residual`; without one, a ControlNet's or T2I-Adapter's, x itself, at no cost."""
    return x if residual is None else x + residual
