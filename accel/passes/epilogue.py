"""Adds that follow a convolution or a matrix product, done where their result is still at hand."""

from __future__ import annotations

from torch.fx import Graph, Node

from .. import ops
from . import ir


def fuse_epilogues(graph: Graph) -> None:
    """Fold `y + other` into the producer of y: a time embedding, then a residual of y's shape.

    The producer must have no other reader, and the fused call stands where the add stood, so that
    both operands exist by then. Of two producers the later one takes the other's result as its
    residual. Where that leaves the producer without a residual, an optional one takes the place.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in ir.calls(graph, ops.add):
        a, b = ir.tensors(node)
        assert a is not None and b is not None
        if position.get(a, -1) < position.get(b, -1):
            a, b = b, a
        with graph.inserting_before(node):
            fused = _fuse(graph, node, a, b) or _fuse(graph, node, b, a)
        if fused is not None:
            position[fused] = position[node]
            ir.replace(node, fused)
    for node in ir.calls(graph, ops.residual_add):
        producer, optional = ir.tensors(node)
        assert producer is not None and optional is not None
        if ir.is_call(producer, ops.reshape):
            continue  # the reshape of what is not given would be left
        with graph.inserting_before(node):
            fused = _fuse(graph, node, producer, optional)
        if fused is not None:
            ir.replace(node, fused)
    ir.erase_dead_calls(graph)


def _fuse(graph: Graph, node: Node, producer: Node, other: Node) -> Node | None:
    if producer is other or ir.only_user(producer) is not node:
        return None
    if ir.is_call(producer, ops.conv2d):
        return _fuse_conv2d(graph, node, producer, other)
    if ir.is_call(producer, ops.reshape):
        return _fuse_through_reshape(graph, node, producer, other)
    if not ir.is_call(producer, ops.linear) or ir.shape(other) != ir.shape(producer):
        return None
    return _fuse_linear(graph, producer, other)


def _fuse_conv2d(graph: Graph, node: Node, producer: Node, other: Node) -> Node | None:
    *tensors, embedding, residual = ir.tensors(producer)
    if residual is not None:
        return None
    batch, _, _, channels = ir.shape(producer)
    if ir.shape(other) == ir.shape(producer):
        tensors += [embedding, other]
    elif embedding is None and ir.shape(other) == (batch, 1, 1, channels):
        tensors += [_vector(graph, other), None]
    else:
        return None
    return ir.emit(graph, ops.conv2d, tensors, producer.kwargs, like=node)


def _vector(graph: Graph, embedding: Node) -> Node:
    """[B, 1, 1, C] as [B, C]."""
    batch, _, _, channels = ir.shape(embedding)
    if ir.is_call(embedding, ops.reshape) and ir.shape(ir.source(embedding)) == (batch, channels):
        return ir.source(embedding)
    return ir.emit(graph, ops.reshape, [embedding], {"shape": (batch, channels)})


def _fuse_linear(graph: Graph, producer: Node, other: Node) -> Node | None:
    *tensors, residual = ir.tensors(producer)
    if residual is not None:
        return None
    return ir.emit(graph, ops.linear, [*tensors, other], producer.kwargs, like=producer)


def _fuse_through_reshape(graph: Graph, node: Node, reshaped: Node, other: Node) -> Node | None:
    """`reshape(linear(x)) + other`: tokens on their way back to an image."""
    producer = ir.source(reshaped)
    if not ir.is_call(producer, ops.linear) or ir.only_user(producer) is not reshaped:
        return None
    if ir.shape(other) != ir.shape(reshaped) or ir.tensors(producer)[3] is not None:
        return None
    shape = {"shape": ir.shape(producer)}
    residual = ir.emit(graph, ops.reshape, [other], shape, like=producer)
    fused = _fuse_linear(graph, producer, residual)
    assert fused is not None
    return ir.emit(graph, ops.reshape, [fused], {"shape": ir.shape(node)}, like=node)
