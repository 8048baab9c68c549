"""Linear layers on Hopper in CUDA C++ (matmul_hopper.cu): the product with its whole epilogue.

Triton's kernel for the same (matmul.py) leaves the tensor cores idle while a tile is finished,
which takes a third of the time of GEGLU's where the depth is small; the source says what is done
instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import ceil, prod

import torch

from ..hardware import Hardware
from . import nvrtc
from .matmul import row_stride, supports
from .nvrtc import CudaLaunch, TileMap
from .registry import Call, Config, compiled_kernel

ROWS, STEP = 128, 64
"""Of a tile; what of the depth is one stage."""

_WARPS = 8
"""That multiply."""

_THREADS = 32 * (_WARPS + 4)

_GROUP = 8
"""Tiles in a column of a group: see matmul.py."""

_LAG = 2
"""Steps that the second warpgroup keeps behind the first."""

_SHARED_BYTES = 227 << 10

CONFIGS = 6

_WIDTHS = {"none": (256, 192, 160, 128, 240), "geglu": (256, 160, 192, 128)}
"""Columns of a tile, GEGLU: of values and gates. In the order of preference."""


def variant(width: int, cluster: int, stages: int, programs: int, pdl: bool = True) -> Config:
    """Tiles of `width` columns of the weight.

    cluster: blocks that share what they read of the weight. stages: of operands that are there or
    on their way. programs: blocks, each of which makes one tile after another. pdl: whether the
    launch may begin while the one before still runs.
    """
    return {
        "width": width,
        "cluster": cluster,
        "stages": stages,
        "programs": programs,
        "pdl": pdl,
    }


def _box(width: int) -> int:
    """Columns of a box of results, as the source has it."""
    return next(box for box in (64, 32, 16) if width % box == 0)


def _slots(width: int, columns: int, stages: int) -> int:
    """Boxes of results that each warp has room for; 0: too many stages. columns: of results."""
    stage = (ROWS + width) * STEP * 2
    box = _box(columns)
    boxes = columns // box
    for slots in range(boxes, 0, -1):
        barriers = 8 * (2 * stages + _WARPS * slots + 1)
        size = stages * stage + _WARPS * slots * 16 * box * 2 + barriers
        if boxes % slots == 0 and size + 1024 <= _SHARED_BYTES:
            return slots
    return 0


def _stages(width: int, columns: int) -> int:
    """As many as there can be beside two boxes of each warp's results, or one that is all."""
    least = min(2, columns // _box(columns))
    return next(s for s in range(8, 1, -1) if _slots(width, columns, s) >= least)


def _columns(width: int, activation: str) -> int:
    return width // 2 if activation == "geglu" else width


def _cost(call: Call, width: int, cluster: int, programs: int) -> float:
    """How long all tiles take, in columns of products one after another."""
    columns = _columns(width, call.attrs["activation"])
    down = ceil(call.out.rows / (ROWS * cluster))
    tiles = down * ceil(call.out.shape[-1] / columns)
    return ceil(tiles / (programs // cluster)) * (width + 16)


def _configs(call: Call, hardware: Hardware) -> Sequence[Config]:
    activation = call.attrs["activation"]
    ranked = sorted(
        ((width, cluster) for width in _WIDTHS[activation] for cluster in (2, 1)),
        key=lambda pair: _cost(call, *pair, _programs(pair[1], hardware)),
    )
    return [
        variant(
            width,
            cluster,
            _stages(width, _columns(width, activation)),
            _programs(cluster, hardware),
        )
        for width, cluster in ranked[:CONFIGS]
    ]


def _programs(cluster: int, hardware: Hardware) -> int:
    return hardware.multiprocessors // cluster * cluster


def _fits(call: Call, config: Config, hardware: Hardware) -> bool:
    activation = call.attrs["activation"]
    try:
        width, cluster, stages = (int(config[name]) for name in ("width", "cluster", "stages"))
    except KeyError:
        return False
    known = width in _WIDTHS[activation] and cluster in (1, 2)
    return known and 2 < stages <= 8 and _slots(width, _columns(width, activation), stages) > 0


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
    names = ("width", "cluster", "stages", "programs")
    width, cluster, stages, programs = (int(config[name]) for name in names)
    geglu = activation == "geglu"
    tile = _columns(width, activation)
    box, slots = _box(tile), _slots(width, tile, stages)
    tiles = ceil(rows / (ROWS * cluster)) * cluster * ceil(columns / tile)
    halves = 2 if geglu else 1
    results = [
        _matrix(t, rows, columns, (box, 16)) for t in (out if residual is None else residual, out)
    ]
    stage = (ROWS + width) * STEP * 2
    launch = CudaLaunch(
        source="matmul_hopper.cu",
        architecture="sm_90a",
        grid=(min(programs, tiles), 1, 1),
        threads=_THREADS,
        shared=1024  # what lies there starts at a multiple of that
        + stages * stage
        + _WARPS * slots * 16 * box * 2
        + 8 * (2 * stages + _WARPS * slots + 1),
        defines={
            **{"WIDTH": width, "STAGES": stages, "SLOTS": slots, "CLUSTER": cluster},
            **{"LAG": _LAG, "GROUP": _GROUP, "GEGLU": int(geglu)},
            **{"BIAS": int(bias is not None), "RESIDUAL": int(residual is not None)},
            **{"OVERLAP": int(bool(config["pdl"])), "BF16": int(x.dtype == torch.bfloat16)},
        },
        arguments=(
            _matrix(x, rows, depth, (STEP, ROWS)),
            TileMap(
                weight,
                sizes=(depth, columns, halves, 1),
                strides=(depth, columns * depth, halves * columns * depth),
                box=(STEP, width // 2, 1, 1),
            ),
            *results,
            weight if bias is None else bias,
            *map(ctypes.c_int32, (rows, columns, depth)),
        ),
        cluster=cluster,
        overlaps=bool(config["pdl"]),
    )
    return [launch]


def _matrix(x: torch.Tensor, rows: int, columns: int, box: tuple[int, int]) -> TileMap:
    """Of the rows of x. box: columns and rows."""
    stride = row_stride(x) or columns
    return TileMap(
        x,
        sizes=(columns, rows, 1, 1),
        strides=(stride, rows * stride, rows * stride),
        box=(*box, 1, 1),
    )
