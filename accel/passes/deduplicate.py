"""Common subexpressions: two calls of one operator on the same tensors with the same attributes."""

from __future__ import annotations

from torch.fx import Graph

from . import ir


def deduplicate(graph: Graph) -> None:
    """Let every repeated call read the first one's result. All operators are pure."""
    seen: dict[object, object] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())), node.meta.get("dtype"))
        first = seen.setdefault(key, node)
        if first is not node:
            ir.replace(node, first)  # type: ignore[arg-type]
