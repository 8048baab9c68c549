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
from accel.runtime.executable import Executable
from accel.tuning import Choice

PAIR, MOVED = ("linear", "layer_norm"), ("bare linear", "add_layer_norm")


class Select:
    """References as kernels; ours: of which operators one counts as ours; us: times by operator."""

    def __init__(
        self,
        us: Mapping[str, float | None],
        ours: Sequence[str] = ("layer_norm", "add_layer_norm"),
        provisional: Sequence[str] = (),
    ) -> None:
        self.us, self.ours, self.provisional = us, ours, provisional

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        return [self._choice(call) for call in calls]

    def _choice(self, call: Call) -> Choice:
        name = call.op
        if name == "linear" and call.tensors[3] is None:
            name = "bare linear"
        kernel = reference(call.op)
        if name in self.ours:
            kernel = replace(kernel, launches=lambda *rest: [])
        provisional = name in self.provisional
        return Choice(kernel, {}, "a test", self.us.get(name), provisional)


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
    ("ours", "taken"),
    [
        (("layer_norm", "add_layer_norm"), True),  # a library adds the residual in a pass
        (("linear", "layer_norm", "add_layer_norm"), False),  # ours on the way
        (("layer_norm",), False),
        ((), False),
    ],
    ids=str,
)
def test_of_unknown_times_the_pass_that_is_saved_decides(
    runner: Runner, ours: Any, taken: bool
) -> None:
    for us in ({}, times((12, None), (9, 5))):
        assert (moved(bound(runner, Select(us, ours))) > 0) == taken


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
