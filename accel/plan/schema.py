"""The plan: what an engine runs, for any size and any GPU, without the model's code.

Every name stands for one tensor, written once. Sizes are expressions over named dimensions
(`shapes.py`), dtypes are roles: `compute` is whatever precision the session runs in, the others are
themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import InvalidPlan
from . import recipe as recipes
from .recipe import Recipe
from .shapes import Size, names

PLAN_VERSION = 3

COMPUTE = "compute"
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}

PHASES = ("static", "prompt", "timestep", "prompt+timestep", "step")


def resolve(role: str, compute: torch.dtype) -> torch.dtype:
    """The dtype that `role` means when the session computes in `compute`."""
    if role == COMPUTE:
        return compute
    if role not in DTYPES:
        raise InvalidPlan(f"unknown dtype {role!r}")
    return DTYPES[role]


@dataclass(frozen=True)
class Input:
    """A tensor of the caller. It is stored contiguous after `permute`, which the steps then read.

    `phase` says how often it changes: "prompt", "timestep" or "step".
    """

    name: str
    shape: tuple[Size, ...]
    dtype: str
    phase: str
    optional: bool = False
    permute: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Output:
    """A step's result handed to the caller, after `permute`."""

    value: str
    permute: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor made from source parameters by a recipe: a weight, in the layout steps want."""

    name: str
    dtype: str
    recipe: Recipe


@dataclass(frozen=True)
class Step:
    """One operator call: `output = op(*inputs, **attrs)`; `None` stands for an absent tensor."""

    op: str
    inputs: tuple[str | None, ...]
    attrs: dict[str, Any]
    output: str
    shape: tuple[Size, ...]
    dtype: str
    phase: str


@dataclass(frozen=True)
class Plan:
    """A compiled structure.

    `structure` says which, as JSON data: kind, family, graph_key, shape_key, config.
    """

    structure: dict[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: tuple[Constant, ...]
    steps: tuple[Step, ...]
    version: int = field(default=PLAN_VERSION)

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """The named dimensions, in the order in which inputs bring them."""
        found: dict[str, None] = {}
        for entry in self.inputs:
            if not entry.optional:
                for size in entry.shape:
                    found.update(dict.fromkeys(sorted(names(size))))
        return tuple(found)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Source parameters that the plan reads, with their shapes."""
        return {
            param.name: param.shape
            for constant in self.constants
            for param in recipes.params(constant.recipe)
        }

    def without(self, absent: Iterable[str]) -> Plan:
        """The plan specialised to calls in which the optional inputs `absent` are not given."""
        gone = set(absent)
        assert gone <= {entry.name for entry in self.inputs if entry.optional}
        alias: dict[str, str] = {}
        steps = []
        for step in self.steps:
            inputs = tuple(
                None if name in gone else alias.get(name, name) if name else None
                for name in step.inputs
            )
            if step.op == "residual_add" and inputs[1] is None:
                assert inputs[0] is not None
                alias[step.output] = inputs[0]
                continue
            steps.append(
                Step(step.op, inputs, step.attrs, step.output, step.shape, step.dtype, step.phase)
            )
        return Plan(
            self.structure,
            tuple(entry for entry in self.inputs if entry.name not in gone),
            tuple(Output(alias.get(o.value, o.value), o.permute) for o in self.outputs),
            self.constants,
            tuple(steps),
            self.version,
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as `json.dumps` takes it; `from_json` gives an equal plan back."""
        return {
            "version": self.version,
            "structure": self.structure,
            "inputs": [_drop_defaults(vars(entry)) for entry in self.inputs],
            "outputs": [_drop_defaults(vars(entry)) for entry in self.outputs],
            "constants": [
                {"name": c.name, "dtype": c.dtype, "recipe": recipes.to_json(c.recipe)}
                for c in self.constants
            ],
            "steps": [
                {
                    "op": s.op,
                    "in": list(s.inputs),
                    "attrs": s.attrs,
                    "out": s.output,
                    "shape": list(s.shape),
                    "dtype": s.dtype,
                    "phase": s.phase,
                }
                for s in self.steps
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan written by `to_json`. Raises `InvalidPlan` for damage or another version."""
        if not isinstance(data, Mapping) or data.get("version") != PLAN_VERSION:
            found = data.get("version") if isinstance(data, Mapping) else None
            raise InvalidPlan(f"the plan has version {found}, this pack reads {PLAN_VERSION}")
        try:
            plan = Plan(
                dict(data["structure"]),
                tuple(
                    Input(
                        entry["name"],
                        tuple(entry["shape"]),
                        entry["dtype"],
                        entry["phase"],
                        entry.get("optional", False),
                        _tuple(entry.get("permute")),
                    )
                    for entry in data["inputs"]
                ),
                tuple(
                    Output(entry["value"], _tuple(entry.get("permute")))
                    for entry in data["outputs"]
                ),
                tuple(
                    Constant(entry["name"], entry["dtype"], recipes.from_json(entry["recipe"]))
                    for entry in data["constants"]
                ),
                tuple(
                    Step(
                        entry["op"],
                        tuple(entry["in"]),
                        frozen(dict(entry["attrs"])),
                        entry["out"],
                        tuple(entry["shape"]),
                        entry["dtype"],
                        entry["phase"],
                    )
                    for entry in data["steps"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidPlan(f"the plan is damaged: {type(error).__name__} {error}") from error
        plan.check()
        return plan

    def check(self) -> None:
        """Every name is written once, before it is read, and every phase and dtype is known."""
        known = {entry.name for entry in self.inputs} | {entry.name for entry in self.constants}
        if len(known) != len(self.inputs) + len(self.constants):
            raise InvalidPlan("the plan names an input or a constant twice")
        for step in self.steps:
            missing = [name for name in step.inputs if name is not None and name not in known]
            if missing:
                raise InvalidPlan(f"{step.output} reads {missing[0]}, which nothing has written")
            if step.output in known:
                raise InvalidPlan(f"{step.output} is written twice")
            if step.phase not in PHASES or (step.dtype != COMPUTE and step.dtype not in DTYPES):
                raise InvalidPlan(f"{step.output} has phase {step.phase}, dtype {step.dtype}")
            known.add(step.output)
        for output in self.outputs:
            if output.value not in known:
                raise InvalidPlan(f"the output {output.value} is never written")


def dumps(plan: Plan) -> str:
    """The plan as JSON with one entry a line, so that two versions can be compared by eye."""
    data = plan.to_json()
    parts = []
    for key, value in data.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value)
            parts.append(f'"{key}": [\n{lines}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _drop_defaults(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in entry.items() if value is not None and value is not False
    }


def _tuple(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def frozen(value: Any) -> Any:
    """JSON data with tuples for lists, however deep, as the attributes of steps are held."""
    if isinstance(value, Mapping):
        return {name: frozen(entry) for name, entry in value.items()}
    return tuple(frozen(entry) for entry in value) if isinstance(value, (list, tuple)) else value
