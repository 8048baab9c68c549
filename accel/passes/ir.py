"""The graph that passes work on: `torch.fx` nodes whose targets are operators, shapes beside them.

- A node's tensors are its `args` (`None` for an absent one), its attributes are its `kwargs`.
- `meta["shape"]` holds ints and sympy expressions over the plan's dimension names, `meta["dtype"]`
  a dtype. A node without them is no tensor (a size that the exporter computes): passes leave it
  alone.
- A placeholder is an input (`meta["input"]`) or a constant (`meta["recipe"]`).
- Every call is pure: what writes to an argument, or is random, `capture` has refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import ops
from ..plan.recipe import Recipe

Shape = tuple[Any, ...]
"""Sizes: ints, or sympy expressions over dimension names."""


def is_tensor(value: object) -> TypeGuard[Node]:
    """Whether `value` is a node whose result is one tensor."""
    return isinstance(value, Node) and "shape" in value.meta


def is_call(value: object, target: Callable[..., Any]) -> TypeGuard[Node]:
    """Whether `value` is a call of `target`."""
    return isinstance(value, Node) and value.op == "call_function" and value.target is target


def is_constant(value: object) -> TypeGuard[Node]:
    """Whether `value` is a placeholder made from source parameters."""
    return isinstance(value, Node) and "recipe" in value.meta


def shape(node: Node) -> Shape:
    """The node's sizes."""
    sizes: Shape = node.meta["shape"]
    return sizes


def dtype(node: Node) -> torch.dtype:
    """The dtype of the node's result, with `CAPTURE_DTYPE` for "what the session computes in"."""
    value: torch.dtype = node.meta["dtype"]
    return value


def rank(node: Node) -> int:
    """How many dimensions the node's result has."""
    return len(shape(node))


def tensors(node: Node) -> tuple[Node | None, ...]:
    """The tensors that an operator of ours reads, in the order of its signature."""
    assert all(argument is None or isinstance(argument, Node) for argument in node.args)
    return tuple(argument if isinstance(argument, Node) else None for argument in node.args)


def source(node: Node) -> Node:
    """The first tensor that an operator of ours reads, which is never absent."""
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def attribute(node: Node, name: str) -> Any:
    """An attribute of a call of one of our operators."""
    return node.kwargs[name]


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of an ATen call by the names of its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return ops.aten_arguments(node.target, node.args, node.kwargs)


def emit(
    graph: Graph,
    target: Callable[..., Any],
    tensors: Sequence[Node | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    like: Node | None = None,
    shape: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Node:
    """Append an operator at the graph's insertion point.

    The result has the shape and dtype of `like` unless given; without either, the operator's shape
    rule over its inputs' shapes decides, and the first tensor's dtype.
    """
    attrs = dict(attrs or {})
    node = graph.call_function(target, tuple(tensors), attrs)
    if shape is None:
        if like is not None:
            shape = like.meta["shape"]
        else:
            entry = ops.of(target)
            assert entry is not None
            shapes = [None if t is None else t.meta["shape"] for t in tensors]
            shape = entry.shape(shapes, attrs)
    first = like if like is not None else next(t for t in tensors if t is not None)
    node.meta["shape"] = tuple(shape)
    node.meta["dtype"] = dtype if dtype is not None else first.meta["dtype"]
    return node


def constant(graph: Graph, recipe: Recipe, dtype: torch.dtype, name: str) -> Node:
    """A new constant, placed with the other placeholders."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta.update(shape=recipe.shape, dtype=dtype, recipe=recipe)
    return node


def replace(old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`, and drop `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def erase_dead_calls(graph: Graph) -> None:
    """Drop the calls that nothing reads."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def calls(graph: Graph, target: Callable[..., Any]) -> list[Node]:
    """The calls of `target`, in order."""
    return [node for node in graph.nodes if is_call(node, target)]


def only_user(node: Node) -> Node | None:
    """The single reader of `node`, if there is just one and it reads it once."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    read: list[Node] = []
    map_arg((user.args, user.kwargs), read.append)
    return user if read.count(node) == 1 else None


def interpret(graph: Graph, dims: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Run the graph as it stands, on references: the yardstick of the passes' tests.

    `tensors`: inputs and constants by placeholder name; an optional input may be missing.
    """

    def concrete(value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            return int(value.subs({symbol: dims[symbol.name] for symbol in value.free_symbols}))
        if isinstance(value, (tuple, list)):
            return tuple(concrete(entry) for entry in value)
        return value

    results: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            results[node] = tensors.get(node.name)
        elif node.op == "output":
            return map_arg(node.args[0], results.__getitem__)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), results.__getitem__)
            results[node] = node.target(
                *concrete(args), **{name: concrete(value) for name, value in kwargs.items()}
            )
    raise AssertionError("the graph has no output")
