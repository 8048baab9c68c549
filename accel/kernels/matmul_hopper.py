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

LAG = 2
"""Steps that the second warpgroup keeps behind the first."""

WIDTHS = {"none": (256, 192, 160, 128, 240), "geglu": (256, 160, 192, 128)}
"""Columns of a tile, of values and gates together; of equals the one to prefer comes first."""

CLUSTERS = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
"""Tiles down and across that the blocks of a cluster make at one time."""

CONFIGS = 6

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

    def shared(self, stages: int, slots: int) -> int:
        """Bytes for so many stages of operands, and slots of each warp for boxes of results."""
        operands = stages * (ROWS + self.width) * STEP * 2
        barriers = 8 * (2 * stages + _WARPS * slots + 1)
        return operands + _WARPS * slots * 16 * self.box * 2 + barriers

    def slots(self, stages: int) -> int:
        """As many as there can be beside the stages: all boxes', or a share of them; or 0."""
        boxes = self.columns // self.box
        fitting = [n for n in range(1, boxes + 1) if boxes % n == 0]
        return max((n for n in fitting if self.shared(stages, n) <= _SHARED_BYTES), default=0)

    @property
    def stages(self) -> int:
        """As many as there can be beside two slots of each warp."""
        least = min(2, self.columns // self.box)
        return max(n for n in range(2, _MOST_STAGES + 1) if self.slots(n) >= least)


def variant(
    width: int, cluster: int, stages: int, programs: int, lag: int = LAG, pdl: bool = True
) -> Config:
    """Tiles of `width` columns of the weight.

    cluster: blocks that share what they read, two of the weight, four of x as well. stages: of
    operands that are there or on their way. programs: blocks at most, each of which makes one tile
    after another. lag: steps that the second warpgroup keeps behind the first. pdl: whether the
    launch may begin while the one before still runs.
    """
    return {
        "width": width,
        "cluster": cluster,
        "stages": stages,
        "programs": programs,
        "lag": lag,
        "pdl": pdl,
    }


def _configs(call: Call, hardware: Hardware) -> Sequence[Config]:
    activation, pdl = call.attrs["activation"], _reads_ahead(call)
    found = [
        variant(
            width, cluster, Tile(width, activation).stages, programs_of(cluster, hardware), pdl=pdl
        )
        for width in WIDTHS[activation]
        for cluster in (2, 4, 1)
    ]
    return sorted(found, key=lambda config: _columns_of_busiest(call, config))[:CONFIGS]


def _reads_ahead(call: Call) -> bool:
    """Whether the weight is one, which a launch may read before the one ahead has ended."""
    weight = call.tensors[1]
    return weight is not None and weight.constant


def programs_of(cluster: int, hardware: Hardware) -> int:
    """Blocks that run at one time. Clusters of four leave a few multiprocessors out."""
    alike = {1: 1, 2: 2, 4: 32}[cluster]
    return hardware.multiprocessors // alike * alike


def _columns_of_busiest(call: Call, config: Config) -> int:
    """Columns of products that some block has to make, one tile after another."""
    width, cluster, programs = (int(config[name]) for name in ("width", "cluster", "programs"))
    tile = Tile(width, call.attrs["activation"])
    count = _rectangles(call.out.rows, call.out.shape[-1], tile, cluster)
    # A narrow product reads more of shared memory for what it computes.
    return ceil(count / (programs // cluster)) * (width + 16)


def _rectangles(rows: int, columns: int, tile: Tile, cluster: int) -> int:
    """Of as many tiles as the blocks of a cluster make at one time."""
    down, across = CLUSTERS[cluster]
    return ceil(rows / (ROWS * down)) * ceil(columns / (tile.columns * across))


def _fits(call: Call, config: Config, hardware: Hardware) -> bool:
    activation = call.attrs["activation"]
    try:
        tile = Tile(int(config["width"]), activation)
        stages, lag = int(config["stages"]), int(config["lag"])
        cluster, programs = int(config["cluster"]), int(config["programs"])
        pdl = bool(config["pdl"])
    except KeyError:  # of another version
        return False
    return (
        tile.width in WIDTHS[activation]
        and lag < stages <= _MOST_STAGES
        and tile.slots(stages) > 0
        and cluster in CLUSTERS
        and programs == programs_of(cluster, hardware)
        and (_reads_ahead(call) or not pdl)
    )


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
    cluster, stages, lag = (int(config[name]) for name in ("cluster", "stages", "lag"))
    pdl, slots = bool(config["pdl"]), tile.slots(stages)
    blocks = min(int(config["programs"]), cluster * _rectangles(rows, columns, tile, cluster))
    down, across = CLUSTERS[cluster]
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
        grid=(blocks, 1, 1),
        threads=_THREADS,
        shared=tile.shared(stages, slots) + 1024,
        defines={
            **{"WIDTH": tile.width, "STAGES": stages, "SLOTS": slots, "CLUSTER": cluster},
            **{"LAG": lag, "GROUP": GROUP // down, "GEGLU": int(geglu)},
            **{"BIAS": int(bias is not None), "RESIDUAL": int(residual is not None)},
            **{"OVERLAP": int(pdl), "BF16": int(x.dtype == torch.bfloat16)},
        },
        arguments=(
            _rows_of(x, rows, (STEP, ROWS // across)),
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
