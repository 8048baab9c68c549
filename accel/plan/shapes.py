"""Symbolic sizes: integer expressions over the named dimensions of a plan.

A size is an `int` or a string such as `"(height - 1)//2 + 1"`. The grammar is what a denoiser needs
and nothing more: integers, names, `+ - * // %`, `max(a, b)`, `min(a, b)` and parentheses. Strings
are parsed once into closures; nothing is ever handed to `eval`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from ..errors import InvalidPlan

Size = int | str
Dims = Mapping[str, int]
_Evaluate = Callable[[Dims], int]

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_CALLS: dict[str, Callable[..., int]] = {"max": max, "min": min}


def evaluate(size: Size, dims: Dims) -> int:
    """The value of `size` for concrete `dims`. Raises `InvalidPlan` for an unknown name."""
    if isinstance(size, int):
        return size
    try:
        return _parse(size)(dims)
    except (ZeroDivisionError, RecursionError) as error:
        raise InvalidPlan(f"size expression {size[:80]!r} has no value: {error}") from error


def evaluate_shape(shape: Iterable[Size], dims: Dims) -> tuple[int, ...]:
    """The sizes' values for concrete `dims`."""
    return tuple(evaluate(size, dims) for size in shape)


def names(size: Size) -> frozenset[str]:
    """The dimensions that `size` depends on."""
    if isinstance(size, int):
        return frozenset()
    return frozenset(
        node.id
        for node in ast.walk(_tree(size))
        if isinstance(node, ast.Name) and node.id not in _CALLS
    )


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidPlan(f"size expression {text[:80]!r} cannot be read") from error


@cache
def _parse(text: str) -> _Evaluate:
    return _compile(_tree(text), text)


def _compile(node: ast.expr, text: str) -> _Evaluate:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
        return lambda dims: value
    if isinstance(node, ast.Name):
        name = node.id

        def look_up(dims: Dims) -> int:
            if name not in dims:
                raise InvalidPlan(f"size expression {text[:80]!r} names no known dimension: {name}")
            return dims[name]

        return look_up
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _compile(node.operand, text)
        return lambda dims: -operand(dims)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        apply = _BINARY[type(node.op)]
        left, right = _compile(node.left, text), _compile(node.right, text)
        return lambda dims: apply(left(dims), right(dims))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _CALLS
        and len(node.args) > 1
        and not node.keywords
    ):
        call = _CALLS[node.func.id]
        arguments = [_compile(argument, text) for argument in node.args]
        return lambda dims: call(*(argument(dims) for argument in arguments))
    raise InvalidPlan(f"size expression {text[:80]!r} uses something other than + - * // % max min")


def from_sympy(expression: Any) -> Size:
    """Print a sympy expression (as `torch.export` makes them) in the grammar above.

    Raises `InvalidPlan` for a function that the grammar does not have.
    """
    if isinstance(expression, int):
        return expression
    if expression.is_Integer:
        return int(expression)
    return _print(expression)


def _print(expression: Any) -> str:
    if expression.is_Integer:
        text = str(int(expression))
        return f"({text})" if expression < 0 else text
    if expression.is_Symbol:
        return str(expression.name)
    kind = type(expression).__name__
    parts = [_print(argument) for argument in expression.args]
    if kind == "Add":
        return "(" + " + ".join(parts) + ")"
    if kind == "Mul":
        return "(" + "*".join(parts) + ")"
    if kind == "Pow" and expression.exp.is_Integer and expression.exp > 0:
        return "(" + "*".join([parts[0]] * int(expression.exp)) + ")"
    if kind in ("FloorDiv", "CleanDiv"):
        return f"({parts[0]}//{parts[1]})"
    if kind in ("Mod", "PythonMod"):
        return f"({parts[0]}%{parts[1]})"
    if kind in ("Max", "Min"):
        return f"{kind.lower()}({', '.join(parts)})"
    raise InvalidPlan(f"a size depends on {kind}(...), which a plan cannot express")
