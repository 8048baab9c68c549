"""GroupNorm followed by SiLU as one operator."""

from __future__ import annotations

from torch.fx import Graph

from .. import ops
from . import ir


def fuse_norm_activation(graph: Graph) -> None:
    """Fuse where the SiLU is the norm's only reader."""
    for norm in ir.calls(graph, ops.group_norm):
        user = ir.only_user(norm)
        if norm.kwargs["activation"] != "none" or not ir.is_call(user, ops.silu):
            continue
        assert user is not None
        with graph.inserting_before(user):
            attrs = {**norm.kwargs, "activation": "silu"}
            new = ir.emit(graph, ops.group_norm, norm.args, attrs, like=user)  # type: ignore[arg-type]
        ir.replace(user, new)
        graph.erase_node(norm)
