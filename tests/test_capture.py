"""Capture to executable: one export serves every size, and equals the host's own module."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from running import Runner, relative_error
from support import make_unet, residuals_for, tiny_config
from torch import nn
from torch.nn import functional as F

from accel import ops
from accel.capture import ResidualMarker, capture
from accel.errors import InvalidInput, UnsupportedModel
from accel.models import UNetConfig, parameters
from accel.models.calls import bind_call
from accel.models.twin import Twin, TwinInput, residual_count, unet_twin
from accel.passes import run_passes
from accel.plan.lower import lower
from accel.plan.schema import Plan, Step
from accel.plan.shapes import names
from accel.structure import structure_of

SDXL = dataclasses.replace(
    tiny_config("sdxl"),
    down_depths=((0, 0), (1, 1), (2, 2)),
    mid_depth=2,
    up_depths=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
)
CONTROLNET = tiny_config("sd15-controlnet")

# batch, height, width, tokens
SIZES = [(1, 65, 33, 77), (3, 33, 40, 154), (4, 16, 24, 77)]
LIMIT = 1e-5

# Down to one pixel, where a norm over two values turns rounding errors into signs: in float64.
SMALL = [(2, 8, 8, 5), (2, 5, 1, 1), (2, 1, 3, 7)]


def plan_of(twin: Twin, progress: Any = None) -> Plan:
    graph = capture(twin, progress)
    run_passes(graph)
    return lower(graph, {})


def inputs_for(config: UNetConfig, size: tuple[int, ...], residuals: bool) -> dict[str, Any]:
    batch, height, width, tokens = size
    generator = torch.Generator().manual_seed(height)
    inputs = {
        "latent": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 999,
        "context": torch.randn(batch, tokens, config.context_dim, generator=generator),
    }
    if config.pooled_dim is not None:
        inputs["pooled"] = torch.randn(batch, config.pooled_dim, generator=generator)
    if config.kind == "controlnet":
        factor = 2 ** (len(config.hint_block_channels) - 1)
        shape = (batch, config.hint_channels, factor * height, factor * width)
        inputs["hint"] = torch.rand(shape, generator=generator)
    if residuals:
        made = residuals_for(config, batch, height, width, generator)
        assert len(made) == residual_count(config)
        inputs |= {f"residual_{i}": value for i, value in enumerate(made)}
    return inputs


def arguments_of(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A plan's inputs as diffusers' own module takes them."""
    arguments: dict[str, Any] = {
        "sample": inputs["latent"],
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["context"],
        "return_dict": False,
    }
    if "pooled" in inputs:
        # Diffusers embeds `time_ids` itself; the plan takes the finished vector.
        width = module.config.projection_class_embeddings_input_dim - 6 * 8
        ids = torch.arange(6.0).repeat(len(inputs["latent"]), 1) * 100
        arguments["added_cond_kwargs"] = {
            "text_embeds": inputs["pooled"][:, :width],
            "time_ids": ids,
        }
        embedded = module.add_time_proj(ids.flatten()).view(len(ids), -1)
        inputs["pooled"] = torch.cat([inputs["pooled"][:, :width], embedded], 1)
    residuals = [value for name, value in inputs.items() if name.startswith("residual_")]
    if residuals:
        arguments["down_block_additional_residuals"] = tuple(residuals[:-1])
        arguments["mid_block_additional_residual"] = residuals[-1]
    if "hint" in inputs:
        arguments["controlnet_cond"] = inputs["hint"]
    return arguments


def plain(module: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What diffusers' own module makes of a plan's inputs, in the order of the plan's outputs."""
    with torch.no_grad():
        out = module(**arguments_of(module, inputs))
    return [*out[0], out[1]] if "hint" in inputs else [out[0]]


def check(run: Runner, module: nn.Module, config: UNetConfig, size: Any, residuals: bool) -> None:
    inputs = inputs_for(config, size, residuals)
    expected = plain(module, inputs)
    found = run(inputs)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert relative_error(left, right) <= LIMIT


def check_small(run: Runner, module: nn.Module, config: UNetConfig, size: Any) -> None:
    """The same in float64, with residuals: the graph is equal, not only the numbers alike."""
    double = copy.deepcopy(module)
    nn.Module.to(double, torch.float64)  # diffusers' own `to` warns
    inputs = inputs_for(config, size, config.kind == "unet")
    inputs = {n: v if n == "timestep" else v.double() for n, v in inputs.items()}
    expected = plain(double, inputs)
    found = Runner(run.plan, double.state_dict(), torch.float64)(inputs)
    for left, right in zip(found, expected, strict=True):
        assert relative_error(left, right) <= 1e-10


@pytest.fixture(scope="module")
def unet(tiny_plan: Plan, tiny_unet: nn.Module) -> Runner:
    return Runner(tiny_plan, tiny_unet.state_dict())


@pytest.fixture(scope="module")
def controlnet() -> tuple[Runner, nn.Module]:
    module = make_unet(1, CONTROLNET)
    plan = plan_of(unet_twin(CONTROLNET, ControlNetModel, ResidualMarker))
    return Runner(plan, module.state_dict()), module


@pytest.fixture(scope="module")
def sdxl() -> tuple[Runner, nn.Module]:
    module = make_unet(2, SDXL)
    plan = plan_of(unet_twin(SDXL, UNet2DConditionModel, ResidualMarker))
    return Runner(plan, module.state_dict()), module


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("residuals", [False, True], ids=["plain", "residuals"])
def test_unet_equals_diffusers(
    unet: Runner, tiny_unet: nn.Module, size: Any, residuals: bool
) -> None:
    check(unet, tiny_unet, tiny_config(), size, residuals)


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_a_small_unet_image_equals_diffusers(unet: Runner, tiny_unet: nn.Module, size: Any) -> None:
    check_small(unet, tiny_unet, tiny_config(), size)


def test_controlnet_equals_diffusers(controlnet: tuple[Runner, nn.Module]) -> None:
    check(*controlnet, CONTROLNET, SIZES[0], False)
    check_small(*controlnet, CONTROLNET, SMALL[0])


def test_sdxl_equals_diffusers(sdxl: tuple[Runner, nn.Module]) -> None:
    check(*sdxl, SDXL, SIZES[0], True)
    check_small(*sdxl, SDXL, SMALL[0])


@pytest.mark.parametrize("size", [SIZES[0], SMALL[1]], ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "with a ControlNet"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_t2i_adapters_equal_diffusers(
    request: pytest.FixtureRequest, family: str, guided: bool, size: Any
) -> None:
    """From the call to the result, in float64: each state at its place, and at no other."""
    config: UNetConfig = tiny_config() if family == "sd15" else SDXL
    if family == "sd15":
        run, module = request.getfixturevalue("unet"), request.getfixturevalue("tiny_unet")
    else:
        run, module = request.getfixturevalue("sdxl")
    double = copy.deepcopy(module)
    nn.Module.to(double, torch.float64)  # diffusers' own `to` warns
    inputs = inputs_for(config, size, guided)
    inputs = {n: v if n == "timestep" else v.double() for n, v in inputs.items()}
    made = residuals_for(config, *size[:3], torch.Generator().manual_seed(9))
    # One where each level ends; SDXL's first has no attention and ends halved, the middle is last.
    states = [made[place].double() for place in ((2, 5, 8, 11), (3, 5, 8, 9))[family == "sdxl"]]
    arguments = arguments_of(double, inputs)
    runner = Runner(run.plan, double.state_dict(), torch.float64)
    expected, found = [], []
    for count in (0, 1, 4):
        arguments["down_intrablock_additional_residuals"] = states[:count] or None
        found += runner(bind_call(config, "diffusers", (), arguments).inputs)
        with torch.no_grad():
            expected += double(**arguments)  # takes the states off the list
    for left, right in zip(found, expected, strict=True):
        assert relative_error(left, right) <= 1e-10
    assert all(relative_error(one, found[0]) > 1e-3 for one in found[1:])


class Nothing:
    """Stands for an optional input that a twin does not have."""

    def __radd__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def unnumbered(plan: Plan) -> Plan:
    """The plan with its values called by their order, and its inputs in order of their names."""
    called = {step.output: f"value_{i}" for i, step in enumerate(plan.steps)}

    def renamed(step: Step) -> Step:
        inputs = tuple(called.get(name, name) if name else None for name in step.inputs)
        return dataclasses.replace(step, inputs=inputs, output=called[step.output])

    return dataclasses.replace(
        plan,
        structure={},
        inputs=tuple(sorted(plan.inputs, key=lambda entry: entry.name)),
        outputs=tuple(dataclasses.replace(o, value=called[o.value]) for o in plan.outputs),
        steps=tuple(map(renamed, plan.steps)),
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_t2i_adapters_cost_nothing_when_not_given(
    request: pytest.FixtureRequest, family: str
) -> None:
    """What runs is then the plan of a network that could take none: every step, every constant."""
    if family == "sd15":
        config, plan = tiny_config(), request.getfixturevalue("tiny_plan")
    else:
        config, plan = SDXL, request.getfixturevalue("sdxl")[0].plan
    adapters = [entry.name for entry in plan.inputs if entry.name.startswith("adapter_")]
    assert len(adapters) == residual_count(config) - 1
    without = plan_of(
        unet_twin(
            config,
            UNet2DConditionModel,
            lambda name: Nothing() if name.startswith("adapter_") else ResidualMarker(name),
        )
    )
    assert not any(entry.name.startswith("adapter_") for entry in without.inputs)
    assert unnumbered(plan.without(adapters)) == unnumbered(without)


def test_a_hint_of_another_size_is_refused(controlnet: tuple[Runner, nn.Module]) -> None:
    """A hint of one pixel a latent would broadcast, and one of any other size be nonsense."""
    inputs = inputs_for(CONTROLNET, (1, 8, 8, 5), False)
    for side in (2, 14, 64):
        with pytest.raises(InvalidInput, match=r"hint must be \[1, 3, 16, 16\] \(batch x 3 x "):
            controlnet[0]({**inputs, "hint": torch.zeros(1, 3, side, side)})


def test_nothing_is_left_to_data_or_to_aten(
    unet: Runner, controlnet: tuple[Runner, nn.Module], sdxl: tuple[Runner, nn.Module]
) -> None:
    for run in (unet, controlnet[0], sdxl[0]):
        plan = run.plan
        assert plan.dims == ("batch", "height", "width", "tokens")
        for step in plan.steps:
            assert ops.get(step.op).name == step.op
            assert frozenset[str]().union(*map(names, step.shape)) <= set(plan.dims)
        assert not any(step.op.startswith("aten.") for step in plan.steps)
        assert not any(step.op == "permute" for step in plan.steps)
        assert {step.phase for step in plan.steps} <= {
            "prompt",
            "timestep",
            "prompt+timestep",
            "step",
        }


def test_plans_read_every_parameter_once(
    unet: Runner, controlnet: tuple[Runner, nn.Module], sdxl: tuple[Runner, nn.Module]
) -> None:
    runs = ((unet, tiny_config()), (controlnet[0], CONTROLNET), (sdxl[0], SDXL))
    for run, config in runs:
        expected = {name: parameter.shape for name, parameter in parameters(config).items()}
        assert run.plan.parameters == expected


def test_a_twin_holds_no_weight_of_the_live_module(tiny_unet: nn.Module) -> None:
    twin = unet_twin(tiny_config(), tiny_unet, ResidualMarker)
    tensors = [*twin.module.parameters(), *twin.module.buffers()]
    assert tensors and all(tensor.device.type == "meta" for tensor in tensors)
    assert next(tiny_unet.parameters()).device.type == "cpu"
    assert not tiny_unet._forward_pre_hooks


# Small networks: what is refused, and what is put right.


class Small(nn.Module):
    """A convolution, and a body of one's own."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("mean", torch.zeros(4))
        self.table = torch.ones(4, dtype=torch.float16, device="meta")
        self.body = body

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.body(self, *inputs)


def small_twin(body: Callable[..., Any], phase: str = "step") -> Twin:
    module = Small(body).to(torch.float16).to("meta").eval()
    latent = TwinInput("latent", ("batch", 4, "height", "width"), "compute", phase)
    names = {name: name for name in ("conv.weight", "conv.bias")}
    return Twin(module, (latent,), {"batch": 2, "height": 72, "width": 104}, names)


def runs_as(body: Callable[..., Any]) -> Plan:
    """The plan of a body, checked against the body itself at another size."""
    plan = plan_of(small_twin(body))
    torch.manual_seed(0)
    module = Small(body).eval()
    x = torch.randn(3, 4, 7, 5)
    with torch.no_grad():
        (result,) = Runner(plan, module.state_dict())({"latent": x})
        assert relative_error(result, module(x.clone())) <= LIMIT
    return plan


def fresh(module: Any, x: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    h += x
    return F.silu(h)


def old_name(module: Any, x: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    before = F.silu(h)
    h.mul_(x)
    return h * before + h


@pytest.mark.parametrize("body", [fresh, old_name])
def test_writes_to_a_fresh_result_are_made_functional(body: Callable[..., Any]) -> None:
    runs_as(body)


def test_other_operators_stay_atens() -> None:
    plan = runs_as(
        lambda module, x: module.conv(x).clamp(-0.5, 0.5).softmax(1, dtype=torch.float32)
    )
    assert [s.op for s in plan.steps if s.op.startswith("aten")] == [
        "aten.clamp.default",
        "aten.softmax.int",
    ]


def test_an_input_may_be_returned_turned() -> None:
    runs_as(lambda module, x: x.permute(0, 2, 3, 1))
    runs_as(lambda module, x: (module.conv(x) + x).permute(0, 2, 3, 1))


def test_a_dtype_argument_follows_the_session() -> None:
    plan = plan_of(small_twin(lambda module, x: module.conv(x).softmax(1, dtype=torch.float16)))
    module = Small(F.silu)
    x = torch.randn(1, 4, 5, 6)
    (result,) = Runner(plan, module.state_dict())({"latent": x})
    assert relative_error(result, module.conv(x).softmax(1)) <= LIMIT


def view_of_old(module: Any, x: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    flat = h.flatten(1)
    h += x
    return flat


def part(module: Any, x: torch.Tensor) -> torch.Tensor:
    h = module.conv(x)
    h[:, :2] += 1
    return h


def own_input(module: Any, x: torch.Tensor) -> torch.Tensor:
    x += 1
    return module.conv(x)


def own_buffer(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.mean += 1
    return module.conv(x) + module.mean.view(1, 4, 1, 1)


def held(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.conv(x) + module.table.view(1, 4, 1, 1)


def fixed(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.conv(x) + torch.ones(72, 104, device=x.device, dtype=x.dtype)


def counted(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (view_of_old, "writes to a tensor in place: it calls aten.add_"),
        (part, "writes to a tensor in place"),
        (own_input, "writes to a tensor in place"),
        (own_buffer, "writes to a tensor in place"),
        (lambda module, x: module.conv(x) + module.mean.view(1, 4, 1, 1), "parameter more .* mean"),
        (held, "holds a tensor outside its parameters, .*table"),
        (fixed, "works only where height is 72"),
        (counted, "cannot be captured|depends on data"),
        (lambda module, x: x * torch.rand_like(x), "is random: it calls aten.rand_like"),
        (lambda module, x: F.dropout(x, 0.5), "is random: it calls aten.dropout"),
        (lambda module, x: x * x.shape[2], "computes with sizes"),
        (
            lambda module, x: x + torch.arange(4, device=x.device, dtype=x.dtype).view(1, 4, 1, 1),
            "makes a tensor",
        ),
        (lambda module, x: x.abs().max(1)[0], "max.dim, which cannot be compiled"),
        (lambda module, x: module.nothing(x), "cannot be captured: AttributeError"),
    ],
)
def test_what_cannot_be_right_is_refused(body: Callable[..., Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        plan_of(small_twin(body))
    assert "\n" not in str(caught.value)


def test_sizes_that_must_agree_are_refused() -> None:
    """Two inputs' heights that the network takes for one."""
    twin = small_twin(lambda module, x, y: module.conv(x) + y)
    other = TwinInput("other", ("batch", 4, "rows", "width"), "compute", "step")
    twin = dataclasses.replace(
        twin, inputs=(*twin.inputs, other), example={**twin.example, "rows": 72}
    )
    with pytest.raises(UnsupportedModel, match="works only where rows is height"):
        plan_of(twin)


def test_the_hosts_contexts_do_not_reach_the_capture() -> None:
    expected = plan_of(small_twin(fresh))
    twin = small_twin(fresh)
    seen: list[float] = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plan = plan_of(twin, lambda fraction, what: seen.append(fraction))
        tensors = unet_twin(tiny_config(), UNet2DConditionModel, ResidualMarker).module.parameters()
    assert not any(tensor.is_inference() for tensor in tensors)
    assert plan == expected
    assert seen and seen == sorted(seen) and 0 < seen[0] <= seen[-1] <= 1


# ComfyUI's own classes, in a process of their own since ComfyUI settles its devices on import.


def _comfyui_findings(root: str, diffusers_plan: dict[str, Any]) -> Any:
    sys.path.insert(0, root)
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.ops
        from comfy.cldm.cldm import ControlNet
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
        from comfy.t2i_adapter.adapter import Adapter
    except Exception as error:
        return f"ComfyUI cannot be imported: {error}"
    from test_models import _comfyui_arguments

    findings = {}
    for kind, config in COMFYUI.items():
        cls = UNetModel if config.kind == "unet" else ControlNet
        arguments = {**_comfyui_arguments(config), "device": "cpu", "dtype": torch.float32}
        torch.manual_seed(3)
        module = cls(**arguments, operations=comfy.ops.manual_cast).eval().requires_grad_(False)
        for name, parameter in module.named_parameters():  # ComfyUI leaves them uninitialised
            scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            mean = float(parameter.dim() == 1 and name.endswith("weight"))  # of a norm
            parameter.copy_(torch.randn_like(parameter) * scale + mean)
        plan = plan_of(unet_twin(config, module, ResidualMarker))
        own = module.state_dict()
        state = {name: own[p.ldm_name] for name, p in parameters(config).items()}
        run = Runner(plan, state)
        errors = []
        for size, residuals in ((SIZES[0], False), (SIZES[2], config.kind == "unet")):
            inputs = inputs_for(config, size, residuals)
            arguments = {"timesteps": inputs["timestep"], "context": inputs["context"]}
            with torch.no_grad():
                if config.kind == "unet":
                    made = [value for name, value in inputs.items() if name.startswith("residual_")]
                    if made:  # ComfyUI takes them from the end
                        arguments["control"] = {"output": made[:-1], "middle": made[-1:]}
                    expected = [module(inputs["latent"], **arguments)]
                else:
                    out = module(inputs["latent"], inputs["hint"], **arguments)
                    expected = [*out["output"], *out["middle"]]
            found = run(inputs)
            assert len(found) == len(expected)
            errors += [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        if config.kind == "unet":
            runs = {"own": run, "diffusers": Runner(Plan.from_json(diffusers_plan), state)}
            findings["adapters"] = _adapter_findings(config, module, runs, Adapter)
        findings[kind] = {
            "errors": max(errors),
            "key": structure_of(module).graph_key,
            "parameters": plan.parameters,
            "ops": sorted(step.op for step in plan.steps),
            "inputs": [entry.name for entry in plan.inputs],
        }
    return findings


def _adapter_findings(
    config: UNetConfig, module: nn.Module, runs: dict[str, Runner], adapter: Any
) -> dict[str, list[float]]:
    """Errors of each plan, and how much what is added changes, for lists of every kind."""
    torch.manual_seed(4)
    channels = list(config.block_out_channels)
    net = adapter(channels, nums_rb=2, cin=192, ksize=1, sk=True, xl=False).requires_grad_(False)
    findings: dict[str, list[float]] = {name: [] for name in (*runs, "change")}
    for size, kind in (
        (SIZES[2], "net"),
        (SIZES[0], "net"),  # at odd sizes only its first states fit
        (SIZES[1], "all"),
        (SIZES[0], "all+controlnet"),
        (SIZES[2], "some"),
    ):
        batch, height, width, _ = size
        inputs = inputs_for(config, size, False)
        if kind == "net":
            control = net(torch.rand(1, 3, 8 * height, 8 * width))
        else:
            generator = torch.Generator().manual_seed(5)
            states = residuals_for(config, batch, height, width, generator)
            control = {"input": states[-2::-1], "middle": states[-1:]}
        if kind == "all+controlnet":
            made = residuals_for(config, batch, height, width, generator)
            control |= {"output": made[:-1], "middle": [states[-1] + made[-1]]}
        if kind == "some":
            control = {
                "input": [control["input"][i] if i in (7, 8, 10) else None for i in range(11)]
            }
        args = (inputs["latent"], inputs["timestep"], inputs["context"], None)
        inputs = bind_call(config, "comfyui", (*args, control), {}).inputs
        with torch.no_grad():
            without = module(*args)
            expected = module(*args, control)  # takes them off the lists
        for name, run in runs.items():
            findings[name].append(relative_error(run(inputs)[0], expected))
        findings["change"].append(relative_error(expected, without))
    return findings


COMFYUI = {
    "unet": tiny_config(),
    "controlnet": dataclasses.replace(CONTROLNET, hint_block_channels=(16, 32, 96, 256)),
}


@pytest.fixture(scope="module")
def comfyui(tiny_plan: Plan) -> Any:
    arguments = (os.environ["COMFYUI_PATH"], tiny_plan.to_json())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        findings = pool.apply(_comfyui_findings, arguments)
    if isinstance(findings, str):
        pytest.skip(findings)
    return findings


@pytest.mark.comfyui
@pytest.mark.parametrize("kind", COMFYUI)
def test_comfyui_equals_its_own_module(comfyui: Any, kind: str) -> None:
    config = COMFYUI[kind]
    cls = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    found = comfyui[kind]
    assert found["errors"] <= LIMIT
    assert found["parameters"] == {n: p.shape for n, p in parameters(config).items()}
    from diffusers.utils import logging  # its warnings say nothing here

    logging.set_verbosity_error()
    from accel.models import diffusers_kwargs

    with torch.device("meta"):
        assert found["key"] == structure_of(cls(**diffusers_kwargs(config))).graph_key


@pytest.mark.comfyui
def test_t2i_adapters_equal_comfyui(comfyui: Any) -> None:
    """By ComfyUI's capture and by diffusers': ComfyUI's own adapter, every place, some places."""
    found = comfyui["adapters"]
    assert max(found["own"] + found["diffusers"]) <= LIMIT
    assert min(found["change"]) > 1e-2


@pytest.mark.comfyui
def test_comfyui_makes_the_plan_that_diffusers_makes(comfyui: Any, tiny_plan: Plan) -> None:
    """So either host's capture may serve the other's module."""
    assert comfyui["unet"]["ops"] == sorted(step.op for step in tiny_plan.steps)
    assert sorted(comfyui["unet"]["inputs"]) == sorted(entry.name for entry in tiny_plan.inputs)
