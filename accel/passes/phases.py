"""Phase partition: how often each value changes, which is the set of inputs that it depends on.

`static` depends on nothing, `prompt` on the prompt alone (every cross-attention K and V), `timestep` on the
timestep, `step` on the latent. What has the phase `prompt` need not run again while the caller vouches, by
a key, that the prompt is the same.
"""

from __future__ import annotations

from torch.fx import Graph

from . import ir


def partition_phases(graph: Graph) -> None:
    """Write `meta["phase"]` on every call."""
    inputs: dict[object, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs[node] = frozenset() if ir.is_constant(node) else {node.meta["input"].phase}
        elif node.op == "call_function":
            depends = frozenset().union(*(inputs[n] for n in node.all_input_nodes))
            inputs[node] = depends
            node.meta["phase"] = _phase(depends)


def _phase(depends: frozenset[str]) -> str:
    if "step" in depends:
        return "step"
    return "+".join(p for p in ("prompt", "timestep") if p in depends) or "static"
