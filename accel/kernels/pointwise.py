"""What is left over between the large operators: pointwise chains, concatenation, up-sampling.

All three only move bytes: each is one launch that touches every byte once, sixteen at an access. A
pointwise chain is not generated source but a flat tuple of numbers, a program (`ops.pointwise`),
which one static kernel unrolls at compile time; a single operator is a program of one instruction.

Vector access needs addresses that the compiler can see to be multiples of a vector. Widths are
compiled in. Sizes that vary are passed in units of `ALIGN` elements, so that none is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..hardware import Hardware
from ..ops.pointwise import (
    ADD,
    COS,
    EXP,
    GELU,
    GELU_TANH,
    INSTRUCTION,
    MUL,
    OFFSET,
    OPERANDS,
    SCALE,
    SILU,
    SIN,
    SPLIT,
)
from .launch import Launch
from .registry import Call, Config, TensorSpec, compiled_kernel

PARTS = 4
"""Tensors that a concatenation may join, each with or without a residual."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_OFFSETS = 1 << 31
"""Offsets within one image of the batch have 32 bits."""

# How an operand lies under a result of rows and columns.
_FLAT, _ROWS, _COLUMNS, _COLUMN, _SCALAR = range(5)

_flat, _rows, _columns, _column = (tl.constexpr(mode) for mode in range(4))
_add, _mul, _scale, _offset = (tl.constexpr(code) for code in (ADD, MUL, SCALE, OFFSET))
_silu, _gelu, _gelu_tanh = (tl.constexpr(code) for code in (SILU, GELU, GELU_TANH))
_sin, _cos, _exp, _split = (tl.constexpr(code) for code in (SIN, COS, EXP, SPLIT))
_instruction = tl.constexpr(INSTRUCTION)


@triton.jit
def _operand(x, base, i, row, column, stride, mask, MODE: tl.constexpr):
    """An operand's values under the elements `i` of the result, in fp32."""
    if MODE == _flat:
        value = tl.load(x + base + i, mask, other=0.0)
    elif MODE == _rows:
        value = tl.load(x + base + row * stride + column, mask, other=0.0)
    elif MODE == _columns:
        value = tl.load(x + base + column, mask, other=0.0)
    elif MODE == _column:
        value = tl.load(x + base + row * stride, mask, other=0.0)
    else:
        value = tl.load(x + base)
    return value.to(tl.float32)


@triton.jit
def _step(
    values,
    column,
    CODE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """The result of one instruction."""
    a = values[A]
    if CODE == _add:
        return a + values[B]
    elif CODE == _mul:
        return a * values[B]
    elif CODE == _scale:
        return a * NUMBER
    elif CODE == _offset:
        return a + NUMBER
    elif CODE == _silu:
        return a * tl.sigmoid(a)
    elif CODE == _gelu:
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif CODE == _gelu_tanh:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    elif CODE == _sin:
        return tl.sin(a)
    elif CODE == _cos:
        return tl.cos(a)
    elif CODE == _exp:
        return tl.exp(a)
    else:
        tl.static_assert(CODE == _split)
        return tl.where(column < NUMBER, a, values[B])


_SIZES = [f"{kind}{k}" for kind in ("image", "stride") for k in range(OPERANDS)]


@triton.jit(do_not_specialize=["n", *_SIZES])
def _pointwise(
    out,
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    n,
    image0,
    image1,
    image2,
    image3,
    image4,
    image5,
    stride0,
    stride1,
    stride2,
    stride3,
    stride4,
    stride5,
    MODES: tl.constexpr,
    PROGRAM: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one image's elements.

    n: elements of an image; image, stride: from one image and one row of an operand to the next;
    all in units of ALIGN, strides of single elements excepted.
    """
    xs = (x0, x1, x2, x3, x4, x5)
    images = (image0, image1, image2, image3, image4, image5)
    strides = (stride0, stride1, stride2, stride3, stride4, stride5)
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n * ALIGN
    row, column = i // WIDTH, i % WIDTH
    values = ()
    for k in tl.static_range(len(MODES)):
        if MODES[k] <= _columns:
            base, stride = image * images[k] * ALIGN, strides[k] * ALIGN
        else:
            base, stride = image * images[k], strides[k]
        value = _operand(xs[k], base, i, row, column, stride, mask, MODES[k])
        values = values + (value,)  # type: ignore[assignment]
    for k in tl.static_range(len(PROGRAM) // _instruction):
        value = _step(
            values,
            column,
            PROGRAM[_instruction * k],
            PROGRAM[_instruction * k + 1],
            PROGRAM[_instruction * k + 2],
            PROGRAM[_instruction * k + 3],
        )
        values = values + (value,)  # type: ignore[assignment]
    last: tl.constexpr = len(MODES) + len(PROGRAM) // _instruction - 1
    result = values[last]  # type: ignore[var-annotated]
    tl.store(out + image * n * ALIGN + i, result.to(out.dtype.element_ty), mask)


@dataclass(frozen=True)
class _Operand:
    """How an operand lies: its mode, and elements to its next image and row."""

    mode: int
    image: int
    stride: int


@dataclass(frozen=True)
class _Layout:
    """A result seen as images of rows of columns, and its operands under it."""

    images: int
    rows: int
    columns: int
    operands: tuple[_Operand, ...]

    @property
    def size(self) -> int:
        """Elements of an image."""
        return self.rows * self.columns


def _layout(out: TensorSpec, tensors: Sequence[TensorSpec]) -> _Layout | None:
    """How to walk result and operands together, if that can be said in a few strides."""
    if len(tensors) > OPERANDS or not out.contiguous or 0 in out.shape or not out.shape:
        return None
    *lead, columns = out.shape
    specs = [_padded(t, len(out.shape)) for t in tensors]
    images = 1
    if len(lead) > 1 and any(_per_image(t.shape, out.shape) for t in specs):
        images = lead[0]
    rows = prod(lead) // images
    operands = []
    for spec in specs:
        operand = _under(spec, out, rows)
        if operand is None or max(operand.image, operand.stride * rows) >= _OFFSETS:
            return None
        operands.append(operand)
    layout = _Layout(images, rows, columns, tuple(operands))
    return layout if layout.size < _OFFSETS and images < 1 << 16 else None


def _padded(spec: TensorSpec, rank: int) -> TensorSpec:
    """The tensor with leading dimensions of one, as broadcasting sees it."""
    more = rank - len(spec.shape)
    shape, stride = (1,) * more + spec.shape, (0,) * more + spec.stride
    return TensorSpec(shape, stride, spec.dtype, spec.aligned, spec.constant)


def _per_image(shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether `shape` differs from image to image, but not from pixel to pixel."""
    return shape[0] == out[0] != 1 and prod(shape[1:-1]) == 1 != prod(out[1:-1])


def _under(spec: TensorSpec, out: TensorSpec, rows: int) -> _Operand | None:
    *lead, width = spec.shape
    if width != out.shape[-1] and width != 1:
        return None
    if width != 1 and spec.stride[-1] != 1:
        return None
    wide = width == out.shape[-1]
    if lead == list(out.shape[:-1]):
        stride = spec.row_stride()
        if stride is None or stride < 0:
            return None
        if not wide:
            return _Operand(_COLUMN, rows * stride, stride)
        mode = _FLAT if stride == width or prod(lead) == 1 else _ROWS
        return _Operand(mode, rows * stride, stride)
    mode = _COLUMNS if wide else _SCALAR
    if prod(lead) == 1:
        return _Operand(mode, 0, 0)
    return _Operand(mode, spec.stride[0], 0) if _per_image(spec.shape, out.shape) else None


def _supports(call: Call, hardware: Hardware) -> bool:
    tensors = [t for t in call.tensors if t is not None and t.dtype in _FLOATS]
    if len(tensors) < len(call.tensors) or call.out.dtype not in _FLOATS:
        return False
    return _runs(call.out, hardware) and _layout(call.out, tensors) is not None


def _runs(out: TensorSpec, hardware: Hardware) -> bool:
    """Whether the chip can round to the result's dtype."""
    capability = hardware.capability or (0, 0)
    return capability >= ((8, 0) if out.dtype == torch.bfloat16 else (7, 5))


def _configs(call: Call, hardware: Hardware) -> list[Config]:
    """Eight or sixteen elements a thread; where there is little to do, fewer and more threads."""
    if any(code in (SIN, COS) for code in call.attrs.get("program", ())[::INSTRUCTION]):
        return [{"block": 128, "warps": 4}]  # a hundred instructions for an element: one a thread
    if prod(call.out.shape) <= 1024 * hardware.multiprocessors:
        return [{"block": 256, "warps": 4}, {"block": 1024, "warps": 4}]
    return [
        {"block": 2048, "warps": 4},
        {"block": 1024, "warps": 4},
        {"block": 4096, "warps": 8},
    ]


def _options(config: Config) -> dict[str, Any]:
    return {"num_warps": config["warps"], "num_stages": 1, "enable_fp_fusion": True}


def _launch(
    out: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    program: tuple[int | float, ...],
    config: Config,
) -> list[Launch]:
    layout = _layout(TensorSpec.of(out), [TensorSpec.of(t) for t in tensors])
    assert layout is not None, "supports() has said so"
    operands, size = layout.operands, layout.size
    flat = all(operand.mode == _FLAT for operand in operands)
    plain = flat and SPLIT not in program[::INSTRUCTION]
    width = 1 if plain else layout.columns  # else every width would compile again
    vectors = [o for o in operands if o.mode <= _COLUMNS]
    numbers = [size, *(o.image for o in vectors), *(o.stride for o in vectors)]
    if not plain:
        numbers.append(width)
    align = next(a for a in (8, 4, 2, 1) if all(number % a == 0 for number in numbers))
    args: dict[str, Any] = {"out": out, "n": size // align}
    for k in range(OPERANDS):
        operand = operands[k] if k < len(operands) else _Operand(_SCALAR, 0, 0)
        unit = align if operand.mode <= _COLUMNS else 1
        args[f"x{k}"] = tensors[k] if k < len(tensors) else tensors[0]
        args[f"image{k}"] = operand.image // unit
        args[f"stride{k}"] = operand.stride // unit
    args |= {
        "MODES": tuple(operand.mode for operand in operands),
        "PROGRAM": program,
        "WIDTH": width,
        "ALIGN": align,
        "BLOCK": config["block"],
    }
    grid = (triton.cdiv(size, config["block"]), layout.images)
    return [Launch(_pointwise, grid, args, _options(config))]


@compiled_kernel(
    "pointwise",
    name="triton.pointwise",
    unmeasured=True,
    supports=_supports,
    configs=_configs,
    priority=0,
)
def pointwise(
    out: torch.Tensor,
    *tensors: torch.Tensor,
    program: tuple[int | float, ...],
    dtype: torch.dtype,
    config: Config,
    workspace: torch.Tensor | None = None,
) -> list[Launch]:
    """A whole chain in one pass."""
    return _launch(out, tensors, program, config)


def _single(op: str, program_of: Callable[..., tuple[int | float, ...]]) -> None:
    """Let the kernel run operator `op` too; `program_of(**attrs)` is its program."""

    def launches(
        out: torch.Tensor,
        *tensors: torch.Tensor,
        config: Config,
        workspace: torch.Tensor | None = None,
        **attrs: Any,
    ) -> list[Launch]:
        return _launch(out, tensors, program_of(**attrs), config)

    compiled_kernel(
        op, name=f"triton.{op}", unmeasured=True, supports=_supports, configs=_configs, priority=2
    )(launches)


_single("silu", lambda: (SILU, 0, 0, 0))
_single("gelu", lambda approximate="none": (GELU if approximate == "none" else GELU_TANH, 0, 0, 0))
_single("add", lambda: (ADD, 0, 1, 0))
_single("mul", lambda: (MUL, 0, 1, 0))
_single("residual_add", lambda: (ADD, 0, 1, 0))
_single("cast", lambda dtype: ())


# Concatenation.


@triton.jit(do_not_specialize=["rows"])
def _concat(
    out,
    x0,
    x1,
    x2,
    x3,
    r0,
    r1,
    r2,
    r3,
    rows,
    STARTS: tl.constexpr,
    STRIDES: tl.constexpr,
    ADDED: tl.constexpr,
    RESIDUAL_STRIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one image's elements; each part's columns are read where they are.

    rows: of an image. STARTS: first column of each part, and the width of all. ADDED: whether a
    part has a residual.
    """
    xs, rs = (x0, x1, x2, x3), (r0, r1, r2, r3)
    WIDTH: tl.constexpr = STARTS[len(STARTS) - 1]
    first = tl.program_id(1).to(tl.int64) * rows
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < rows * WIDTH
    row, column = i // WIDTH, i % WIDTH
    result = tl.zeros((BLOCK,), out.dtype.element_ty)
    for k in tl.static_range(len(STRIDES)):
        inside = mask & (column >= STARTS[k]) & (column < STARTS[k + 1])
        at = column - STARTS[k]
        value = tl.load(xs[k] + first * STRIDES[k] + row * STRIDES[k] + at, inside)
        if ADDED[k]:
            residual = tl.load(
                rs[k] + first * RESIDUAL_STRIDES[k] + row * RESIDUAL_STRIDES[k] + at, inside
            )
            value = (value.to(tl.float32) + residual.to(tl.float32)).to(value.dtype)
        result = tl.where(inside, value, result)
    tl.store(out + first * WIDTH + i, result, mask)


def _images(shape: tuple[int, ...]) -> tuple[int, int]:
    """Images and rows of one."""
    images = shape[0] if len(shape) > 2 else 1
    return images, prod(shape[:-1]) // images


def _row_stride(spec: TensorSpec) -> int | None:
    """Elements from row to row of a tensor whose columns lie side by side."""
    if 0 in spec.shape or (spec.shape[-1] != 1 and spec.stride[-1] != 1):
        return None
    return spec.row_stride()


def _supports_concat(call: Call, hardware: Hardware) -> bool:
    parts, residuals = call.tensors[::2], call.tensors[1::2]
    out = call.out
    if len(parts) > PARTS or None in parts or out.dtype not in _FLOATS or not out.contiguous:
        return False
    images, rows = _images(out.shape)
    if images >= 1 << 16 or rows * out.shape[-1] >= _OFFSETS or not _runs(out, hardware):
        return False
    for part, residual in zip(parts, residuals, strict=True):
        assert part is not None
        for spec in (part, residual):
            if spec is None:
                continue
            stride = _row_stride(spec)
            if stride is None or spec.shape != part.shape or spec.dtype != out.dtype:
                return False
            if stride < 0 or rows * stride >= _OFFSETS:
                return False
    return True


@compiled_kernel(
    "concat",
    name="triton.concat",
    unmeasured=True,
    supports=_supports_concat,
    configs=_configs,
    priority=0,
)
def concat(
    out: torch.Tensor,
    *pairs: torch.Tensor | None,
    config: Config,
    workspace: torch.Tensor | None = None,
) -> list[Launch]:
    """All parts and their residuals in one launch."""
    parts = [part for part in pairs[::2] if part is not None]
    residuals = [part if r is None else r for part, r in zip(parts, pairs[1::2], strict=True)]
    images, rows = _images(tuple(out.shape))
    width = out.shape[-1]
    args: dict[str, Any] = {"out": out, "rows": rows}
    for k in range(PARTS):
        args[f"x{k}"] = parts[min(k, len(parts) - 1)]
        args[f"r{k}"] = residuals[min(k, len(parts) - 1)]
    args |= {
        "STARTS": tuple(accumulate((part.shape[-1] for part in parts), initial=0)),
        "STRIDES": tuple(_row_stride(TensorSpec.of(part)) for part in parts),
        "ADDED": tuple(int(residual is not None) for residual in pairs[1::2]),
        "RESIDUAL_STRIDES": tuple(_row_stride(TensorSpec.of(r)) for r in residuals),
        "BLOCK": config["block"],
    }
    grid = (triton.cdiv(rows * width, config["block"]), images)
    return [Launch(_concat, grid, args, _options(config))]


# Up-sampling.


@triton.jit(do_not_specialize=["width", "in_height", "in_width"])
def _upsample(
    out,
    x,
    width,
    in_height,
    in_width,
    scale_y,
    scale_x,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row of the result: y and the image come from the grid."""
    y, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width * CHANNELS
    pixel, channel = i // CHANNELS, i % CHANNELS
    from_y = tl.minimum((y.to(tl.float32) * scale_y).to(tl.int32), in_height - 1)
    from_x = tl.minimum((pixel.to(tl.float32) * scale_x).to(tl.int32), in_width - 1)
    # What the compiler does not follow through floats: all channels of a pixel share from_x.
    SAME: tl.constexpr = CHANNELS & -CHANNELS
    from_x = tl.max_constancy(from_x, SAME if SAME < 16 else 16)
    row = (image * in_height + from_y) * in_width
    value = tl.load(x + row * STRIDE + from_x * STRIDE + channel, mask)
    first = (image * tl.num_programs(1) + y) * width
    tl.store(out + first * CHANNELS + i, value, mask)


def _supports_upsample(call: Call, hardware: Hardware) -> bool:
    (x,), out = call.tensors, call.out
    if x is None or out.dtype not in _FLOATS or x.dtype != out.dtype or not out.contiguous:
        return False
    images, height, width, channels = out.shape
    stride = _row_stride(x)
    if stride is None or stride < 0 or max(images, height) >= 1 << 16:
        return False
    return max(width * channels, x.shape[2] * stride) < _OFFSETS and _runs(out, hardware)


@compiled_kernel(
    "upsample_nearest",
    name="triton.upsample_nearest",
    unmeasured=True,
    supports=_supports_upsample,
    configs=_configs,
    priority=0,
)
def upsample_nearest(
    out: torch.Tensor,
    x: torch.Tensor,
    *,
    size: tuple[int, int],
    config: Config,
    workspace: torch.Tensor | None = None,
) -> list[Launch]:
    """Pixels as PyTorch picks them: `min(floor(i * float32(H_x / H)), H_x - 1)`, in float32."""
    images, in_height, in_width, channels = x.shape
    height, width = size
    args = {
        "out": out,
        "x": x,
        "width": width,
        "in_height": in_height,
        "in_width": in_width,
        "scale_y": in_height / height,
        "scale_x": in_width / width,
        "CHANNELS": channels,
        "STRIDE": _row_stride(TensorSpec.of(x)),
        "BLOCK": config["block"],
    }
    grid = (triton.cdiv(width * channels, config["block"]), height, images)
    return [Launch(_upsample, grid, args, _options(config))]
