"""Where a residual is added: by its product, or by the LayerNorm that reads the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from running import Runner
from test_executable import inputs_for, residuals
from torch import nn

from accel.kernels import Call, reference
from accel.plan.schema import Plan
from accel.runtime import alternatives
from accel.runtime.executable import Executable
from accel.tuning import Choice

PAIR, MOVED = ("linear", "layer_norm"), ("bare linear", "add_layer_norm")


class Select:
    """References as kernels; us: times by operator.

    ours: the operators whose kernel counts as ours. near: times of sizes near by instead.
    """

    def __init__(
        self,
        us: Mapping[str, float | None],
        ours: Sequence[str] = ("layer_norm", "add_layer_norm"),
        provisional: Sequence[str] = (),
        near: Mapping[str, float | None] | None = None,
        apart: bool = True,
    ) -> None:
        self.us, self.ours, self.provisional = us, ours, provisional
        self.near, self.apart = near or {}, apart

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        return [self._choice(call) for call in calls]

    def _choice(self, call: Call) -> Choice:
        name = call.op
        if name == "linear" and call.tensors[3] is None:
            name = "bare linear"
        kernel = reference(call.op)
        if name in self.ours:
            kernel = replace(kernel, launches=lambda *rest: [])
        if name == "linear":
            kernel = replace(kernel, adds_apart=self.apart)
        us, about = self.us.get(name), self.near.get(name)
        return Choice(kernel, {}, "a test", us, name in self.provisional, about)


@pytest.fixture
def runner(tiny_plan: Plan, tiny_unet: nn.Module) -> Runner:
    return Runner(tiny_plan, tiny_unet.state_dict())


def bound(runner: Runner, select: Select, inputs: Any = None) -> Executable:
    return runner.bind(inputs_for() if inputs is None else inputs, select)


def moved(executable: Executable) -> int:
    return executable.kernels()["reference.add_layer_norm"]


def times(before: Sequence[float | None], after: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(PAIR, before, strict=True)) | dict(zip(MOVED, after, strict=True))


ALL = times((12, 4), (9, 5))


def test_the_pictures_are_the_same_bits(runner: Runner) -> None:
    """Of the whole network, with ControlNet's residuals and without."""
    for inputs in (inputs_for(), inputs_for() | residuals()):
        plain, other = (
            bound(runner, Select({}, ours=()), inputs),
            bound(runner, Select(ALL), inputs),
        )
        norms = plain.kernels()["reference.layer_norm"]
        assert moved(plain) == 0 and 0 < moved(other) < norms
        assert other.kernels()["reference.layer_norm"] == norms - moved(other)
        (expected,), (found,) = plain.run(inputs, None), other.run(inputs, None)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("before", "after", "taken"),
    [
        ((12, 4), (9, 5), True),
        ((12, 4), (12, 4), True),  # one launch less to wait for, wherever it is no slower
        ((12, 4), (12, 4.1), False),
        ((12, 4), (13, 5), False),
    ],
)
def test_the_faster_pair_is_taken(runner: Runner, before: Any, after: Any, taken: bool) -> None:
    assert (moved(bound(runner, Select(times(before, after)))) > 0) == taken


@pytest.mark.parametrize(
    ("ours", "apart", "taken"),
    [
        (("layer_norm", "add_layer_norm"), True, True),
        (("layer_norm", "add_layer_norm"), False, False),  # added on the way
        (("linear", "layer_norm", "add_layer_norm"), False, False),
        (("layer_norm",), True, False),
        ((), True, False),
    ],
    ids=str,
)
def test_of_unknown_times_the_pass_that_is_saved_decides(
    runner: Runner, ours: Any, apart: bool, taken: bool
) -> None:
    for us in ({}, times((12, None), (9, 5))):
        assert (moved(bound(runner, Select(us, ours, apart=apart))) > 0) == taken


@pytest.mark.parametrize(("before", "taken"), [((12, 4), True), ((8, 4), False)])
def test_sizes_near_by_speak_where_nothing_is_measured(
    runner: Runner, before: Any, taken: bool
) -> None:
    guessed = Select({}, near=times(before, (9, 5)), apart=False)
    assert (moved(bound(runner, guessed)) > 0) == taken
    partly = Select({"linear": before[0]}, near=times((100, 4), (9, 5)), apart=False)
    assert (moved(bound(runner, partly)) > 0) == taken, "what is measured here goes first"


def test_what_the_prompt_decides_stays_under_its_names(runner: Runner) -> None:
    """Its results are kept by name: another choice later must find them."""
    sites = list(alternatives._sites(runner.plan))
    assert sites and {site.product.phase for site in sites} == {"step"}
    product, norm = sites[0].product.output, sites[0].norm.output
    early = tuple(
        replace(step, phase="prompt") if step.output in (product, norm) else step
        for step in runner.plan.steps
    )
    left = {site.norm.output for site in alternatives._sites(replace(runner.plan, steps=early))}
    assert norm not in left and len(left) == len(sites) - 1


def test_a_library_norm_is_no_reason_to_move(runner: Runner) -> None:
    assert moved(bound(runner, Select(ALL, ours=("layer_norm",)))) == 0


@pytest.mark.parametrize("which", [*PAIR, *MOVED])
def test_what_is_still_being_compiled_may_change_the_choice(runner: Runner, which: str) -> None:
    """The kernel that is waited for need not be of the pair that runs meanwhile."""
    assert bound(runner, Select(ALL, provisional=(which,))).provisional
    assert not bound(runner, Select(ALL)).provisional


def test_sizes_choose_for_themselves(runner: Runner) -> None:
    class BySize(Select):
        def _choice(self, call: Call) -> Choice:
            small = call.tensors[0] is not None and call.tensors[0].rows <= 2 * 8 * 8
            self.us = ALL if small else times((12, 4), (13, 5))
            return super()._choice(call)

    small, large, larger = (
        moved(bound(runner, BySize({}), inputs_for(side, side))) for side in (8, 16, 64)
    )
    assert small > large > larger
