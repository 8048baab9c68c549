"""The graph that passes work on: `torch.fx` nodes whose targets are operators, with shapes beside them.

- A node's tensors are its `args` (`None` for an absent one), its attributes are its `kwargs`.
- `meta["shape"]` holds ints and sympy expressions over the plan's dimension names; `meta["dtype"]` a dtype.
- A placeholder is an input (`meta["input"]`) or a constant (`meta["recipe"]`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..plan.recipe import Recipe

Tensors = Sequence[Node | None]


def shape(node: Node) -> tuple[Any, ...]:
    """The node's sizes: ints, or sympy expressions over dimension names."""
    return node.meta["shape"]


def dtype(node: Node) -> torch.dtype:
    return node.meta["dtype"]


def rank(node: Node) -> int:
    return len(shape(node))


def emit(
    graph: Graph,
    target: Callable[..., Any],
    tensors: Tensors,
    attrs: dict[str, Any] | None = None,
    *,
    like: Node | None = None,
    shape: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Node:
    """Append an operator at the graph's insertion point.

    The result has the shape and dtype of `like` unless given; without either, the operator's shape rule
    over its inputs' shapes decides, and the first tensor's dtype.
    """
    attrs = attrs or {}
    node = graph.call_function(target, tuple(tensors), attrs)
    if shape is None:
        if like is not None:
            shape = like.meta["shape"]
        else:
            entry = ops.of(target)
            assert entry is not None
            shapes = [None if t is None else t.meta["shape"] for t in tensors]
            shape = entry.shape(shapes, attrs)
    source = like if like is not None else next(t for t in tensors if t is not None)
    node.meta["shape"] = tuple(shape)
    node.meta["dtype"] = dtype if dtype is not None else source.meta["dtype"]
    return node


def constant(graph: Graph, recipe: Recipe, dtype: torch.dtype, name: str) -> Node:
    """A new constant, placed with the other placeholders."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta.update(shape=recipe.shape, dtype=dtype, recipe=recipe)
    return node


def replace(old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`, and drop `old` where nothing else holds it."""
    old.replace_all_uses_with(new)
    if not old.users:
        old.graph.erase_node(old)


def calls(graph: Graph, target: Callable[..., Any]) -> list[Node]:
    """The calls of `target`, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is target]


def is_call(node: Any, target: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def only_user(node: Node) -> Node | None:
    """The single reader of `node`, if there is just one and it reads it once."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    reads = [n for n in user.all_input_nodes if n is node]
    flat: list[Any] = []
    torch.fx.node.map_arg((user.args, user.kwargs), flat.append)
    return user if len(reads) == 1 and flat.count(node) == 1 else None


def is_constant(node: Any) -> bool:
    return isinstance(node, Node) and "recipe" in node.meta


def interpret(graph: Graph, dims: dict[str, int], tensors: dict[str, torch.Tensor]) -> Any:
    """Run the graph as it stands, on references: the yardstick of the passes' tests.

    `tensors`: inputs and constants by placeholder name; an optional input may be missing.
    """
    import sympy

    def concrete(value: Any) -> Any:
        if isinstance(value, sympy.Expr):
            return int(value.subs({s: dims[s.name] for s in value.free_symbols}))
        if isinstance(value, (tuple, list)):
            return type(value)(concrete(entry) for entry in value)
        return value

    environment: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            environment[node] = tensors.get(node.name)
        elif node.op == "output":
            return torch.fx.node.map_arg(node.args[0], environment.__getitem__)
        else:
            args = torch.fx.node.map_arg(node.args, environment.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, environment.__getitem__)
            environment[node] = node.target(
                *concrete(tuple(args)), **{k: concrete(v) for k, v in kwargs.items()}
            )
    raise AssertionError("the graph has no output")
