"""Channels-last images: convolutions, group norms and up-sampling work on `[B, H, W, C]`.

It is the layout of tensor-core convolutions, and in it the way between an image and a sequence of tokens
is a free view. Each layout-bound operator is rewritten to its channels-last form between two permutations;
pointwise operators follow; pairs of permutations then cancel (`views.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from . import ir
from ..plan.recipe import Permute, Recipe, Reshape

aten = torch.ops.aten

TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)

_FOLLOWERS = (ops.add, ops.mul, ops.silu, ops.gelu, ops.cast, ops.residual_add)


def to_channels_last(graph: Graph) -> None:
    """Rewrite every four-dimensional operator that has a channels-last form."""
    last: dict[Node, Node] = {}  # channels-first value -> its channels-last equivalent

    def image(node: Node) -> Node:
        if node not in last:
            last[node] = ir.emit(graph, ops.permute, [node], {"dims": TO_LAST})
        return last[node]

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        with graph.inserting_before(node):
            if ops.permute is node.target and node.kwargs["dims"] == TO_FIRST:
                last[node] = node.args[0]  # type: ignore[assignment]
                continue
            new = _channels_last(graph, node, image, last)
            if new is None:
                continue
            first = ir.emit(graph, ops.permute, [new], {"dims": TO_FIRST}, like=node)
        last[first] = new
        ir.replace(node, first)


def _channels_last(graph: Graph, node: Node, image: Any, last: dict[Node, Node]) -> Node | None:
    target: Any = node.target
    x: Any = node.args[0] if node.args else None
    if ir.rank(node) != 4 if "shape" in node.meta else True:
        return None
    if target is aten.conv2d.default:
        return _conv2d(graph, node, image)
    if target is aten.group_norm.default:
        groups, weight, bias, eps = (*node.args[1:], *(None, None, 1e-5)[len(node.args) - 2 :])[:4]
        attrs = {"groups": groups, "eps": eps, "activation": "none"}
        return ir.emit(graph, ops.group_norm, [image(x), weight, bias], attrs)  # type: ignore[list-item]
    if target is aten.upsample_nearest2d.vec:
        size = ir.shape(node)[2:]
        channels_last = tuple(ir.shape(node)[d] for d in TO_LAST)
        return ir.emit(
            graph, ops.upsample_nearest, [image(x)], {"size": size}, shape=channels_last
        )
    if target in _FOLLOWERS and any(n in last for n in node.all_input_nodes):
        tensors = [_broadcast_image(graph, n, image) for n in node.args]
        shape = tuple(ir.shape(node)[d] for d in TO_LAST)
        attrs = dict(node.kwargs)
        return ir.emit(graph, target, tensors, attrs, shape=shape, dtype=ir.dtype(node))
    return None


def _broadcast_image(graph: Graph, node: Any, image: Any) -> Node | None:
    if node is None or ir.rank(node) == 4:
        return None if node is None else image(node)
    shape = (1,) * (4 - ir.rank(node)) + ir.shape(node)
    return image(ir.emit(graph, ops.reshape, [node], {"shape": shape}))


def _conv2d(graph: Graph, node: Node, image: Any) -> Node:
    defaults: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)
    x, weight, *rest = node.args
    bias, stride, padding, dilation, groups = (*rest, *defaults[len(rest) :])
    stride, padding, dilation = (_pair(v) for v in (stride, padding, dilation))
    assert isinstance(weight, Node)
    out_channels, in_channels, *kernel = ir.shape(weight)
    if (tuple(kernel), stride, padding, groups) == ((1, 1), (1, 1), (0, 0), 1):
        recipe: Recipe = Reshape(weight.meta["recipe"], (out_channels, in_channels))
        matrix = ir.constant(graph, recipe, ir.dtype(weight), f"{weight.name}_matrix")
        tensors: Any = [image(x), matrix, bias, None]
        return ir.emit(graph, ops.linear, tensors, {"activation": "none"})
    recipe = Permute(weight.meta["recipe"], TO_LAST)
    filters = ir.constant(graph, recipe, ir.dtype(weight), f"{weight.name}_nhwc")
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    tensors = [image(x), filters, bias, None, None]
    shape = tuple(ir.shape(node)[d] for d in TO_LAST)
    return ir.emit(graph, ops.conv2d, tensors, attrs, shape=shape)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value)
    return values * 2 if len(values) == 1 else values
