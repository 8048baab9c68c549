"""One plan at one shape: what binding refuses, when the prompt's part is skipped, kernel counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from running import CPU, Runner, without_absent
from support import residuals_for, tiny_config
from torch import nn

from accel.errors import InvalidInput, InvalidPlan
from accel.plan.recipe import Param
from accel.plan.schema import Constant, Input, Output, Plan, Step, dumps
from accel.runtime.arena import Arena
from accel.runtime.executable import Executable, bind_dims


def inputs_for(height: int = 9, width: int = 16, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latent": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 999,
        "context": torch.randn(batch, 77, 32, generator=generator),
    }


def residuals(height: int = 9, width: int = 16, batch: int = 2) -> dict[str, torch.Tensor]:
    made = residuals_for(tiny_config(), batch, height, width, torch.Generator().manual_seed(1))
    return {f"residual_{i}": value for i, value in enumerate(made)}


@pytest.fixture
def runner(tiny_plan: Plan, tiny_unet: nn.Module) -> Runner:
    return Runner(tiny_plan, tiny_unet.state_dict())


# Binding.


def test_dimensions_come_from_the_inputs(tiny_plan: Plan) -> None:
    shapes = {name: value.shape for name, value in inputs_for().items()}
    dims = {"batch": 2, "height": 9, "width": 16, "tokens": 77}
    assert bind_dims(tiny_plan, shapes) == dims
    assert bind_dims(tiny_plan, {**shapes, **{n: v.shape for n, v in residuals().items()}}) == dims


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latent": (4, 9, 16)},
            r"latent must have 4 dimensions \(batch x 4 x height x width\), not 3: \[4, 9, 16\]",
        ),
        ({"latent": (2, 9, 9, 16)}, r"latent must be \[2, 4, 9, 16\] .*, not \[2, 9, 9, 16\]"),
        ({"latent": (2, 4, 0, 16)}, r"latent is empty: \[2, 4, 0, 16\]"),
        (
            {"context": (2, 77, 64)},
            r"context must be \[2, 77, 32\] \(batch x tokens x 32\), not \[2, 77, 64\]",
        ),
        ({"context": (1, 77, 32)}, r"context must be \[2, 77, 32\] .*, not \[1, 77, 32\]"),
        ({"context": (77, 32)}, "context must have 3 dimensions"),
        ({"timestep": (1,)}, r"timestep must be \[2\] \(batch\), not \[1\]"),
        ({"timestep": ()}, "timestep must have 1 dimensions"),
        ({"timestep": None}, "the input 'timestep' is missing"),
        ({"pooled": (2, 80)}, "the engine takes .*, context, latent, .*, not 'pooled'"),
        ({"residual_0": (2, 32, 9, 17)}, r"residual_0 must be \[2, 32, 9, 16\] .* 17\]"),
        ({"residual_3": (2, 32, 4, 8)}, r"residual_3 must be \[2, 32, 5, 8\] .* 4, 8\]"),
        ({"residual_0": (1, 32, 9, 16)}, r"residual_0 must be \[2, 32, 9, 16\]"),
        ({"residual_12": (2, 64, 4)}, "residual_12 must have 4 dimensions"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny_plan: Plan, changes: Any, message: str) -> None:
    shapes: dict[str, Any] = {name: tuple(value.shape) for name, value in inputs_for().items()}
    shapes = {name: shape for name, shape in {**shapes, **changes}.items() if shape is not None}
    with pytest.raises(InvalidInput, match=message) as caught:
        bind_dims(tiny_plan, shapes)
    assert "\n" not in str(caught.value)


def test_inputs_of_any_dtype_and_layout(runner: Runner) -> None:
    inputs = inputs_for()
    (expected,) = runner(inputs)
    other = {**inputs, "latent": inputs["latent"].double().to(memory_format=torch.channels_last)}
    other["context"] = inputs["context"].mT.contiguous().mT
    (result,) = runner(other)
    assert torch.equal(result, expected)
    assert result.is_contiguous() and result.dtype == torch.float32
    whole = {**inputs, "timestep": torch.tensor([7, 999])}
    assert torch.equal(
        runner(whole)[0], runner({**whole, "timestep": torch.tensor([7.0, 999.0])})[0]
    )


def test_results_are_the_callers_own(runner: Runner) -> None:
    executable, inputs = runner.bind(inputs_for()), inputs_for()
    (first,) = executable.run(inputs, None)
    kept = first.clone()
    (second,) = executable.run({**inputs, "latent": inputs["latent"] * 2}, None)
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_the_callers_contexts_change_nothing(runner: Runner) -> None:
    inputs = inputs_for()
    (expected,) = runner(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(runner(inputs)[0], expected)
    with torch.inference_mode():
        executable = runner.bind(inputs)
        assert torch.equal(executable.run(inputs, None)[0], expected)
    assert torch.equal(executable.run(inputs, None)[0], expected)
    with torch.enable_grad():
        wanted = {**inputs, "latent": inputs["latent"].clone().requires_grad_()}
        assert not executable.run(wanted, None)[0].requires_grad


# The prompt's part.


class Counted(Runner):
    """Counts how often each executable ran its prompt's part."""

    runs = 0

    def bind(self, inputs: Any) -> Executable:
        executable = super().bind(inputs)
        execute = executable._execute

        def counted(calls: Any, environment: Any) -> None:
            self.runs += calls is executable._prompt_calls
            execute(calls, environment)

        executable._execute = counted
        return executable


@pytest.fixture
def counted(tiny_plan: Plan, tiny_unet: nn.Module) -> Counted:
    return Counted(tiny_plan, tiny_unet.state_dict())


def test_an_equal_key_skips_the_prompt_exactly(counted: Counted) -> None:
    inputs = inputs_for()
    executable = counted.bind(inputs)
    (expected,) = executable.run(inputs, None)
    assert torch.equal(executable.run(inputs, "a")[0], expected)
    assert counted.runs == 2
    assert torch.equal(executable.run(inputs, "a")[0], expected)
    assert counted.runs == 2 and executable.prompt_hits == 1
    step = {**inputs, "latent": inputs["latent"] * 2, "timestep": inputs["timestep"] / 2}
    (skipped,) = executable.run(step, "a")
    assert counted.runs == 2
    assert torch.equal(executable.run(step, None)[0], skipped)


def test_a_key_vouches_so_the_prompt_is_not_even_read(counted: Counted) -> None:
    """That is the contract: equal keys, equal prompts. A new key is never wrong."""
    inputs = inputs_for()
    executable = counted.bind(inputs)
    (expected,) = executable.run(inputs, "a")
    changed = {**inputs, "context": inputs["context"] * 2}
    assert torch.equal(executable.run(changed, "a")[0], expected)
    (other,) = executable.run(changed, "b")
    assert not torch.equal(other, expected)
    assert torch.equal(executable.run(inputs, "a")[0], expected)  # "a" was forgotten meanwhile


def test_no_key_vouches_for_nothing(counted: Counted) -> None:
    inputs = inputs_for()
    executable = counted.bind(inputs)
    executable.run(inputs, "a")
    changed = {**inputs, "context": inputs["context"] * 2}
    (other,) = executable.run(changed, None)
    assert counted.runs == 2
    executable.run(inputs, None), executable.run(inputs, None)
    assert counted.runs == 4
    assert not torch.equal(executable.run(inputs, "a")[0], other)
    assert counted.runs == 5


def test_image_sizes_and_controlnet_share_a_prompt(counted: Counted) -> None:
    inputs = inputs_for()
    larger = {**inputs, "latent": torch.randn(2, 4, 24, 16)}
    guided = {**inputs, **residuals()}
    expected = [counted(each)[0] for each in (inputs, larger, guided)]
    assert counted.runs == 3
    bound = [counted.bind(each) for each in (inputs, larger, guided)]
    bound[0].run(inputs, "a")
    assert counted.runs == 4
    for executable, each, right in zip(bound, (inputs, larger, guided), expected, strict=True):
        assert torch.equal(executable.run(each, "a")[0], right)
    assert counted.runs == 4
    # another prompt through one of them is seen by all
    prompt = {**inputs, "context": inputs["context"] * 2}
    (right,) = counted(prompt)
    bound[1].run({**larger, "context": prompt["context"]}, "b")
    runs = counted.runs
    assert torch.equal(bound[0].run(prompt, "b")[0], right)
    assert counted.runs == runs


def test_prompts_of_other_shapes_are_apart(counted: Counted) -> None:
    inputs, longer = inputs_for(), inputs_for()
    longer["context"] = torch.randn(2, 154, 32)
    one, two = counted.bind(inputs), counted.bind(longer)
    first = one.run(inputs, "a")[0]
    two.run(longer, "a")
    assert counted.runs == 2
    assert torch.equal(one.run(inputs, "a")[0], first)
    assert counted.runs == 2


def test_a_failure_forgets_the_prompt(counted: Counted) -> None:
    inputs = inputs_for()
    executable = counted.bind(inputs)
    executable.run(inputs, "a")
    broken = {**inputs, "context": inputs["context"] * 2}
    del broken["timestep"]
    with pytest.raises(KeyError):
        executable.run(broken, "b")
    (expected,) = counted(inputs)
    runs = counted.runs
    assert torch.equal(executable.run(inputs, "a")[0], expected)
    assert counted.runs == runs + 1


# Optional residuals, kernel counts, memory.


def test_zero_residuals_are_like_none(runner: Runner) -> None:
    inputs = inputs_for()
    zero = {name: torch.zeros_like(value) for name, value in residuals().items()}
    (expected,) = runner(inputs)
    assert torch.equal(runner({**inputs, **zero})[0], expected)
    (changed,) = runner({**inputs, **residuals()})
    assert not torch.equal(changed, expected)
    assert torch.equal(runner(inputs)[0], expected)


def test_some_residuals_alone(runner: Runner) -> None:
    """Any subset may come, the others count as zero."""
    inputs = inputs_for()
    every = residuals()
    every |= {f"adapter_{i}": every[f"residual_{i}"] / 2 for i in range(12)}
    for names in (["residual_12"], ["residual_0", "residual_5"], ["adapter_0", "adapter_8"]):
        some = {name: every[name] for name in names}
        rest = {n: torch.zeros_like(v) for n, v in every.items() if n not in some}
        assert torch.equal(runner({**inputs, **some})[0], runner({**inputs, **some, **rest})[0])


KERNELS = {
    "linear": 145,
    "group_norm": 61,
    "conv2d": 52,
    "layer_norm": 48,
    "attention": 32,
    "concat": 12,
    "silu": 2,
    "pointwise": 1,  # the timestep's sines and cosines
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "residuals"])
@pytest.mark.parametrize("places", [(), (2, 5, 8, 11), range(12)], ids=str)
def test_kernel_counts(runner: Runner, guided: bool, places: Sequence[int]) -> None:
    """None more for a ControlNet: its residuals ride in the concatenations that read the skips.

    A T2I-Adapter's states are sums of their own where a block ends that adds its input already,
    and ride along in convolutions that have nothing to add.
    """
    states = list(residuals().values())
    inputs = inputs_for() | (residuals() if guided else {})
    inputs |= {f"adapter_{place}": states[place] for place in places}
    sums = {"residual_add": len([place for place in places if place % 3])}
    expected = Counter({f"reference.{name}": count for name, count in (KERNELS | sums).items()})
    assert runner.bind(inputs).kernels() == +expected


def test_the_prompt_part_is_one_product_for_all_blocks(runner: Runner) -> None:
    """Every K and V of the prompt in one product."""
    executable = runner.bind(inputs_for())
    counts = Counter(call.step.op for call in executable._prompt_calls)
    assert counts == {"linear": 1, "slice_dim": 32}


def test_views_cost_no_kernel_at_any_size(runner: Runner) -> None:
    for height, width in ((9, 16), (8, 8), (1, 5)):
        kernels = runner.bind(inputs_for(height, width)).kernels()
        assert not any("reshape" in name or "slice" in name for name in kernels)


def test_growth_keeps_addresses(runner: Runner) -> None:
    inputs = inputs_for()
    small = runner.bind(inputs)
    (expected,) = small.run(inputs, None)
    outs = [call.out.data_ptr() for call in small._step_calls if call.out is not None]
    before = runner.arena.bytes
    larger = inputs_for(40, 32)
    large = runner.bind(larger)
    assert runner.arena.bytes > before
    large.run(larger, None)
    assert torch.equal(small.run(inputs, None)[0], expected)
    assert outs == [call.out.data_ptr() for call in small._step_calls if call.out is not None]
    grown = runner.arena.bytes
    middle = runner.bind(inputs_for(16, 16))
    middle.run(inputs_for(16, 16), None)
    assert runner.arena.bytes == grown  # a smaller one finds room
    middle.release()
    large.release()
    assert runner.arena.bytes == before
    assert torch.equal(small.run(inputs, None)[0], expected)


# The schema, and plans that no pass makes.


def test_json_gives_an_equal_plan(tiny_plan: Plan) -> None:
    text = dumps(tiny_plan)
    again = Plan.from_json(json.loads(text))
    assert again == tiny_plan
    assert dumps(again) == text
    assert Plan.from_json(json.loads(json.dumps(tiny_plan.to_json()))) == tiny_plan
    assert Plan.from_json(tiny_plan.to_json()) == tiny_plan


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(version=0),
        lambda data: data.pop("steps"),
        lambda data: data["steps"].pop(0),
        lambda data: data["steps"].append(data["steps"][-1]),
        lambda data: data["steps"][0].update(phase="sometimes"),
        lambda data: data["steps"][0].update(dtype="float4"),
        lambda data: data["steps"][0].pop("attrs"),
        lambda data: data["steps"][0].update(attrs=[1]),
        lambda data: data["inputs"].append(data["inputs"][0]),
        lambda data: data["outputs"][0].update(value="nothing"),
        lambda data: data["constants"][0].update(recipe={"param": 3}),
        lambda data: data.update(structure="sd15"),
        lambda data: data.update(inputs=None),
    ],
)
def test_damaged_plans_are_refused(tiny_plan: Plan, damage: Any) -> None:
    data = json.loads(dumps(tiny_plan))
    damage(data)
    with pytest.raises(InvalidPlan):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], "plan", {}, {"version": 1}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(InvalidPlan):
        Plan.from_json(data)


def small_plan(*steps: Step, outputs: tuple[Output, ...]) -> Plan:
    """Steps over a latent [batch, height, 4], a prompt [batch, 4] and a weight [4, 4]."""
    inputs = (
        Input("x", ("batch", "height", 4), "compute", "step"),
        Input("p", ("batch", 4), "compute", "prompt"),
    )
    constants = (Constant("w", "compute", Param("w", (4, 4))),)
    return Plan({}, inputs, outputs, constants, steps)


def step(
    op: str, inputs: Any, output: str, shape: Any, phase: str = "step", /, **attrs: Any
) -> Step:
    return Step(op, inputs, attrs, output, shape, "compute", phase)


X, P, W = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(4, 4)


def run_small(plan: Plan, height: int = 3) -> list[torch.Tensor]:
    return Runner(plan, {"w": W})({"x": X[:, :height], "p": P})


def test_a_view_keeps_its_buffer_alive() -> None:
    """`a` is read last by the view `b`'s reader: later results must not take its place before."""
    shape = ("batch", "height", 4)
    flat = ("batch", "(4*height)")
    plan = small_plan(
        step("silu", ("x",), "a", shape),
        step("reshape", ("a",), "b", flat, shape=flat),
        step("slice_dim", ("b",), "c", ("batch", 4), dim=1, start=0, length=4),
        *(step("silu", (f"{'x' if i == 0 else f's{i - 1}'}",), f"s{i}", shape) for i in range(6)),
        step("add", ("c", "p"), "d", ("batch", 4)),
        outputs=(Output("d"), Output("s5")),
    )
    found, chain = run_small(plan)
    assert torch.equal(found, torch.nn.functional.silu(X)[:, 0] + P)
    expected = X
    for _ in range(6):
        expected = torch.nn.functional.silu(expected)
    assert torch.equal(chain, expected)


def test_a_reshape_that_strides_forbid_is_a_copy() -> None:
    plan = small_plan(
        step("permute", ("x",), "a", ("batch", 4, "height"), dims=(0, 2, 1)),
        step("reshape", ("a",), "b", ("batch", "(4*height)"), shape=("batch", "(4*height)")),
        step("silu", ("b",), "c", ("batch", "(4*height)")),
        outputs=(Output("c"),),
    )
    (found,) = run_small(plan)
    assert torch.equal(found, torch.nn.functional.silu(X.mT.reshape(2, 12)))
    kernels = Runner(plan, {"w": W}).bind({"x": X, "p": P}).kernels()
    assert kernels == {"reference.reshape": 1, "reference.silu": 1}


def test_outputs_may_be_views_constants_and_results_of_the_prompt() -> None:
    plan = small_plan(
        step("silu", ("p",), "a", ("batch", 4), "prompt"),
        step("slice_dim", ("a",), "b", ("batch", 1), "prompt", dim=1, start=1, length=1),
        step("permute", ("w",), "t", (4, 4), "static", dims=(1, 0)),
        step("add", ("x", "x"), "y", ("batch", "height", 4)),
        outputs=(Output("b"), Output("t"), Output("a", (1, 0)), Output("x"), Output("y")),
    )
    runner = Runner(plan, {"w": W})
    silu = torch.nn.functional.silu(P)
    expected = [silu[:, 1:2], W.T, silu.T, X, X + X]
    one, two = ({"x": X[:, :height], "p": P} for height in (3, 2))
    first, second = runner.bind(one), runner.bind(two)
    for left, right in zip(first.run(one, "k"), expected, strict=True):
        assert torch.equal(left, right)
    # The other size takes the prompt's results from the first.
    for left, right in zip(second.run(two, "k")[:3], expected, strict=False):
        assert torch.equal(left, right)
    assert second.prompt_hits == 1


def test_prompt_results_of_the_images_size_belong_to_the_image() -> None:
    """What depends on the prompt alone by value, but on the image by size, is no shared result."""
    shape = ("batch", "height", 4)
    plan = small_plan(
        step("reshape", ("p",), "a", ("batch", 1, 4), "prompt", shape=("batch", 1, 4)),
        step("expand", ("a",), "b", shape, "prompt", shape=shape),
        step("silu", ("b",), "c", shape, "prompt"),
        step(
            "slice_dim", ("p",), "d", ("batch", 1), "prompt", dim=1, start="(height - 2)", length=1
        ),
        step("silu", ("d",), "e", ("batch", 1), "prompt"),
        step("add", ("x", "c"), "y", shape),
        outputs=(Output("y"), Output("e")),
    )
    runner = Runner(plan, {"w": W})
    silu = torch.nn.functional.silu
    for height in (3, 2):
        inputs = {"x": X[:, :height], "p": P}
        found, cut = runner.bind(inputs).run(inputs, "k")
        assert torch.equal(found, X[:, :height] + silu(P)[:, None])
        assert torch.equal(cut, silu(P)[:, height - 2 : height - 1])


def test_a_step_whose_shape_is_wrong_is_refused() -> None:
    plan = small_plan(step("silu", ("x",), "a", ("batch", 4)), outputs=(Output("a"),))
    with pytest.raises(InvalidPlan, match=r"a should be \[2, 4\], silu makes \(2, 3, 4\)"):
        run_small(plan)


def test_aten_arguments_follow_the_sessions_dtype() -> None:
    attrs = {"args": ({"tensor": 0}, -1), "kwargs": {"dtype": {"dtype": "compute"}}}
    plan = small_plan(
        step("aten.softmax.int", ("x",), "a", ("batch", "height", 4), **attrs),
        outputs=(Output("a"),),
    )
    again = Plan.from_json(json.loads(dumps(plan)))
    assert again == plan
    dims = {"batch": 2, "height": 3}
    executable = Executable(again, dims, {"w": W.double()}, torch.float64, Arena(CPU), {})
    (found,) = executable.run({"x": X, "p": P}, None)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, X.double().softmax(-1))


def test_without_takes_only_optional_inputs(tiny_plan: Plan) -> None:
    plan = without_absent(tiny_plan, inputs_for())
    assert [entry.name for entry in plan.inputs] == ["latent", "timestep", "context"]
    assert plan.without([]) == plan
    plan.check()
    with pytest.raises(AssertionError):
        tiny_plan.without(["latent"])
