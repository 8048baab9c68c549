"""Linear layers of a few rows: what a sampling step computes from its time embedding.

The weight is read once and nothing else is large, so all that counts is to ask DRAM for enough of
it at a time. A block is one warp. It takes some rows of the weight whole, into registers, before it
multiplies: no loop, no barrier, every 16-byte load under way at once, and an SM holds the blocks to
have some 80 KB under way. Rows of x come from the cache. The products are summed in fp32 on the
ordinary units, which also serves GPUs without tensor cores.
"""

from __future__ import annotations

from math import ceil, log2, prod

import torch
import triton
import triton.language as tl

from ..hardware import Hardware
from .launch import Launch, interpreted
from .matmul import gelu_erf, options, row_stride
from .overlap import can_overlap
from .registry import Call, Config, compiled_kernel

ROWS = 16
"""Of x, at most."""

_PIECE = 256
"""Of a row of the weight: 16 bytes for each thread of a warp."""

_MOST_REGISTERS = 160
"""Of a thread, for weights."""


@triton.jit
def _chunks(p, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows that begin at p [rows, 1], as a tuple of pieces [rows, BLOCK_K]."""
    ks = tl.arange(0, BLOCK_K)[None, :]
    found = ()
    for k in tl.static_range(0, K, BLOCK_K):
        if k + BLOCK_K <= K:
            found = found + (tl.load(p + k + ks),)  # type: ignore[assignment]
        else:
            piece = tl.load(p + k + ks, k + ks < K, other=0.0)
            found = found + (piece,)  # type: ignore[assignment]
    return found


@triton.jit
def _product(weights, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 products of rows in pieces with the vector that begins at x."""
    ks = tl.arange(0, BLOCK_K)
    total = tl.zeros_like(weights[0]).to(tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        if k + BLOCK_K <= K:
            v = tl.load(x + k + ks)
        else:
            v = tl.load(x + k + ks, k + ks < K, other=0.0)
        total += weights[k // BLOCK_K].to(tl.float32) * v.to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["M"])
def _gemv(
    x,
    weight,
    bias,
    residual,
    out,
    M,
    N,
    x_stride,
    residual_stride,
    out_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """`activation(x @ weight^T + bias) + residual` for M <= ROWS rows, BLOCK_N columns a block."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    if not EVEN_N:
        columns = tl.minimum(columns, N - 1)
    start = columns.to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weights = _chunks(weight + start, K, BLOCK_K)
    if GEGLU:
        gates = _chunks(weight + N.to(tl.int64) * K + start, K, BLOCK_K)
    for m in tl.static_range(ROWS):
        row = tl.minimum(m, M - 1)
        y = _product(weights, x + row * x_stride, K, BLOCK_K)
        if bias is not None:
            y += tl.load(bias + columns).to(tl.float32)
        if GEGLU:
            gate = _product(gates, x + row * x_stride, K, BLOCK_K)
            if bias is not None:
                gate += tl.load(bias + N + columns).to(tl.float32)
            y *= gelu_erf(gate)
        if residual is not None:
            y += tl.load(residual + row * residual_stride + columns).to(tl.float32)
        target = out + row * out_stride + columns
        here = tl.full((BLOCK_N,), m, tl.int32) < M
        tl.store(target, y.to(out.dtype.element_ty), inside & here)


def _registers(call: Call) -> int:
    """What a thread holds of one column's weights, in fp32."""
    x, weight = call.tensors[:2]
    assert x is not None and weight is not None
    return ceil(x.shape[-1] / 32) * (weight.shape[0] // call.out.shape[-1])


def _supports(call: Call, hardware: Hardware) -> bool:
    x, weight, bias, residual = call.tensors
    if hardware.capability is None or x is None or weight is None:
        return False
    if call.attrs["activation"] not in ("none", "geglu"):
        return False
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if x.dtype == torch.bfloat16 and hardware.capability < (8, 0):
        return False
    present = [spec for spec in (x, weight, bias, residual, call.out) if spec is not None]
    apart = [spec for spec in (x, residual, call.out) if spec is not None]
    return (
        0 < x.rows <= ROWS
        and x.shape[-1] * x.dtype.itemsize % 16 == 0
        and all(spec.dtype == x.dtype for spec in present)
        and weight.contiguous
        and (bias is None or bias.contiguous)
        and all(spec.stride[-1] == 1 and spec.row_stride() is not None for spec in apart)
        and _registers(call) <= _MOST_REGISTERS
    )


def _configs(call: Call, hardware: Hardware) -> list[Config]:
    """As many columns a block as leave every SM some eight of them; then the numbers beside it."""
    fitting = [n for n in (1, 2, 4, 8) if n * _registers(call) <= _MOST_REGISTERS]
    wanted = call.out.shape[-1] / (8 * hardware.multiprocessors)
    ranked = sorted(fitting, key=lambda n: (abs(log2(n / wanted)), n))
    pdl = can_overlap(hardware)
    configs: list[Config] = [{"block_n": n, "pdl": pdl} for n in ranked[:3]]
    return [*configs, {"block_n": ranked[0], "pdl": False}] if pdl else configs


@compiled_kernel(
    "linear", name="triton.gemv", unmeasured=True, supports=_supports, configs=_configs, priority=0
)
def gemv(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    activation: str,
    config: Config,
    workspace: None,
) -> list[Launch]:
    """Up to 16 rows; each block some columns of the result."""
    rows, depth, columns = prod(x.shape[:-1]), x.shape[-1], out.shape[-1]
    block_n = int(config["block_n"])
    pdl = bool(config["pdl"]) and not interpreted(_gemv)
    return [
        Launch(
            _gemv,
            (triton.cdiv(columns, block_n),),
            {
                "x": x,
                "weight": weight,
                "bias": bias,
                "residual": residual,
                "out": out,
                "M": rows,
                "N": columns,
                "x_stride": row_stride(x),
                "residual_stride": row_stride(residual),
                "out_stride": row_stride(out),
                "K": depth,
                "ROWS": triton.next_power_of_2(rows),
                "GEGLU": activation == "geglu",
                "BLOCK_N": block_n,
                "BLOCK_K": min(triton.next_power_of_2(depth), _PIECE),
                "EVEN_N": columns % block_n == 0,
                "PDL": pdl,
            },
            {"num_warps": 1, "enable_fp_fusion": True, **options(pdl)},
        )
    ]
