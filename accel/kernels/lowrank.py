"""Weights with their low-rank changes: any number of parameters in one launch.

A LoRA of SDXL changes some 700 parameters by products whose inner size is its rank. Each alone is
so little that a GPU waits for the host; and in float32 the sums would cross its memory several
times. Here a block makes one tile of one parameter: it reads it once, adds the changes of all
LoRAs to it in float32, rounds once and writes it. What is where is read from tables, so that there
is one piece of code for all structures and LoRAs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launch

ROWS, COLUMNS, _DEPTH = 64, 64, 16
"""Of a tile, and of the rank at a time."""

KINDS = (torch.float16, torch.bfloat16, torch.float32)
"""Of factors, by the number that stands in the table."""

ALIGNED = 8
"""Elements that offsets and strides of places, and their columns, must be multiples of."""


@triton.jit
def _factor(address, kind, offsets, inside):
    """Numbers of a factor that begins at `address`, in fp32."""
    if kind == 0:
        half = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, inside, other=0.0)
        values = half.to(tl.float32)
    elif kind == 1:
        brain = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, inside, other=0.0)
        values = brain.to(tl.float32)
    else:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, inside, other=0.0)
    return values


@triton.jit
def _product(
    pair,
    rows,
    inside_m,
    columns,
    inside_n,
    width,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left [*, rank] @ right [rank, width] of a pair in the table, at some rows and columns."""
    left = tl.load(pair)
    right = tl.load(pair + 1)
    rank = tl.load(pair + 2).to(tl.int32)
    kind = tl.load(pair + 3).to(tl.int32)
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, rank, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside_k = ks < rank
        a = _factor(
            left,
            kind,
            rows[:, None] * rank + ks[None, :],
            inside_m[:, None] & inside_k[None, :],
        )
        b = _factor(
            right,
            kind,
            ks[:, None] * width + columns[None, :],
            inside_k[:, None] & inside_n[None, :],
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _add_products(
    tiles,
    places,
    changes,
    scales,
    base,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = base + the sum of a place's changes, a tile of a place each block."""
    tile = tl.program_id(0)
    place = places + tl.load(tiles + tile) * 8
    offset = tl.multiple_of(tl.load(place), 8)
    height = tl.load(place + 1).to(tl.int32)
    width = tl.multiple_of(tl.load(place + 2).to(tl.int32), 8)
    stride = tl.multiple_of(tl.load(place + 3).to(tl.int32), 8)
    taps = tl.load(place + 4).to(tl.int32)
    local = tile - tl.load(place + 5).to(tl.int32)
    first = tl.load(place + 6).to(tl.int32)
    count = tl.load(place + 7).to(tl.int32)

    across = tl.cdiv(width, N)
    rows = (local // across) * M + tl.arange(0, M)
    columns = (local % across) * N + tl.arange(0, N)
    inside_m, inside_n = rows < height, columns < width
    # Memory has the channels last, a factor has them first.
    inputs = width // taps
    named = (columns % inputs) * taps + columns // inputs

    total = tl.zeros((M, N), tl.float32)
    for index in range(first, first + count):
        change = changes + index * 8
        product = tl.full((M, N), 1.0, tl.float32)
        # One piece of code for both pairs: the fewer registers, the more blocks an SM holds.
        for pair in range(0, 1 + (tl.load(change + 4) != 0).to(tl.int32)):
            product *= _product(
                change + 4 * pair, rows, inside_m, named, inside_n, width, DEPTH, PRECISION
            )
        total += product * tl.load(scales + index)

    where = rows[:, None] * stride + columns[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    value = tl.load(base + offset + where, inside, other=0.0).to(tl.float32)
    # Without changes it is a copy: added to zero, -0 would lose its sign.
    value = tl.where(count == 0, value, value + total)
    tl.store(out + offset + where, value.to(out.dtype.element_ty), inside)


def add_products(
    tiles: torch.Tensor,
    places: torch.Tensor,
    changes: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor,
    out: torch.Tensor,
    exact: bool,
) -> Launch:
    """out = base + changes at every place; elsewhere `out` stays as it is.

    tiles:   [T] int32: the place of each tile of `ROWS` x `COLUMNS`, a place's tiles side by side
    places:  [P, 8] int64: offset in `base` and `out` (elements), rows, columns, stride of the rows,
             taps (1 where memory has the columns in the order of the factors; for an image kernel
             with the channels last, how many taps it has), first tile, first change, changes
    changes: [C, 8] int64: addresses of left [rows, rank] and right [rank, columns], rank, kind (of
             `KINDS`), and the same of a second pair, whose product it is multiplied by, or zeros
    scales:  [C] float32
    base, out: [*], of one dtype, all memory that offsets count from; may be the same
    exact:   multiply float32 without tensor cores, as a GPU before Ampere must. With them each is
             the sum of two numbers of 11 bits (of one, where the factor is in half precision), and
             what three products of these leave out is about as little as float32's rounding
    """
    return Launch(
        _add_products,
        (tiles.numel(),),
        {
            **{"tiles": tiles, "places": places, "changes": changes, "scales": scales},
            **{"base": base, "out": out, "M": ROWS, "N": COLUMNS, "DEPTH": _DEPTH},
            "PRECISION": "ieee" if exact else "tf32x3",
        },
        {"num_warps": 8 if exact else 4, "num_stages": 1},
    )
