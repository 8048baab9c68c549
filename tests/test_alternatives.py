"""Where a norm's input is made: by the step before it, or by the norm on the way."""

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
from accel.plan.recipe import Param
from accel.plan.schema import Constant, Plan, Step
from accel.runtime import alternatives
from accel.runtime.executable import Executable
from accel.tuning import Choice

PAIR, MOVED = ("linear", "layer_norm"), ("bare linear", "add_layer_norm")
JOINED = ("concat", "group_norm", "concat_group_norm")
CONV = ("conv2d", "bare conv2d", "group_norm", "concat_group_norm")


class Select:
    """References as kernels; us: times by operator.

    ours: the operators whose kernel counts as ours. near: times of sizes near by instead. apart:
    whether linear layers and convolutions add their residuals in a pass apart. elsewhere: the
    operators that were timed on another GPU.
    """

    def __init__(
        self,
        us: Mapping[str, float | None],
        ours: Sequence[str] = ("layer_norm", "add_layer_norm"),
        provisional: Sequence[str] = (),
        near: Mapping[str, float | None] | None = None,
        apart: bool = True,
        elsewhere: Sequence[str] = (),
    ) -> None:
        self.elsewhere = elsewhere
        self.us, self.ours, self.provisional = us, ours, provisional
        self.near, self.apart = near or {}, apart

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        return [self._choice(call) for call in calls]

    def ran(self) -> None:
        """Nothing waits for the first result."""

    def _choice(self, call: Call) -> Choice:
        name = call.op
        if name in ("linear", "conv2d") and call.tensors[-1] is None:
            name = f"bare {name}"
        kernel = reference(call.op)
        if name in self.ours:
            kernel = replace(kernel, launches=lambda *rest: [])
        if name in ("linear", "conv2d"):
            kernel = replace(kernel, adds_apart=self.apart)
        us, about = self.us.get(name), self.near.get(name)
        where = "another GPU" if name in self.elsewhere else None
        return Choice(kernel, {}, "a test", us, name in self.provisional, about, where)


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


def test_times_of_two_gpus_are_not_compared(runner: Runner) -> None:
    """Those of one other are, among themselves."""
    slower = times((12, 4), (13, 5))
    alike = Select({}, near=slower, elsewhere=(*PAIR, *MOVED))
    assert moved(bound(runner, alike)) == 0
    here = {name: us for name, us in slower.items() if name in PAIR}
    there = {name: us for name, us in slower.items() if name in MOVED}
    mixed = Select(here, near=there, elsewhere=MOVED)
    assert moved(bound(runner, mixed)) > 0, "as where nothing is known"


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
    sites = [s for s in alternatives._sites(runner.plan) if s.norm.op == "layer_norm"]
    assert sites and {site.maker.phase for site in sites} == {"step"}
    product, norm = sites[0].maker.output, sites[0].norm.output
    early = tuple(
        replace(step, phase="prompt") if step.output in (product, norm) else step
        for step in runner.plan.steps
    )
    left = {site.norm.output for site in alternatives._sites(replace(runner.plan, steps=early))}
    assert norm not in left and left.issuperset(site.norm.output for site in sites[1:])


def test_a_library_norm_is_no_reason_to_move(runner: Runner) -> None:
    assert moved(bound(runner, Select(ALL, ours=("layer_norm",)))) == 0


@pytest.mark.parametrize("which", [*PAIR, *MOVED])
def test_what_is_still_being_compiled_may_change_the_choice(runner: Runner, which: str) -> None:
    """The kernel that is waited for need not be of the pair that runs meanwhile."""
    assert bound(runner, Select(ALL, provisional=(which,))).provisional
    assert not bound(runner, Select(ALL)).provisional


def test_equal_kernels_have_one_name_and_others_another(runner: Runner) -> None:
    names = [bound(runner, Select(us)).selection() for us in (ALL, ALL, times((9, 5), (12, 4)))]
    assert names[0] == names[1] != names[2]


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


# GroupNorms that make the image they norm.


def joined(executable: Executable) -> int:
    return executable.kernels()["reference.concat_group_norm"]


def test_images_made_on_the_way_are_the_same_bits(runner: Runner) -> None:
    """Of concatenations and of sums, and no kernel more for a ControlNet's residuals."""
    counts = []
    for inputs in (inputs_for(), inputs_for() | residuals()):
        plain = bound(runner, Select({}, ours=()), inputs)
        ours = ("add_layer_norm", "concat_group_norm")
        other = bound(runner, Select({}, ours=ours), inputs)
        before, after = plain.kernels(), other.kernels()
        assert joined(plain) == 0 and after["reference.concat"] == 0
        assert joined(other) > before["reference.concat"] == 12
        assert after["reference.group_norm"] == before["reference.group_norm"] - joined(other)
        assert after.total() == before.total() - 12
        assert moved(other) > 0
        (expected,), (found,) = plain.run(inputs, None), other.run(inputs, None)
        assert torch.equal(found, expected)
        counts.append(after)
    assert counts[0] == counts[1]


def test_image_and_norm_lie_apart(runner: Runner) -> None:
    """So that the norm's memory is taken anew while the image waits for its last reader."""
    executable = bound(runner, Select({}, ours=("add_layer_norm", "concat_group_norm")))
    calls, pairs, taken = executable._step_calls, 0, 0
    for index, call in enumerate(calls):
        if isinstance(call.out, tuple):
            pairs += 1
            image, norm = call.out
            assert not overlap(image, norm)
            name = calls[index + 1].step.output
            readers = [at for at, later in enumerate(calls) if name in later.step.inputs]
            written = [later.out for later in calls[index + 1 : max(readers, default=index) + 1]]
            single = [out for out in written if isinstance(out, torch.Tensor)]
            assert not any(overlap(out, image) for out in single)
            taken += any(overlap(out, norm) for out in single)
    assert pairs == joined(executable) + moved(executable)
    assert taken > pairs // 2


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two buffers share memory."""
    first, second = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (a, b))
    return second[0] < first[1]


def test_sums_of_an_adapter_ride_along(runner: Runner) -> None:
    inputs = inputs_for() | {f"adapter_{i}": residuals()[f"residual_{i}"] for i in (2, 5, 8, 11)}
    plain = bound(runner, Select({}, ours=()), inputs)
    other = bound(runner, Select({}, ours=("concat_group_norm",)), inputs)
    sums = "reference.residual_add"
    assert other.kernels()[sums] < plain.kernels()[sums]
    assert torch.equal(other.run(inputs, None)[0], plain.run(inputs, None)[0])


@pytest.mark.parametrize(
    ("us", "taken"),
    [
        ({"concat": 6, "group_norm": 10, "concat_group_norm": 12}, True),
        ({"concat": 6, "group_norm": 10, "concat_group_norm": 16}, True),
        ({"concat": 6, "group_norm": 10, "concat_group_norm": 17}, False),
        ({"concat": 6, "group_norm": 10}, True),  # a pass is saved
        ({"concat_group_norm": 12}, True),
        ({}, True),
    ],
    ids=str,
)
def test_a_concatenation_is_made_where_that_is_faster(runner: Runner, us: Any, taken: bool) -> None:
    """Of unknown times with any kernel of ours, and never with a library's."""
    for near in ({}, us):  # measured here, or at sizes near by
        select = Select({} if near else us, JOINED, near=near, apart=False)
        executable = bound(runner, select)
        assert joined(executable) == (12 if taken else 0)
        assert executable.kernels()["reference.concat"] == (0 if taken else 12)
    assert joined(bound(runner, Select(us, ours=("concat", "group_norm")))) == 0


@pytest.mark.parametrize(
    ("us", "apart", "taken"),
    [
        ((30, 25, 10, 14), False, True),
        ((30, 25, 10, 16), True, False),
        ((30, None, 10, 14), False, False),
        ((30, None, 10, 14), True, True),
    ],
)
def test_a_sum_is_made_where_that_is_faster(
    runner: Runner, us: Any, apart: bool, taken: bool
) -> None:
    """Of unknown times where the product's kernel adds the residual in a pass apart."""
    times = dict(zip(CONV, us, strict=True)) | {"linear": 1, "bare linear": 9, "concat": 1}
    found = bound(runner, Select(times, ours=("concat_group_norm",), apart=apart))
    assert joined(found) == (8 if taken else 0)
    assert found.kernels()["reference.conv2d"] == 52


@pytest.mark.parametrize("which", JOINED)
def test_a_norm_that_is_still_being_compiled_may_change(runner: Runner, which: str) -> None:
    assert bound(runner, Select({}, provisional=(which,))).provisional


def step(op: str, output: str, *inputs: str | None, phase: str = "step", **attrs: Any) -> Step:
    return Step(op, inputs, attrs, output, (1, 4, 4, 8), "compute", phase)


JOIN = step("concat", "image", "x", None, "skip", "residual")
NORM = step("group_norm", "norm", "image", "scale", "base", None, None)


def sites_of(*steps: Step) -> list[tuple[str, str]]:
    constants = tuple(
        Constant(name, "compute", Param(name, (8,))) for name in ("scale", "base", "weight")
    )
    plan = Plan({}, (), (), constants, steps)
    return [(site.maker.output, site.norm.output) for site in alternatives._sites(plan)]


def test_what_a_norm_can_make() -> None:
    image = [("image", "norm")]
    assert sites_of(JOIN, NORM) == image
    assert sites_of(step("concat", "image", "x", None, "skip", None), NORM) == image
    assert sites_of(step("residual_add", "image", "x", "residual"), NORM) == image
    assert sites_of(step("linear", "image", "x", "weight", None, "residual"), NORM) == image
    conv = ("x", "weight", "base", None)
    assert sites_of(step("conv2d", "image", *conv, "residual"), NORM) == image
    tokens = step("layer_norm", "norm", "image", "scale", None)
    assert sites_of(step("linear", "image", "x", "weight", None, "residual"), tokens) == image
    reader = step("linear", "shortcut", "image", "weight", None, None)
    assert sites_of(JOIN, reader, NORM, step("silu", "other", "image")) == image


def test_what_a_norm_cannot_make() -> None:
    """And the second of two norms of one image, which then reads what the first has made."""
    second = replace(NORM, output="second")
    assert sites_of(JOIN, NORM, second) == [("image", "norm")]
    for maker in (
        step("concat", "image", "x", None, phase="prompt"),
        step("conv2d", "image", "x", "weight", "base", None, None),
        step("linear", "image", "x", "weight", "base", None),
        step("silu", "image", "x"),
    ):
        assert not sites_of(maker, NORM), maker.op
    tokens = step("layer_norm", "norm", "image", "scale", "base")
    for maker in (JOIN, step("conv2d", "image", "x", "weight", "base", None, "residual")):
        assert not sites_of(maker, tokens), maker.op
    # What is added first, or is made by steps that may come later.
    shifted = ("image", "scale", "base", "shift", None)
    for inputs in (shifted, ("image", "scale", "base", None, "base"), ("image", "made", "base")):
        assert not sites_of(JOIN, replace(NORM, inputs=inputs))
    # Another shape of the same elements.
    flat = step("reshape", "flat", "image", shape=(1, 16, 8))
    assert not sites_of(JOIN, flat, replace(NORM, inputs=("flat", "scale", "base")))
