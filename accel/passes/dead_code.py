"""Drop what no output depends on; inputs stay, since callers name them."""

from __future__ import annotations

from torch.fx import Graph

from . import ir


def remove_dead_code(graph: Graph) -> None:
    """Erase unread calls and unread constants."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "call_function" or ir.is_constant(node)):
            graph.erase_node(node)
