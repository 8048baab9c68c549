"""What a kernel in a configuration does for a call, in microseconds of a chip's own rates.

Each form of kernel is described by a handful of terms, of two kinds: those that add up (a launch,
filling a pipeline, an epilogue) and those that overlap (arithmetic, shared memory, L2, DRAM,
latency), of which the longest decides. All are counted for the multiprocessor that has the most to
do: one tile more than a wave costs a wave. What a term really takes, as a multiple of what is
written here, is fitted (`cost.fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from math import ceil, inf, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.registry import Call, Config, TensorSpec
from .chips import Chip

FILL = 1500
"""Clocks from the start of a block to its first product."""

LATENCY = 800
"""Clocks from asking for operands until they are there."""

L2_BYTES = 44
"""Bytes that the L2 brings one multiprocessor per clock."""

SHARED_BYTES = 128
"""Bytes that shared memory gives or takes per clock."""

STEP = 40
"""Clocks of a step of a loop in which one block alone leaves the tensor cores idle."""

BUSY = 0.1
"""Of the time of its products, what a multiprocessor takes longer when all are at work: power
lowers the clock, and all ask the L2 at once."""

SCALARS = 128
"""Simple operations of a multiprocessor per clock."""

EXPONENTIALS = 16
"""Of a multiprocessor per clock."""

EVEN = 0.5
"""How far a library's choice of a tile at each size, and what it does about the last wave, make up
for that one's emptiness: its times grow with the size more evenly than those of one tile do."""

EXCHANGE = 4
"""Clocks for each warp and channel of a block of whole groups, to merge their statistics."""

OF_SPLITS = ("second", "parts")
"""Terms that only tiles have whose sum is split."""

THREADS, REGISTERS = 2048, 65536
"""Of a multiprocessor."""

PLACES = 24
"""Blocks of a multiprocessor at most."""


@dataclass
class Work:
    """Microseconds by term. fixed: these add up; overlapped: the longest of these decides.

    Where a kernel may have several tiles, and which is not known, a term is an array of a time for
    each, or one number for all. tiles: how many.
    """

    fixed: dict[str, Any] = field(default_factory=dict)
    overlapped: dict[str, Any] = field(default_factory=dict)
    tiles: int = 1

    def nominal(self) -> float:
        """Microseconds by the chip's own rates, nothing fitted. Of one tile."""
        return float(sum(self.fixed.values()) + max(self.overlapped.values()))

    def at(self, tile: int) -> Work:
        """That of one of the tiles, with the terms that it has."""

        def one(terms: dict[str, Any]) -> dict[str, Any]:
            found = {
                name: float(us[tile]) if isinstance(us, np.ndarray) else us
                for name, us in terms.items()
            }
            return {name: us for name, us in found.items() if us or name not in OF_SPLITS}

        return Work(one(self.fixed), one(self.overlapped))

    def possible(self) -> bool:
        """Whether all are times."""
        for us in (*self.fixed.values(), *self.overlapped.values()):
            if isinstance(us, np.ndarray):
                if not (us.min() >= 0 and us.max() < inf):
                    return False
            elif not 0 <= us < inf:
                return False
        return True


@dataclass(frozen=True)
class Tile:
    """One product's share of a block: rows, the columns of each `tl.dot`, and how it loops."""

    rows: int
    columns: tuple[int, ...]
    step: int
    warps: int
    stages: int
    split: int = 1
    programs: int = 0
    wide: bool = True  # operands go from shared memory to the tensor cores directly (wgmma)

    @cached_property
    def width(self) -> int:
        """Columns of all its products."""
        return sum(self.columns)

    @cached_property
    def stage(self) -> int:
        """Bytes of one stage of operands in half precision."""
        return (self.rows + self.width) * self.step * 2


@dataclass(frozen=True)
class Product:
    """A matrix product, or a convolution as one: rows (pixels) x depth (taps x channels) x columns.

    weight, activations: bytes. added: elements that the epilogue reads. gated: whether half of the
    columns are gates (GEGLU).
    """

    rows: int
    columns: int
    depth: int
    weight: int
    activations: int
    added: int
    gated: bool = False


def product(
    chip: Chip,
    problem: Product,
    tile: Tile,
    down: int,
    across: int,
    steps: int,
    early: bool,
    even: float = 0.0,
) -> Work:
    """`down` x `across` tiles of a product, each of `steps` steps (of all its parts together).

    even: the share of the last wave's emptiness that is not waited for.
    """
    cycle = chip.cycle_us
    blocks = down * across * tile.split
    most = _waves(blocks / chip.multiprocessors, even)
    resident = _resident(chip, tile)
    live = min(resident, most)
    each = ceil(steps / tile.split)
    alone = chip.multiprocessors / min(blocks, chip.multiprocessors)
    l2 = L2_BYTES * min(1.5, alone)
    math = tile.rows * tile.width * tile.step / chip.multiply_adds
    shared = (_operands(tile) + tile.stage) / SHARED_BYTES
    rounds = _waves(most / live, even)
    # Blocks side by side hide each other's beginning and end.
    fills = 1 if tile.programs else rounds
    ends = most if tile.programs or live == 1 else rounds
    elements = tile.rows * tile.width
    work = Work(
        {
            "early" if early else "launch": chip.launch_us,
            "fill": (FILL + tile.stage / l2) * fills * cycle,
            "epilogue": elements * ends * 8 / SCALARS * cycle,
            "added": elements * ends * 8 / SCALARS * cycle
            * (problem.added / max(1, problem.rows * problem.columns)),
            "step": each * most * STEP * cycle if live == 1 else 0.0,
        },
        {
            "math": each * most * math * cycle,
            "shared": each * most * shared * cycle,
            "l2": each * most * tile.stage / l2 * cycle,
            "latency": each * rounds * LATENCY / max(1, tile.stages - 1) * cycle,
            "dram": (problem.weight + _spilled(chip, problem.activations)) * chip.dram_us_per_byte,
        },
    )  # fmt: skip
    # Beside what overlaps: while some are idle, all that the others do is quicker.
    share = blocks / (most * chip.multiprocessors)
    work.fixed["busy"] = BUSY * share * each * most * math * cycle
    if problem.gated:
        work.fixed["gate"] = elements / 2 * ends * 24 / SCALARS * cycle
    if tile.split > 1:
        moved = 2 * 4 * problem.rows * problem.columns * tile.split
        work.fixed["second"] = chip.launch_us
        work.fixed["parts"] = moved / (chip.multiprocessors * L2_BYTES) * cycle
    return work


def _waves(count: float, even: float) -> float:
    """Waves that are waited for: whole ones, but for the share that is even."""
    return even * max(1.0, count) + (1 - even) * ceil(count)


def _resident(chip: Chip, tile: Tile) -> int:
    """Blocks of a product that one multiprocessor holds."""
    if tile.programs:
        return max(1, round(tile.programs / chip.multiprocessors))
    shared = max(tile.stages * tile.stage, 2 * tile.rows * tile.width) + 2048
    registers = min(tile.rows * tile.width // (32 * tile.warps) + 70, 255) * 32 * tile.warps
    return max(1, min(REGISTERS // registers, chip.shared_bytes // shared))


def _operands(tile: Tile) -> float:
    """Bytes that the tensor cores read from shared memory in a step."""
    if tile.wide:  # one instruction makes 64 rows of a product, 16 deep
        high = ceil(tile.rows / 64) * tile.step / 16
        return high * (64 * len(tile.columns) + tile.width) * 32
    down, across = 2, max(1, tile.warps // 2)  # warps, each of which reads its own operands
    return tile.step * 2 * (tile.rows * across + tile.width * down)


def _spilled(chip: Chip, size: float) -> float:
    """Of so many bytes of activations, those that the L2 does not hold from launch to launch."""
    return max(0.0, size - 0.5 * chip.l2_bytes)


def _bytes(spec: TensorSpec | None) -> int:
    return 0 if spec is None else prod(spec.shape) * spec.dtype.itemsize


def _power_of_2(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _numbers(config: Config, *names: str) -> list[int]:
    return [int(config[name]) for name in names]


def _linear(call: Call) -> Product:
    x, weight, _, residual = call.tensors
    assert x is not None and weight is not None
    gated = weight.shape[0] != call.out.shape[-1]
    activations = _bytes(x) + _bytes(residual) + _bytes(call.out)
    added = 0 if residual is None else prod(residual.shape)
    return Product(
        *(x.rows, weight.shape[0], x.shape[-1], _bytes(weight), activations, added, gated)
    )


def _matmul(tma: bool) -> Callable[[Chip, Call, Config], Work]:
    def describe(chip: Chip, call: Call, config: Config) -> Work:
        problem = _linear(call)
        rows, columns, tail, step, warps, stages, split, programs = _numbers(
            config,
            *("block_m", "block_n", "tail_n", "block_k"),
            *("warps", "stages", "split", "programs"),
        )
        if problem.gated:
            widths: tuple[int, ...] = (2 * columns,) if tma else (columns, columns)
        else:
            widths = (columns, tail) if tail else (columns,)
        wide = chip.capability[0] in (9, 10)
        tile = Tile(rows, widths, step, warps, stages, split, programs, wide)
        down, across = ceil(problem.rows / rows), ceil(problem.columns / tile.width)
        steps = ceil(problem.depth / step)
        return product(chip, problem, tile, down, across, steps, bool(config["pdl"]))

    return describe


def _matmul_hopper(chip: Chip, call: Call, config: Config) -> Work:
    problem = _linear(call)
    width, cluster, stages, programs = _numbers(config, "width", "cluster", "stages", "programs")
    rows, step = 128, 64
    tile = Tile(rows, (width,), step, 8, stages, programs=programs)
    high, wide = min(cluster, 2), max(1, cluster // 2)  # of a cluster, in blocks
    down = ceil(problem.rows / (rows * high)) * high
    across, steps = ceil(problem.columns / (width * wide)) * wide, ceil(problem.depth / step)
    work = product(chip, problem, tile, down, across, steps, bool(config["pdl"]))
    # One warpgroup multiplies while the other finishes its part, but for the last tile.
    work.fixed["step"] = 0.0
    for term in {"epilogue", "added", "gate"} & work.fixed.keys():
        work.fixed[term] /= ceil(down * across / programs)
    # What blocks share is read once.
    work.overlapped["l2"] *= (rows / wide + width / high) / (rows + width)
    return work


def _conv(call: Call) -> tuple[Product, int, int]:
    """As a product; with its taps and input channels."""
    x, weight, _, _, residual = call.tensors
    assert x is not None and weight is not None
    channels, *kernel, inputs = weight.shape
    taps = prod(kernel)
    activations = _bytes(x) + _bytes(residual) + _bytes(call.out)
    added = 0 if residual is None else prod(residual.shape)
    rows = call.out.rows
    return (
        Product(rows, channels, taps * inputs, _bytes(weight), activations, added),
        taps,
        inputs,
    )


def _conv_tile(call: Call, config: Config) -> tuple[int, int]:
    """Pixels of a tile, and how many tiles cover the images."""
    if "block_m" in config:
        pixels = int(config["block_m"])
        return pixels, ceil(call.out.rows / pixels)
    box = [int(side) for side in str(config["box"]).split("x")]
    x = call.tensors[0]
    assert x is not None
    double = call.attrs.get("upsample") is not None
    grid = x.shape[:3] if double else call.out.shape[:3]
    count = prod(ceil(size / side) for size, side in zip(grid, box, strict=True))
    return prod(box), count * (4 if double else 1)


def _conv2d(chip: Chip, call: Call, config: Config) -> Work:
    problem, taps, inputs = _conv(call)
    pixels, down = _conv_tile(call, config)
    columns, step, warps, stages, parts = _numbers(
        config, "block_n", "block_k", "warps", "stages", "parts"
    )
    tail = int(config.get("tail_n", 0))
    wide = chip.capability[0] in (9, 10)
    tile = Tile(
        *(pixels, (columns, tail) if tail else (columns,), step, warps, stages, parts),
        wide=wide,
    )
    steps = taps * ceil(inputs / step)
    across = ceil(problem.columns / tile.width)
    early = bool(config.get("early"))
    return product(chip, problem, tile, down, across, steps, early)


# Libraries do not say which tile they take. These are the rows and columns of those that NVIDIA's
# have; which one it was is inferred from times (`cost`).
LIBRARY_TILES = tuple(
    (rows, columns)
    for rows, widths in (
        (64, (64, 96, 128, 160, 192, 256)),
        (128, (64, 96, 128, 160, 192, 256)),
        (192, (128, 160, 192)),
        (256, (64, 96, 128, 160, 192)),
    )
    for columns in widths
)


def _hidden(chip: Chip, problem: Product) -> Work:
    """Of all tiles, for the caller to add to."""
    found = _of_tiles(chip, problem)
    return Work(dict(found.fixed), dict(found.overlapped), found.tiles)


@lru_cache(maxsize=4096)
def _of_tiles(chip: Chip, problem: Product) -> Work:
    """Of each tile, with the split of K that suits it best."""
    wide = chip.capability[0] in (9, 10)
    found = []
    for rows, columns in LIBRARY_TILES:
        down, across = ceil(problem.rows / rows), ceil(problem.columns / columns)
        steps, warps = ceil(problem.depth / 64), 8 if rows * columns >= 128 * 128 else 4
        ways = []
        for split in (1, 2, 4, 8):
            many = down * across * split > 2 * chip.multiprocessors
            if split > 1 and (steps < 8 * split or many):
                break
            tile = _library_tile(rows, columns, warps, split, wide)
            ways.append(product(chip, problem, tile, down, across, steps, False, EVEN))
        found.append(ways[0] if len(ways) == 1 else min(ways, key=Work.nominal))
    return Work(
        _together([work.fixed for work in found]),
        _together([work.overlapped for work in found]),
        len(found),
    )


@cache
def _library_tile(rows: int, columns: int, warps: int, split: int, wide: bool) -> Tile:
    return Tile(rows, (columns,), 64, warps, 4, split, wide=wide)


def _together(found: Sequence[Mapping[str, float]]) -> dict[str, NDArray[np.float64]]:
    """The terms of several tiles as arrays; what one does not have takes it no time."""
    names = dict.fromkeys(name for terms in found for name in terms)
    return {name: np.array([terms.get(name, 0.0) for terms in found]) for name in names}


def _passes(chip: Chip, work: Work, launches: int, size: float) -> None:
    """Add further launches, which move so many bytes in all."""
    moved = size / (chip.multiprocessors * L2_BYTES) * chip.cycle_us
    moved += _spilled(chip, size) * chip.dram_us_per_byte
    work.fixed |= {"passes": launches * chip.launch_us, "passed": moved}


def _library_linear(name: str) -> Callable[[Chip, Call, Config], Work]:
    def describe(chip: Chip, call: Call, config: Config) -> Work:
        problem = _linear(call)
        out, residual = _bytes(call.out), _bytes(call.tensors[3])
        work = _hidden(chip, problem)
        if problem.gated and name.endswith("geglu"):  # reads both halves, writes one
            _passes(chip, work, 1, 3 * out + residual)
        elif problem.gated:  # PyTorch's GELU, product and sum
            _passes(chip, work, 3, 8 * out + 2 * residual)
        elif residual and name != "cublaslt.linear":
            _passes(chip, work, 1, out + 2 * residual)
        return work

    return describe


def _library_conv(chip: Chip, call: Call, config: Config) -> Work:
    x, _, bias, embedding, residual = call.tensors
    work = _hidden(chip, _conv(call)[0])
    apart = embedding is not None or residual is not None
    if apart or (bias is not None and not config.get("fused")):
        _passes(chip, work, 1, 2 * _bytes(call.out) + _bytes(residual))
    if call.attrs.get("upsample") is not None:
        written = 5 * _bytes(x) / (chip.multiprocessors * L2_BYTES) * chip.cycle_us
        work.fixed["upsampled"] = chip.launch_us + written
    return work


def _attention(chip: Chip, call: Call, config: Config) -> Work:
    query, key, _ = call.tensors
    assert query is not None and key is not None
    heads = int(call.attrs["heads"])
    head = query.shape[2] // heads
    padded = ceil(head / 16) * 16
    rows = int(config.get("rows", 128))
    repeat = int(config.get("repeat", 1))
    warps = int(config.get("warps", 8))
    keys = key.shape[1]
    blocks = ceil(query.shape[1] / (rows * repeat)) * query.shape[0] * heads
    short = config.get("kind") == "short"
    held = ceil(keys / 16) * 16
    column = held if short else int(config.get("keys", 128))
    stages = int(config.get("stages", 2))
    cut = bool(config.get("cut", True))
    wide = padded if cut else 1 << (padded - 1).bit_length()
    shared = 4 * column * wide * (1 if short else stages) + 2 * rows * wide + 2048
    registers = (rows * (column + wide + (wide if short else 0))) // (32 * warps) + 50
    if config.get("registers"):
        registers = int(config["registers"])
    registers = min(registers, 255) * 32 * warps
    resident = max(1, min(chip.shared_bytes // shared, REGISTERS // registers))
    most = ceil(blocks / chip.multiprocessors)
    live = min(resident, most)
    rounds = most if live == 1 else ceil(most / live)
    loops = 1 if short else ceil(keys / column)
    cycle = chip.cycle_us
    amount = most * repeat * rows * loops * column
    moved = most * (loops * column * 4 + repeat * rows * 4) * wide
    activations = sum(map(_bytes, (*call.tensors, call.out)))
    return Work(
        {
            "launch": chip.launch_us,
            "fill": FILL * rounds * cycle,
            "repeat": LATENCY * rounds * repeat * cycle if short else 0.0,
            "epilogue": rows * repeat * wide * (rounds if live > 1 else most) * 8 / SCALARS * cycle,
        },
        {
            "math": amount * wide * 2 / chip.multiply_adds * cycle,
            "exponentials": amount / EXPONENTIALS * cycle,
            "scalars": amount * 6 / SCALARS * cycle,
            "l2": moved / L2_BYTES * cycle,
            "latency": rounds * loops * repeat * LATENCY * cycle,
            "dram": _spilled(chip, activations) * chip.dram_us_per_byte,
        },
    )


def _attention_hopper(chip: Chip, call: Call, config: Config) -> Work:
    groups, keys, stages, blocks = _numbers(config, "groups", "keys", "stages", "blocks")
    registers = REGISTERS // (128 * groups * blocks)
    same = {"rows": 64 * groups, "keys": keys, "warps": 4 * groups, "stages": stages}
    return _attention(chip, call, {**same, "registers": min(255, registers)})


def _moves(
    chip: Chip,
    launches: float,
    early: bool,
    size: float,
    blocks: int,
    threads: int,
    held: int,
    loops: float = 1,
) -> Work:
    """Blocks that move `size` bytes in all. held: bytes that one block has under way."""
    at_once = max(1, min(PLACES, THREADS // threads, (REGISTERS * 4) // max(1, 2 * held)))
    places = chip.multiprocessors * at_once
    waves = ceil(blocks / places)
    cycle = chip.cycle_us
    # An SM with few bytes under way waits for each of them.
    return Work(
        {
            "early" if early else "launch": launches * chip.launch_us,
            "wave": waves * loops * LATENCY * cycle,
            "blocks": blocks / chip.multiprocessors * 100 * cycle,
        },
        {
            "l2": size / (chip.multiprocessors * L2_BYTES) * cycle,
            "busiest": ceil(blocks / chip.multiprocessors) * (size / blocks) / L2_BYTES * cycle,
            "dram": _spilled(chip, size) * chip.dram_us_per_byte,
        },
    )


def _group_norm(chip: Chip, call: Call, config: Config) -> Work:
    *parts, _, _ = (
        call.tensors if call.op == "concat_group_norm" else (*call.tensors[:1], None, None)
    )
    read = sum(map(_bytes, parts))
    image = parts[0]
    assert image is not None
    width = image.shape[-1] + (parts[2].shape[-1] if len(parts) > 2 and parts[2] is not None else 0)
    batch, pixels = image.shape[0], prod(image.shape[1:-1])
    out = batch * pixels * width * image.dtype.itemsize
    made = call.op == "concat_group_norm"
    early = bool(config.get("pdl"))
    if config.get("scheme") == "whole":
        groups, warps = _numbers(config, "groups", "warps")
        part = groups * (width // int(call.attrs["groups"]))
        blocks = batch * ceil(width / part)
        lanes = _power_of_2(part)
        held = max(16, _power_of_2(pixels)) * lanes
        size = read + out * (2 if made else 1)
        work = _moves(chip, 1, early, size, blocks, 32 * warps, 2 * held)
        each = ceil(blocks / chip.multiprocessors) * chip.cycle_us
        work.fixed["thread"] = held / (32 * warps) * 30 * each
        # What channels come to is exchanged by all warps, and each counts all groups anew.
        work.fixed["exchange"] = warps * lanes * EXCHANGE * each
        return work
    channels, rows, warps, grid = _numbers(config, "channels", "rows", "warps", "grid")
    columns = batch * ceil(width / channels)
    tiles = ceil(pixels / rows)
    strips = max(1, min(grid // columns, tiles))
    each = min(ceil(tiles / strips), 8)
    first = columns * ceil(tiles / ceil(tiles / min(strips, 64)))
    second = columns * ceil(tiles / each)
    tile = rows * channels * 2
    one = _moves(chip, 1, early, read + (out if made else 0), first, 32 * warps, tile,
                 ceil(tiles / min(strips, 64)))  # fmt: skip
    two = _moves(chip, 1, early, 2 * out, second, 32 * warps, tile, each)
    merged = ceil(tiles / ceil(tiles / min(strips, 64)))
    return Work(
        {
            **{name: one.fixed[name] + two.fixed[name] for name in one.fixed},
            "merge": merged * ceil(second / chip.multiprocessors / 4) * 10 * chip.cycle_us,
        },
        {name: one.overlapped[name] + two.overlapped[name] for name in one.overlapped},
    )


def _layer_norm(chip: Chip, call: Call, config: Config) -> Work:
    x = call.tensors[0]
    assert x is not None
    rows, warps = _numbers(config, "rows", "warps")
    size = sum(map(_bytes, (*call.tensors, call.out)))
    blocks = ceil(x.rows / rows)
    work = _moves(
        *(chip, 1, bool(config.get("pdl")), size, blocks, 32 * warps, rows * x.shape[-1] * 2)
    )
    work.fixed["thread"] = rows * x.shape[-1] / (32 * warps) * 20 * chip.cycle_us
    return work


def _flat(chip: Chip, call: Call, config: Config) -> Work:
    block, warps = _numbers(config, "block", "warps")
    size = sum(map(_bytes, (*call.tensors, call.out)))
    blocks = ceil(prod(call.out.shape) / block)
    return _moves(chip, 1, False, size, blocks, 32 * warps, block * 2)


def _library_moves(passes: float) -> Callable[[Chip, Call, Config], Work]:
    def describe(chip: Chip, call: Call, config: Config) -> Work:
        size = sum(map(_bytes, (*call.tensors, call.out)))
        blocks = ceil(prod(call.out.shape) / 1024)
        return _moves(chip, passes, False, passes * size, blocks, 256, 2048)

    return describe


def _gemv(chip: Chip, call: Call, config: Config) -> Work:
    size = sum(map(_bytes, (*call.tensors, call.out)))
    weight = call.tensors[1]
    assert weight is not None
    block = int(config["block_n"])
    blocks = ceil(call.out.shape[-1] / block)
    work = _moves(chip, 1, bool(config["pdl"]), size, blocks, 32, 2 * block * weight.shape[1])
    work.overlapped["dram"] = _bytes(weight) * chip.dram_us_per_byte
    return work


def _few_in(chip: Chip, call: Call, config: Config) -> Work:
    rows, columns, tiles, warps = _numbers(config, "block_m", "block_n", "tiles", "warps")
    size = sum(map(_bytes, (*call.tensors, call.out)))
    blocks = ceil(call.out.rows / rows) * ceil(call.out.shape[-1] / (columns * tiles))
    return _moves(chip, 1, False, size, blocks, 32 * warps, rows * columns * 4, tiles)


def _few_out(chip: Chip, call: Call, config: Config) -> Work:
    rows = int(config["block_m"])
    x = call.tensors[0]
    assert x is not None
    size = sum(map(_bytes, (*call.tensors, call.out)))
    blocks = ceil(x.rows / rows)
    steps = ceil(x.shape[-1] / int(config["block_k"]))
    return _moves(chip, 2, bool(config["early"]), size, blocks, 128, rows * 256, steps / 2)


Describe = Callable[[Chip, Call, Config], Work]

FORMS: Mapping[str, Describe] = {
    "triton.matmul_tma": _matmul(True),
    "triton.matmul": _matmul(False),
    "cuda.matmul": _matmul_hopper,
    "triton.conv2d_tma": _conv2d,
    "triton.conv2d": _conv2d,
    "triton.conv2d_few_in": _few_in,
    "triton.conv2d_few_out": _few_out,
    "triton.gemv": _gemv,
    "triton.attention": _attention,
    "cuda.attention": _attention_hopper,
    "cudnn.attention": _attention,
    "flash.attention": _attention,
    "torch.sdpa": _attention,
    "triton.group_norm": _group_norm,
    "triton.concat_group_norm": _group_norm,
    "triton.layer_norm": _layer_norm,
    "triton.add_layer_norm": _layer_norm,
    "triton.concat": _flat,
    "triton.residual_add": _flat,
    "triton.silu": _flat,
    "triton.pointwise": _flat,
    "triton.upsample_nearest": _flat,
    "torch.group_norm": _library_moves(3),
    "torch.concat_group_norm": _library_moves(3),
    "torch.layer_norm": _library_moves(1),
    "torch.add_layer_norm": _library_moves(2),
    "torch.cat": _library_moves(1),
    "torch.residual_add": _library_moves(1),
    "torch.silu": _library_moves(1),
    "torch.upsample_nearest2d": _library_moves(1),
    "cublas.linear": _library_linear("cublas.linear"),
    "cublas.linear_onto": _library_linear("cublas.linear_onto"),
    "cublas.geglu": _library_linear("cublas.geglu"),
    "cublaslt.linear": _library_linear("cublaslt.linear"),
    "cublaslt.geglu": _library_linear("cublaslt.geglu"),
    "cudnn.conv2d": _library_conv,
    "cudnn_frontend.conv2d": _library_conv,
}

HIDDEN = frozenset(
    name
    for name in FORMS
    if name.startswith(("cublas", "cudnn")) and not name.endswith("attention")
)
"""Forms whose tile is not known."""


def work_of(chip: Chip, call: Call, name: str, config: Config) -> Work | None:
    """What a kernel does for a call, for each tile that it may have; None: it is not described.

    A configuration of another version of the kernel, or a damaged one, is not described either.
    """
    describe = FORMS.get(name)
    if describe is None:
        return None
    try:
        found = describe(chip, call, config)
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        return None
    return found if found.possible() else None
