"""diffusers pipelines on engines: the same pictures, whatever happens to them in between."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from support import tiny_config
from torch import Tensor, nn

from accel import Session
from accel.hosts import diffusers as host
from accel.hosts.diffusers import accelerate, engines, restore
from accel.models import UNetConfig, diffusers_kwargs

# Two levels: at 64 x 64 no norm is then over a pixel or two, which would magnify rounding errors.
SD = dataclasses.replace(
    tiny_config("sd15"),
    block_out_channels=(32, 64),
    layers_per_block=(1, 1),
    down_depths=((1,), (0,)),
    up_depths=((0, 0), (1, 1)),
    heads=(4, 4),
)
XL = dataclasses.replace(
    tiny_config("sdxl"),
    block_out_channels=(32, 64),
    layers_per_block=(1, 1),
    down_depths=((0,), (2,)),
    mid_depth=2,
    up_depths=((2, 2), (0, 0)),
    heads=(4, 4),
)
CONTROL = dataclasses.replace(
    SD, kind="controlnet", up_depths=(), hint_channels=3, hint_block_channels=(8, 16, 16, 32)
)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session("cpu", "fp32", cache_dir=tmp_path_factory.mktemp("plans"))


@pytest.fixture(autouse=True)
def default_session(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_sessions", {(torch.device("cpu"), torch.float32): session})


def vae() -> AutoencoderKL:
    torch.manual_seed(5)
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **VAE_BLOCKS)


VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def network(seed: int, config: UNetConfig = SD) -> Any:
    """A UNet or ControlNet whose every part matters, and that keeps sampling tame."""
    settings = diffusers_kwargs(config) | {"layers_per_block": 1}
    torch.manual_seed(seed)
    module: Any
    if config.kind == "unet":
        module = UNet2DConditionModel(sample_size=64, **settings)
        scaled = {"conv_out": 0.3}
    else:
        module = ControlNetModel(**settings)
        scaled = {"controlnet_cond_embedding.conv_out": 100.0}
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    for name, factor in scaled.items():
        for parameter in module.get_submodule(name).parameters():
            parameter.mul_(factor)
    return module


def sd(seed: int = 0, controlnet: Any = None) -> Any:
    """A tiny SD1.5 pipeline without text encoder, with one or several ControlNets if given."""
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "unet": network(seed),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if controlnet is None:
        pipe = StableDiffusionPipeline(**parts)
    else:
        pipe = StableDiffusionControlNetPipeline(controlnet=controlnet, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> Any:
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network(0, XL),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(seed: int = 0, pooled: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    found = {name: torch.randn(1, 7, 32, generator=generator) for name in names}
    if pooled:
        names = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        found |= {name: torch.randn(1, 16, generator=generator) for name in names}
    return found


def hint(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, seed: int = 0, **kwargs: Any) -> Tensor:
    """Latents after 4 DDIM steps at 64 x 64."""
    settings: dict[str, Any] = {
        "num_inference_steps": 4,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    settings |= prompt(seed, pooled=isinstance(pipe, StableDiffusionXLPipeline)) | kwargs
    picture: Tensor = pipe(**settings).images
    return picture


def check(ours: Tensor, plain: Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - plain).norm() <= 1e-5 * plain.norm()


def differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).norm() > 1e-4 * other.norm()


def fallbacks(pipe: Any) -> list[str]:
    return [reason for engine in engines(pipe) for reason in engine.report()["fallbacks"]]


def count(pipe: Any, name: str) -> int:
    return sum(engine.report()[name] for engine in engines(pipe))


@pytest.fixture
def pair(session: Session) -> Iterator[tuple[Any, Any]]:
    """A plain pipeline and its accelerated twin."""
    plain, ours = sd(), sd()
    assert accelerate(ours, session) is ours
    yield plain, ours
    restore(ours)


# The same picture.


def test_two_pictures_in_a_row_with_other_prompts(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    before, hits = count(ours, "forwards"), count(ours, "prompt_hits")
    for seed in (1, 2):
        check(draw(ours, seed), draw(plain, seed))
    assert count(ours, "forwards") - before == 8
    assert count(ours, "prompt_hits") - hits == 6  # all but the first step of each
    assert not fallbacks(ours)


def test_sdxl(session: Session) -> None:
    plain, ours = sdxl(), accelerate(sdxl(), session)
    check(draw(ours, 3), draw(plain, 3))
    sizes = {"original_size": (32, 64), "crops_coords_top_left": (8, 0), "guidance_scale": 1.0}
    check(draw(ours, 3, **sizes), draw(plain, 3, **sizes))
    assert count(ours, "prompt_hits") == 6
    assert not fallbacks(ours)


@pytest.mark.parametrize(
    "settings",
    [
        {"controlnet_conditioning_scale": 0.6},
        {"guess_mode": True},
        {"control_guidance_end": 0.5, "guidance_scale": 1.0},
    ],
    ids=["scale", "guess", "half"],
)
def test_controlnet(session: Session, settings: dict[str, Any]) -> None:
    plain, ours = (sd(0, network(7, CONTROL)) for _ in range(2))
    accelerate(ours, session)
    picture = draw(ours, image=hint(), **settings)
    check(picture, draw(plain, image=hint(), **settings))
    differ(picture, draw(plain, image=hint(1), **settings))
    assert len(engines(ours)) == 2 and not fallbacks(ours)


def test_several_controlnets(session: Session) -> None:
    plain, ours = (
        sd(0, MultiControlNetModel([network(7, CONTROL), network(8, CONTROL)])) for _ in range(2)
    )
    accelerate(ours, session)
    settings = {"image": [hint(1), hint(2)], "controlnet_conditioning_scale": [1.0, 0.5]}
    check(draw(ours, **settings), draw(plain, **settings))
    assert len(engines(ours)) == 3 and not fallbacks(ours)


def test_one_network_alone(session: Session) -> None:
    plain, ours = network(0), accelerate(network(0), session)
    latent, context = torch.randn(1, 4, 9, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = plain(latent, 11, context).sample
        check(ours(latent, 11, context).sample, expected)
        check(ours(latent, 11, context, return_dict=False)[0], expected)
        check(ours.forward(latent, 11, context, *[None] * 9, False)[0], expected)
        assert type(ours(latent, 11, context)) is type(plain(latent, 11, context))
    assert not fallbacks(ours)


def test_one_controlnet_alone(session: Session) -> None:
    plain, ours = network(7, CONTROL), accelerate(network(7, CONTROL), session)
    arguments = (torch.randn(1, 4, 8, 8), 11, torch.randn(1, 7, 32), hint())
    with torch.no_grad():
        theirs, result = plain(*arguments), ours(*arguments)
    assert type(result) is type(theirs)
    check(result.mid_block_res_sample, theirs.mid_block_res_sample)
    for one, other in zip(
        result.down_block_res_samples, theirs.down_block_res_samples, strict=True
    ):
        check(one, other)


# What a callback does to the prompt.


def replaced(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if step == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(2)
    return tensors


def in_place(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if step == 1:
        tensors["prompt_embeds"].mul_(0.5)
    return tensors


def without_trace(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if step == 1:
        tensors["prompt_embeds"].data.mul_(0.5)
    return tensors


def guidance_off(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if step == 1:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
    return tensors


@pytest.mark.parametrize("callback", [replaced, in_place, without_trace, guidance_off])
def test_a_prompt_edited_on_the_way(pair: tuple[Any, Any], callback: Any) -> None:
    plain, ours = pair
    settings = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    picture = draw(ours, **settings)
    check(picture, draw(plain, **settings))
    differ(picture, draw(plain))
    assert not fallbacks(ours)


def test_a_callback_that_only_sees_latents_costs_no_hoisting(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    hits = count(ours, "prompt_hits")
    draw(ours, callback_on_step_end=lambda pipe, step, t, tensors: tensors)
    assert count(ours, "prompt_hits") - hits == 3


def test_in_inference_mode_nothing_vouches_for_the_prompt(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    hits = count(ours, "prompt_hits")
    with torch.inference_mode():
        check(draw(ours), draw(plain))
    assert count(ours, "prompt_hits") == hits


def test_keys_tell_tensors_runs_and_writes_apart() -> None:
    run = host._Run(hoist=True)
    one, other = torch.ones(2), torch.ones(2)
    first = run.key((one, other))
    assert first is not None and run.key((one, other)) == first
    assert run.key((other, one)) != first
    assert host._Run(hoist=True).key((one, other)) != first
    one.add_(1)
    assert run.key((one, other)) != first
    addresses = {id(tensor) for tensor in run._held.values()}
    for _ in range(20):  # a tensor of a key is held: no new one gets its id
        assert id(torch.ones(2)) not in addresses
    with torch.inference_mode():
        assert run.key((torch.ones(2),)) is None
    run.end()
    assert run.key((one, other)) is None and not run._held


# LoRAs.


def lora_of(seed: int, **settings: Any) -> dict[str, Tensor]:
    """A LoRA over attentions and convolutions, as diffusers saves it."""
    from peft.utils import get_peft_model_state_dict

    module = network(0)
    module.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=LAYERS, **settings))
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(module).items()}


def both(pair: tuple[Any, Any], do: Callable[[Any], Any]) -> None:
    for pipe in pair:
        do(pipe)


def followed(pair: tuple[Any, Any], steps: list[Callable[[Any], Any]]) -> list[Any]:
    """The accelerated pipeline's picture after each step, all as the plain one's."""
    plain, ours = pair
    seen = []
    for step in steps:
        both(pair, step)
        expected, picture = draw(plain), draw(ours)
        check(picture, expected)
        seen.append(picture)
    assert not fallbacks(ours)
    return seen


def test_loras_are_followed_through_all_their_states(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    one, two = lora_of(1), lora_of(2)
    without = draw(ours)
    steps: list[Callable[[Any], Any]] = [
        lambda p: p.load_lora_weights(dict(one), adapter_name="one"),
        lambda p: p.load_lora_weights(dict(two), adapter_name="two"),
        lambda p: p.set_adapters(["one", "two"], [0.5, 1.5]),
        lambda p: p.set_adapters("two", 0.3),
        lambda p: p.unet.disable_lora(),
        lambda p: p.unet.enable_lora(),
        lambda p: p.delete_adapters("one"),
        lambda p: (
            p.unet.down_blocks[0]
            .attentions[0]
            .transformer_blocks[0]
            .attn1.to_q.lora_B["two"]
            .weight.data.mul_(3.0)
        ),
        lambda p: p.fuse_lora(),
        lambda p: p.unload_lora_weights(),
    ]
    seen = [without, *followed(pair, steps)]
    differ(seen[1], without)
    check(seen[-1], seen[-2])  # fused, and still there when the adapters are gone
    differ(seen[-1], without)


def test_unfused_loras_are_gone(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    without = draw(ours)
    both(pair, lambda p: p.load_lora_weights(lora_of(1)))
    both(pair, lambda p: p.fuse_lora(lora_scale=0.7))
    check(draw(ours), draw(plain))
    both(pair, lambda p: p.unfuse_lora())
    check(draw(ours), draw(plain))
    both(pair, lambda p: p.unload_lora_weights())
    check(draw(ours), draw(plain))
    check(draw(ours), without)
    assert not fallbacks(ours)


def test_the_lora_scale_of_a_call_runs_on_the_host(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    both(pair, lambda p: p.load_lora_weights(lora_of(1)))
    arguments = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32))
    scaled = {"cross_attention_kwargs": {"scale": 0.4}}
    with torch.no_grad():
        for settings in (scaled, {}):
            check(ours.unet(*arguments, **settings)[0], plain.unet(*arguments, **settings)[0])
    assert len(fallbacks(ours)) == 1 and "scale" in fallbacks(ours)[0]


def test_scheduled_loras_change_at_their_steps(session: Session) -> None:
    """As peft's own do that a callback switches: half of the steps of this sampling, not of all."""
    parts = {name: part for name, part in sd().components.items() if name != "image_encoder"}
    plain = StableDiffusionImg2ImgPipeline(**parts)
    pipe = accelerate(StableDiffusionImg2ImgPipeline(**sd().components), session)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    settings = {"image": image, "strength": 0.5, "num_inference_steps": 8, **prompt()}

    def draw(pipe: Any, **more: Any) -> Tensor:
        seeded = torch.Generator().manual_seed(0)
        found: Tensor = pipe(**settings, **more, generator=seeded, output_type="latent").images
        return found

    bare = draw(plain)
    check(draw(pipe), bare)
    plain.load_lora_weights(lora_of(1), adapter_name="a")

    def off_after_two(pipe: Any, step: int, _: Any, tensors: Any) -> Any:
        if step == 1:
            pipe.disable_lora()
        return tensors

    expected = draw(plain, callback_on_step_end=off_after_two)
    (engine,) = engines(pipe)
    engine.schedule_loras([(lora_of(1), 1.0, 0.0, 0.5)])
    for _ in range(2):  # the schedule begins anew with each sampling
        check(draw(pipe), expected)
        assert engine.report()["loras"] == []
    differ(expected, bare)
    engine.set_loras([])
    check(draw(pipe), bare)
    assert not fallbacks(pipe)
    restore(pipe)


def test_steps_are_told_by_their_timesteps() -> None:
    """Two networks are called in each; a scheduler of second order lists timesteps twice."""
    listed = torch.tensor([900.0, 700, 700, 500, 500, 300, 300])
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=listed), _num_timesteps=5)
    run = host._Run(hoist=False, pipe=pipe)
    seen = [run.step(t) for t in (torch.tensor([700]), 700, 500, torch.tensor(500.0), 300, 100)]
    assert seen == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]


def test_dora_is_followed_through_all_its_states(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    without = draw(ours)
    dora, other = lora_of(1, use_dora=True), lora_of(2)
    assert any("magnitude" in name for name in dora)
    steps: list[Callable[[Any], Any]] = [
        lambda p: p.load_lora_weights(dict(dora), adapter_name="dora"),
        lambda p: p.load_lora_weights(dict(other), adapter_name="other"),
        lambda p: p.set_adapters(["dora", "other"], [0.5, -0.7]),
        lambda p: p.set_adapters("dora", 0.3),
        lambda p: (
            p.unet.down_blocks[0]
            .attentions[0]
            .transformer_blocks[0]
            .attn1.to_q.lora_magnitude_vector["dora"]
            .weight.data.mul_(3.0)
        ),
        lambda p: p.unload_lora_weights(),
    ]
    seen = [without, *followed(pair, steps)]
    for before, after in itertools.pairwise(seen):
        differ(after, before)
    check(seen[-1], without)


def test_another_variant_of_lora_runs_on_the_host(pair: tuple[Any, Any]) -> None:
    from peft.tuners.lora.variants import DoraLinearVariant

    class Another(DoraLinearVariant):
        """Of a kind that is not known here."""

    plain, ours = pair
    both(pair, lambda p: p.load_lora_weights(lora_of(1, use_dora=True)))
    for module in ours.unet.modules():
        for name, variant in getattr(module, "lora_variant", {}).items():
            if type(variant) is DoraLinearVariant:
                module.lora_variant[name] = Another()
    check(draw(ours), draw(plain))
    assert len(fallbacks(ours)) == 1 and "variant of LoRA" in fallbacks(ours)[0]
    both(pair, lambda p: p.unload_lora_weights())
    check(draw(ours), draw(plain))
    assert len(fallbacks(ours)) == 1


def test_a_lora_that_was_there_before(session: Session) -> None:
    plain, ours = sd(), sd()
    both((plain, ours), lambda p: p.load_lora_weights(lora_of(1)))
    accelerate(ours, session)
    check(draw(ours), draw(plain))
    assert not fallbacks(ours) and count(ours, "forwards")


# Other changes between two pictures, and on the way.


def test_freeu_on_and_off(pair: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    plain, ours = pair
    without = draw(ours)
    both(pair, lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6))
    caplog.set_level(logging.WARNING, host.logger.name)
    picture = draw(ours)
    check(picture, draw(plain))
    differ(picture, without)
    assert len([r for r in caplog.records if r.name == host.logger.name]) == 1
    assert len(fallbacks(ours)) == 1
    both(pair, lambda p: p.disable_freeu())
    check(draw(ours), without)
    assert len(fallbacks(ours)) == 1


def test_freeu_on_the_way(pair: tuple[Any, Any]) -> None:
    plain, ours = pair

    def callback(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        return tensors

    check(draw(ours, callback_on_step_end=callback), draw(plain, callback_on_step_end=callback))
    assert len(fallbacks(ours)) == 1


def versioned(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(3.0)


def unversioned(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].conv1.weight.data.mul_(3.0)


def new_parameter(pipe: Any) -> None:
    layer = pipe.unet.mid_block.resnets[0].conv1
    layer.weight = nn.Parameter(layer.weight.detach() * 3.0)


def new_layer(pipe: Any) -> None:
    block = pipe.unet.mid_block.resnets[0]
    block.conv1 = copy.deepcopy(block.conv1)
    block.conv1.weight.data.mul_(3.0)


def new_state_dict(pipe: Any) -> None:
    pipe.unet.load_state_dict(network(4).state_dict())


def attribute(pipe: Any) -> None:
    pipe.unet.down_blocks[0].resnets[0].norm1.eps = 0.1


def foreign_forward(pipe: Any) -> None:
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 0.9,)


def hook(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda module, args, result: result * 3.0)


@pytest.mark.parametrize(
    ("change", "host_runs"),
    [
        (versioned, False),
        (unversioned, False),
        (new_parameter, False),
        (new_layer, False),
        (new_state_dict, False),
        (attribute, True),
        (foreign_forward, True),
        (hook, True),
    ],
)
def test_whatever_changes_the_network_shows(
    pair: tuple[Any, Any], change: Callable[[Any], Any], host_runs: bool
) -> None:
    plain, ours = pair
    before = draw(ours)
    both(pair, change)
    picture = draw(ours)
    check(picture, draw(plain))
    differ(picture, before)
    assert bool(fallbacks(ours)) is host_runs


def test_an_unknown_argument_runs_on_the_host_once_loudly(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    plain, ours = network(0), accelerate(network(0), session)
    latent, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    mask = torch.tensor([[1.0] * 4 + [0.0] * 3])
    caplog.set_level(logging.WARNING, host.logger.name)
    with torch.no_grad():
        for _ in range(3):
            result = ours(latent, 5, context, encoder_attention_mask=mask).sample
            assert torch.equal(
                result, plain(latent, 5, context, encoder_attention_mask=mask).sample
            )
        assert len(caplog.records) == 1
        assert "encoder_attention_mask" in caplog.records[0].getMessage()
        check(ours(latent, 5, context).sample, plain(latent, 5, context).sample)
    assert ["encoder_attention_mask" in reason for reason in fallbacks(ours)] == [True]


def test_errors_of_the_host_stay_its_own(session: Session) -> None:
    plain, ours = network(0), accelerate(network(0), session)
    arguments = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 31))
    with pytest.raises(RuntimeError) as theirs:
        plain(*arguments)
    with pytest.raises(RuntimeError) as mine:
        ours(*arguments)
    assert str(mine.value) == str(theirs.value)


def test_gradients_come_from_the_host(session: Session) -> None:
    ours = accelerate(network(0), session)
    latent = torch.randn(1, 4, 8, 8, requires_grad=True)
    ours(latent, 5, torch.randn(1, 7, 32)).sample.sum().backward()
    assert latent.grad is not None and latent.grad.abs().sum() > 0


# The pipeline stays what it was.


def test_the_objects_pass_for_what_they_were(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    assert isinstance(ours, StableDiffusionPipeline) and isinstance(ours, DiffusionPipeline)
    assert isinstance(ours.unet, UNet2DConditionModel)
    assert type(ours).__name__ == "StableDiffusionPipeline"
    assert ours.unet.dtype == torch.float32
    assert ours.unet.device == ours.device == ours._execution_device == torch.device("cpu")
    assert ours.unet.config.in_channels == 4
    assert ours.components["unet"] is ours.unet


def test_saving_and_loading(pair: tuple[Any, Any], tmp_path: Path) -> None:
    _, ours = pair
    expected = draw(ours)
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    check(draw(loaded), expected)
    check(draw(ours), expected)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_copies_are_plain(pair: tuple[Any, Any], how: str) -> None:
    plain, ours = pair
    copied = {
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
    }[how](ours.unet)
    assert type(copied) is UNet2DConditionModel
    for (name, mine), theirs in zip(
        copied.state_dict().items(), plain.unet.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    again = copy.copy(ours)
    assert type(again) is StableDiffusionPipeline and again.unet is ours.unet


def test_another_pipeline_of_the_same_parts(pair: tuple[Any, Any]) -> None:
    plain, ours = pair
    direct = StableDiffusionPipeline(**ours.components, requires_safety_checker=False)
    for other in (direct, StableDiffusionImg2ImgPipeline.from_pipe(ours)):
        assert other.unet is ours.unet
        other.set_progress_bar_config(disable=True)
    forwards = count(ours, "forwards")
    check(draw(direct), draw(plain))
    assert count(ours, "forwards") == forwards + 4


def test_restore(session: Session) -> None:
    plain, ours = sd(0, network(7, CONTROL)), sd(0, network(7, CONTROL))
    fields = set(vars(ours.unet))
    accelerate(ours, session)
    expected = draw(ours, image=hint())
    assert len(engines(ours)) == 2
    assert restore(ours) is ours
    assert type(ours) is StableDiffusionControlNetPipeline
    assert type(ours.unet) is UNet2DConditionModel
    assert type(ours.controlnet) is ControlNetModel
    assert set(vars(ours.unet)) == fields
    assert not engines(ours)
    assert torch.equal(draw(ours, image=hint()), draw(plain, image=hint()))
    check(draw(ours, image=hint()), expected)
    restore(ours)
    accelerate(ours, session)
    accelerate(ours)
    check(draw(ours, image=hint()), expected)
    assert type(ours).__mro__[1] is StableDiffusionControlNetPipeline
    restore(ours)


def test_on_the_cpu_the_engine_comes_with_the_first_call() -> None:
    plain, ours = sd(), accelerate(sd())
    assert not engines(ours)
    check(draw(ours), draw(plain))
    assert len(engines(ours)) == 1


def test_another_precision_is_another_engine(session: Session, tmp_path: Path) -> None:
    half = Session("cpu", "bf16", cache_dir=session.cache.root)
    host._sessions[torch.device("cpu"), torch.bfloat16] = half
    ours = accelerate(sd())
    single = draw(ours)
    ours.to(torch.bfloat16)
    embeddings = {name: value.bfloat16() for name, value in prompt(0).items()}
    picture = draw(ours, **embeddings)
    assert engines(ours)[0].session is half
    assert picture.dtype == torch.bfloat16
    assert (picture.float() - single).norm() < 0.1 * single.norm()
    assert not fallbacks(ours)


def test_hooks_that_move_the_network_are_lived_with(pair: tuple[Any, Any]) -> None:
    from accelerate import cpu_offload_with_hook

    plain, ours = pair
    _, handle = cpu_offload_with_hook(ours.unet, torch.device("cpu"))
    check(draw(ours), draw(plain))
    handle.offload()
    check(draw(ours, 1), draw(plain, 1))
    handle.remove()
    check(draw(ours), draw(plain))
    assert not fallbacks(ours)
    restore(ours)
    assert "forward" not in vars(ours.unet)
    check(draw(ours), draw(plain))


def test_parked_weights_go_along_in_name_only(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `meta` for a card: what the engine has is not moved, and the pipeline goes by words."""
    monkeypatch.setattr(host, "_DEVICES", ("cpu", "meta"))
    plain, ours = network(0), accelerate(network(0), session)
    places = [parameter.data_ptr() for parameter in ours.parameters()]
    for _ in range(2):
        assert ours.to("meta") is ours and ours.device.type == "meta"
        assert all(parameter.device.type == "cpu" for parameter in ours.parameters())
    assert [parameter.data_ptr() for parameter in ours.parameters()] == places
    arguments = (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32))
    with torch.no_grad():
        check(ours(*arguments)[0], plain(*arguments)[0])
    # Another dtype is for the weights themselves.
    ours.double()
    assert ours.dtype == torch.float64 and ours.device.type == "meta"
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float64}


@pytest.mark.gpu
def test_on_a_card_the_weights_wait_on_the_cpu(session: Session) -> None:
    card, half = torch.device("cuda", 0), torch.float16
    host._sessions[card, half] = Session("cuda", "fp16", cache_dir=session.cache.root)
    plain, ours = (sd().to("cuda", half) for _ in range(2))
    embeddings = {name: value.to("cuda", half) for name, value in prompt(0).items()}

    def same(**kwargs: Any) -> None:
        mine, theirs = draw(ours, **embeddings, **kwargs), draw(plain, **embeddings, **kwargs)
        assert mine.device == theirs.device and mine.dtype == theirs.dtype
        assert (mine - theirs).float().norm() <= 1e-2 * theirs.float().norm()

    def where() -> set[str]:
        return {parameter.device.type for parameter in ours.unet.parameters()}

    accelerate(ours)
    assert where() == {"cpu"} and not fallbacks(ours)
    assert ours.unet.device == ours.device == ours._execution_device == card
    same()
    both((plain, ours), lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6))
    same()
    assert where() == {"cuda"} and len(fallbacks(ours)) == 1
    both((plain, ours), lambda p: p.disable_freeu())
    same()
    assert where() == {"cpu"} and len(fallbacks(ours)) == 1
    both((plain, ours), lambda p: p.load_lora_weights(lora_of(1)))
    same()
    both((plain, ours), lambda p: p.fuse_lora())
    both((plain, ours), lambda p: p.unload_lora_weights())
    same()
    ours.to("cpu")
    assert ours.unet.device.type == "cpu"
    ours.to("cuda")
    assert ours.unet.device == card and where() == {"cpu"}
    same()
    ours.enable_model_cpu_offload()
    same()
    same()
    ours.remove_all_hooks()
    ours.to("cuda")
    same()
    assert len(fallbacks(ours)) == 1
    restore(ours)
    assert where() == {"cuda"} and ours.unet.device == card
    same()


# What cannot be accelerated.


def with_processor(module: Any) -> None:
    class Mine:
        def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

    module.set_attn_processor(Mine())


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (with_processor, "processor"),
        (lambda module: module.to(torch.float64), "float64"),
        (lambda module: module.to("meta"), "meta"),
        (lambda module: module.enable_freeu(0.9, 0.2, 1.5, 1.6), "s1"),
    ],
)
def test_what_is_not_supported_is_returned_unchanged(
    session: Session,
    prepare: Callable[[Any], Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = sd()
    prepare(pipe.unet)
    fields = dict(vars(pipe.unet))
    caplog.set_level(logging.WARNING, host.logger.name)
    assert accelerate(pipe, session) is pipe
    records = [r.getMessage() for r in caplog.records if r.name == host.logger.name]
    assert len(records) == 1 and reason in records[0] and "\n" not in records[0]
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.unet) is UNet2DConditionModel
    assert vars(pipe.unet) == fields
    assert not engines(pipe)


def test_a_module_of_another_kind_is_returned_unchanged(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    module = nn.Linear(3, 3)
    assert accelerate(module, session) is module
    assert type(module) is nn.Linear
    assert "neither a UNet nor a ControlNet" in caplog.text


def test_a_refused_controlnet_does_not_keep_the_unet_off(session: Session) -> None:
    plain, ours = sd(0, network(7, CONTROL)), sd(0, network(7, CONTROL))
    both((plain, ours), lambda p: with_processor(p.controlnet))
    accelerate(ours, session)
    assert len(engines(ours)) == 1 and type(ours.controlnet) is ControlNetModel
    check(draw(ours, image=hint()), draw(plain, image=hint()))
