"""Phase partition: how often each value changes, which is the set of inputs that it depends on.

`static` depends on nothing, `prompt` on the prompt alone (every cross-attention K and V),
`timestep` on the timestep, `step` on the latent. What has the phase `prompt` need not run again
while the caller vouches, by a key, that the prompt is the same.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from . import ir


def partition_phases(graph: Graph) -> None:
    """Write `meta["phase"]` on every call."""
    depends: dict[Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            constant = ir.is_constant(node)
            depends[node] = frozenset() if constant else frozenset([node.meta["input"].phase])
        elif node.op == "call_function":
            sources = (depends[n] for n in node.all_input_nodes)
            depends[node] = frozenset[str]().union(*sources)
            node.meta["phase"] = _phase(depends[node])


def _phase(depends: frozenset[str]) -> str:
    if "step" in depends:
        return "step"
    return "+".join(p for p in ("prompt", "timestep") if p in depends) or "static"
