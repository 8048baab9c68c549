"""Channels-last convolution with its epilogue."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from .registry import Shape, op


def _shape(shapes: Any, attrs: dict[str, Any]) -> Shape:
    (batch, *space, _), (out_channels, *kernel, _) = shapes[0], shapes[1]
    space = attrs.get("upsample") or space
    sizes = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k, stride, padding, dilation in zip(
            space, kernel, attrs["stride"], attrs["padding"], attrs["dilation"], strict=True
        )
    )
    return (batch, *sizes, out_channels)


@op(
    shape=_shape,
    flops=lambda shapes, out, attrs: 2 * prod(out) * prod(shapes[1][1:]),
    sizes=("upsample",),
)
def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`conv(x) + bias + embedding + residual`; of x made `upsample` large first, if given.

    x [B, H, W, C], weight [O, kh, kw, C/groups], bias [O], embedding [B, O] (the same for every
    pixel), residual [B, H', W', O]; returns [B, H', W', O]. `upsample`: the size (H, W) to which
    nearest-neighbour up-sampling brings x: a pixel reads `floor(i * H_x / H)`.
    """
    image = x.permute(0, 3, 1, 2)
    if upsample is not None:
        image = F.interpolate(image, size=upsample, mode="nearest")
    y = F.conv2d(
        image,
        weight.permute(0, 3, 1, 2),
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    ).permute(0, 2, 3, 1)
    if embedding is not None:
        y = y + embedding[:, None, None, :]
    if residual is not None:
        y = y + residual
    return y
