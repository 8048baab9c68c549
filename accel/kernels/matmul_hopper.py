"""Linear layers on Hopper in CUDA C++ (matmul_hopper.cu): the product with its whole epilogue.

Triton's kernel for the same (matmul.py) leaves the tensor cores idle while a tile is finished,
which is a third of the time of GEGLU where the depth is small; the source says what is done
instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch

from ..hardware import Hardware
from . import nvrtc
from .matmul import row_stride, supports
from .nvrtc import CudaLaunch, TileMap
from .registry import Call, Config, compiled_kernel

ROWS, STEP = 128, 64
"""Of a tile; of the depth, what is one stage."""

GROUP = 16
"""Tiles in a column of a group: with the eight or so beside each, all that are made at one time."""

VARIANTS = {"none": ((160, 1), (192, 1)), "geglu": ((256, 2), (256, 1), (160, 1))}
"""Columns of a tile, of values and gates together, and blocks that share what they read of the
weight. On an H200, under power draw, others were never within 3 % of the best of all kernels but
where one of these was quicker."""

_WARPS = 8
"""That multiply."""

_THREADS = 32 * (_WARPS + 4)

_MOST_STAGES = 8

_SHARED_BYTES = (227 << 10) - 1024
"""Of a block, but for where it starts: at a multiple of 1024."""


@dataclass(frozen=True)
class Tile:
    """A tile's columns, and what of it finds place in shared memory."""

    width: int
    activation: str

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.width // 2 if self.activation == "geglu" else self.width

    @property
    def box(self) -> int:
        """Columns of a box of results, as the source has it."""
        return next(box for box in (64, 32, 16) if self.columns % box == 0)

    def shared(self, stages: int) -> int:
        """Bytes for so many stages of operands, and each warp's boxes of results."""
        operands = stages * (ROWS + self.width) * STEP * 2
        boxes = _WARPS * (self.columns // self.box)
        return operands + boxes * 16 * self.box * 2 + 8 * (2 * stages + boxes + 1)

    @property
    def stages(self) -> int:
        """As many as there can be."""
        return max(n for n in range(2, _MOST_STAGES + 1) if self.shared(n) <= _SHARED_BYTES)


def variant(width: int, cluster: int, stages: int, programs: int, pdl: bool = True) -> Config:
    """Tiles of `width` columns of the weight.

    cluster: blocks that share what they read of the weight. stages: of operands that are there or
    on their way. programs: blocks at most, each of which makes one tile after another. pdl: whether
    the launch may begin while the one before still runs.
    """
    return {
        "width": width,
        "cluster": cluster,
        "stages": stages,
        "programs": programs,
        "pdl": pdl,
    }


def _configs(call: Call, hardware: Hardware) -> Sequence[Config]:
    activation, weight = call.attrs["activation"], call.tensors[1]
    # A launch may read what no launch writes before the one ahead of it has ended.
    pdl = weight is not None and weight.constant
    return [
        variant(
            *(width, cluster, Tile(width, activation).stages),
            *(hardware.multiprocessors // cluster * cluster, pdl),
        )
        for width, cluster in VARIANTS[activation]
    ]


def _fits(call: Call, config: Config, hardware: Hardware) -> bool:
    return dict(config) in _configs(call, hardware)


def _supports(call: Call, hardware: Hardware) -> bool:
    return hardware.capability == (9, 0) and supports(call, hardware) and nvrtc.available()


@compiled_kernel(
    "linear",
    name="cuda.matmul",
    supports=_supports,
    configs=_configs,
    fits=_fits,
    priority=2,
)
def matmul(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
    config: Config,
    workspace: torch.Tensor | None,
) -> list[CudaLaunch]:
    """One launch. Tensors as the operator's."""
    rows, depth, columns = prod(x.shape[:-1]), x.shape[-1], out.shape[-1]
    tile, geglu = Tile(int(config["width"]), activation), activation == "geglu"
    cluster, stages, pdl = int(config["cluster"]), int(config["stages"]), bool(config["pdl"])
    tiles = ceil(rows / (ROWS * cluster)) * cluster * ceil(columns / tile.columns)
    halves = 2 if geglu else 1
    weights = TileMap(
        weight,
        sizes=(depth, columns, halves, 1),
        strides=(depth, columns * depth, halves * columns * depth),
        box=(STEP, tile.width // 2, 1, 1),
    )
    launch = CudaLaunch(
        source="matmul_hopper.cu",
        architecture="sm_90a",
        grid=(min(int(config["programs"]), tiles), 1, 1),
        threads=_THREADS,
        shared=tile.shared(stages) + 1024,
        defines={
            **{"WIDTH": tile.width, "STAGES": stages, "CLUSTER": cluster},
            **{"GROUP": GROUP // cluster, "GEGLU": int(geglu), "BIAS": int(bias is not None)},
            **{"RESIDUAL": int(residual is not None), "OVERLAP": int(pdl)},
            **{"BF16": int(x.dtype == torch.bfloat16)},
        },
        arguments=(
            _rows_of(x, rows, (STEP, ROWS)),
            weights,
            _rows_of(out if residual is None else residual, rows, (tile.box, 16)),
            _rows_of(out, rows, (tile.box, 16)),
            weight if bias is None else bias,
            *map(ctypes.c_int32, (rows, columns, depth)),
        ),
        cluster=cluster,
        overlaps=pdl,
        takes_turns=True,
    )
    return [launch]


def _rows_of(x: torch.Tensor, rows: int, box: tuple[int, int]) -> TileMap:
    """A tensor as one matrix. box: columns and rows."""
    columns, stride = x.shape[-1], row_stride(x)
    assert stride is not None
    return TileMap(
        x,
        sizes=(columns, rows, 1, 1),
        strides=(stride, rows * stride, rows * stride),
        box=(*box, 1, 1),
    )
