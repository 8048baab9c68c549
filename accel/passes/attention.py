"""`scaled_dot_product_attention` between splits into heads, as one operator on projections' layout."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from . import ir

_SPLIT = (0, 2, 1, 3)


def fuse_attention(graph: Graph) -> None:
    """Rewrite q, k, v split into heads -> attention -> heads joined. Masks and causal attention stay ATen's."""
    for node in ir.calls(graph, torch.ops.aten.scaled_dot_product_attention.default):
        if len(node.args) > 3 or set(node.kwargs) - {"scale"}:
            arguments = dict(
                zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)
            )
            arguments.update(node.kwargs)
            if arguments.get("attn_mask") is not None or arguments.get("is_causal"):
                continue
            if arguments.get("dropout_p") or arguments.get("enable_gqa"):
                continue
        projections = [_projection(n) for n in node.args[:3]]
        joined = _join(node)
        if joined is None or any(p is None for p in projections):
            continue
        _, heads, _, width = ir.shape(node)
        scale = node.kwargs.get("scale")
        attrs = {"heads": heads, "scale": float(width) ** -0.5 if scale is None else scale}
        with graph.inserting_before(joined):
            new = ir.emit(graph, ops.attention, projections, attrs, like=joined)
        ir.replace(joined, new)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _projection(node: Any) -> Node | None:
    """x of `x.reshape(B, S, heads, D).permute(0, 2, 1, 3)`, if x is [B, S, heads*D]."""
    if not ir.is_call(node, ops.permute) or node.kwargs["dims"] != _SPLIT:
        return None
    split = node.args[0]
    if not ir.is_call(split, ops.reshape) or ir.rank(split) != 4:
        return None
    x = split.args[0]
    batch, length, heads, width = ir.shape(split)
    return x if ir.shape(x) == (batch, length, heads * width) else None


def _join(node: Node) -> Node | None:
    """The [B, S, heads*D] that the attention's result ends in, if nothing else reads it."""
    permuted = ir.only_user(node)
    if not ir.is_call(permuted, ops.permute) or permuted.kwargs["dims"] != _SPLIT:  # type: ignore[union-attr]
        return None
    joined = ir.only_user(permuted)  # type: ignore[arg-type]
    if not ir.is_call(joined, ops.reshape):
        return None
    batch, heads, length, width = ir.shape(node)
    return joined if ir.shape(joined) == (batch, length, heads * width) else None  # type: ignore[arg-type]
