"""Nearest-neighbour up-sampling of a channels-last image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .registry import Shape, op


def _shape(shapes: Any, attrs: dict[str, Any]) -> Shape:
    return (shapes[0][0], *attrs["size"], shapes[0][3])


@op(shape=_shape, sizes=("size",))
def upsample_nearest(x: torch.Tensor, *, size: tuple[int, int]) -> torch.Tensor:
    """x [B, H, W, C] to [B, *size, C]; a pixel of the result reads `floor(i * H / size)`."""
    return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="nearest").permute(0, 2, 3, 1)
