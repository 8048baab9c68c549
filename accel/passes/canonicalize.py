"""Exported ATen to canonical form: identities gone, every alias one of four view operators.

Export keeps what PyTorch would call: dropout in eval mode, `contiguous`, a division by 1.0, seven ways to
reshape. Later passes should meet one spelling of each thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from . import ir
from ..plan.schema import Input

aten = torch.ops.aten

_IDENTITY = {
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.native_dropout.default,
}

_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
}

_PERMUTES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
}

_POINTWISE: dict[Any, Callable[..., torch.Tensor]] = {
    aten.silu.default: ops.silu,
    aten.gelu.default: ops.gelu,
}


def canonicalize(graph: Graph) -> None:
    """Rewrite each node by the first rule that knows its target; others stay as they are."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            new = _canonical(graph, node)
        if new is not None:
            ir.replace(node, new)
    graph.eliminate_dead_code()


def _canonical(graph: Graph, node: Node) -> Node | None:
    target: Any = node.target
    x: Any = node.args[0] if node.args else None
    if target in _IDENTITY:
        return x
    if target in _RESHAPES:
        return ir.emit(graph, ops.reshape, [x], {"shape": ir.shape(node)}, like=node)
    if target in _PERMUTES:
        return ir.emit(graph, ops.permute, [x], {"dims": _dims(node)}, like=node)
    if target in (aten.expand.default, aten.expand_as.default):
        if ir.shape(x) == ir.shape(node):
            return x
        return ir.emit(graph, ops.expand, [x], {"shape": ir.shape(node)}, like=node)
    if target in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device):
        if ir.dtype(x) == ir.dtype(node):
            return x
        return ir.emit(graph, ops.cast, [x], {"dtype": ir.dtype(node)}, like=node)
    if target is aten.slice.Tensor:
        return _slice(graph, node)
    if target in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        return None  # its `getitem`s are rewritten, then it is dead
    if getattr(target, "__name__", "") == "getitem" and isinstance(x, Node):
        return _part(graph, node)
    if target in (aten.div.Tensor, aten.mul.Tensor) and _is_number(node.args[1], 1):
        return x if ir.dtype(x) == ir.dtype(node) else None
    if target in (aten.add.Tensor, aten.mul.Tensor):
        return _binary(graph, node)
    if target in _POINTWISE:
        return ir.emit(graph, _POINTWISE[target], [x], dict(node.kwargs), like=node)
    if target is aten.cat.default:
        return _cat(graph, node)
    if target is aten.linear.default:
        weight, bias = node.args[1], (node.args[2] if len(node.args) > 2 else None)
        tensors: Any = [x, weight, bias, None]
        return ir.emit(graph, ops.linear, tensors, {"activation": "none"}, like=node)
    if target is aten.layer_norm.default:
        return _layer_norm(graph, node)
    if target is torch.ops.switchyard.residual.default:
        return _residual(graph, node)
    if target is torch.ops.switchyard.attention.default:
        query, key, value, heads = node.args
        width = ir.shape(query)[-1] // heads  # type: ignore[arg-type]
        attrs = {"heads": heads, "scale": float(width) ** -0.5}
        return ir.emit(graph, ops.attention, [query, key, value], attrs, like=node)  # type: ignore[list-item]
    return None


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == number


def _dims(node: Node) -> tuple[int, ...]:
    """The order of dimensions, read off a permutation of markers."""
    x: Any = node.args[0]
    sizes = range(2, 2 + ir.rank(x))
    marked = node.target(torch.empty(*sizes, device="meta"), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(size - 2 for size in marked.shape)


def _slice(graph: Graph, node: Node) -> Node | None:
    x, *rest = node.args
    assert isinstance(x, Node)
    dim, start, end, step = [*rest, *(0, None, None, 1)[len(rest) :]]
    if step != 1:
        return None
    dim = dim % ir.rank(x)  # type: ignore[operator]
    if ir.shape(x)[dim] == ir.shape(node)[dim]:
        return x
    start = start or 0
    if not isinstance(start, int) or start < 0:
        return None
    attrs = {"dim": dim, "start": start, "length": ir.shape(node)[dim]}
    return ir.emit(graph, ops.slice_dim, [x], attrs, like=node)


def _part(graph: Graph, node: Node) -> Node | None:
    """`chunk(x)[i]` or `split(x)[i]` as a slice of x."""
    source, index = node.args
    if not isinstance(source, Node) or source.target not in (
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
    ):
        return None
    x: Any = source.args[0]
    dim = (source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)) % ir.rank(x)  # type: ignore[operator]
    lengths = [part[dim] for part in source.meta["shapes"]]
    attrs = {"dim": dim, "start": sum(lengths[:index]), "length": lengths[index]}  # type: ignore[misc,index]
    return ir.emit(graph, ops.slice_dim, [x], attrs, like=node)


def _binary(graph: Graph, node: Node) -> Node | None:
    a, b = node.args
    if node.kwargs or not isinstance(a, Node) or not isinstance(b, Node):
        return None
    if not ir.dtype(a) == ir.dtype(b) == ir.dtype(node):
        return None  # type promotion stays ATen's
    target = ops.add if node.target is aten.add.Tensor else ops.mul
    return ir.emit(graph, target, [a, b], like=node)


def _cat(graph: Graph, node: Node) -> Node | None:
    """Concatenation along any dimension as one along the last, between two permutations."""
    parts: Any = node.args[0]
    dim = (node.args[1] if len(node.args) > 1 else 0) % ir.rank(node)  # type: ignore[operator]
    if any(ir.dtype(part) != ir.dtype(node) for part in parts):
        return None
    order = [d for d in range(ir.rank(node)) if d != dim] + [dim]
    back = tuple(sorted(range(len(order)), key=order.__getitem__))
    moved = dim != ir.rank(node) - 1
    pairs: list[Node | None] = []
    for part in parts:
        if moved:
            part = ir.emit(graph, ops.permute, [part], {"dims": tuple(order)})
        pairs += [part, None]
    result = ir.emit(graph, ops.concat, pairs)
    return ir.emit(graph, ops.permute, [result], {"dims": back}, like=node) if moved else result


def _layer_norm(graph: Graph, node: Node) -> Node | None:
    x, normalized, *rest = node.args
    weight, bias, eps = [*rest, *(None, None, 1e-5)[len(rest) :]][:3]
    if len(normalized) != 1:  # type: ignore[arg-type]
        return None
    return ir.emit(graph, ops.layer_norm, [x, weight, bias], {"eps": eps}, like=node)  # type: ignore[list-item]


def _residual(graph: Graph, node: Node) -> Node:
    """The marker that capture left where a ControlNet residual comes in: an optional input."""
    x, index = node.args
    assert isinstance(x, Node)
    name = f"residual_{index}"
    with graph.inserting_before(next(iter(graph.nodes))):
        residual = graph.placeholder(name)
    entry = Input(name, (), "", "step", optional=True)
    residual.meta.update(shape=ir.shape(x), dtype=ir.dtype(x), input=entry)
    return ir.emit(graph, ops.residual_add, [x, residual], like=node)
