"""Exported ATen to canonical form: identities gone, every alias one of four view operators.

Export keeps what PyTorch would call: dropout in eval mode, `contiguous`, a division by 1.0, seven
ways to reshape. Later passes should meet one spelling of each thing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..plan.schema import Input
from . import ir

aten = torch.ops.aten

_IDENTITIES = {
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
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

_PERMUTES: set[Any] = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
}

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}

_PARTITIONS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}


def canonicalize(graph: Graph) -> None:
    """Rewrite each node by the first rule that knows its target; others stay as they are."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        if not ir.is_tensor(node) or node.target not in _RULES:
            continue
        with graph.inserting_before(node):
            new = _RULES[node.target](graph, node)
        if new is not None:
            ir.replace(node, new)
    graph.eliminate_dead_code()


def _identity(graph: Graph, node: Node) -> Node:
    return ir.source(node)


def _dropout(graph: Graph, node: Node) -> Node | None:
    return None if ir.arguments(node)["train"] else ir.source(node)


def _reshape(graph: Graph, node: Node) -> Node:
    shape = {"shape": ir.shape(node)}
    return ir.emit(graph, ops.reshape, [ir.source(node)], shape, like=node)


def _permute(graph: Graph, node: Node) -> Node:
    """The order of dimensions is read off a permutation of markers."""
    x = ir.source(node)
    markers = torch.empty(*range(2, 2 + ir.rank(x)), device="meta")
    assert callable(node.target)
    moved = node.target(markers, *node.args[1:], **node.kwargs)
    dims = tuple(size - 2 for size in moved.shape)
    return ir.emit(graph, ops.permute, [x], {"dims": dims}, like=node)


def _expand(graph: Graph, node: Node) -> Node:
    x = ir.source(node)
    if ir.shape(x) == ir.shape(node):
        return x
    return ir.emit(graph, ops.expand, [x], {"shape": ir.shape(node)}, like=node)


def _cast(graph: Graph, node: Node) -> Node:
    x = ir.source(node)
    if ir.dtype(x) == ir.dtype(node):
        return x
    return ir.emit(graph, ops.cast, [x], {"dtype": ir.dtype(node)}, like=node)


def _slice(graph: Graph, node: Node) -> Node | None:
    x, given = ir.source(node), ir.arguments(node)
    if given["step"] != 1:
        return None
    dim = given["dim"] % ir.rank(x)
    if ir.shape(x)[dim] == ir.shape(node)[dim]:
        return x
    start = given["start"] or 0
    if not isinstance(start, int) or start < 0:
        return None
    attrs = {"dim": dim, "start": start, "length": ir.shape(node)[dim]}
    return ir.emit(graph, ops.slice_dim, [x], attrs, like=node)


def _getitem(graph: Graph, node: Node) -> Node | None:
    """`chunk(x)[i]` or `split(x)[i]` as a slice of x; the call itself is then dead."""
    parts, index = node.args
    if not isinstance(parts, Node) or parts.target not in _PARTITIONS:
        return None
    assert isinstance(index, int)
    x = ir.source(parts)
    dim = ir.arguments(parts)["dim"] % ir.rank(x)
    lengths = [shape[dim] for shape in parts.meta["shapes"]]
    attrs = {"dim": dim, "start": sum(lengths[:index]), "length": lengths[index]}
    return ir.emit(graph, ops.slice_dim, [x], attrs, like=node)


def _div(graph: Graph, node: Node) -> Node | None:
    return _times_one(node)


def _mul(graph: Graph, node: Node) -> Node | None:
    return _times_one(node) or _binary(graph, node, ops.mul)


def _times_one(node: Node) -> Node | None:
    """x, where it is multiplied or divided by the number 1."""
    x, number = node.args
    if not ir.is_tensor(x) or isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    return x if number == 1 and ir.dtype(x) == ir.dtype(node) else None


def _add(graph: Graph, node: Node) -> Node | None:
    return _binary(graph, node, ops.add)


def _binary(graph: Graph, node: Node, target: Callable[..., torch.Tensor]) -> Node | None:
    a, b = node.args
    if node.kwargs or not ir.is_tensor(a) or not ir.is_tensor(b):
        return None
    if not ir.dtype(a) == ir.dtype(b) == ir.dtype(node):
        return None  # type promotion stays ATen's
    return ir.emit(graph, target, [a, b], like=node)


def _silu(graph: Graph, node: Node) -> Node:
    return ir.emit(graph, ops.silu, [ir.source(node)], like=node)


def _gelu(graph: Graph, node: Node) -> Node:
    attrs = {"approximate": ir.arguments(node)["approximate"]}
    return ir.emit(graph, ops.gelu, [ir.source(node)], attrs, like=node)


def _cat(graph: Graph, node: Node) -> Node | None:
    """Concatenation along any dimension as one along the last, between two permutations."""
    given = ir.arguments(node)
    parts: list[Node] = list(given["tensors"])
    rank = ir.rank(node)
    if any(ir.dtype(part) != ir.dtype(node) or ir.rank(part) != rank for part in parts):
        return None
    dim = given["dim"] % rank
    order = (*(d for d in range(rank) if d != dim), dim)
    back = tuple(sorted(range(rank), key=order.__getitem__))
    moved = dim != rank - 1
    pairs: list[Node | None] = []
    for part in parts:
        if moved:
            part = ir.emit(graph, ops.permute, [part], {"dims": order})
        pairs += [part, None]
    result = ir.emit(graph, ops.concat, pairs)
    return ir.emit(graph, ops.permute, [result], {"dims": back}, like=node) if moved else result


def _linear(graph: Graph, node: Node) -> Node | None:
    given = ir.arguments(node)
    x, weight = given["input"], given["weight"]
    if ir.rank(weight) != 2:
        return None
    tensors = [x, weight, given["bias"], None]
    return ir.emit(graph, ops.linear, tensors, {"activation": "none"}, like=node)


def _layer_norm(graph: Graph, node: Node) -> Node | None:
    given = ir.arguments(node)
    if len(given["normalized_shape"]) != 1:
        return None
    tensors = [given["input"], given["weight"], given["bias"]]
    return ir.emit(graph, ops.layer_norm, tensors, {"eps": given["eps"]}, like=node)


def _attention(graph: Graph, node: Node) -> Node:
    """The marker that a twin left for attention on the projections' layout."""
    given = ir.arguments(node)
    width = ir.shape(given["query"])[-1] // given["heads"]
    attrs = {"heads": given["heads"], "scale": float(width) ** -0.5}
    tensors = [given[name] for name in ("query", "key", "value")]
    return ir.emit(graph, ops.attention, tensors, attrs, like=node)


def _residual(graph: Graph, node: Node) -> Node:
    """The marker that a twin left where a ControlNet or T2I-Adapter adds: an optional input."""
    x, name = ir.source(node), ir.arguments(node)["name"]
    with graph.inserting_before(next(iter(graph.nodes))):
        residual = graph.placeholder(name)
    entry = Input(name, (), "", "step", optional=True)
    residual.meta.update(shape=ir.shape(x), dtype=ir.dtype(x), input=entry)
    return ir.emit(graph, ops.residual_add, [x, residual], like=node)


_RULES: dict[Any, Callable[[Graph, Node], Node | None]] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_PERMUTES, _permute),
    **dict.fromkeys(_CASTS, _cast),
    aten.dropout.default: _dropout,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.slice.Tensor: _slice,
    operator.getitem: _getitem,
    aten.div.Tensor: _div,
    aten.mul.Tensor: _mul,
    aten.add.Tensor: _add,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    torch.ops.switchyard.attention.default: _attention,
    torch.ops.switchyard.residual.default: _residual,
}
