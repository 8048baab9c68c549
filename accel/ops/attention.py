"""Multi-head attention over the layout in which the projections leave their results."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F

from .registry import op


@op(
    shape=lambda shapes, attrs: shapes[0],
    flops=lambda shapes, out, attrs: 4 * prod(shapes[0]) * shapes[1][1],
)
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, heads: int, scale: float
) -> torch.Tensor:
    """`softmax(q k^T * scale) v` for each head.

    query [B, S, heads*D], key and value [B, T, heads*D], strided slices of merged projections
    allowed; returns [B, S, heads*D], contiguous.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return result.transpose(1, 2).flatten(2)
