"""Simplify chains of views: permutations compose and cancel, reshapes collapse, cuts undo joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from .. import ops
from . import ir


def simplify_views(graph: Graph) -> None:
    """Rewrite each view of a view to one view of the source, and drop those that change nothing."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _RULES:
            continue
        with graph.inserting_before(node):
            new = _RULES[node.target](graph, node)
        if new is not None:
            ir.replace(node, new)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _simpler_reshape(graph: Graph, node: Node) -> Node | None:
    x: Any = node.args[0]
    if ir.shape(x) == ir.shape(node):
        return x
    if not ir.is_call(x, ops.reshape):
        return None
    source: Any = x.args[0]
    if ir.shape(source) == ir.shape(node):
        return source
    return ir.emit(graph, ops.reshape, [source], {"shape": ir.shape(node)}, like=node)


def _simpler_permute(graph: Graph, node: Node) -> Node | None:
    x: Any = node.args[0]
    dims: Any = node.kwargs["dims"]
    if ir.is_call(x, ops.permute):
        inner: Any = x.kwargs["dims"]
        x, dims = x.args[0], tuple(inner[d] for d in dims)
    if dims == tuple(range(len(dims))):
        return x
    if _moves_only_ones(ir.shape(x), dims):
        reshaped = ir.emit(graph, ops.reshape, [x], {"shape": ir.shape(node)}, like=node)
        return _simpler_reshape(graph, reshaped) or reshaped
    if x is node.args[0]:
        return None
    return ir.emit(graph, ops.permute, [x], {"dims": dims}, like=node)


def _moves_only_ones(shape: tuple[Any, ...], dims: tuple[int, ...]) -> bool:
    """Whether the dimensions larger than one keep their order: then memory does not change."""
    kept = [d for d in dims if shape[d] != 1]
    return kept == sorted(kept)


def _simpler_concat(graph: Graph, node: Node) -> Node | None:
    """The tensor itself, where its slices along the last dimension are put side by side again."""
    parts: Any = node.args[::2]
    if any(node.args[1::2]) or not all(ir.is_call(part, ops.slice_dim) for part in parts):
        return None
    source = parts[0].args[0]
    start: Any = 0
    for part in parts:
        if part.args[0] is not source or part.kwargs["dim"] != ir.rank(source) - 1:
            return None
        if part.kwargs["start"] != start:
            return None
        start += part.kwargs["length"]
    return source if start == ir.shape(source)[-1] else None


def _simpler_slice(graph: Graph, node: Node) -> Node | None:
    """The part itself, where a concatenation is cut where it was joined."""
    x: Any = node.args[0]
    if not ir.is_call(x, ops.concat) or node.kwargs["dim"] != ir.rank(x) - 1:
        return None
    start: Any = 0
    for part, residual in zip(x.args[::2], x.args[1::2], strict=True):
        length = ir.shape(part)[-1]
        if (start, length) == (node.kwargs["start"], node.kwargs["length"]):
            return part if residual is None else None
        start += length
    return None


_RULES: dict[Any, Callable[[Graph, Node], Node | None]] = {
    ops.permute: _simpler_permute,
    ops.reshape: _simpler_reshape,
    ops.concat: _simpler_concat,
    ops.slice_dim: _simpler_slice,
}
