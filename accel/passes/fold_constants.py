"""Evaluate what depends on no input, such as the frequencies of the timestep embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from . import ir
from ..plan.recipe import Literal

LIMIT = 1 << 16
"""Elements. Larger tables are cheaper to compute than to store as JSON."""


def fold_constants(graph: Graph) -> None:
    """Replace each float32 value that no placeholder reaches by a literal constant, computed on the CPU."""
    values: dict[Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or any(n not in values for n in node.all_input_nodes):
            continue
        if not all(isinstance(size, int) for size in ir.shape(node)):
            continue
        kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k != "device"}
        args: Any = torch.fx.node.map_arg(node.args, values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node, value in values.items():
        if all(user in values for user in node.users):
            continue
        if value.dtype != torch.float32 or value.numel() > LIMIT:
            continue
        literal = Literal(tuple(value.flatten().tolist()), tuple(value.shape))
        node.replace_all_uses_with(
            ir.constant(graph, literal, torch.float32, f"literal_{node.name}")
        )
    graph.eliminate_dead_code()
