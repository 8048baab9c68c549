"""The table of operators: one entry holds all that the compiler needs to know about an operator.

An operator is a plain function: its *eager reference*, written in PyTorch, which is the ground
truth for every kernel. The function itself is the target of graph nodes, so a graph stays runnable
after every pass. Tensors come first and positionally (a missing optional one is `None`), attributes
are keyword-only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidPlan

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """Schema, shape rule, reference and cost of one operator.

    `shape(shapes, attrs)` gives the output's shape, for concrete shapes (`None` for an absent
    tensor). `flops(shapes, out, attrs)` counts a multiply-add as two; pointwise work is not
    counted.
    `view`: the result aliases the first input whenever strides allow; no kernel runs.
    `sizes`: attributes that hold symbolic sizes.
    `output_dtype`: attribute that holds the output's dtype; otherwise it is the first tensor's.
    `rowwise`: every dimension but the last only counts rows; how they are split does not matter.
    `results`: what the output stacks are so many tensors, each of which may live on its own. Then
    kernels find `out[0]`, `out[1]`, … in a tuple, or in one tensor, and the plan's steps read them
    through `result`.
    """

    name: str
    reference: Callable[..., torch.Tensor]
    shape: Callable[[Sequence[Shape | None], dict[str, Any]], Shape]
    flops: Callable[[Sequence[Shape | None], Shape, dict[str, Any]], int]
    view: bool = False
    sizes: tuple[str, ...] = ()
    output_dtype: str | None = None
    rowwise: bool = False
    results: int = 1


OPS: dict[str, Op] = {}


def op(
    *,
    shape: Callable[[Sequence[Any], dict[str, Any]], Shape],
    flops: Callable[[Sequence[Any], Shape, dict[str, Any]], int] = lambda shapes, out, attrs: 0,
    view: bool = False,
    sizes: tuple[str, ...] = (),
    output_dtype: str | None = None,
    rowwise: bool = False,
    results: int = 1,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register the decorated function as the reference of the operator of that name."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = function.__name__
        OPS[name] = Op(name, function, shape, flops, view, sizes, output_dtype, rowwise, results)
        return function

    return register


def get(name: str) -> Op:
    """The operator called `name`; ATen's own, by qualified name, need no entry."""
    if name in OPS:
        return OPS[name]
    if name.startswith("aten."):
        entry = _aten(name)
        OPS[name] = entry
        return entry
    raise InvalidPlan(f"unknown operator {name!r}: the plan was made by another version")


def of(target: Any) -> Op | None:
    """The operator a graph node's target stands for, if it is one of ours."""
    entry = OPS.get(getattr(target, "__name__", ""))
    return entry if entry is not None and entry.reference is target else None


def aten_name(target: Any) -> str | None:
    """`aten.exp.default` for a functional ATen overload, `None` for anything else.

    Overloads that write to an argument or return a view of one are refused: liveness planning must
    know every alias, and those it knows are operators of ours.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if any(a.alias_info is not None for a in (*target._schema.arguments, *target._schema.returns)):
        return None
    if len(target._schema.returns) != 1:
        return None
    return str(target)


def aten_arguments(
    target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = target._schema.arguments
    values: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
    values |= dict(zip((a.name for a in schema), args, strict=False))
    return values | dict(kwargs)


def _aten(name: str) -> Op:
    packet, _, kind = name.removeprefix("aten.").partition(".")
    overload = getattr(getattr(torch.ops.aten, packet, None), kind, None)
    if overload is None or aten_name(overload) != name:
        raise InvalidPlan(f"unknown operator {name!r}: the plan was made by another version")

    def reference(*tensors: torch.Tensor, args: Any = (), kwargs: Any = None) -> torch.Tensor:
        def fill(value: Any) -> Any:
            if isinstance(value, dict) and "tensor" in value:
                return tensors[value["tensor"]]
            return [fill(v) for v in value] if isinstance(value, (tuple, list)) else value

        named = {key: fill(value) for key, value in (kwargs or {}).items()}
        return overload(*(fill(value) for value in args), **named)

    def shape(shapes: Sequence[Shape | None], attrs: dict[str, Any]) -> Shape:
        tensors = [torch.empty(s, device="meta") for s in shapes if s is not None]
        return tuple(reference(*tensors, **attrs).shape)

    return Op(name, reference, shape, lambda shapes, out, attrs: 0)
