"""Running a plan by hand, without sessions: constants by recipe, one executable, its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from accel.plan.recipe import Param, places
from accel.plan.schema import Plan, resolve
from accel.runtime.arena import Arena
from accel.runtime.executable import Executable, bind_dims

CPU = torch.device("cpu")


def constants_of(
    plan: Plan, state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The plan's constants, filled from the source's parameters."""
    constants = {}
    for entry in plan.constants:
        constant = torch.empty(entry.recipe.shape, dtype=resolve(entry.dtype, dtype))
        for source, place in places(entry.recipe, constant):
            if isinstance(source, Param):
                assert source.shape == tuple(state[source.name].shape), source.name
                place.copy_(state[source.name])
            else:
                place.copy_(torch.tensor(source.values).view(source.shape))
        constants[entry.name] = constant
    return constants


def without_absent(plan: Plan, inputs: Mapping[str, torch.Tensor]) -> Plan:
    """The plan specialised to the optional inputs that `inputs` has."""
    return plan.without(i.name for i in plan.inputs if i.optional and i.name not in inputs)


class Runner:
    """Executables of one plan with one set of weights, over one arena, as an engine keeps them."""

    def __init__(
        self, plan: Plan, state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.plan, self.dtype = plan, dtype
        self.constants = constants_of(plan, state, dtype)
        self.arena = Arena(CPU)
        self.prompts: dict[Any, Any] = {}

    def bind(self, inputs: Mapping[str, torch.Tensor], selector: Any = None) -> Executable:
        plan = without_absent(self.plan, inputs)
        dims = bind_dims(plan, {name: value.shape for name, value in inputs.items()})
        constants, arena, prompts = self.constants, self.arena, self.prompts
        return Executable(plan, dims, constants, self.dtype, arena, prompts, None, selector)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return self.bind(inputs).run(inputs, None)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return float((result - expected).norm() / expected.norm())
