"""Concatenation along channels, with ControlNet's residuals added on the way."""

from __future__ import annotations

import torch

from .registry import op


@op(shape=lambda shapes, attrs: (*shapes[0][:-1], sum(s[-1] for s in shapes[::2])))
def concat(*pairs: torch.Tensor | None) -> torch.Tensor:
    """Concatenate `x0 + r0, x1 + r1, …` along the last dimension.

    `pairs` is flat: x0, r0, x1, r1, …; each x [..., C_i]; each r of the same shape, or `None` for
    none. The sum is made only here: other readers of x see it without the residual.
    """
    parts = []
    for x, residual in zip(pairs[::2], pairs[1::2], strict=True):
        assert x is not None
        parts.append(x if residual is None else x + residual)
    return torch.cat(parts, dim=-1)
