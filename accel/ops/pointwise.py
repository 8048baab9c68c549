"""Pointwise operators that passes look for by name; all others stay ATen's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InvalidPlan
from .registry import Shape, op


def _broadcast(shapes: Any, attrs: dict[str, Any]) -> Shape:
    columns = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    wide = [{size for size in sizes if size != 1} for sizes in columns]
    if any(len(sizes) > 1 for sizes in wide):
        raise InvalidPlan(f"shapes {' and '.join(map(str, shapes))} do not broadcast")
    return tuple(sizes.pop() if sizes else 1 for sizes in reversed(wide))


def _same(shapes: Any, attrs: dict[str, Any]) -> Shape:
    return tuple(shapes[0])


# Operators of a program (see `pointwise`), each on values a and b and a number.
ADD, MUL, SCALE, OFFSET, SILU, GELU, GELU_TANH, SIN, COS, EXP, SPLIT = range(11)

INSTRUCTION = 4
"""Numbers that one instruction of a program takes: operator, a, b, number."""

OPERANDS = 6
"""Tensors that a program made by a pass reads at most: kernels have a parameter for each."""

_UNARY: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    SILU: F.silu,
    GELU: F.gelu,
    GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    SIN: torch.sin,
    COS: torch.cos,
    EXP: torch.exp,
}


@op(shape=_broadcast)
def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a + b`, broadcast."""
    return a + b


@op(shape=_broadcast)
def mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a * b`, broadcast."""
    return a * b


@op(shape=_same)
def silu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)`."""
    return F.silu(x)


@op(shape=_same)
def gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """The exact (erf) GELU, or its tanh form."""
    return F.gelu(x, approximate=approximate)


@op(shape=_same, output_dtype="dtype")
def cast(x: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype."""
    return x.to(dtype)


@op(shape=_same)
def residual_add(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """`x + residual`; without one, a ControlNet's or T2I-Adapter's, x itself, at no cost."""
    return x if residual is None else x + residual


@op(shape=_broadcast, output_dtype="dtype")
def pointwise(
    *tensors: torch.Tensor, program: tuple[int | float, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A chain of pointwise operators, in float32 (float64 if a tensor is) and rounded once.

    `program`: four numbers an instruction, operator, a, b and a number. a and b count the values so
    far: first the tensors, broadcast, then each instruction's result. The last one, in `dtype`, is
    returned. `a + b`, `a * b`, `a * number`, `a + number`, functions of a, and SPLIT: a in the
    columns before `number`, b from there on, which is how two results lie side by side.
    """
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    values = [t.to(wide) for t in tensors]
    for start in range(0, len(program), INSTRUCTION):
        code, a, b, number = program[start : start + INSTRUCTION]
        x, y = values[int(a)], values[int(b)]
        if code == ADD:
            result = x + y
        elif code == MUL:
            result = x * y
        elif code == SCALE:
            result = x * number
        elif code == OFFSET:
            result = x + number
        elif code == SPLIT:
            left, right = x.expand(shape)[..., : int(number)], y.expand(shape)[..., int(number) :]
            result = torch.cat([left, right], dim=-1)
        elif code in _UNARY:
            result = _UNARY[int(code)](x)
        else:
            raise InvalidPlan(f"pointwise programs know no operator {code!r}")
        values.append(result)
    return values[-1].expand(shape).to(dtype)
