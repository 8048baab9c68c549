"""ControlNet's residual adds, done while the up block's concatenation reads its parts.

The residual belongs to the skip path only: the next down block must read the un-added tensor, which it
does, since nothing but the concatenation sees the sum.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph

from .. import ops
from . import ir


def fold_controlnet(graph: Graph) -> None:
    """Fold `residual_add` into the concatenation, where that is its only reader."""
    for node in ir.calls(graph, ops.concat):
        pairs: list[Any] = list(node.args)
        folded = []
        for i in range(0, len(pairs), 2):
            source = pairs[i]
            if pairs[i + 1] is None and ir.is_call(source, ops.residual_add):
                if ir.only_user(source) is node:
                    pairs[i], pairs[i + 1] = source.args
                    folded.append(source)
        if folded:
            node.args = tuple(pairs)
            for source in folded:
                graph.erase_node(source)
