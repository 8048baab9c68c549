"""Matrix product with its epilogue."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InvalidPlan
from .registry import Shape, op


def _shape(shapes: Any, attrs: dict[str, Any]) -> Shape:
    columns = shapes[1][0]
    return (*shapes[0][:-1], columns // 2 if attrs["activation"] == "geglu" else columns)


@op(
    shape=_shape,
    flops=lambda shapes, out, attrs: 2 * prod(shapes[0][:-1]) * prod(shapes[1]),
    rowwise=True,
)
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str = "none",
) -> torch.Tensor:
    """`activation(x @ weight^T + bias) + residual`.

    x [..., K], weight [N, K], bias [N], residual of the result's shape; returns [..., N].
    `geglu`: the first half of the columns times the exact (erf) GELU of the second: [..., N/2].
    """
    y = F.linear(x, weight, bias)
    if activation == "geglu":
        hidden, gate = y.chunk(2, dim=-1)
        y = hidden * F.gelu(gate)
    elif activation != "none":
        raise InvalidPlan(f"linear knows no activation {activation!r}")
    return y if residual is None else y + residual
