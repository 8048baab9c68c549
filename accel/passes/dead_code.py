"""Drop what no output depends on; inputs stay, since callers name them."""

from __future__ import annotations

from torch.fx import Graph

from . import ir


def remove_dead_code(graph: Graph) -> None:
    """Erase unread calls and unread constants."""
    ir.erase_dead_calls(graph)
    for node in list(graph.nodes):
        if ir.is_constant(node) and not node.users:
            graph.erase_node(node)
