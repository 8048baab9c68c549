"""Matrix product with its whole epilogue in one launch: bias, GEGLU, residual.

What bounds a tile on the tensor cores is how fast its operands come: from L2 (the fewer bytes per
product, the larger and squarer the tile) and out of shared memory (the fewer, the wider one tensor
core instruction is). What bounds a layer is how well its tiles fill the last wave of SMs. Tiles of
a `tl.dot` are powers of two, the channels of these networks multiples of 320: so a tile may have a
tail, a second, narrower product beside the first, of the same rows. 128 + 32 columns make 128 tiles
of a layer of 2048 rows and 1280 channels, one for each of 132 SMs but four.

GEGLU needs the hidden and the gate columns of one place in one tile. Where the copy engine (TMA)
loads the weight, they come as one box of a [2, N, K] view, so that one wide product makes both.

From Hopper on a launch may begin while the one ahead of it still runs (`pdl`, programmatic
dependent launch): it waits at once until that one is done, and lets the next begin likewise.

Three forms of the loop: operands through TMA descriptors, one tile per block or (persistent) a loop
over tiles in which the loads of the next tile overtake the stores of the last; and for older GPUs
operands through pointers and asynchronous copies. Each may split K over blocks, for layers of few
tiles: the partial products then go through memory, and a second launch adds them, always in the
same order, and does the epilogue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..hardware import Hardware
from . import cublaslt, library, overlap
from .launch import Launch, interpreted
from .registry import NO_CONFIG, Call, Config, TensorSpec, compiled_kernel, kernel

CONFIGS, CONFIGS_TMA = 8, 6

_GEMV_ROWS = 8
"""Up to so many rows the other kernel, which reads the weight once and multiplies as it goes."""


@triton.jit
def gelu_erf(x):
    """GELU in its exact form, fp32, to 4e-7: `max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2`.

    What is subtracted is `P(t) * exp(-x^2 / 2)` with `t = 1 / (1 + |y| / 2)`: of the form that
    Abramowitz and Stegun give erfc (7.1.26), the factor |x| in the polynomial, whose coefficients
    were fitted anew (relative error 1e-4 for gates below -0.5). With y^2 the exponent, powers
    of y serve both. The reciprocal is a square root's, which is one instruction.
    """
    y = x * 0.8493218002880191  # y * y = x * x / 2 * log2(e)
    square = y * y
    t = tl.rsqrt(square * 0.25 + 1.0 + tl.abs(y))
    p = t * -0.1479146033525467 + 0.7274673581123352
    p = p * t - 1.1977604627609253
    p = p * t + 0.4531925916671753
    p = p * t - 0.26407596468925476
    p = p * t + 0.032347459346055984
    p = p * t + 0.396743595593161  # such that GELU(0) is 0
    return tl.maximum(x, 0.0) - p * tl.exp2(-square)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, in an order that keeps what is read at one time in the L2 cache.

    Groups of GROUP rows of tiles, within a group column by column.
    """
    in_group = GROUP * tiles_n
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _vector(p, columns, N, EVEN_N: tl.constexpr):
    """The bias of some columns."""
    if EVEN_N:
        return tl.load(p + columns)
    else:
        return tl.load(p + columns, columns < N, other=0.0)


@triton.jit
def _corner(p, m0, stride, rows, columns):
    """Pointers to a rectangle whose rows begin at m0; only the way there needs 64 bits."""
    return p + m0.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]


@triton.jit
def _inside(m0, rows, columns, M, N, EVEN_N: tl.constexpr):
    if EVEN_N:
        return (m0 + rows < M)[:, None]
    else:
        return (m0 + rows < M)[:, None] & (columns < N)[None, :]


@triton.jit
def _rectangle(p, m0, stride, rows, columns, M, N, EVEN_N: tl.constexpr):
    """A tile of the residual, or of products."""
    mask = _inside(m0, rows, columns, M, N, EVEN_N)
    return tl.load(_corner(p, m0, stride, rows, columns), mask, other=0.0)


@triton.jit
def _store(y, out, m0, stride, rows, columns, M, N, EVEN_N: tl.constexpr):
    mask = _inside(m0, rows, columns, M, N, EVEN_N)
    tl.store(_corner(out, m0, stride, rows, columns), y.to(out.dtype.element_ty), mask)


@triton.jit
def _plus(y, columns):
    """Rows of fp32 plus a vector of columns."""
    return y + columns.to(tl.float32)[None, :]


@triton.jit
def _repeated(columns, ROWS: tl.constexpr):
    """A vector of columns as so many rows of fp32."""
    return tl.broadcast_to(columns.to(tl.float32)[None, :], (ROWS, columns.shape[0]))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of the columns; of accumulators no element moves for it."""
    return acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _leave(
    acc,
    bias,
    residual,
    out,
    m0,
    n0,
    M,
    N,
    residual_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Store accumulators with what is to be added to them."""
    rows = tl.arange(0, ROWS)
    columns = n0 + tl.arange(0, COLUMNS)
    if bias is not None:
        acc = _plus(acc, _vector(bias, columns, N, EVEN_N))
    if residual is not None:
        r = _rectangle(residual, m0, residual_stride, rows, columns, M, N, EVEN_N)
        acc += r.to(tl.float32)
    _store(acc, out, m0, out_stride, rows, columns, M, N, EVEN_N)


@triton.jit
def _leave_in_quarters(
    acc,
    bias,
    residual,
    out,
    m0,
    n0,
    M,
    N,
    residual_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """The same one part after another: only its addends have to fit beside the accumulators."""
    QUARTER: tl.constexpr = COLUMNS // 4
    left, right = _halves(acc, ROWS, COLUMNS)
    for half in tl.static_range(2):
        if half == 0:
            first, second = _halves(left, ROWS, COLUMNS // 2)
        else:
            first, second = _halves(right, ROWS, COLUMNS // 2)
        n = n0 + 2 * half * QUARTER
        _leave(
            *(first, bias, residual, out, m0, n, M, N, residual_stride, out_stride),
            *(ROWS, QUARTER, EVEN_N),
        )
        _leave(
            *(second, bias, residual, out, m0, n + QUARTER, M, N, residual_stride, out_stride),
            *(ROWS, QUARTER, EVEN_N),
        )


@triton.jit
def _finish(
    acc,
    second,
    bias,
    residual,
    out,
    m0,
    n0,
    M,
    N,
    residual_stride,
    out_stride,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    QUARTERS: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """The epilogue of a tile: second is the gates, or the tail."""
    if GEGLU:
        if bias is not None:
            columns = n0 + tl.arange(0, BLOCK_N)
            acc = _plus(acc, _vector(bias, columns, N, EVEN_N))
            second = _plus(second, _vector(bias + N, columns, N, EVEN_N))
        _leave(
            *(acc * gelu_erf(second), None, residual, out, m0, n0, M, N),
            *(residual_stride, out_stride, BLOCK_M, BLOCK_N, EVEN_N),
        )
    else:
        if QUARTERS:
            _leave_in_quarters(
                *(acc, bias, residual, out, m0, n0, M, N, residual_stride, out_stride),
                *(BLOCK_M, BLOCK_N, EVEN_N),
            )
        else:
            _leave(
                *(acc, bias, residual, out, m0, n0, M, N, residual_stride, out_stride),
                *(BLOCK_M, BLOCK_N, EVEN_N),
            )
        if TAIL_N:
            n1 = n0 + BLOCK_N
            _leave(
                *(second, bias, residual, out, m0, n1, M, N, residual_stride, out_stride),
                *(BLOCK_M, TAIL_N, EVEN_N),
            )


@triton.jit
def _tile(
    tile,
    x,
    weight,
    tail,
    bias,
    residual,
    out,
    M,
    N,
    K,
    x_stride,
    residual_stride,
    out_stride,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    EARLY: tl.constexpr,
    QUARTERS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One tile of the result, or of a partial product. For the parameters see `_matmul`."""
    SECOND: tl.constexpr = BLOCK_N if GEGLU else TAIL_N
    m, n = _place(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N + TAIL_N), GROUP)
    m0 = m * BLOCK_M
    n0 = n * (BLOCK_N + TAIL_N)
    rows = tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)

    steps = tl.cdiv(K, BLOCK_K)
    begin = 0
    if SPLIT > 1:  # a split may end with fewer steps, never with none
        share = tl.cdiv(steps, SPLIT)
        begin = tl.program_id(1) * share
        steps = tl.minimum(begin + share, steps)
        out += tl.program_id(1).to(tl.int64) * M * out_stride

    if TAIL_N:
        tail_columns = n0 + BLOCK_N + tl.arange(0, TAIL_N)
    if EARLY:  # in flight all through the loop
        if bias is not None:
            b = _vector(bias, columns, N, EVEN_N)
            if TAIL_N:
                tail_b = _vector(bias, tail_columns, N, EVEN_N)
        if residual is not None:
            r = _rectangle(residual, m0, residual_stride, rows, columns, M, N, EVEN_N)
            if TAIL_N:
                tail_r = _rectangle(residual, m0, residual_stride, rows, tail_columns, M, N, EVEN_N)

    if TMA and GEGLU:
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for step in range(begin, steps):
            k = step * BLOCK_K
            w = weight.load([0, n0, k]).reshape(2 * BLOCK_N, BLOCK_K)
            both = tl.dot(x.load([m0, k]), w.T, both)
        acc, second = _halves(both, BLOCK_M, 2 * BLOCK_N)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if SECOND:
            second = tl.zeros((BLOCK_M, SECOND), tl.float32)
        if TMA:
            for step in range(begin, steps):
                k = step * BLOCK_K
                a = x.load([m0, k])
                acc = tl.dot(a, weight.load([n0, k]).T, acc)
                if SECOND:
                    second = tl.dot(a, tail.load([n0 + BLOCK_N, k]).T, second)
        else:
            # Rows beyond the end read the last one, so that no load needs a mask for them. Within
            # a tile 32 bits do, which leaves registers to the accumulators.
            ks = tl.arange(0, BLOCK_K)
            xs = x + m0.to(tl.int64) * x_stride + begin * BLOCK_K
            ws = weight + n0.to(tl.int64) * K + begin * BLOCK_K
            in_x = tl.minimum(rows, M - 1 - m0)[:, None] * x_stride + ks[None, :]
            in_w = tl.minimum(columns - n0, N - 1 - n0)[None, :] * K + ks[:, None]
            if GEGLU:
                os = ws + N.to(tl.int64) * K
                in_o = in_w
            elif TAIL_N:
                os = ws
                in_o = tl.minimum(tail_columns - n0, N - 1 - n0)[None, :] * K + ks[:, None]
            for step in range(begin, steps):
                if EVEN_K:
                    a = tl.load(xs + in_x)
                    w = tl.load(ws + in_w)
                else:
                    left = K - step * BLOCK_K
                    a = tl.load(xs + in_x, ks[None, :] < left, other=0.0)
                    w = tl.load(ws + in_w, ks[:, None] < left, other=0.0)
                acc = tl.dot(a, w, acc)
                if SECOND:
                    if EVEN_K:
                        w = tl.load(os + in_o)
                    else:
                        w = tl.load(os + in_o, ks[:, None] < K - step * BLOCK_K, other=0.0)
                    second = tl.dot(a, w, second)
                    os += BLOCK_K
                xs += BLOCK_K
                ws += BLOCK_K

    if GEGLU and SPLIT > 1:
        _store(acc, out, m0, out_stride, rows, columns, M, N, EVEN_N)
        _store(second, out + N, m0, out_stride, rows, columns, M, N, EVEN_N)
    elif EARLY:
        if bias is not None:
            acc = _plus(acc, b)
        if residual is not None:
            acc += r.to(tl.float32)
        _store(acc, out, m0, out_stride, rows, columns, M, N, EVEN_N)
        if TAIL_N:
            if bias is not None:
                second = _plus(second, tail_b)
            if residual is not None:
                second += tail_r.to(tl.float32)
            _store(second, out, m0, out_stride, rows, tail_columns, M, N, EVEN_N)
    else:
        _finish(
            *(acc, second if SECOND else None, bias, residual, out, m0, n0, M, N),
            *(residual_stride, out_stride, GEGLU, BLOCK_M, BLOCK_N, TAIL_N, QUARTERS, EVEN_N),
        )


@triton.jit
def _biases(bias, n0, N, GEGLU: tl.constexpr, COLUMNS: tl.constexpr, EVEN_N: tl.constexpr):
    """Of some columns from n0 on, for GEGLU of as many hidden ones and then of their gates."""
    if GEGLU:
        place = tl.arange(0, 2 * COLUMNS)
        columns = n0 + place % COLUMNS
        bias += place // COLUMNS * N
    else:
        columns = n0 + tl.arange(0, COLUMNS)
    return _vector(bias, columns, N, EVEN_N)


@triton.jit
def _tiles(
    x,
    weight,
    tail,
    bias,
    residual,
    out,
    M,
    N,
    K,
    residual_stride,
    out_stride,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    QUARTERS: tl.constexpr,
    EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile after another, as steps of a single loop: for the parameters see `_matmul`.

    So the copies for the next tile are under way while one is finished; where they come from must
    not depend on the finishing. Accumulators begin as the bias, which is on its way meanwhile too:
    it need not be added, nor they be cleared. (Triton does not let Hopper's tensor cores overwrite
    them instead, as they could.) The first bias is read ahead of the launch before: a weight is no
    launch's result.
    """
    WIDTH: tl.constexpr = BLOCK_N * 2 if GEGLU else BLOCK_N
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N + TAIL_N)
    tiles, steps = tiles_m * tiles_n, tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    mine = tl.cdiv(tiles - tile, tl.num_programs(0))
    next_m, next_n = _place(tile, tiles_m, tiles_n, GROUP)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    if TAIL_N:
        second = tl.zeros((BLOCK_M, TAIL_N), tl.float32)
    if bias is not None:
        n1 = next_n * (BLOCK_N + TAIL_N)
        acc = _repeated(_biases(bias, n1, N, GEGLU, BLOCK_N, EVEN_N), BLOCK_M)
        if TAIL_N:
            second = _repeated(_biases(bias, n1 + BLOCK_N, N, False, TAIL_N, EVEN_N), BLOCK_M)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    step = steps - 1
    m0 = 0
    n0 = 0
    for _ in tl.range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            m0 = next_m * BLOCK_M
            n0 = next_n * (BLOCK_N + TAIL_N)
            # Where none follows, the last tile once more.
            tile = tl.minimum(tile + tl.num_programs(0), tiles - 1)
            next_m, next_n = _place(tile, tiles_m, tiles_n, GROUP)
        k = step * BLOCK_K
        a = x.load([m0, k])
        if GEGLU:
            acc = tl.dot(a, weight.load([0, n0, k]).reshape(WIDTH, BLOCK_K).T, acc)
        else:
            acc = tl.dot(a, weight.load([n0, k]).T, acc)
        if TAIL_N:
            second = tl.dot(a, tail.load([n0 + BLOCK_N, k]).T, second)

        if step == steps - 1:
            if bias is not None:
                n1 = next_n * (BLOCK_N + TAIL_N)
                b = _biases(bias, n1, N, GEGLU, BLOCK_N, EVEN_N)
                if TAIL_N:
                    tail_b = _biases(bias, n1 + BLOCK_N, N, False, TAIL_N, EVEN_N)
            if GEGLU:
                first, gate = _halves(acc, BLOCK_M, WIDTH)
            else:
                first = acc
            _finish(
                *(first, gate if GEGLU else (second if TAIL_N else None), None, residual, out),
                *(m0, n0, M, N, residual_stride, out_stride),
                *(GEGLU, BLOCK_M, BLOCK_N, TAIL_N, QUARTERS, EVEN_N),
            )
            if bias is not None:
                acc = _repeated(b, BLOCK_M)
                if TAIL_N:
                    second = _repeated(tail_b, BLOCK_M)
            else:
                acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
                if TAIL_N:
                    second = tl.zeros((BLOCK_M, TAIL_N), tl.float32)


@triton.jit(do_not_specialize=["M"])
def _matmul(
    x,
    weight,
    tail,
    bias,
    residual,
    out,
    M,
    N,
    K,
    x_stride,
    residual_stride,
    out_stride,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EARLY: tl.constexpr,
    QUARTERS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """`activation(x @ weight^T + bias) + residual`, in tiles of BLOCK_M x (BLOCK_N + TAIL_N).

    TMA: x, weight and tail are descriptors of boxes of BLOCK_K by BLOCK_M rows of x, and BLOCK_N
    (GEGLU: 2 x BLOCK_N) and TAIL_N rows of the weight; else x and weight are pointers.
    SPLIT: blocks along K; with more than one, out holds one fp32 product [M, rows of the weight]
    for each, without an epilogue. EARLY: read bias and residual before the loop. QUARTERS: the
    epilogue takes the first columns in four parts.
    """
    if PERSISTENT:
        _tiles(
            *(x, weight, tail, bias, residual, out, M, N, K, residual_stride, out_stride),
            *(GEGLU, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_K, GROUP, QUARTERS, EVEN_N, PDL),
        )
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        _tile(
            tl.program_id(0),
            x,
            weight,
            tail,
            bias,
            residual,
            out,
            M,
            N,
            K,
            x_stride,
            residual_stride,
            out_stride,
            GEGLU,
            BLOCK_M,
            BLOCK_N,
            TAIL_N,
            BLOCK_K,
            GROUP,
            SPLIT,
            TMA,
            EARLY,
            QUARTERS,
            EVEN_N,
            EVEN_K,
        )


@triton.jit(do_not_specialize=["M"])
def _combine(
    products,
    bias,
    residual,
    out,
    M,
    N,
    residual_stride,
    out_stride,
    PRODUCTS: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The epilogue by itself, of the sum of products [PRODUCTS, M, N] (GEGLU: [PRODUCTS, M, 2N]).

    They are added in fp32 from the first to the last.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    WIDE: tl.constexpr = 2 if GEGLU else 1
    m0 = tl.program_id(0) * BLOCK_M
    n0 = tl.program_id(1) * BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.static_range(PRODUCTS):
        y += _rectangle(products, m0, N * WIDE, rows, columns, M, N, EVEN_N).to(tl.float32)
        if GEGLU:
            g = _rectangle(products + N, m0, N * WIDE, rows, columns, M, N, EVEN_N)
            gate += g.to(tl.float32)
        products += M.to(tl.int64) * N * WIDE
    if GEGLU:
        if bias is not None:
            y = _plus(y, _vector(bias, columns, N, EVEN_N))
            gate = _plus(gate, _vector(bias + N, columns, N, EVEN_N))
        _leave(
            *(y * gelu_erf(gate), None, residual, out, m0, n0, M, N),
            *(residual_stride, out_stride, BLOCK_M, BLOCK_N, EVEN_N),
        )
    else:
        _leave(
            *(y, bias, residual, out, m0, n0, M, N),
            *(residual_stride, out_stride, BLOCK_M, BLOCK_N, EVEN_N),
        )


@dataclass(frozen=True)
class _Tile:
    """Columns are those of one half for GEGLU. `step`: how much of K at a time."""

    rows: int
    columns: int
    tail: int
    step: int
    warps: int


_TMA_TILES: tuple[_Tile, ...] = (
    _Tile(128, 256, 0, 64, 8),
    _Tile(256, 128, 0, 64, 8),
    _Tile(128, 256, 64, 64, 8),
    _Tile(128, 128, 64, 64, 8),
    _Tile(128, 128, 32, 64, 8),
    _Tile(128, 128, 32, 128, 8),
    _Tile(128, 128, 0, 64, 8),
    _Tile(128, 128, 0, 64, 4),
    _Tile(128, 64, 0, 64, 4),
    _Tile(64, 256, 0, 64, 4),
    _Tile(64, 128, 32, 64, 4),
    _Tile(64, 128, 0, 64, 4),
    _Tile(64, 128, 0, 128, 4),
    _Tile(64, 64, 16, 64, 4),
    _Tile(64, 64, 16, 128, 4),
    _Tile(64, 64, 0, 64, 4),
    _Tile(64, 64, 0, 128, 4),
    _Tile(64, 32, 0, 128, 4),
)

_TMA_GEGLU_TILES: tuple[_Tile, ...] = (
    _Tile(128, 128, 0, 64, 8),
    _Tile(256, 64, 0, 64, 8),
    _Tile(128, 64, 0, 64, 4),
    _Tile(64, 128, 0, 64, 4),
    _Tile(64, 64, 0, 64, 4),
    _Tile(64, 64, 0, 128, 4),
)

_POINTER_TILES: tuple[_Tile, ...] = (
    _Tile(128, 256, 0, 32, 8),
    _Tile(128, 128, 64, 32, 8),
    _Tile(128, 128, 32, 32, 8),
    _Tile(128, 128, 0, 32, 4),
    _Tile(128, 128, 0, 64, 8),
    _Tile(128, 64, 0, 32, 4),
    _Tile(128, 64, 0, 64, 4),
    _Tile(64, 128, 32, 64, 4),
    _Tile(64, 128, 0, 64, 4),
    _Tile(64, 64, 16, 64, 4),
    _Tile(64, 64, 0, 64, 4),
    _Tile(64, 32, 0, 64, 4),
)

_POINTER_GEGLU_TILES: tuple[_Tile, ...] = (
    _Tile(128, 64, 0, 32, 4),
    _Tile(128, 64, 0, 64, 8),
    _Tile(64, 128, 0, 64, 8),
    _Tile(64, 64, 0, 64, 4),
    _Tile(64, 32, 0, 64, 4),
)

_GROUP = 8

_SPLITS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class _Chip:
    """One SM, per clock: fp16 multiply-adds on the tensor cores, bytes that the L2 brings it."""

    multiply_adds: int
    l2_bytes: int


_CHIPS = {
    (8, 0): _Chip(1024, 40),
    (9, 0): _Chip(2048, 44),
    (10, 0): _Chip(4096, 44),
    (10, 3): _Chip(4096, 44),
}
_CONSUMER = _Chip(256, 18)  # where products are accumulated in fp32; twice that in fp16

# Clocks.
_LATENCY = 800  # from asking for a stage of operands until it is there
_FILL = 1200  # from the start of a block to its first product
_SYNC = 40  # of a step of the loop, in which one block alone leaves the tensor cores idle
_LAUNCH = 2000  # of the second launch
_SHARED_BYTES = 128  # that shared memory gives or takes


@dataclass(frozen=True)
class _Problem:
    rows: int
    columns: int  # of the result
    depth: int  # K
    geglu: bool
    bias: bool
    addend: bool  # a bias or a residual

    @staticmethod
    def of(call: Call) -> _Problem:
        x, _, bias, residual = call.tensors
        assert x is not None
        geglu = call.attrs["activation"] == "geglu"
        addend = bias is not None or residual is not None
        return _Problem(x.rows, call.out.shape[-1], x.shape[-1], geglu, bias is not None, addend)


@dataclass(frozen=True)
class _Variant:
    """A tile with all that a configuration adds to it, and what it costs on a chip."""

    tile: _Tile
    stages: int
    split: int
    persistent: bool
    tma: bool
    resident: int  # blocks that one SM holds at a time

    def widths(self, geglu: bool) -> tuple[int, ...]:
        """Columns of each product that a step makes."""
        if geglu:
            return (2 * self.tile.columns,) if self.tma else (self.tile.columns,) * 2
        return (self.tile.columns, self.tile.tail) if self.tile.tail else (self.tile.columns,)

    def cycles(self, problem: _Problem, hardware: Hardware) -> float:
        """Clocks until the last block is done; DRAM, which all variants read alike, left out."""
        assert hardware.capability is not None
        tile, widths = self.tile, self.widths(problem.geglu)
        chip = _CHIPS.get(hardware.capability, _CONSUMER)
        across = ceil(problem.columns / (tile.columns + tile.tail))
        blocks = ceil(problem.rows / tile.rows) * across * self.split
        most = ceil(blocks / hardware.multiprocessors)  # blocks that some SM has to do
        live = min(self.resident, most)
        steps = ceil(ceil(problem.depth / tile.step) / self.split)

        stage = (tile.rows + sum(widths)) * tile.step * 2
        l2 = chip.l2_bytes * min(1.5, max(1.0, hardware.multiprocessors / blocks))
        step = max(
            tile.rows * sum(widths) * tile.step / chip.multiply_adds,
            (self._operand_bytes(widths, hardware) + stage) / _SHARED_BYTES,
            stage / l2,
        )
        loop = steps * most * (step + (_SYNC if live == 1 else 0))
        loop = max(loop, steps * ceil(most / live) * _LATENCY / (self.stages - 1))

        elements = tile.rows * (tile.columns + tile.tail)
        fill = _FILL + stage / l2
        epilogue = 500 + elements * ((24 if problem.geglu else 6) + 4 * problem.addend) / 128
        if live > 1:  # another block computes meanwhile
            edges = (fill + epilogue) * ceil(most / live)
        else:
            edges = epilogue * most + fill * (1 if self.persistent else most)
        total = loop + edges
        if self.split > 1:
            moved = 2 * 4 * problem.rows * problem.columns * (1 + problem.geglu) * self.split
            total += _LAUNCH + moved / (hardware.multiprocessors * chip.l2_bytes / 2)
        return total

    def _operand_bytes(self, widths: tuple[int, ...], hardware: Hardware) -> int:
        """What the tensor cores read from shared memory in a step."""
        assert hardware.capability is not None
        tile = self.tile
        if self.tma or hardware.capability[0] in (9, 10, 11):
            # One instruction makes 64 (Hopper) or 128 rows of a product, 16 deep.
            high = 64 if hardware.capability[0] == 9 else 128
            return sum(
                ceil(tile.rows / high) * tile.step // 16 * (high + width) * 32 for width in widths
            )
        down, across = 2, tile.warps // 2  # warps, each of which reads its own operands
        return tile.step * 2 * (tile.rows * across + sum(widths) * down)

    def config(self, hardware: Hardware, pdl: bool) -> Config:
        tile = self.tile
        programs = hardware.multiprocessors * self.resident if self.persistent else 0
        return {
            "block_m": tile.rows,
            "block_n": tile.columns,
            "tail_n": tile.tail,
            "block_k": tile.step,
            "warps": tile.warps,
            "stages": self.stages,
            "split": self.split,
            "programs": programs,
            "pdl": pdl,
        }


def _quartered(tile: _Tile, geglu: bool) -> bool:
    """Whether there are too many accumulators to hold all that is added to them as well."""
    return not geglu and tile.rows * tile.columns >= 128 * 32 * tile.warps


def _early(tile: _Tile, geglu: bool, tma: bool) -> bool:
    """Whether the registers hold bias and residual beside the accumulators through the loop."""
    accumulators = tile.rows * (tile.columns + tile.tail) // (32 * tile.warps)
    return not geglu and accumulators <= (96 if tma else 64)


def _variants(problem: _Problem, hardware: Hardware, tma: bool) -> Iterator[_Variant]:
    """Every variant that fits the chip and suits the shape."""
    if tma:
        tiles = _TMA_GEGLU_TILES if problem.geglu else _TMA_TILES
    else:
        tiles = _POINTER_GEGLU_TILES if problem.geglu else _POINTER_TILES
    for tile in tiles:
        width = tile.columns + tile.tail
        if tile.columns > 64 and width >= 2 * problem.columns:
            continue
        blocks = ceil(problem.rows / tile.rows) * ceil(problem.columns / width)
        assert hardware.capability is not None
        most = ceil(blocks / hardware.multiprocessors)
        deepest: dict[tuple[int, bool], _Variant] = {}  # of those that run side by side alike
        for stages, persistent in product((2, 3, 4, 5), (False, True)):
            resident = _resident(tile, stages, persistent, problem.geglu, hardware, tma)
            if resident == 0 or (persistent and most <= resident):
                continue
            if persistent and problem.bias and hardware.capability > (9, 0):
                continue  # to begin as the bias, all of tensor memory would go through registers
            variant = _Variant(tile, stages, 1, persistent, tma, resident)
            deepest[min(resident, most), persistent] = variant
        steps = ceil(problem.depth / tile.step)
        for variant in deepest.values():
            for split in _SPLITS[:1] if variant.persistent else _SPLITS:
                enough = steps >= 4 * split and (split - 1) * ceil(steps / split) < steps
                few = blocks * split <= 2 * hardware.multiprocessors
                if split == 1 or (enough and few):
                    yield replace(variant, split=split)


def _resident(
    tile: _Tile, stages: int, persistent: bool, geglu: bool, hardware: Hardware, tma: bool
) -> int:
    """How many blocks of the kind one SM holds; 0: it cannot run, or should not."""
    assert hardware.capability is not None and hardware.shared_bytes is not None
    width = tile.columns * (2 if geglu else 1) + tile.tail
    stage = (tile.rows + width) * tile.step * 2
    if persistent and not tma:
        return 0
    if stages == 2 and (persistent or not tma or stage < 48 << 10):  # too few bytes under way
        return 0
    # Of Blackwell's tensor memory Triton makes too much use (rows), or none (columns).
    if persistent and ((geglu and tile.rows < 128) or width > 256) and hardware.capability > (9, 0):
        return 0
    wide = tma or 9 <= hardware.capability[0] < 12  # else a stage goes to registers at once
    shared = (stages if wide else stages - 1) * stage + 256
    # What the epilogue rearranges lies where the operands were, unless the next come in already.
    leaving = tile.rows * tile.columns * 2 // (4 if _quartered(tile, geglu) else 1)
    shared = shared + leaving if persistent else max(shared, leaving)
    if shared > hardware.shared_bytes:
        return 0
    reserved = 1 << 10  # for each block, by the system
    registers = min(tile.rows * width // (32 * tile.warps) + 70, 255)
    return min(
        max(1, 65536 // (registers * 32 * tile.warps)),
        (hardware.shared_bytes + reserved) // (shared + reserved),
    )


def _ranked(call: Call, hardware: Hardware, tma: bool) -> list[_Variant]:
    """The variants for a call, the quickest first; of one tile no more than two."""
    problem = _Problem.of(call)
    found = sorted(
        _variants(problem, hardware, tma), key=lambda variant: variant.cycles(problem, hardware)
    )
    ranked: list[_Variant] = []
    for variant in found:
        same = [other for other in ranked if other.tile == variant.tile]
        if len(same) < 2:
            ranked.append(variant)
    return ranked


def supports(call: Call, hardware: Hardware) -> bool:
    """Products of half precision, of more rows than the kernel for few takes well."""
    x = call.tensors[0]
    return (
        hardware.capability is not None
        and hardware.capability >= (8, 0)
        and bool(hardware.shared_bytes)
        and x is not None
        and x.rows > _GEMV_ROWS
        and min(x.shape[-1], call.out.shape[-1]) >= 16
        and _regular(call)
    )


def _regular(call: Call) -> bool:
    return call.attrs["activation"] in ("none", "geglu") and library.regular(call)


def _has_tma(hardware: Hardware) -> bool:
    # The consumers' Blackwell (12.0) has the copy engine too, but gains nothing by it: its tensor
    # cores read registers.
    return hardware.capability is not None and (9, 0) <= hardware.capability < (12, 0)


def _supports_tma(call: Call, hardware: Hardware) -> bool:
    return _has_tma(hardware) and supports(call, hardware)


def _reads_ahead(call: Call) -> bool:
    """Whether the bias is a weight, which a launch may read before the one ahead has ended."""
    bias = call.tensors[2]
    return bias is None or bias.constant


def _fits(call: Call, config: Config, hardware: Hardware) -> bool:
    return overlap.fits(call, config, hardware) and (_reads_ahead(call) or not config["pdl"])


def _configs_tma(call: Call, hardware: Hardware) -> list[Config]:
    """Where launches may overlap, the best one also without."""
    ranked = _ranked(call, hardware, True)
    if not (overlap.can_overlap(hardware) and _reads_ahead(call)):
        return [variant.config(hardware, False) for variant in ranked[:CONFIGS_TMA]]
    found = [variant.config(hardware, True) for variant in ranked[: CONFIGS_TMA - 1]]
    return [*found, ranked[0].config(hardware, False)]


def _configs_pointer(call: Call, hardware: Hardware) -> list[Config]:
    """Only one where there is a copy engine: beside it, pointers never won on an H100."""
    count = 1 if _has_tma(hardware) else CONFIGS
    return [variant.config(hardware, False) for variant in _ranked(call, hardware, False)[:count]]


def _workspace(call: Call, config: Config) -> int:
    """The partial products in fp32."""
    weight = call.tensors[1]
    assert weight is not None
    split = int(config["split"])
    return 4 * split * call.out.rows * weight.shape[0] if split > 1 else 0


@compiled_kernel(
    "linear",
    name="triton.matmul_tma",
    supports=_supports_tma,
    configs=_configs_tma,
    fits=_fits,
    workspace=_workspace,
    priority=2,
)
def matmul_tma(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    """Operands through the copy engine."""
    return _launches(True, out, x, weight, bias, residual, activation, config, workspace)


@compiled_kernel(
    "linear",
    name="triton.matmul",
    supports=supports,
    configs=_configs_pointer,
    workspace=_workspace,
    priority=3,
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
) -> list[Launch]:
    """Operands through pointers."""
    return _launches(False, out, x, weight, bias, residual, activation, config, workspace)


def _launches(
    tma: bool,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    geglu = activation == "geglu"
    rows, depth, columns = prod(x.shape[:-1]), x.shape[-1], out.shape[-1]
    names = ("block_m", "block_n", "tail_n", "block_k", "warps")
    tile = _Tile(*(int(config[name]) for name in names))
    split, programs = int(config["split"]), int(config["programs"])
    width = tile.columns + tile.tail
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, width)
    partial = None
    if split > 1:
        assert workspace is not None
        partial = workspace.view(torch.float32)

    tail: TensorDescriptor | None = None
    operands: tuple[Any, Any] = (x, weight)
    if tma:
        box = [tile.rows, tile.step]
        source = TensorDescriptor(x, [rows, depth], [row_stride(x), 1], box)
        shape, strides, box = list(weight.shape), [depth, 1], [tile.columns, tile.step]
        if tile.tail:
            tail = TensorDescriptor(weight, shape, strides, [tile.tail, tile.step])
        if geglu:
            shape, strides = [2, columns, depth], [columns * depth, depth, 1]
            box = [2, tile.columns, tile.step]
        operands = (source, TensorDescriptor(weight, shape, strides, box))

    pdl = bool(config["pdl"]) and not interpreted(_matmul)
    early = (
        programs == 0
        and partial is None
        and (bias is not None or residual is not None)
        and _early(tile, geglu, tma)
    )
    # ptxas would rather spill two registers of the consumers' Blackwell than take a few more.
    small = not (tma or early) and tile.rows * width * (2 if geglu else 1) <= 64 * 80
    first = Launch(
        _matmul,
        (min(blocks, programs) if programs else blocks, split),
        {
            "x": operands[0],
            "weight": operands[1],
            "tail": tail,
            "bias": bias if partial is None else None,
            "residual": residual if partial is None else None,
            "out": out if partial is None else partial,
            "M": rows,
            "N": columns,
            "K": depth,
            "x_stride": None if tma else row_stride(x),
            "residual_stride": row_stride(residual) if partial is None else None,
            "out_stride": row_stride(out) if partial is None else weight.shape[0],
            "GEGLU": geglu,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "TAIL_N": tile.tail,
            "BLOCK_K": tile.step,
            "GROUP": _GROUP,
            "SPLIT": split,
            "TMA": tma,
            "PERSISTENT": programs > 0,
            "EARLY": early,
            "QUARTERS": _quartered(tile, geglu),
            "EVEN_N": columns % width == 0,
            "EVEN_K": depth % tile.step == 0,
            "PDL": pdl,
        },
        {
            "num_warps": tile.warps,
            "num_stages": int(config["stages"]),
            "enable_fp_fusion": True,
            **({"maxnreg": 128} if small else {}),
            **options(pdl),
        },
    )
    if partial is None:
        return [first]
    return [first, combination(out, partial, bias, residual, split, geglu, pdl)]


def options(pdl: bool) -> dict[str, Any]:
    """Of a launch that may begin before the one ahead of it has ended, or not."""
    return {"launch_pdl": True} if pdl else {}


def combination(
    out: torch.Tensor,
    products: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    count: int,
    geglu: bool,
    pdl: bool,
) -> Launch:
    """The sum of `count` products [rows, columns of the weight] with the epilogue, into out."""
    rows, columns = prod(out.shape[:-1]), out.shape[-1]
    block_m, block_n = 8, 128
    return Launch(
        _combine,
        (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)),
        {
            "products": products,
            "bias": bias,
            "residual": residual,
            "out": out,
            "M": rows,
            "N": columns,
            "residual_stride": row_stride(residual),
            "out_stride": row_stride(out),
            "PRODUCTS": count,
            "GEGLU": geglu,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "EVEN_N": columns % block_n == 0,
            "PDL": pdl,
        },
        {"num_warps": 4, "enable_fp_fusion": True, **options(pdl)},
    )


def row_stride(tensor: torch.Tensor | None) -> int | None:
    """Elements from row to row; `_supports` saw to it that there is such a number."""
    return None if tensor is None else TensorSpec.of(tensor).row_stride()


def _supports_combined(call: Call, hardware: Hardware) -> bool:
    half = call.out.dtype == torch.float16 or (hardware.capability or (0, 0)) >= (8, 0)
    return call.attrs["activation"] == "geglu" and half and _regular(call)


@kernel(
    "linear",
    name="cublas.geglu",
    supports=_supports_combined,
    configs=lambda call, hardware: (NO_CONFIG,),
    workspace=library.product_bytes,
    priority=2,
)
def geglu(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
    config: Config,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """cuBLAS's product, and one pass over it."""
    product = workspace.view(out.dtype).view(-1, weight.shape[0])
    library.product_into(product, x, weight, bias)
    combination(out, product, None, residual, 1, True, False).run()
    return out


def _supports_algorithms(call: Call, hardware: Hardware) -> bool:
    return _supports_combined(call, hardware) and cublaslt.multiplies(call, hardware)


def _algorithm_bytes(call: Call, config: Config) -> int:
    """The product, and behind it what cublasLt's algorithm for it needs."""
    x, weight, bias, _ = call.tensors
    assert x is not None and weight is not None
    shape = (x.rows, weight.shape[0])
    product = TensorSpec(shape, (shape[1], 1), x.dtype)
    own = cublaslt.product_workspace(product, x, weight, bias, None, config)
    return _aligned(library.product_bytes(call, config)) + own


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


@kernel(
    "linear",
    name="cublaslt.geglu",
    supports=_supports_algorithms,
    configs=cublaslt.configs,
    workspace=_algorithm_bytes,
    priority=0,
)
def geglu_by_algorithm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
    config: Config,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """The product by one of cublasLt's algorithms, and one pass over it."""
    shape = (prod(x.shape[:-1]), weight.shape[0])
    size = prod(shape) * out.element_size()
    product = workspace[:size].view(out.dtype).view(shape)
    cublaslt.product_into(product, x, weight, bias, None, config, workspace[_aligned(size) :])
    combination(out, product, None, residual, 1, True, False).run()
    return out
