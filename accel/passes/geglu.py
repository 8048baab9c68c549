"""`linear -> halves -> hidden * gelu(gate)` as one matrix product with an epilogue."""

from __future__ import annotations

from torch.fx import Graph, Node

from .. import ops
from . import ir


def fuse_geglu(graph: Graph) -> None:
    """Fuse where the projection feeds nothing but its two halves; the exact GELU only."""
    for node in ir.calls(graph, ops.mul):
        a, b = ir.tensors(node)
        projection = _match(a, b) or _match(b, a)
        if projection is None:
            continue
        x, weight, bias, _ = ir.tensors(projection)
        with graph.inserting_before(node):
            tensors = [x, weight, bias, None]
            new = ir.emit(graph, ops.linear, tensors, {"activation": "geglu"}, like=node)
        ir.replace(node, new)
    ir.erase_dead_calls(graph)


def _match(hidden: Node | None, activated: Node | None) -> Node | None:
    """The projection, if `hidden * activated` is all that becomes of it."""
    if not ir.is_call(activated, ops.gelu) or ir.attribute(activated, "approximate") != "none":
        return None
    gate = ir.source(activated)
    if not ir.is_call(hidden, ops.slice_dim) or not ir.is_call(gate, ops.slice_dim):
        return None
    projection = ir.source(hidden)
    if ir.source(gate) is not projection or not ir.is_call(projection, ops.linear):
        return None
    if ir.tensors(projection)[3] is not None or ir.attribute(projection, "activation") != "none":
        return None
    columns, last = ir.shape(projection)[-1], ir.rank(projection) - 1
    halves = [{"dim": last, "start": s, "length": columns // 2} for s in (0, columns // 2)]
    if columns % 2 or [dict(hidden.kwargs), dict(gate.kwargs)] != halves:
        return None
    if set(projection.users) != {hidden, gate}:
        return None
    if any(ir.only_user(part) is None for part in (hidden, gate, activated)):
        return None
    return projection
