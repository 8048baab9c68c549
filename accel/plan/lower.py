"""Lowering: the optimised graph, written down as a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def lower(graph: Graph, structure: Mapping[str, Any]) -> Plan:
    """The plan of a graph that has been through `PASSES`.

    Raises `UnsupportedModel` for a call that is neither an operator of ours nor a functional ATen
    one of tensors.
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
            steps.append(_step(node, names, len(steps)))
            names[node] = steps[-1].output
    written = {output.value for output in outputs} | {n for s in steps for n in s.inputs if n}
    plan = Plan(
        json.loads(json.dumps(structure)),
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
    permute: tuple[int, ...] | None = None
    readers = list(node.users)
    permutations: set[Any] = {r.kwargs.get("dims") for r in readers if r.target is ops.permute}
    if len(permutations) == 1 and all(r.target is ops.permute for r in readers):
        permute = permutations.pop()
        names.update(dict.fromkeys(readers, entry.name))
    dtype = entry.dtype or _role(node)
    return Input(entry.name, _sizes(node), dtype, entry.phase, entry.optional, permute)


def _output(node: Node, names: dict[Node, str]) -> Output:
    if node.target is not ops.permute:
        return Output(names[node])
    (source,) = node.all_input_nodes
    if source.op == "placeholder":  # which may be stored permuted already
        return Output(names[node])
    dims: Any = node.kwargs["dims"]
    return Output(names[source], dims)


def _step(node: Node, names: dict[Node, str], index: int) -> Step:
    entry = ops.of(node.target)
    aten = ops.aten_name(node.target)
    if entry is None and aten is None:
        raise UnsupportedModel(f"the network calls {node.target}, which cannot be compiled")
    if "shape" not in node.meta:
        raise UnsupportedModel(f"the network computes with sizes: it calls {node.target}")
    inputs: tuple[Node | None, ...]
    if entry is not None:
        op = name = entry.name
        inputs = tuple(value if isinstance(value, Node) else None for value in node.args)
        attrs: dict[str, Any] = {
            key: _sized(value) if key in entry.sizes else _plain(value, node)
            for key, value in node.kwargs.items()
        }
    else:
        assert aten is not None
        op, name = aten, aten.split(".")[1]
        inputs, attrs = _template(node)
    if not any(inputs):
        raise UnsupportedModel(f"the network makes a tensor of its own: it calls {node.target}")
    return Step(
        op,
        tuple(None if value is None else names[value] for value in inputs),
        attrs,
        f"{name}_{index}",
        _sizes(node),
        _role(node),
        node.meta["phase"],
    )


def _template(node: Node) -> tuple[tuple[Node, ...], dict[str, Any]]:
    """The tensors of an ATen call, and its arguments with their positions in place of them."""
    tensors: list[Node] = []

    def template(value: Any) -> Any:
        if isinstance(value, Node):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, (tuple, list)):
            return tuple(template(item) for item in value)
        return _plain(value, node)

    attrs: dict[str, Any] = {"args": tuple(template(value) for value in node.args)}
    kwargs = {key: template(value) for key, value in node.kwargs.items() if key != "device"}
    if kwargs:
        attrs["kwargs"] = kwargs
    return tuple(tensors), attrs


def _sized(value: Any) -> Any:
    if value is None:
        return None
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
    raise UnsupportedModel(f"{node.name} has an attribute of type {type(value).__name__}")
