"""Lowering: the optimised graph, written down as a plan."""

from __future__ import annotations

from itertools import chain, count
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..errors import UnsupportedModel
from .recipe import Recipe, params
from .schema import COMPUTE, DTYPES, Constant, Input, Output, Plan, Step
from .shapes import Size, from_sympy

CAPTURE_DTYPE = torch.float16
"""The dtype of the captured twin, which stands for "whatever the session computes in"."""

_ROLES = {dtype: name for name, dtype in DTYPES.items()} | {CAPTURE_DTYPE: COMPUTE}


def lower(graph: Graph, structure: dict[str, Any]) -> Plan:
    """The plan of a graph that has been through `PASSES`.

    Raises `UnsupportedModel` for a call that is neither an operator of ours nor a functional ATen one.
    """
    inputs: list[Input] = []
    constants: list[Constant] = []
    steps: list[Step] = []
    outputs: tuple[Output, ...] = ()
    names: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and "recipe" in node.meta:
            recipe = node.meta["recipe"]
            names[node] = _unique(_constant_name(recipe), names)
            constants.append(Constant(names[node], _role(node), recipe))
        elif node.op == "placeholder":
            inputs.append(_input(node, names))
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            outputs = tuple(_output(result, names) for result in results)
        elif node not in names:
            entry = ops.of(node.target)
            names[node] = f"{entry.name if entry else str(node.target).split('.')[1]}_{len(steps)}"
            steps.append(_step(node, names))
    written = {output.value for output in outputs} | {n for s in steps for n in s.inputs if n}
    plan = Plan(
        structure,
        tuple(inputs),
        outputs,
        tuple(constants),
        tuple(step for step in steps if step.output in written),
    )
    plan.check()
    return plan


def _constant_name(recipe: Recipe) -> str:
    """The parameter's own name; for several together, the first one's and how many more."""
    sources = [param.name for param in params(recipe)]
    more = f" +{len(sources) - 1}" if len(sources) > 1 else ""
    return (sources[0] if sources else "literal") + more


def _unique(name: str, names: dict[Node, str]) -> str:
    taken = set(names.values())
    candidates = chain([name], (f"{name} ({i})" for i in count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _role(node: Node) -> str:
    dtype = node.meta["dtype"]
    if dtype not in _ROLES:
        raise UnsupportedModel(f"{node.name} has dtype {dtype}, which plans do not express")
    return _ROLES[dtype]


def _sizes(node: Node) -> tuple[Size, ...]:
    return tuple(from_sympy(size) for size in node.meta["shape"])


def _input(node: Node, names: dict[Node, str]) -> Input:
    """An input; if all that is read of it is one permutation, it is stored permuted."""
    entry: Input = node.meta["input"]
    names[node] = entry.name
    permute = None
    readers = list(node.users)
    permutations = {r.kwargs.get("dims") for r in readers if r.target is ops.permute}
    if readers and len(permutations) == 1 and all(r.target is ops.permute for r in readers):
        permute = permutations.pop()
        names.update(dict.fromkeys(readers, entry.name))
    dtype = entry.dtype or _role(node)
    return Input(entry.name, _sizes(node), dtype, entry.phase, entry.optional, permute)  # type: ignore[arg-type]


def _output(node: Node, names: dict[Node, str]) -> Output:
    if node.op == "call_function" and node.target is ops.permute:
        source: Any = node.args[0]
        return Output(names[source], tuple(node.kwargs["dims"]))  # type: ignore[arg-type]
    return Output(names[node])


def _step(node: Node, names: dict[Node, str]) -> Step:
    entry = ops.of(node.target)
    if entry is not None:
        tensors = [None if n is None else names[n] for n in node.args]  # type: ignore[index]
        attrs = {
            key: _sized(value) if key in entry.sizes else _plain(value, node)
            for key, value in node.kwargs.items()
        }
        name = entry.name
    else:
        aten = ops.aten_name(node.target)
        if aten is None:
            raise UnsupportedModel(f"the network calls {node.target}, which cannot be compiled")
        sources: list[str | None] = []

        def template(value: Any) -> Any:
            if isinstance(value, Node):
                sources.append(names[value])
                return {"tensor": len(sources) - 1}
            if isinstance(value, (tuple, list)):
                return tuple(template(item) for item in value)
            return _plain(value, node)

        attrs = {"args": [template(value) for value in node.args]}
        kwargs = {k: template(v) for k, v in node.kwargs.items() if k != "device"}
        if kwargs:
            attrs["kwargs"] = kwargs
        tensors, name = sources, aten
    phase = node.meta["phase"]
    return Step(name, tuple(tensors), attrs, names[node], _sizes(node), _role(node), phase)


def _sized(value: Any) -> Any:
    return tuple(from_sympy(v) for v in value) if isinstance(value, tuple) else from_sympy(value)


def _plain(value: Any, node: Node) -> Any:
    """An attribute as JSON: numbers, strings, dtypes by role, tuples of these."""
    if isinstance(value, torch.dtype):
        if value not in _ROLES:
            raise UnsupportedModel(f"{node.name} uses {value}, which plans do not express")
        return {"dtype": _ROLES[value]} if ops.of(node.target) is None else _ROLES[value]
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, node) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    size = getattr(value, "is_Integer", None)
    if size is not None:
        raise UnsupportedModel(f"{node.name} computes with a size, which plans do not express")
    raise UnsupportedModel(f"{node.name} has an attribute of type {type(value).__name__}")
