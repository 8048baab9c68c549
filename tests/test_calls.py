"""Forward calls of the hosts as a plan's inputs, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import family_config, make_unet, residuals_for, tiny_config
from torch import Tensor

from accel.errors import InvalidInput, UnsupportedModel
from accel.models.calls import bind_call, prompt_tensors
from accel.models.twin import residual_count

SD, XL = tiny_config("sd15"), tiny_config("sdxl")
CONTROL = dataclasses.replace(tiny_config("sd15-controlnet"), hint_block_channels=(8, 16, 16, 32))
COMFY_CONTROL = dataclasses.replace(CONTROL, pooled_dim=None)


def tensors(batch: int = 2, side: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, side, side), torch.randn(batch, 7, 32)


def added(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    ids = torch.tensor([[1024, 768, 0, 16, 1024, 1152]]).repeat(batch, 1)
    return {"text_embeds": torch.randn(batch, 16, dtype=dtype), "time_ids": ids.to(dtype)}


# Timesteps and the latent.


@pytest.mark.parametrize(
    "timestep",
    [
        481,
        481.0,
        torch.tensor(481),
        torch.tensor(481, dtype=torch.int32),
        torch.tensor(481.0, dtype=torch.float64),
        torch.tensor([481]),
        torch.tensor([481, 481]),
        torch.tensor([481.0, 481.0], dtype=torch.float16),
    ],
    ids=repr,
)
@pytest.mark.parametrize("by_name", [True, False])
def test_every_spelling_of_a_timestep_is_one_float_for_each_image(
    timestep: Any, by_name: bool
) -> None:
    latent, context = tensors()
    given = {"sample": latent, "timestep": timestep, "encoder_hidden_states": context}
    args, kwargs = ((), given) if by_name else (tuple(given.values()), {})
    call = bind_call(SD, "diffusers", args, kwargs)
    assert call.inputs["timestep"].dtype == torch.float32
    assert call.inputs["timestep"].tolist() == [481.0, 481.0]
    assert call.inputs["latent"] is latent and call.inputs["context"] is context
    assert set(call.inputs) == {"latent", "timestep", "context"}


def test_fractions_of_a_timestep_are_rounded_as_diffusers_rounds_them() -> None:
    latent, context = tensors()
    value = 480.123456789123
    for given in (value, torch.tensor(value, dtype=torch.float64)):
        bound = bind_call(SD, "diffusers", (latent, given, context), {}).inputs["timestep"]
        assert torch.equal(bound, torch.tensor([value] * 2, dtype=torch.float64).float())


def test_the_result_has_the_dtype_of_the_latent() -> None:
    latent, context = tensors()
    call = bind_call(SD, "diffusers", (latent.half(), 1, context), {"return_dict": False})
    assert call.finish([latent]).dtype == torch.float16
    result = bind_call(SD, "comfyui", (latent, torch.tensor([1.0, 2.0]), context), {})
    assert result.finish([latent]) is latent


# SDXL's pooled vector.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip_sin_to_cos": False, "freq_shift": 1},
        {"addition_time_embed_dim": 7, "pooled_dim": 6 * 7 + 16},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_pooled_vector_is_diffusers_own_bit_for_bit(
    changes: dict[str, Any], dtype: torch.dtype, batch: int
) -> None:
    config = dataclasses.replace(XL, **changes)
    module = make_unet(0, config)
    conditions = added(batch, dtype)
    seen: list[Tensor] = []
    module.add_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.get_aug_embed(torch.zeros(1), torch.zeros(1), conditions)
    latent, context = tensors(batch)
    call = bind_call(config, "diffusers", (latent, 1, context), {"added_cond_kwargs": conditions})
    assert torch.equal(call.inputs["pooled"].to(torch.float32), seen[0])
    assert call.prompt == (context, conditions["text_embeds"], conditions["time_ids"])


def test_the_full_sdxl_has_2816_channels() -> None:
    config = family_config("sdxl")
    conditions = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}
    kwargs = {"added_cond_kwargs": conditions}
    call = bind_call(
        config, "diffusers", (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 77, 2048)), kwargs
    )
    assert call.inputs["pooled"].shape == (1, 2816)


# diffusers' ControlNet: residuals into the UNet, and out of the ControlNet.


def test_residuals_are_numbered_by_skip_and_the_middle_comes_last() -> None:
    latent, context = tensors()
    residuals = residuals_for(SD, 2, 8, 8, torch.Generator().manual_seed(0))
    residuals[3] = residuals[3][:1]
    call = bind_call(
        SD,
        "diffusers",
        (latent, 1, context),
        {
            "down_block_additional_residuals": residuals[:-1],
            "mid_block_additional_residual": residuals[-1],
        },
    )
    assert len(residuals) == residual_count(SD)
    for index, residual in enumerate(residuals):
        bound = call.inputs[f"residual_{index}"]
        assert bound.shape[0] == 2 and torch.equal(bound, residual.expand_as(bound))
        assert bound.data_ptr() == residual.data_ptr()


def adapters_for(config: Any, places: list[int], batch: int = 2) -> list[Tensor]:
    made = residuals_for(config, batch, 8, 8, torch.Generator().manual_seed(1))
    return [made[place] for place in places]


@pytest.mark.parametrize(
    ("config", "places", "names"),
    [
        (SD, [2, 5, 8, 11], ["adapter_2", "adapter_5", "adapter_8", "adapter_11"]),
        (XL, [3, 5, 8, 9], ["adapter_3", "adapter_5", "adapter_8", "residual_9"]),
    ],
    ids=["sd15", "sdxl"],
)
def test_adapters_states_find_their_places(
    config: Any, places: list[int], names: list[str]
) -> None:
    """After a block's attention, after a block without; SDXL's last one in the middle."""
    latent, context = tensors()
    extra = {} if config is SD else {"added_cond_kwargs": added()}

    def bound(states: Any) -> dict[str, Tensor]:
        given = {"down_intrablock_additional_residuals": states, **extra}
        inputs = bind_call(config, "diffusers", (latent, 1, context), given).inputs
        return {name: value for name, value in inputs.items() if name[-1].isdigit()}

    states = adapters_for(config, places)
    found = bound(states)
    assert list(found) == names
    assert all(a is b for a, b in zip(found.values(), states, strict=True))
    assert len(states) == 4  # diffusers itself empties the list
    surplus = [*states, torch.ones(2, 65, 1, 1)]
    assert list(bound(surplus)) == names  # of another shape, or one too many: ignored
    assert list(bound(states[:1])) == names[:1]
    assert list(bound((None, *states[1:]))) == names[1:]
    single = bound(adapters_for(config, places, batch=1))
    assert all(value.shape[0] == 2 for value in single.values())
    assert list(single) == [name for name in names if name.startswith("adapter")]


def test_the_middle_takes_a_controlnets_and_an_adapters_together() -> None:
    latent, context = tensors()
    residuals = residuals_for(XL, 2, 8, 8, torch.Generator().manual_seed(0))
    states = adapters_for(XL, [3, 5, 8, 9])
    kwargs = {
        "down_block_additional_residuals": residuals[:-1],
        "mid_block_additional_residual": residuals[-1],
        "down_intrablock_additional_residuals": states,
        "added_cond_kwargs": added(),
    }
    inputs = bind_call(XL, "diffusers", (latent, 1, context), kwargs).inputs
    assert torch.equal(inputs["residual_9"], residuals[-1] + states[-1])
    assert {"residual_0", "residual_8", "adapter_3", "adapter_8"} <= set(inputs)


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.7, 0, 2, torch.tensor(0.3)], ids=repr)
def test_residuals_are_scaled_as_diffusers_scales_them(scale: Any, guess: bool) -> None:
    module = make_unet(1, CONTROL)
    latent, context = tensors()
    hint = torch.rand(2, 3, 64, 64)
    down, middle = module(latent, 5, context, hint, return_dict=False)
    kwargs = {"conditioning_scale": scale, "guess_mode": guess}
    call = bind_call(CONTROL, "diffusers", (latent, 5, context, hint), kwargs)
    ours = call.finish([*down, middle])
    theirs = module(latent, 5, context, hint, return_dict=False, **kwargs)
    for ours_one, theirs_one in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        assert torch.equal(ours_one, theirs_one)
    assert call.prompt == (context, hint)
    assert call.inputs["hint"] is hint or torch.equal(call.inputs["hint"], hint)


def test_one_hint_serves_the_whole_batch() -> None:
    latent, context = tensors()
    call = bind_call(CONTROL, "diffusers", (latent, 5, context, torch.rand(1, 3, 64, 64)), {})
    assert call.inputs["hint"].shape == (2, 3, 64, 64)


# ComfyUI.


def popped(config: Any, control: dict[str, list[Tensor | None]]) -> dict[str, Tensor]:
    """What a ComfyUI UNet adds where: it takes from the end of the lists as it goes."""
    skips = residual_count(config) - 1
    found: dict[str, Tensor | None] = {}
    lists = {name: list(entries) for name, entries in control.items()}
    for block in range(skips):
        found[f"adapter_{block}"] = lists["input"].pop() if lists["input"] else None
    found[f"residual_{skips}"] = lists["middle"].pop() if lists["middle"] else None
    for skip in reversed(range(skips)):
        found[f"residual_{skip}"] = lists["output"].pop() if lists["output"] else None
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("present", "middles"),
    [
        ([True] * 12, 1),
        ([True] * 5, 1),
        ([True, None, True, None, None, True, True], 0),
        ([None] * 12, 2),
        ([True] * 15, 1),
        ([], 0),
    ],
)
def test_control_lists_are_read_from_their_end_and_left_alone(
    present: list[bool | None], middles: int
) -> None:
    latent, context = tensors()
    output = [torch.full((2, 1, 1, 1), float(i)) if p else None for i, p in enumerate(present)]
    middle = [torch.full((2, 1, 1, 1), 100.0 + i) for i in range(middles)]
    above = [torch.full((2, 1, 1, 1), 200.0 + i) if p else None for i, p in enumerate(present)]
    control = {"input": above, "middle": middle, "output": output}
    before = {name: list(entries) for name, entries in control.items()}
    call = bind_call(SD, "comfyui", (latent, torch.ones(2), context, None, control), {})
    bound = {name: value for name, value in call.inputs.items() if name[-1].isdigit()}
    expected = popped(SD, control)
    assert {name: value.flatten()[0].item() for name, value in bound.items()} == {
        name: value.flatten()[0].item() for name, value in expected.items()
    }
    assert all(a is b for name in before for a, b in zip(before[name], control[name], strict=True))


def test_a_residual_of_one_image_serves_the_batch() -> None:
    latent, context = tensors()
    control = {"input": [], "middle": [torch.ones(1, 64, 1, 1)], "output": []}
    call = bind_call(SD, "comfyui", (latent, torch.ones(2), context), {"control": control})
    assert call.inputs[f"residual_{residual_count(SD) - 1}"].shape == (2, 64, 1, 1)


def test_what_does_not_fit_is_left_out_as_the_host_does(caplog: pytest.LogCaptureFixture) -> None:
    """ComfyUI tries to add, and warns: an adapter halves odd sizes downwards, a UNet upwards."""
    latent, context = tensors(side=9)
    lists = {
        "input": [torch.ones(2, 64, 4, 4), None, None, torch.ones(1, 32, 9, 9), None, None],
        "middle": [torch.ones(3, 64, 2, 2)],
        "output": [torch.ones(2, 64, 2, 2), torch.ones(2, 65, 2, 2)],
    }
    control = {
        name: entries[::-1] if name == "output" else entries for name, entries in lists.items()
    }
    call = bind_call(SD, "comfyui", (latent, torch.ones(2), context), {"control": control})
    added = {name: tuple(v.shape) for name, v in call.inputs.items() if name[-1].isdigit()}
    assert added == {"adapter_2": (2, 32, 9, 9), "residual_11": (2, 64, 2, 2)}
    assert [record.args[0] for record in caplog.records] == ["input", "middle", "output"]


def test_comfyuis_controlnet_gives_its_dictionary_of_lists() -> None:
    latent, context = tensors()
    kwargs = {
        "x": latent,
        "hint": torch.rand(1, 3, 64, 64),
        "timesteps": torch.tensor([3.0, 4.0]),
        "context": context,
        "control_type": [1],
    }
    call = bind_call(COMFY_CONTROL, "comfyui", (), kwargs)
    outputs = [torch.full((2, 1), float(i), dtype=torch.float64) for i in range(13)]
    result = call.finish(outputs)
    assert set(result) == {"output", "middle"}
    assert [r[0].item() for r in result["output"]] == list(range(12))
    assert [r[0].item() for r in result["middle"]] == [12]
    assert result["output"][0].dtype == torch.float32
    assert len({id(r) for r in [*result["output"], *result["middle"]]}) == 13
    assert call.prompt == (context, kwargs["hint"])


def test_comfyuis_pooled_vector_passes_as_it_is() -> None:
    latent, context = tensors()
    y = torch.randn(2, XL.pooled_dim or 0)
    options = {
        "sigmas": torch.ones(1),
        "cond_or_uncond": [0, 1],
        "uuids": ["a"],
        "patches": {},
        "wrappers": {"diffusion_model": {"key": [print]}},
        "original_shape": [2, 4, 8, 8],
    }
    kwargs = {"transformer_options": options, "crossattn_controlnet": context}
    call = bind_call(XL, "comfyui", (latent, torch.ones(2), context, y), kwargs)
    assert call.inputs["pooled"] is y
    assert call.prompt == (context, y)


# What hosts vouch for.


def test_prompt_tensors_are_those_of_the_bound_call() -> None:
    latent, context = tensors()
    conditions, hint = added(), torch.rand(2, 3, 64, 64)
    calls: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = [
        (SD, "diffusers", (latent, 1, context), {}),
        (
            XL,
            "diffusers",
            (latent, 1),
            {"encoder_hidden_states": context} | {"added_cond_kwargs": conditions},
        ),
        (CONTROL, "diffusers", (latent, 1, context), {"controlnet_cond": hint}),
        (COMFY_CONTROL, "comfyui", (latent, hint, torch.ones(2), context), {}),
    ]
    for config, host, args, kwargs in calls:
        bound = bind_call(config, host, args, kwargs).prompt
        assert all(
            a is b for a, b in zip(bound, prompt_tensors(config, host, args, kwargs), strict=True)
        )
        assert bound


# What is refused.


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"class_labels": torch.ones(2)}, "class_labels"),
        ({"timestep_cond": torch.ones(2)}, "timestep_cond"),
        ({"attention_mask": torch.ones(2, 7)}, "attention_mask"),
        ({"encoder_attention_mask": torch.ones(2, 7)}, "encoder_attention_mask"),
        ({"down_block_additional_residuals": [torch.ones(1)] * 4}, "T2I-Adapters"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, r"cross_attention_kwargs\['scale'\]=0.5"),
        ({"cross_attention_kwargs": {"gligen": {"boxes": 1}}}, "gligen"),
        ({"added_cond_kwargs": {"image_embeds": [torch.ones(1)]}}, "image_embeds"),
        ({"something_new": 1}, "something_new"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(kwargs: Any, names: str) -> None:
    latent, context = tensors()
    with pytest.raises(UnsupportedModel, match=names) as failure:
        bind_call(SD, "diffusers", (latent, 1, context), kwargs)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"cross_attention_kwargs": {"scale": 1.0}},
        {"cross_attention_kwargs": {}, "added_cond_kwargs": {}},
        {"cross_attention_kwargs": {"gligen": None}, "added_cond_kwargs": {"image_embeds": None}},
        {"down_block_additional_residuals": (), "mid_block_additional_residual": None},
        {"class_labels": None, "down_intrablock_additional_residuals": []},
    ],
)
def test_what_changes_nothing_passes(kwargs: Any) -> None:
    latent, context = tensors()
    inputs = bind_call(SD, "diffusers", (latent, 1, context), kwargs).inputs
    assert set(inputs) == {"latent", "timestep", "context"}


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"control": {"input_after": [None, torch.ones(1)], "output": []}}, "input_after"),
        ({"control": {"input": [None, 0.5], "output": []}}, r"control\['input'\] of float"),
        ({"transformer_options": {"patches": {"attn1_patch": [print]}}}, "patches"),
        ({"transformer_options": {"patches_replace": {"attn2": {}}}}, "patches_replace"),
        ({"transformer_options": {"optimized_attention_override": print}}, "override"),
        ({"transformer_options": {"a_key_of_tomorrow": 1}}, "a_key_of_tomorrow"),
        ({"time_context": torch.ones(1)}, "time_context"),
    ],
)
def test_comfyui_patches_are_refused_by_name(kwargs: Any, names: str) -> None:
    latent, context = tensors()
    with pytest.raises(UnsupportedModel, match=names):
        bind_call(SD, "comfyui", (latent, torch.ones(2), context), kwargs)


@pytest.mark.parametrize(
    ("prepare", "names"),
    [
        (lambda k: k.pop("sample"), "sample is missing"),
        (lambda k: k.update(sample=torch.ones(4, 8, 8)), "4 dimensions"),
        (lambda k: k.update(timestep=torch.ones(3)), "timestep"),
        (lambda k: k.update(encoder_hidden_states=None), "encoder_hidden_states is missing"),
        (lambda k: k.update(encoder_hidden_states=[1]), "must be a tensor"),
        (lambda k: k.update(mid_block_additional_residual=torch.ones(1)), "come together"),
        (
            lambda k: k.update(
                down_block_additional_residuals=[torch.ones(1)] * 12,
                down_intrablock_additional_residuals=[torch.ones(1)],
            ),
            "together",
        ),
        (
            lambda k: k.update(down_intrablock_additional_residuals=[torch.ones(2, 32, 8, 7)]),
            r"does not fit the network: \[2, 32, 8, 7\] where it has \[2, 32, 8, 8\]",
        ),
        (lambda k: k.update(down_intrablock_additional_residuals=torch.ones(4)), "a list of"),
        (lambda k: k.update(down_intrablock_additional_residuals=[0.5]), "a list of"),
        (
            lambda k: k.update(
                down_block_additional_residuals=[torch.ones(1)] * 9,
                mid_block_additional_residual=torch.ones(1),
            ),
            "must be 12 tensors, not 9",
        ),
    ],
)
def test_what_does_not_fit_is_named(prepare: Callable[[dict[str, Any]], Any], names: str) -> None:
    latent, context = tensors()
    kwargs: dict[str, Any] = {"sample": latent, "timestep": 1, "encoder_hidden_states": context}
    prepare(kwargs)
    with pytest.raises(InvalidInput, match=names) as failure:
        bind_call(SD, "diffusers", (), kwargs)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        (None, "text_embeds and time_ids"),
        ({"text_embeds": torch.ones(2, 16)}, "text_embeds and time_ids"),
        ({"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 5)}, "64 channels"),
        ({"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(1, 6)}, "batch"),
    ],
)
def test_sdxls_conditions_must_be_whole(conditions: Any, names: str) -> None:
    latent, context = tensors()
    with pytest.raises(InvalidInput, match=names):
        bind_call(XL, "diffusers", (latent, 1, context), {"added_cond_kwargs": conditions})


@pytest.mark.parametrize("hint", [torch.ones(1, 3, 32, 64), torch.ones(3, 64, 64)])
def test_the_hint_must_be_eight_times_the_latent(hint: Tensor) -> None:
    latent, context = tensors()
    with pytest.raises(InvalidInput, match="8 times the latent, 64 x 64"):
        bind_call(CONTROL, "diffusers", (latent, 1, context, hint), {})


def test_a_list_of_scales_is_refused() -> None:
    latent, context = tensors()
    with pytest.raises(UnsupportedModel, match="conditioning_scale"):
        bind_call(CONTROL, "diffusers", (latent, 1, context, torch.ones(1, 3, 64, 64), [1.0]), {})


def test_y_must_be_there_exactly_where_the_network_reads_it() -> None:
    latent, context = tensors()
    with pytest.raises(InvalidInput, match="y is missing"):
        bind_call(XL, "comfyui", (latent, torch.ones(2), context), {})
    with pytest.raises(InvalidInput, match="y is not an input"):
        bind_call(SD, "comfyui", (latent, torch.ones(2), context, torch.ones(2, 8)), {})


def test_an_argument_cannot_come_twice_or_without_a_name() -> None:
    latent, context = tensors()
    with pytest.raises(InvalidInput, match="sample is given twice"):
        bind_call(SD, "diffusers", (latent, 1, context), {"sample": latent})
    with pytest.raises(UnsupportedModel, match="14 positional arguments"):
        bind_call(SD, "diffusers", (latent, 1, context, *([None] * 11)), {})


def test_gradients_are_refused_only_where_they_are_asked_for() -> None:
    latent, context = tensors()
    context.requires_grad_(True)
    with pytest.raises(UnsupportedModel, match="gradient"):
        bind_call(SD, "diffusers", (latent, 1, context), {})
    with torch.no_grad():
        assert bind_call(SD, "diffusers", (latent, 1, context), {}).inputs
