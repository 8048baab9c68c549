"""`scaled_dot_product_attention` between splits into heads, on the projections' own layout."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .. import ops
from . import ir

_SPLIT = (0, 2, 1, 3)


def fuse_attention(graph: Graph) -> None:
    """Rewrite q, k, v split into heads -> attention -> heads joined.

    Masks, causal attention, dropout and keys of another batch or head count stay ATen's.
    """
    for node in ir.calls(graph, torch.ops.aten.scaled_dot_product_attention.default):
        given = ir.arguments(node)
        if given["attn_mask"] is not None or given["is_causal"] or given["dropout_p"]:
            continue
        projections = [_projection(given[name]) for name in ("query", "key", "value")]
        joined = _join(node)
        if joined is None or None in projections:
            continue
        query, key, value = (ir.shape(given[name]) for name in ("query", "key", "value"))
        batch, heads, _, width = query
        if key != value or (key[0], key[1], key[3]) != (batch, heads, width):
            continue
        scale = float(width) ** -0.5 if given["scale"] is None else given["scale"]
        attrs = {"heads": heads, "scale": scale}
        with graph.inserting_before(joined):
            new = ir.emit(graph, ops.attention, projections, attrs, like=joined)
        ir.replace(joined, new)
    ir.erase_dead_calls(graph)


def _projection(node: Node) -> Node | None:
    """x of `x.reshape(B, S, heads, D).permute(0, 2, 1, 3)`, if x is [B, S, heads*D]."""
    if not ir.is_call(node, ops.permute) or ir.attribute(node, "dims") != _SPLIT:
        return None
    split = ir.source(node)
    if not ir.is_call(split, ops.reshape):
        return None
    x = ir.source(split)
    batch, length, heads, width = ir.shape(split)
    return x if ir.shape(x) == (batch, length, heads * width) else None


def _join(node: Node) -> Node | None:
    """The [B, S, heads*D] that the attention's result ends in, if nothing else reads it."""
    permuted = ir.only_user(node)
    if not ir.is_call(permuted, ops.permute) or ir.attribute(permuted, "dims") != _SPLIT:
        return None
    joined = ir.only_user(permuted)
    if not ir.is_call(joined, ops.reshape):
        return None
    batch, heads, length, width = ir.shape(node)
    return joined if ir.shape(joined) == (batch, length, heads * width) else None
