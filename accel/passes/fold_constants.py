"""Evaluate what depends on no input, such as the frequencies of the timestep embedding."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..plan.lower import CAPTURE_DTYPE
from ..plan.recipe import Literal
from . import ir

LIMIT = 1 << 16
"""Elements. Larger tables are cheaper to compute than to store as JSON."""


def fold_constants(graph: Graph) -> None:
    """Replace each float32 value that no placeholder reaches by a literal, computed on the CPU.

    A value in the compute dtype is not evaluated, nor what depends on it: float16 only stands for
    it.
    """
    values: dict[Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or any(n not in values for n in node.all_input_nodes):
            continue
        if not ir.is_tensor(node) or ir.dtype(node) == CAPTURE_DTYPE:
            continue
        if not all(isinstance(size, int) for size in ir.shape(node)):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        with torch.device("cpu"):
            values[node] = node.target(*args, **{k: v for k, v in kwargs.items() if k != "device"})
    for node, value in values.items():
        if all(user in values for user in node.users):
            continue
        if value.dtype != torch.float32 or value.numel() > LIMIT:
            continue
        literal = Literal(tuple(value.flatten().tolist()), tuple(value.shape))
        name = f"literal_{node.name}"
        node.replace_all_uses_with(ir.constant(graph, literal, torch.float32, name))
    ir.erase_dead_calls(graph)
