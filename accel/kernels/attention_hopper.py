"""Self-attention on Hopper in CUDA C++ (attention_hopper.cu), for the heads of Stable Diffusion.

Triton's kernel for the same (attention.py) keeps products and exponentials apart, looks for every
block's maximum, and pads heads to powers of two; the source says what is done instead.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from ..hardware import Hardware
from . import nvrtc
from .attention import SHORT, images_apart, plain
from .nvrtc import CudaLaunch, TileMap
from .registry import Call, Config, compiled_kernel

HEADS = (40, 64, 80, 160)
"""Columns of a head that there are products for."""

_ROW_BYTES = 128
"""Of a tile's row in shared memory, which holds 64 columns."""


def variant(groups: int, keys: int, stages: int, blocks: int) -> Config:
    """64 x `groups` queries a block, `keys` at a time.

    stages: blocks of keys that are there or on their way. blocks: of queries that a multiprocessor
    holds at once.
    """
    return {"groups": groups, "keys": keys, "stages": stages, "blocks": blocks}


_VARIANTS: dict[int, Sequence[Config]] = {
    40: (
        *(variant(4, 64, 3, 1), variant(4, 80, 3, 1), variant(3, 128, 3, 1)),
        *(variant(4, 64, 4, 1), variant(2, 64, 3, 2), variant(1, 64, 3, 4)),
    ),
    64: (
        *(variant(2, 64, 3, 2), variant(1, 64, 3, 4)),
        *(variant(4, 64, 3, 1), variant(3, 96, 3, 1)),
    ),
    80: (variant(1, 64, 2, 3), variant(3, 64, 3, 1), variant(2, 64, 3, 1)),
    160: (variant(1, 64, 2, 2), variant(2, 64, 2, 1)),
}
"""By the columns of a head, the likeliest first. None has more registers than there are."""


def _configs(call: Call, hardware: Hardware) -> Sequence[Config]:
    return _VARIANTS[call.out.shape[2] // call.attrs["heads"]]


def _fits(call: Call, config: Config, hardware: Hardware) -> bool:
    return config in _configs(call, hardware)


def _supports(call: Call, hardware: Hardware) -> bool:
    if hardware.capability != (9, 0) or not plain(call):
        return False
    key = call.tensors[1]
    assert key is not None
    return (
        call.out.shape[2] // call.attrs["heads"] in HEADS
        and key.shape[1] > SHORT // 2  # few keys are better held all at once
        and nvrtc.available()
    )


@compiled_kernel(
    "attention",
    name="cuda.attention",
    supports=_supports,
    configs=_configs,
    fits=_fits,
    priority=2,
)
def attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    config: Config,
    workspace: torch.Tensor | None,
    heads: int,
    scale: float,
) -> list[CudaLaunch]:
    """One launch. Tensors as the operator's."""
    images, queries, width = query.shape
    groups, keys, stages = (int(config[name]) for name in ("groups", "keys", "stages"))
    head = width // heads
    tile = -(-head // 64) * keys * _ROW_BYTES
    launch = CudaLaunch(
        source="attention_hopper.cu",
        architecture="sm_90a",
        grid=(-(-queries // (64 * groups)), images * heads, 1),
        threads=128 * groups,
        shared=2 * stages * tile + 1024,  # tiles start at a multiple of that
        defines={
            **{name.upper(): int(number) for name, number in config.items()},
            "HEAD": head,
            "BF16": int(query.dtype == torch.bfloat16),
        },
        arguments=(
            _blocks(key, heads, keys),
            _blocks(value, heads, keys),
            query,
            out,
            ctypes.c_int64(images_apart(query)),
            ctypes.c_int64(query.stride(1)),
            *map(ctypes.c_int32, (queries, key.shape[1], heads)),
            ctypes.c_float(scale * math.log2(math.e)),
        ),
    )
    return [launch]


def _blocks(x: torch.Tensor, heads: int, keys: int) -> TileMap:
    """Of the rows of one head of one image, 64 columns at a time; zero beyond the head's own."""
    images, rows, width = x.shape
    head = width // heads
    return TileMap(
        x,
        sizes=(head, heads, rows, images),
        strides=(head, x.stride(1), images_apart(x)),
        box=(64, 1, keys, 1),
    )
