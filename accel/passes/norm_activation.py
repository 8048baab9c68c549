"""GroupNorm followed by SiLU as one operator."""

from __future__ import annotations

from torch.fx import Graph

from .. import ops
from . import ir


def fuse_norm_activation(graph: Graph) -> None:
    """Fuse where the SiLU is the norm's only reader."""
    for norm in ir.calls(graph, ops.group_norm):
        user = ir.only_user(norm)
        if ir.attribute(norm, "activation") != "none" or not ir.is_call(user, ops.silu):
            continue
        attrs = {**norm.kwargs, "activation": "silu"}
        with graph.inserting_before(user):
            new = ir.emit(graph, ops.group_norm, ir.tensors(norm), attrs, like=user)
        ir.replace(user, new)
        graph.erase_node(norm)
