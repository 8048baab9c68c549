"""Normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .concat import concat
from .registry import op


@op(shape=lambda shapes, attrs: shapes[0])
def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    groups: int,
    eps: float,
    activation: str = "none",
) -> torch.Tensor:
    """GroupNorm of `x + shift + offset`, a channels-last image, then SiLU if asked for ("silu").

    x [B, H, W, C] or [B, S, C], weight and bias [C], shift [B, C] (a time embedding, the same for
    every pixel), offset [C] (the bias of the convolution that made x); returns the shape of x.
    """
    for addend in (offset, shift):
        if addend is not None:
            x = x + (
                addend if addend.dim() == 1 else addend.view(x.shape[0], *[1] * (x.dim() - 2), -1)
            )
    # As [B, C, pixels]: ATen's kernel for channels-last images on the CPU sums squares in one pass,
    # which loses the digits of a mean far from zero.
    pixels = x.flatten(1, -2).transpose(1, 2)
    y = torch.group_norm(pixels, groups, weight, bias, eps)
    return (F.silu(y) if activation == "silu" else y).transpose(1, 2).reshape(x.shape)


@op(shape=lambda shapes, attrs: shapes[0], rowwise=True)
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dimension: x [..., C], weight and bias [C]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@op(shape=lambda shapes, attrs: (2, *shapes[0]), results=2)
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
) -> torch.Tensor:
    """`x + residual` and its LayerNorm over the last dimension, one after the other: [2, ..., C].

    x and residual [..., C], weight and bias [C].
    """
    total = x + residual
    return torch.stack((total, layer_norm(total, weight, bias, eps=eps)))


@op(
    shape=lambda shapes, attrs: (2, *shapes[0][:-1], sum(s[-1] for s in shapes[:-2:2])),
    results=2,
)
def concat_group_norm(
    *tensors: torch.Tensor | None, groups: int, eps: float, activation: str = "none"
) -> torch.Tensor:
    """A concatenation along channels and its GroupNorm, one after the other: [2, B, ..., C].

    tensors: what `concat` takes, x0, r0, x1, r1, …, then weight and bias [C]. One pair alone is a
    sum. The statistics are of the sums as they are rounded.
    """
    *pairs, weight, bias = tensors
    assert weight is not None and bias is not None
    image = concat(*pairs)
    norm = group_norm(image, weight, bias, groups=groups, eps=eps, activation=activation)
    return torch.stack((image, norm))
