"""Channels-last images: convolutions, group norms and up-sampling work on `[B, H, W, C]`.

It is the layout of tensor-core convolutions, and in it the way between an image and a sequence of
tokens is a free view. Each layout-bound operator is rewritten to its channels-last form between two
permutations; pointwise operators follow; pairs of permutations then cancel (`views.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..plan.recipe import Permute, Recipe, Reshape
from . import ir

aten = torch.ops.aten

TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)

_FOLLOWERS = (ops.add, ops.mul, ops.silu, ops.gelu, ops.cast, ops.residual_add)

Image = Callable[[Node], Node]
"""Channels-first value -> its channels-last equivalent."""


def to_channels_last(graph: Graph) -> None:
    """Rewrite every four-dimensional operator that has a channels-last form."""
    last: dict[Node, Node] = {}

    def image(node: Node) -> Node:
        if node not in last:
            last[node] = ir.emit(graph, ops.permute, [node], {"dims": TO_LAST})
        return last[node]

    for node in list(graph.nodes):
        if node.op != "call_function" or not ir.is_tensor(node) or ir.rank(node) != 4:
            continue
        if ir.is_call(node, ops.permute) and ir.attribute(node, "dims") == TO_FIRST:
            last[node] = ir.source(node)
            continue
        with graph.inserting_before(node):
            if node.target in _RULES:
                new = _RULES[node.target](graph, node, image)
            elif node.target in _FOLLOWERS and any(n in last for n in node.all_input_nodes):
                new = _follow(graph, node, image)
            else:
                continue
            if new is None:
                continue
            first = ir.emit(graph, ops.permute, [new], {"dims": TO_FIRST}, like=node)
        last[first] = new
        ir.replace(node, first)


def _conv2d(graph: Graph, node: Node, image: Image) -> Node | None:
    given = ir.arguments(node)
    weight, bias, groups = given["weight"], given["bias"], given["groups"]
    if not ir.is_constant(weight):
        return None
    recipe: Recipe = weight.meta["recipe"]
    x = image(given["input"])
    stride, padding, dilation = (_pair(given[k]) for k in ("stride", "padding", "dilation"))
    out_channels, in_channels, *kernel = recipe.shape
    if kernel == [1, 1] and stride == (1, 1) and padding == (0, 0) and groups == 1:
        matrix = Reshape(recipe, (out_channels, in_channels))
        tensors = [x, ir.constant(graph, matrix, ir.dtype(weight), f"{weight.name}_matrix"), bias]
        return ir.emit(graph, ops.linear, [*tensors, None], {"activation": "none"})
    filters = Permute(recipe, TO_LAST)
    tensors = [x, ir.constant(graph, filters, ir.dtype(weight), f"{weight.name}_nhwc"), bias]
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return ir.emit(graph, ops.conv2d, [*tensors, None, None], attrs, shape=_last_shape(node))


def _group_norm(graph: Graph, node: Node, image: Image) -> Node:
    given = ir.arguments(node)
    tensors = [image(given["input"]), given["weight"], given["bias"]]
    attrs = {"groups": given["num_groups"], "eps": given["eps"], "activation": "none"}
    return ir.emit(graph, ops.group_norm, tensors, attrs)


def _upsample_nearest(graph: Graph, node: Node, image: Image) -> Node | None:
    given = ir.arguments(node)
    x, scales = given["input"], given["scale_factors"]
    # A given scale, not the sizes' ratio, picks the pixels. They agree where the scale is whole.
    if scales is not None and any(scale != int(scale) for scale in scales):
        return None
    attrs = {"size": ir.shape(node)[2:]}
    return ir.emit(graph, ops.upsample_nearest, [image(x)], attrs, shape=_last_shape(node))


def _follow(graph: Graph, node: Node, image: Image) -> Node:
    """A pointwise operator on the channels-last forms of what it reads."""

    def operand(value: Node | None) -> Node | None:
        if value is None:
            return None
        if ir.rank(value) < 4:
            shape = (1,) * (4 - ir.rank(value)) + ir.shape(value)
            value = ir.emit(graph, ops.reshape, [value], {"shape": shape})
        return image(value)

    assert callable(node.target)
    tensors = [operand(value) for value in ir.tensors(node)]
    shape, dtype = _last_shape(node), ir.dtype(node)
    return ir.emit(graph, node.target, tensors, node.kwargs, shape=shape, dtype=dtype)


def _last_shape(node: Node) -> ir.Shape:
    return tuple(ir.shape(node)[d] for d in TO_LAST)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


_RULES: dict[Any, Callable[[Graph, Node, Image], Node | None]] = {
    aten.conv2d.default: _conv2d,
    aten.group_norm.default: _group_norm,
    aten.upsample_nearest2d.vec: _upsample_nearest,
}
