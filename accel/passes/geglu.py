"""`linear -> halves -> hidden * gelu(gate)` as one matrix product with an epilogue."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from .. import ops
from . import ir


def fuse_geglu(graph: Graph) -> None:
    """Fuse where the projection feeds nothing but its two halves; the exact GELU only."""
    for node in ir.calls(graph, ops.mul):
        a, b = node.args
        for hidden, activated in ((a, b), (b, a)):
            projection = _match(hidden, activated)
            if projection is None:
                continue
            x, weight, bias, _ = projection.args
            with graph.inserting_before(node):
                new = ir.emit(
                    graph,
                    ops.linear,
                    [x, weight, bias, None],  # type: ignore[list-item]
                    {"activation": "geglu"},
                    like=node,
                )
            ir.replace(node, new)
            break
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _match(hidden: Any, activated: Any) -> Node | None:
    if not ir.is_call(activated, ops.gelu) or activated.kwargs.get("approximate", "none") != "none":
        return None
    gate = activated.args[0]
    if not ir.is_call(hidden, ops.slice_dim) or not ir.is_call(gate, ops.slice_dim):
        return None
    projection = hidden.args[0]
    if gate.args[0] is not projection or not ir.is_call(projection, ops.linear):
        return None
    if projection.args[3] is not None or projection.kwargs["activation"] != "none":
        return None
    columns = ir.shape(projection)[-1]
    last = ir.rank(projection) - 1
    halves = [{"dim": last, "start": s, "length": columns // 2} for s in (0, columns // 2)]
    if [dict(hidden.kwargs), dict(gate.kwargs)] != halves:
        return None
    readers = {hidden, gate}
    if set(projection.users) != readers or len(activated.users) != 1 or len(gate.users) != 1:
        return None
    return projection if len(hidden.users) == 1 else None
