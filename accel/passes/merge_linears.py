"""Matrix products that read the same tensor, as one product over stacked weights.

Three places in a denoiser: Q, K and V of self-attention; K and V of every cross-attention, which
all read the prompt; and the projections of the time embedding, one per residual block. One wide
product keeps the GPU busy where many narrow ones leave most of it idle.
"""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Graph, Node

from .. import ops
from ..plan.recipe import Cat
from . import ir


def merge_linears(graph: Graph) -> None:
    """Merge plain products (no activation, no residual) by constants of one dtype."""
    groups: dict[object, list[Node]] = defaultdict(list)
    for node in ir.calls(graph, ops.linear):
        x, weight, bias, residual = ir.tensors(node)
        if residual is not None or ir.attribute(node, "activation") != "none":
            continue
        if not ir.is_constant(weight) or not (bias is None or ir.is_constant(bias)):
            continue
        dtypes = (ir.dtype(weight), None if bias is None else ir.dtype(bias))
        groups[x, dtypes].append(node)
    for members in groups.values():
        if len(members) > 1:
            _merge(graph, members)


def _merge(graph: Graph, members: list[Node]) -> None:
    first = members[0]
    x = ir.source(first)
    weight = _stacked(graph, [ir.tensors(m)[1] for m in members], f"{first.name}_merged_weight")
    bias = _stacked(graph, [ir.tensors(m)[2] for m in members], f"{first.name}_merged_bias")
    with graph.inserting_before(first):
        merged = ir.emit(graph, ops.linear, [x, weight, bias, None], {"activation": "none"})
    start = 0
    for member in members:
        length = ir.shape(member)[-1]
        attrs = {"dim": ir.rank(member) - 1, "start": start, "length": length}
        with graph.inserting_before(member):
            part = ir.emit(graph, ops.slice_dim, [merged], attrs, like=member)
        ir.replace(member, part)
        start += length


def _stacked(graph: Graph, constants: list[Node | None], name: str) -> Node | None:
    """One constant of all rows, or None for absent biases."""
    present = [node for node in constants if node is not None]
    if not present:
        return None
    recipe = Cat(tuple(node.meta["recipe"] for node in present), dim=0)
    return ir.constant(graph, recipe, ir.dtype(present[0]), name)
