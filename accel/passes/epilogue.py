"""Adds that follow a convolution or a matrix product, done where their result is still at hand."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from .. import ops
from . import ir


def fuse_epilogues(graph: Graph) -> None:
    """Fold `y + other` into the producer of y: a time embedding, then a residual of y's shape.

    The producer must have no other reader, and the fused call stands where the add stood, so that both
    operands exist by then. Of two producers the later one takes the other's result as its residual.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in ir.calls(graph, ops.add):
        operands = sorted(node.args, key=lambda n: position.get(n, -1), reverse=True)  # type: ignore[arg-type]
        for producer, other in (operands, operands[::-1]):
            fused = _fuse(graph, node, producer, other)
            if fused is not None:
                position[fused] = position[node]
                ir.replace(node, fused)
                _erase_chain(graph, producer)
                break


def _erase_chain(graph: Graph, node: Node) -> None:
    """Erase a producer that nothing reads any more, and the reshape's source behind it."""
    while not node.users and node.op == "call_function":
        source = node.args[0]
        graph.erase_node(node)
        if node.target is not ops.reshape or not isinstance(source, Node):
            return
        node = source


def _fuse(graph: Graph, node: Node, producer: Any, other: Any) -> Node | None:
    if producer is other or ir.only_user(producer) is not node:
        return None
    if ir.is_call(producer, ops.reshape):
        return _fuse_through_reshape(graph, node, producer, other)
    if ir.is_call(producer, ops.conv2d):
        x, weight, bias, embedding, residual = producer.args
        if embedding is None and residual is None and (e := _per_channel(producer, other)):
            tensors = [x, weight, bias, _vector(graph, node, e), None]
        elif residual is None and ir.shape(other) == ir.shape(producer):
            tensors = [x, weight, bias, embedding, other]
        else:
            return None
    elif ir.is_call(producer, ops.linear) and producer.args[3] is None:
        if ir.shape(other) != ir.shape(producer):
            return None
        tensors = [*producer.args[:3], other]
    else:
        return None
    with graph.inserting_before(node):
        return ir.emit(graph, producer.target, tensors, dict(producer.kwargs), like=node)


def _fuse_through_reshape(graph: Graph, node: Node, reshaped: Node, other: Node) -> Node | None:
    """`reshape(linear(x)) + other`: tokens on their way back to an image."""
    producer: Any = reshaped.args[0]
    if not ir.is_call(producer, ops.linear) or ir.only_user(producer) is not reshaped:
        return None
    if producer.args[3] is not None:
        return None
    if not ir.shape(other) == ir.shape(reshaped) == ir.shape(node):
        return None
    with graph.inserting_before(node):
        shape = {"shape": ir.shape(producer)}
        residual = ir.emit(graph, ops.reshape, [other], shape, like=producer)
        tensors = [*producer.args[:3], residual]
        fused = ir.emit(graph, ops.linear, tensors, dict(producer.kwargs), like=producer)
        return ir.emit(graph, ops.reshape, [fused], {"shape": ir.shape(node)}, like=node)


def _per_channel(image: Node, other: Node) -> Node | None:
    """`other` if it is [B, 1, 1, C] beside an image [B, H, W, C]."""
    batch, _, _, channels = ir.shape(image)
    return other if ir.shape(other) == (batch, 1, 1, channels) else None


def _vector(graph: Graph, node: Node, embedding: Node) -> Node:
    if ir.is_call(embedding, ops.reshape) and ir.rank(embedding.args[0]) == 2:  # type: ignore[arg-type]
        return embedding.args[0]  # type: ignore[return-value]
    batch, _, _, channels = ir.shape(embedding)
    with graph.inserting_before(node):
        return ir.emit(graph, ops.reshape, [embedding], {"shape": (batch, channels)})
