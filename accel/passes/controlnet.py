"""ControlNet's residual adds, done while the up block's concatenation reads its parts.

The residual belongs to the skip path only: the next down block must read the un-added tensor, which
it does, since nothing but the concatenation sees the sum.
"""

from __future__ import annotations

from typing import TypeGuard

from torch.fx import Graph, Node

from .. import ops
from . import ir


def fold_controlnet(graph: Graph) -> None:
    """Fold `residual_add` into the concatenation, where that is its only reader."""
    for node in ir.calls(graph, ops.concat):
        tensors = ir.tensors(node)
        pairs: list[Node | None] = []
        for part, residual in zip(tensors[::2], tensors[1::2], strict=True):
            if residual is None and _read_here_only(part, node):
                pairs += ir.tensors(part)
            else:
                pairs += [part, residual]
        node.args = tuple(pairs)
    ir.erase_dead_calls(graph)


def _read_here_only(part: Node | None, node: Node) -> TypeGuard[Node]:
    return ir.is_call(part, ops.residual_add) and ir.only_user(part) is node
