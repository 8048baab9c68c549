"""Attention without a mask, on the layout in which the projections leave their results.

Two kernels in Triton. `_stream` walks over the keys in blocks with a running softmax, for
self-attention. `_short` has all keys of a prompt at once and walks over the queries, for
cross-attention. On Hopper attention_hopper.py is there for the first as well.

What makes them fast where libraries are not:

- A head is as wide as it is. Tiles are powers of two, so a head of 40 columns is held in two parts
  of 32 and 16 instead of one of 64, and 77 tokens in 64 and 16 instead of 128. What a part is
  wider than the head costs no masked load, which would rule out asynchronous copies: the query is
  zero there, so it does not matter what the keys hold, and such columns of the result are not
  stored. Through a descriptor these columns are the next head's, else the part's own ones again.
- At these widths a softmax costs as much as the products, and what a multiprocessor issues counts
  as much as its 16 exponentials a clock. So the sum of each row may come from the tensor cores (a
  product with ones). Other exponentials are no way out: of a pair of half-precision ones Hopper
  computes one after the other, and rounding their arguments triples the error of the weights; one
  in eight by a polynomial on the FMA units was slower on an H100 at every head size.
- A block's second product runs beside the next block's first. Leaving it in flight through the next
  softmax, too, would need its operand's registers kept, which Triton does not do: wrong results.
- The loop has no mask: keys that do not fill a block are a block of their own after it.

Softmax and sums are fp32; the weights are rounded to the operands' type for the second product, as
everywhere, and the result once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..hardware import Hardware
from .launch import Launch, interpreted
from .registry import Call, Config, TensorSpec, compiled_kernel

WIDEST = 160
"""Columns of a head; wider ones leave no registers for anything else."""

SHORT = 192
"""Keys that `_short` can hold at once."""

MOST_CONFIGS = 8
"""Variants that a call is tried with."""

_LOG2_E = 1.4426950408889634
_OFFSETS = 1 << 31
"""Offsets within one image of the batch have 32 bits."""

_headroom = tl.constexpr(8.0)
"""Weights are at most 2**8 instead of 1, in which fp16 has eight more bits before it underflows."""


@triton.jit
def _rows(
    source,
    first,
    count,
    stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LIVE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """A [ROWS, WIDTH] tile of which only `LIVE` columns and the rows below `count` matter.

    The others repeat ones that do, so that every address is valid and no load needs a mask.
    """
    rows = first + tl.arange(0, ROWS)
    if RAGGED:
        rows = tl.minimum(rows, count - 1)
    columns = tl.arange(0, WIDTH)
    if LIVE < WIDTH:
        columns = columns % LIVE
    return tl.load(source + rows[:, None] * stride + columns[None, :])


@triton.jit
def _query(
    source,
    first,
    count,
    stride,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Columns `START` to `START + WIDTH` of a tile of queries, zero beyond the head's."""
    rows = tl.minimum(first + tl.arange(0, ROWS), count - 1)
    columns = START + tl.arange(0, WIDTH)
    at = source + rows[:, None] * stride + columns[None, :]
    if START + WIDTH > HEAD:
        return tl.load(at, mask=(columns < HEAD)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store(
    out,
    result,
    first,
    count,
    stride,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Columns `START` to `START + WIDTH` of a tile of the result, as far as the head has them."""
    rows = first + tl.arange(0, ROWS)
    columns = START + tl.arange(0, WIDTH)
    mask = (rows < count)[:, None]
    if START + WIDTH > HEAD:
        mask = mask & (columns < HEAD)[None, :]
    at = out + rows[:, None] * stride + columns[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, total, PORTABLE: tl.constexpr):
    """`total + a @ b`, or `a @ b`. Triton's interpreter has no product of bf16."""
    if PORTABLE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _scores(query0, query1, key0, key1, PARTS: tl.constexpr, PORTABLE: tl.constexpr):
    """`q k^T`, its columns being in one or two parts."""
    scores = _dot(query0, tl.trans(key0), None, PORTABLE)
    if PARTS == 2:
        scores = _dot(query1, tl.trans(key1), scores, PORTABLE)
    return scores


@triton.jit
def _softmax(peak, scores, scale):
    """The largest logit with a block's `scores`, their weights, and what earlier weights become.

    peak: the largest logit so far, in powers of two.
    """
    highest = tl.maximum(peak, tl.max(scores, 1) * scale - _headroom)
    weights = tl.exp2(scores * scale - highest[:, None])
    return highest, weights, tl.exp2(peak - highest)


@triton.jit
def _gather(
    result0,
    result1,
    total,
    rounded,
    value0,
    value1,
    fading,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    SUM: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """A block's values by their weights into the result, which fades first.

    total: where `SUM` is "mma", the sum of weights as each of 16 columns; else it is left alone.
    """
    if SUM == "mma":
        ones = tl.full([KEYS, 16], 1.0, value0.dtype)
        total = _dot(rounded, ones, total * fading[:, None], PORTABLE)
    result0 = _dot(rounded, value0, result0 * fading[:, None], PORTABLE)
    if PARTS == 2:
        result1 = _dot(rounded, value1, result1 * fading[:, None], PORTABLE)
    return result0, result1, total


@triton.jit
def _block(
    source,
    blocks0,
    blocks1,
    image,
    column,
    start,
    count,
    stride,
    HEAD: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Both parts of a block of keys, or of values; the first twice where there is one."""
    LIVE0: tl.constexpr = HEAD if HEAD < PART0 else PART0
    LIVE1: tl.constexpr = HEAD - PART0 if PART1 else HEAD
    if TMA:
        part0 = tl.reshape(blocks0.load([image, start, column]), [KEYS, PART0])
    else:
        part0 = _rows(source, start, count, stride, KEYS, PART0, LIVE0, RAGGED)
    part1 = part0
    if PART1:
        if TMA:
            part1 = tl.reshape(blocks1.load([image, start, column + PART0]), [KEYS, PART1])
        else:
            part1 = _rows(source + PART0, start, count, stride, KEYS, PART1, LIVE1, RAGGED)
    return part0, part1


@triton.jit(do_not_specialize=["queries", "keys"])
def _stream(
    out,
    query,
    key,
    value,
    key0_blocks,
    key1_blocks,
    value0_blocks,
    value1_blocks,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    queries,
    keys,
    scale,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    SUM: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """One program: `ROWS` queries of one head of one image, all keys in blocks of `KEYS`.

    key0_blocks, …: descriptors of both parts' blocks where `TMA`. scale: with log2(e) in it.
    """
    PARTS: tl.constexpr = 2 if PART1 else 1
    image = tl.program_id(1) // HEADS
    column = tl.program_id(1) % HEADS * HEAD
    first = tl.program_id(0) * ROWS
    query += image.to(tl.int64) * query_batch + column
    key += image.to(tl.int64) * key_batch + column
    value += image.to(tl.int64) * value_batch + column
    out += image.to(tl.int64) * queries * (HEADS * HEAD) + column

    query0 = _query(query, first, queries, query_row, ROWS, 0, PART0, HEAD)
    query1 = query0
    result0 = tl.zeros([ROWS, PART0], tl.float32)
    result1 = result0
    if PART1:
        query1 = _query(query, first, queries, query_row, ROWS, PART0, PART1, HEAD)
        result1 = tl.zeros([ROWS, PART1], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    if SUM == "mma":
        total = tl.zeros([ROWS, 16], tl.float32)
    else:
        total = tl.zeros([ROWS], tl.float32)

    full = keys // KEYS * KEYS
    for RAGGED in tl.static_range(2):
        for start in tl.range(
            full if RAGGED else 0,
            keys if RAGGED else full,
            KEYS,
            num_stages=2 if RAGGED else STAGES,
        ):
            key0, key1 = _block(
                *(key, key0_blocks, key1_blocks, image, column, start, keys, key_row),
                *(HEAD, PART0, PART1, KEYS, RAGGED, TMA),
            )
            value0, value1 = _block(
                *(value, value0_blocks, value1_blocks, image, column, start, keys, value_row),
                *(HEAD, PART0, PART1, KEYS, RAGGED, TMA),
            )
            scores = _scores(query0, query1, key0, key1, PARTS, PORTABLE)
            if RAGGED:
                alive = (start + tl.arange(0, KEYS) < keys)[None, :]
                scores = tl.where(alive, scores, float("-inf"))
            peak, weights, fading = _softmax(peak, scores, scale)
            if SUM != "mma":
                total = total * fading + tl.sum(weights, 1)
            result0, result1, total = _gather(
                *(result0, result1, total, weights.to(out.dtype.element_ty), value0, value1),
                *(fading, KEYS, PARTS, SUM, PORTABLE),
            )

    if SUM == "mma":
        share = 1.0 / tl.max(total, 1)  # all columns are the same
    else:
        share = 1.0 / total
    _store(out, result0 * share[:, None], first, queries, HEADS * HEAD, ROWS, 0, PART0, HEAD)
    if PART1:
        result1 = result1 * share[:, None]
        _store(out, result1, first, queries, HEADS * HEAD, ROWS, PART0, PART1, HEAD)


@triton.jit(do_not_specialize=["queries", "keys"])
def _short(
    out,
    query,
    key,
    value,
    query_batch,
    query_row,
    key_batch,
    key_row,
    value_batch,
    value_row,
    queries,
    keys,
    scale,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS0: tl.constexpr,
    KEYS1: tl.constexpr,
    REPEAT: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """One program: `REPEAT` tiles of `ROWS` queries of one head of one image, and all its keys.

    The keys are in one or two blocks, of which the last is not full. scale: with log2(e) in it.
    """
    PARTS: tl.constexpr = 2 if PART1 else 1
    LIVE0: tl.constexpr = HEAD if HEAD < PART0 else PART0
    LIVE1: tl.constexpr = HEAD - PART0 if PART1 else HEAD
    LAST: tl.constexpr = KEYS1 == 0
    image = tl.program_id(1) // HEADS
    column = tl.program_id(1) % HEADS * HEAD
    query += image.to(tl.int64) * query_batch + column
    key += image.to(tl.int64) * key_batch + column
    value += image.to(tl.int64) * value_batch + column
    out += image.to(tl.int64) * queries * (HEADS * HEAD) + column

    key00 = _rows(key, 0, keys, key_row, KEYS0, PART0, LIVE0, LAST)
    value00 = _rows(value, 0, keys, value_row, KEYS0, PART0, LIVE0, LAST)
    key01 = key00
    value01 = value00
    if PARTS == 2:
        key01 = _rows(key + PART0, 0, keys, key_row, KEYS0, PART1, LIVE1, LAST)
        value01 = _rows(value + PART0, 0, keys, value_row, KEYS0, PART1, LIVE1, LAST)
    key10 = key00
    value10 = value00
    key11 = key00
    value11 = value00
    if not LAST:
        key10 = _rows(key, KEYS0, keys, key_row, KEYS1, PART0, LIVE0, True)
        value10 = _rows(value, KEYS0, keys, value_row, KEYS1, PART0, LIVE0, True)
        if PARTS == 2:
            key11 = _rows(key + PART0, KEYS0, keys, key_row, KEYS1, PART1, LIVE1, True)
            value11 = _rows(value + PART0, KEYS0, keys, value_row, KEYS1, PART1, LIVE1, True)

    for turn in tl.range(0, REPEAT, num_stages=2):
        first = (tl.program_id(0) * REPEAT + turn) * ROWS
        query0 = _query(query, first, queries, query_row, ROWS, 0, PART0, HEAD)
        query1 = query0
        if PARTS == 2:
            query1 = _query(query, first, queries, query_row, ROWS, PART0, PART1, HEAD)
        scores0 = _scores(query0, query1, key00, key01, PARTS, PORTABLE)
        if LAST:
            scores0 = tl.where((tl.arange(0, KEYS0) < keys)[None, :], scores0, float("-inf"))
            peak = tl.max(scores0, 1)
        else:
            scores1 = _scores(query0, query1, key10, key11, PARTS, PORTABLE)
            alive = (KEYS0 + tl.arange(0, KEYS1) < keys)[None, :]
            scores1 = tl.where(alive, scores1, float("-inf"))
            peak = tl.maximum(tl.max(scores0, 1), tl.max(scores1, 1))
        peak = peak * scale - _headroom
        weights0 = tl.exp2(scores0 * scale - peak[:, None])
        total = tl.sum(weights0, 1)
        rounded0 = weights0.to(value00.dtype)
        result0 = _dot(rounded0, value00, None, PORTABLE)
        result1 = result0
        if PARTS == 2:
            result1 = _dot(rounded0, value01, None, PORTABLE)
        if not LAST:
            weights1 = tl.exp2(scores1 * scale - peak[:, None])
            total += tl.sum(weights1, 1)
            rounded1 = weights1.to(value00.dtype)
            result0 = _dot(rounded1, value10, result0, PORTABLE)
            if PARTS == 2:
                result1 = _dot(rounded1, value11, result1, PORTABLE)
        share = 1.0 / total
        _store(out, result0 * share[:, None], first, queries, HEADS * HEAD, ROWS, 0, PART0, HEAD)
        if PARTS == 2:
            result1 = result1 * share[:, None]
            _store(out, result1, first, queries, HEADS * HEAD, ROWS, PART0, PART1, HEAD)


def parts(width: int, cut: bool) -> tuple[int, int]:
    """Powers of two that hold a head's columns: one, or two if `cut` and that saves any."""
    whole = max(16, 1 << (width - 1).bit_length())
    first = whole // 2
    if cut and first < width < whole:
        second = max(16, 1 << (width - first - 1).bit_length())
        if second < first:
            return first, second
    return whole, 0


def blocks(keys: int) -> tuple[int, int]:
    """The blocks in which `_short` holds so many keys: the fewest that one or two tiles give."""
    options = [(first, second) for first in (16, 32, 64, 128) for second in (0, 16, 32, 64)]
    fitting = [pair for pair in options if sum(pair) >= keys and pair[0] > pair[1]]
    return min(fitting, key=lambda pair: (sum(pair), pair[1]))


@dataclass(frozen=True)
class _Shape:
    """What the choice of variants depends on."""

    images: int
    queries: int
    keys: int
    heads: int
    head: int
    multiprocessors: int
    shared: int
    generation: int

    @staticmethod
    def of(call: Call, hardware: Hardware) -> _Shape:
        query, key = call.tensors[0], call.tensors[1]
        assert query is not None and key is not None and hardware.capability is not None
        heads = call.attrs["heads"]
        return _Shape(
            images=query.shape[0],
            queries=query.shape[1],
            keys=key.shape[1],
            heads=heads,
            head=query.shape[2] // heads,
            multiprocessors=hardware.multiprocessors,
            shared=hardware.shared_bytes or 64 << 10,
            generation=hardware.capability[0],
        )


def _streamed(rows: int, keys: int, warps: int, stages: int, **others: Any) -> Config:
    """A variant of `_stream`.

    cut: whether a head may be in two parts. sum: "mma" where the tensor cores add up the weights.
    registers: at most so many a thread (0: as many as it likes). tma: whether blocks of keys come
    through descriptors.
    """
    config: dict[str, int | str | bool] = {"kind": "stream", "rows": rows, "keys": keys}
    config |= {"warps": warps, "stages": stages}
    config |= {"cut": True, "sum": "alu", "registers": 0, "tma": True}
    return config | others


def _shortened(rows: int, warps: int, repeat: int) -> Config:
    """A variant of `_short`, whose programs take `repeat` tiles of queries each."""
    return {"kind": "short", "rows": rows, "warps": warps, "repeat": repeat}


def _hopper(head: int) -> list[Config]:
    """Variants for wgmma: 64 queries to four warps, and keys enough to outweigh the loop itself.

    Softmax and products overlap between blocks on one multiprocessor, so that two or three are to
    fit. 128 queries halve what the level-2 cache must give; 64 make more blocks.
    """
    if head > 128:
        return [
            _streamed(64, 64, 4, 3),
            _streamed(128, 64, 8, 3),
            _streamed(64, 32, 4, 3),
            _streamed(64, 64, 4, 2),
            _streamed(32, 32, 2, 3, tma=False),
        ]
    small = [_streamed(32, 64, 2, 2, tma=False), _streamed(16, 64, 1, 2, tma=False)]
    if head > 64:
        return [
            _streamed(64, 64, 4, 3),
            _streamed(128, 64, 4, 3),
            _streamed(128, 128, 8, 3, sum="mma"),
            _streamed(64, 128, 4, 3),
            *small,
        ]
    return [
        _streamed(128, 64, 4, 3, cut=False, sum="mma"),
        _streamed(128, 128, 8, 3, cut=False, registers=128),
        _streamed(64, 128, 4, 3),
        _streamed(64, 64, 4, 3),
        _streamed(128, 64, 4, 3, sum="mma"),
        *small,
    ]


def _blackwell(head: int) -> list[Config]:
    """Variants for the data-centre chips whose accumulators lie in a memory of their own."""
    if head > 128:
        found = [(128, 64, 8, 3), (64, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)]
    elif head > 64:
        found = [(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)]
    else:
        found = [(128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3)]
    return [_streamed(*tile) for tile in found]


def _ampere(head: int) -> list[Config]:
    """Variants for mma: 16 queries to a warp, and what registers and shared memory allow."""
    if head > 128:
        found = [(128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 2, 2)]
    else:
        found = [
            (128, 64, 8, 3),
            (64, 64, 4, 2),
            (128, 32, 8, 3),
            (64, 32, 4, 3),
            (64, 64, 4, 3),
            (32, 64, 2, 2),
            (16, 64, 1, 2),
        ]
    return [_streamed(*tile, tma=False) for tile in found]


def _programs(config: Config, shape: _Shape) -> int:
    tile = int(config["rows"]) * int(config.get("repeat", 1))
    return -(-shape.queries // tile) * shape.images * shape.heads


def _shared(config: Config, shape: _Shape) -> int:
    """Bytes of shared memory that a variant needs at most."""
    columns = sum(parts(shape.head, bool(config.get("cut", True))))
    query = 2 * int(config["rows"]) * columns
    if config["kind"] == "short":
        copies = 1 if config["repeat"] == 1 else 3
        return 4 * sum(blocks(shape.keys)) * columns + copies * query + 2048
    keys = int(config["keys"])
    ones = 32 * keys if config["sum"] == "mma" else 0
    return 4 * keys * columns * int(config["stages"]) + query + ones + 2048


_SPEED = {128: 1.0, 64: 0.9, 32: 0.55, 16: 0.35}
"""What a multiprocessor full of such tiles of queries computes, roughly, against the largest."""

_HOPELESS = 0.5
"""Variants that promise less than this share of the best one's speed are not tried."""


def _score(config: Config, shape: _Shape) -> float:
    """How fast a variant may be: by its tile, the rows that are none, and the last wave."""
    rows, programs = int(config["rows"]), _programs(config, shape)
    held = programs * rows * int(config.get("repeat", 1))
    waves = programs / shape.multiprocessors
    used = shape.queries * shape.images * shape.heads / held
    if config["kind"] == "short":  # loading is all there is to do: only who does it counts
        return used * min(1.0, waves)
    return _SPEED[rows] * used * waves / ceil(waves)


def _ranked(variants: Sequence[Config], shape: _Shape) -> list[Config]:
    """The promising ones, best first; of equals, that which comes first."""
    scores = [_score(config, shape) * 0.99**place for place, config in enumerate(variants)]
    order = sorted(range(len(variants)), key=lambda place: -scores[place])
    return [variants[place] for place in order if scores[place] >= _HOPELESS * max(scores)]


def _held(config: Config, shape: _Shape) -> bool:
    """Whether a variant of `_short` finds place in registers, in which all keys arrive at once."""
    keys, columns = sum(blocks(shape.keys)), sum(parts(shape.head, True))
    arriving = keys * columns // (32 * int(config["warps"]))
    if shape.generation in (9, 10) and int(config["rows"]) >= 64:
        return arriving <= 140 and 3 * keys + 2 * columns <= (840 if config["repeat"] == 1 else 720)
    if columns > 128 and shape.generation not in (9, 10):
        return False
    # The queries are there as well.
    return arriving <= 140 and (3 * keys + 3 * columns <= 640 or (keys <= 80 and columns <= 160))


def _configs(call: Call, hardware: Hardware) -> Sequence[Config]:
    shape = _Shape.of(call, hardware)
    found: list[Config] = []
    if shape.keys <= SHORT:
        short = [
            _shortened(64, 4, 1),
            _shortened(128, 8, 1),
            _shortened(64, 4, 2),
            _shortened(128, 8, 2),
            _shortened(64, 4, 4),
            _shortened(32, 4, 1),
            _shortened(128, 8, 4),
            _shortened(16, 4, 1),
        ]
        if _programs(_shortened(32, 4, 1), shape) >= shape.multiprocessors:
            short.pop()
        if shape.generation == 10:  # where loops over products of this size spill
            short = [config for config in short if config["repeat"] == 1]
        found = _ranked([config for config in short if _held(config, shape)], shape)
    if shape.keys > SHORT // 2 or not found:
        variants = {9: _hopper, 10: _blackwell}.get(shape.generation, _ampere)(shape.head)
        found = found[:5] + _ranked(variants, shape)
    return [config for config in found if _shared(config, shape) <= shape.shared][:MOST_CONFIGS]


def _fits(call: Call, config: Config, hardware: Hardware) -> bool:
    shape = _Shape.of(call, hardware)
    short = config["kind"] == "short"
    if short and (shape.keys > SHORT or not _held(config, shape)):
        return False
    return _shared(config, shape) <= shape.shared


def _readable(spec: TensorSpec, width: int) -> bool:
    """Whether rows can be read in vectors, and offsets within an image have 32 bits."""
    if len(spec.shape) != 3 or spec.shape[2] != width or not spec.aligned:
        return False
    image, row, column = spec.stride
    return (
        column == 1
        and row % 8 == 0
        and row >= width
        and (spec.shape[0] == 1 or (image % 8 == 0 and image >= row))
        and spec.shape[1] * row < _OFFSETS
    )


def plain(call: Call) -> bool:
    """Whether the kernels here and in attention_hopper can read and write a call's tensors."""
    query, key, value = call.tensors
    if query is None or key is None or value is None or len(query.shape) != 3:
        return False
    width, heads = query.shape[2], call.attrs["heads"]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and key.dtype == value.dtype == call.out.dtype == query.dtype
        and width % heads == 0
        and all(_readable(spec, width) for spec in (query, key, value))
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and min(query.shape + key.shape) > 0
        and query.shape[0] * heads < 1 << 16
        and call.out.contiguous
        and call.out.aligned
        and call.attrs["scale"] > 0
    )


def _supports(call: Call, hardware: Hardware) -> bool:
    if hardware.capability is None or hardware.capability < (8, 0) or not plain(call):
        return False
    head = call.out.shape[2] // call.attrs["heads"]
    return head % 8 == 0 and head <= WIDEST and bool(_configs(call, hardware))


@compiled_kernel(
    "attention",
    name="triton.attention",
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
) -> list[Launch]:
    """One launch, of the kernel that `config` names. Tensors as the operator's."""
    images, queries, width = query.shape
    keys, head, rows = key.shape[1], width // heads, int(config["rows"])
    part0, part1 = parts(head, bool(config.get("cut", True)))
    args: dict[str, Any] = {
        "out": out,
        "query": query,
        "key": key,
        "value": value,
        "query_batch": images_apart(query),
        "query_row": query.stride(1),
        "key_batch": images_apart(key),
        "key_row": key.stride(1),
        "value_batch": images_apart(value),
        "value_row": value.stride(1),
        "queries": queries,
        "keys": keys,
        "scale": scale * _LOG2_E,
        "HEADS": heads,
        "HEAD": head,
        "PART0": part0,
        "PART1": part1,
        "ROWS": rows,
        "PORTABLE": interpreted(_stream),
    }
    options: dict[str, Any] = {"num_warps": config["warps"], "enable_fp_fusion": True}
    if config["kind"] == "short":
        first, second = blocks(keys)
        repeat = int(config["repeat"])
        args |= {"KEYS0": first, "KEYS1": second, "REPEAT": repeat}
        return [Launch(_short, (-(-queries // (rows * repeat)), images * heads), args, options)]
    step = int(config["keys"])
    for name, tensor in (("key", key), ("value", value)):
        for part, columns in enumerate((part0, part1)):
            there = bool(config["tma"] and columns)
            args[f"{name}{part}_blocks"] = _descriptor(tensor, step, columns) if there else None
    args |= {
        "KEYS": step,
        "STAGES": config["stages"],
        "TMA": config["tma"],
        "SUM": config["sum"],
    }
    if config["registers"]:
        options["maxnreg"] = config["registers"]
    return [Launch(_stream, (-(-queries // rows), images * heads), args, options)]


def images_apart(x: torch.Tensor) -> int:
    """Elements from one image to the next; where there is but one, its stride may be anything."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.stride(1)


def _descriptor(x: torch.Tensor, keys: int, columns: int) -> TensorDescriptor:
    """Of blocks of `keys` rows and `columns` columns of an image, zero beyond its last key."""
    return TensorDescriptor(x, list(x.shape), [images_apart(x), x.stride(1), 1], [1, keys, columns])
