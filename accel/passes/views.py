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
    ir.erase_dead_calls(graph)


def _simpler_reshape(graph: Graph, node: Node) -> Node | None:
    x = ir.source(node)
    source = ir.source(x) if ir.is_call(x, ops.reshape) else x
    if ir.shape(source) == ir.shape(node):
        return source
    if source is x:
        return None
    return ir.emit(graph, ops.reshape, [source], {"shape": ir.shape(node)}, like=node)


def _simpler_permute(graph: Graph, node: Node) -> Node | None:
    x, dims = ir.source(node), ir.attribute(node, "dims")
    if ir.is_call(x, ops.permute):
        inner = ir.attribute(x, "dims")
        x, dims = ir.source(x), tuple(inner[d] for d in dims)
    if dims == tuple(range(len(dims))):
        return x
    if _moves_only_ones(ir.shape(x), dims):
        reshaped = ir.emit(graph, ops.reshape, [x], {"shape": ir.shape(node)}, like=node)
        return _simpler_reshape(graph, reshaped) or reshaped
    if x is ir.source(node):
        return None
    return ir.emit(graph, ops.permute, [x], {"dims": dims}, like=node)


def _moves_only_ones(shape: ir.Shape, dims: tuple[int, ...]) -> bool:
    """Whether the dimensions larger than one keep their order: then memory does not change."""
    kept = [d for d in dims if shape[d] != 1]
    return kept == sorted(kept)


def _simpler_concat(graph: Graph, node: Node) -> Node | None:
    """The tensor itself, where its slices along the last dimension are put side by side again."""
    tensors = ir.tensors(node)
    parts = [part for part in tensors[::2] if ir.is_call(part, ops.slice_dim)]
    if len(parts) < len(tensors) // 2 or any(tensors[1::2]):
        return None
    source = ir.source(parts[0])
    start: Any = 0
    for part in parts:
        attrs = {"dim": ir.rank(source) - 1, "start": start, "length": ir.shape(part)[-1]}
        if ir.source(part) is not source or part.kwargs != attrs:
            return None
        start += ir.shape(part)[-1]
    return source if start == ir.shape(source)[-1] else None


def _simpler_slice(graph: Graph, node: Node) -> Node | None:
    """The part itself, where a concatenation is cut where it was joined."""
    joined = ir.source(node)
    if not ir.is_call(joined, ops.concat) or ir.attribute(node, "dim") != ir.rank(joined) - 1:
        return None
    tensors = ir.tensors(joined)
    wanted = (ir.attribute(node, "start"), ir.attribute(node, "length"))
    start: Any = 0
    for part, residual in zip(tensors[::2], tensors[1::2], strict=True):
        assert part is not None
        length = ir.shape(part)[-1]
        if (start, length) == wanted:
            return part if residual is None else None
        start += length
    return None


_RULES: dict[Any, Callable[[Graph, Node], Node | None]] = {
    ops.permute: _simpler_permute,
    ops.reshape: _simpler_reshape,
    ops.concat: _simpler_concat,
    ops.slice_dim: _simpler_slice,
}
