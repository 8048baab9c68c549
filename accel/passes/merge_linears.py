"""Matrix products that read the same tensor, as one product over stacked weights.

Three places in a denoiser: Q, K and V of self-attention; K and V of every cross-attention, which all read
the prompt; and the projections of the time embedding, one per residual block. One wide product keeps the
GPU busy where many narrow ones leave most of it idle.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from .. import ops
from . import ir
from ..plan.recipe import Cat


def merge_linears(graph: Graph) -> None:
    """Merge plain products (no activation, no residual) with one reader's worth of input and like biases."""
    groups: dict[tuple[Any, ...], list[Node]] = {}
    for node in ir.calls(graph, ops.linear):
        x, weight, bias, residual = node.args
        if residual is not None or node.kwargs["activation"] != "none":
            continue
        if not ir.is_constant(weight) or not (bias is None or ir.is_constant(bias)):
            continue
        groups.setdefault((x, bias is None), []).append(node)
    for (x, no_bias), members in groups.items():
        if len(members) > 1:
            _merge(graph, x, members, no_bias)


def _merge(graph: Graph, x: Node, members: list[Node], no_bias: bool) -> None:
    first = members[0]
    weights: list[Any] = [m.args[1] for m in members]
    name = f"{first.name}_merged"
    weight = ir.constant(graph, _cat(weights), ir.dtype(weights[0]), f"{name}_weight")
    bias = None
    if not no_bias:
        biases: list[Any] = [m.args[2] for m in members]
        bias = ir.constant(graph, _cat(biases), ir.dtype(biases[0]), f"{name}_bias")
    with graph.inserting_before(first):
        tensors = [x, weight, bias, None]
        merged = ir.emit(graph, ops.linear, tensors, {"activation": "none"}, dtype=ir.dtype(first))
    start = 0
    for member in members:
        length = ir.shape(member)[-1]
        attrs = {"dim": ir.rank(member) - 1, "start": start, "length": length}
        with graph.inserting_before(member):
            part = ir.emit(graph, ops.slice_dim, [merged], attrs, like=member)
        ir.replace(member, part)
        start += length


def _cat(constants: list[Node]) -> Cat:
    return Cat(tuple(node.meta["recipe"] for node in constants), dim=0)
