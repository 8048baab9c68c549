"""Common subexpressions: two calls of one operator on the same tensors with the same attributes."""

from __future__ import annotations

from torch.fx import Graph, Node

from . import ir


def deduplicate(graph: Graph) -> None:
    """Let every repeated call read the first one's result."""
    seen: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        attributes = repr(sorted(node.kwargs.items()))
        key = (node.target, repr(node.args), attributes, node.meta.get("dtype"))
        first = seen.setdefault(key, node)
        if first is not node:
            ir.replace(node, first)
