"""Architectures against the real classes: every family, every name, and what must be refused."""

import dataclasses
import json
import multiprocessing
import os
import sys

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import SlicedAttnProcessor

from accel.errors import UnsupportedModel
from accel.models import (
    FAMILIES,
    UNetConfig,
    adapter_names,
    config_of_module,
    diffusers_kwargs,
    family_of,
    infer_config,
    parameters,
    transformers,
    unsupported_state,
)
from accel.structure import structure_hash

CONFIGS = {family.name: family.config for family in FAMILIES}
CONFIGS["tiny-sd15"] = dataclasses.replace(
    CONFIGS["sd15"], block_out_channels=(32, 64, 128, 128), context_dim=32, time_embed_dim=128
)
CONFIGS["tiny-sd15-controlnet"] = dataclasses.replace(
    CONFIGS["sd15-controlnet"],
    block_out_channels=(32, 64, 128, 128),
    context_dim=32,
    time_embed_dim=128,
    hint_block_channels=(16, 32),
)
CONFIGS["tiny-sdxl"] = dataclasses.replace(
    CONFIGS["sdxl"],
    block_out_channels=(32, 64),
    layers_per_block=(1, 3),
    down_depths=((0,), (2, 2, 2)),
    mid_depth=2,
    up_depths=((2, 2, 2, 2), (0, 0)),
    heads=(1, 2),
    context_dim=16,
    pooled_dim=80,
    addition_time_embed_dim=8,
    time_embed_dim=256,
    norm_groups=8,
    norm_eps=1e-6,
)
CONFIGS["no-attention"] = dataclasses.replace(
    CONFIGS["tiny-sd15"],
    down_depths=((0, 0),) * 4,
    mid_depth=-1,
    up_depths=((0, 0, 0),) * 4,
)


def build(config, **changes):
    """The diffusers module of an architecture, without weights."""
    kind = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    with torch.device("meta"):
        return kind(**{**diffusers_kwargs(config), **changes})


def shapes_of(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def ldm_shapes(config):
    return {parameter.ldm_name: parameter.shape for parameter in parameters(config).values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_diffusers_module_agree(name):
    config = CONFIGS[name]
    module = build(config)
    canonical = {name: parameter.shape for name, parameter in parameters(config).items()}
    assert canonical == shapes_of(module)
    assert config_of_module(module) == config
    assert unsupported_state(module) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_config_from_names_and_shapes(name):
    config = CONFIGS[name]
    # What a file cannot tell.
    unknown = {"heads": None, "norm_groups": 32, "norm_eps": 1e-5, "addition_time_embed_dim": None}
    expected = dataclasses.replace(config, **unknown)
    canonical = {name: parameter.shape for name, parameter in parameters(config).items()}
    ldm = ldm_shapes(config)
    assert len(ldm) == len(canonical)
    assert infer_config(canonical) == expected
    assert infer_config(ldm) == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family):
    canonical = {name: parameter.shape for name, parameter in parameters(family.config).items()}
    assert family_of(canonical) is family
    assert family_of(ldm_shapes(family.config)) is family
    stored = json.loads(json.dumps(family.config.to_json()))
    assert UNetConfig.from_json(stored) == family.config


def test_parameter_counts_of_published_models():
    count = {
        family.name: sum(
            torch.Size(parameter.shape).numel() for parameter in parameters(family.config).values()
        )
        for family in FAMILIES
    }
    assert count["sd15"] == 859_520_964
    assert count["sd21"] == 865_910_724
    assert count["sdxl"] == 2_567_463_684
    assert count["sd15-controlnet"] == 361_279_120


def test_a_shape_that_does_not_fit_is_no_network():
    for shapes in (
        {name: parameter.shape for name, parameter in parameters(CONFIGS["tiny-sd15"]).items()},
        ldm_shapes(CONFIGS["tiny-sdxl"]),
        ldm_shapes(CONFIGS["tiny-sd15-controlnet"]),
    ):
        assert infer_config(shapes) is not None
        for name in shapes:
            rest = dict(shapes)
            del rest[name]
            assert infer_config(rest) is None, name
            assert infer_config({**shapes, name: (7, *shapes[name][1:])}) is None, name
        assert infer_config({**shapes, "time_embedding.cond_proj.weight": (4, 4)}) is None
    assert infer_config({}) is None
    assert infer_config({"conv_in.weight": (3,)}) is None


def test_json_refuses_what_is_no_architecture():
    data = CONFIGS["sd15"].to_json()
    for broken in (
        {**data, "colour": 1},
        {name: value for name, value in data.items() if name != "heads"},
        {**data, "heads": [8, 8]},
        {**data, "down_depths": [[1, 1]] * 3},
        {**data, "up_depths": []},
        {**data, "mid_depth": 0},
    ):
        with pytest.raises(ValueError):
            UNetConfig.from_json(broken)


def test_fields_without_effect_do_not_tell_networks_apart():
    sdxl = CONFIGS["sdxl"]
    assert dataclasses.replace(sdxl, heads=(1, 10, 20)) == sdxl
    assert dataclasses.replace(sdxl, heads=(5, 5, 20)) != sdxl
    plain = CONFIGS["no-attention"]
    assert dataclasses.replace(plain, heads=(4, 4, 4, 4), context_dim=99) == plain
    assert dataclasses.replace(CONFIGS["sd15"], heads=None).heads is None


PUBLISHED = {
    # As the models' own config.json have it.
    "sd21": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "ssd1b": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "projection_class_embeddings_input_dim": 2816,
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    with torch.device("meta"):
        module = UNet2DConditionModel(**PUBLISHED[name])
    assert config_of_module(module) == CONFIGS[name]
    assert unsupported_state(module) is None


REFUSED = [
    {"class_embed_type": "timestep"},
    {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
    {"num_class_embeds": 10},
    {"time_cond_proj_dim": 256},
    {"dual_cross_attention": True},
    {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"},
    {"attention_type": "gated"},
    {"resnet_time_scale_shift": "scale_shift"},
    {"resnet_skip_time_act": True},
    {"resnet_out_scale_factor": 2.0},
    {"only_cross_attention": True},
    {"only_cross_attention": (False, False, True, False)},
    {"center_input_sample": True},
    {"downsample_padding": 0},
    {"mid_block_scale_factor": 1.4},
    {"mid_block_type": None},
    {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    {"act_fn": "gelu"},
    {"conv_in_kernel": 5},
    {"conv_out_kernel": 1},
    {"time_embedding_type": "fourier"},
    {"time_embedding_act_fn": "silu"},
    {"timestep_post_act": "silu"},
    {"norm_num_groups": None, "down_block_types": ("DownBlock2D",) * 4},
    {"cross_attention_dim": (32, 32, 64, 32)},
    {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("AttnDownBlock2D",)},
    {"transformer_layers_per_block": (0, 1, 1, 1)},
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda changes: "-".join(map(str, changes)))
def test_every_field_that_changes_the_graph_is_refused(changes):
    if changes.get("norm_num_groups", 32) is None:
        # diffusers cannot build this either: the field alone is set.
        module = build(CONFIGS["tiny-sd15"])
        module.register_to_config(norm_num_groups=None)
        changes = {"norm_num_groups": None}
    else:
        module = build(CONFIGS["tiny-sd15"], **changes)
    with pytest.raises(UnsupportedModel) as caught:
        config_of_module(module)
    assert any(f"{field}=" in str(caught.value) for field in changes)
    assert "\n" not in str(caught.value)
    assert unsupported_state(module) == str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"controlnet_conditioning_channel_order": "bgr"}, {"global_pool_conditions": True}],
    ids=str,
)
def test_controlnet_fields_are_refused(changes):
    with pytest.raises(UnsupportedModel, match=next(iter(changes))):
        config_of_module(build(CONFIGS["tiny-sd15-controlnet"], **changes))


def test_fields_without_effect_are_accepted():
    config = CONFIGS["tiny-sd15"]
    module = build(config, sample_size=64, dropout=0.1, upcast_attention=True, act_fn="swish")
    assert config_of_module(module) == config
    assert "p=0.1" in unsupported_state(module)
    assert unsupported_state(module.eval()) is None


def test_fields_of_future_versions_are_refused_unless_at_their_default():
    module = build(CONFIGS["tiny-sd15"])
    module.register_to_config(qk_norm=None)
    assert config_of_module(module) == CONFIGS["tiny-sd15"]
    module.register_to_config(qk_norm="rms")
    with pytest.raises(UnsupportedModel, match="qk_norm='rms'"):
        config_of_module(module)


def test_diffusers_kwargs_refuses_what_diffusers_cannot_build():
    tiny = CONFIGS["tiny-sd15"]
    for changes in (
        {"heads": None},
        {"mid_depth": 2, "down_depths": ((1, 1),) * 4, "up_depths": ((1, 1, 1),) * 4},
        {"down_depths": ((1, 0), (1, 1), (1, 1), (0, 0))},
    ):
        with pytest.raises(UnsupportedModel):
            diffusers_kwargs(dataclasses.replace(tiny, **changes))


def test_other_modules_are_refused():
    with pytest.raises(UnsupportedModel, match="Linear is neither"):
        config_of_module(torch.nn.Linear(2, 2))
    pretender = type("UNetModel", (torch.nn.Module,), {})()
    pretender.input_blocks = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModel, match="not laid out"):
        config_of_module(pretender)


def test_layers_that_differ_from_the_configuration_are_refused():
    module = build(CONFIGS["tiny-sd15"])
    module.down_blocks[0].resnets[0].conv1 = torch.nn.Conv2d(32, 16, 3, padding=1, device="meta")
    with pytest.raises(UnsupportedModel, match=r"conv1\.weight has shape"):
        config_of_module(module)
    module = build(CONFIGS["tiny-sd15"])
    module.down_blocks[0].attentions[0].transformer_blocks[0].attn2.heads = 4
    with pytest.raises(UnsupportedModel, match="4 attention heads"):
        config_of_module(module)
    module = build(CONFIGS["tiny-sd15"])
    module.extra = torch.nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(UnsupportedModel, match=r"\(extra\)"):
        config_of_module(module)
    module = build(CONFIGS["tiny-sd15"])
    del module.conv_out
    with pytest.raises(UnsupportedModel, match="lacks conv_out"):
        config_of_module(module)


def test_compiled_modules_are_seen_through():
    module = build(CONFIGS["tiny-sd15"])
    assert config_of_module(torch.compile(module)) == CONFIGS["tiny-sd15"]
    assert unsupported_state(torch.compile(module)) is None
    module.down_blocks[0] = torch.compile(module.down_blocks[0])
    assert config_of_module(module) == CONFIGS["tiny-sd15"]
    assert unsupported_state(module) is None


def _hook(*_):
    return None


def _attention(module):
    return module.down_blocks[0].attentions[0].transformer_blocks[0].attn1


def _merge_tokens(module):
    block = module.down_blocks[0].attentions[0].transformer_blocks[0]
    block.__class__ = type("ToMeBlock", (type(block),), {})


class _Processor:
    def __call__(self, *args, **kwargs):
        raise NotImplementedError


CHANGES = {
    "attention processor": (
        lambda module: module.set_attn_processor(_Processor()),
        "processor _Processor",
    ),
    "FreeU": (lambda module: module.enable_freeu(0.9, 0.2, 1.2, 1.4), "s1=0.9"),
    "fused projections": (lambda module: module.fuse_qkv_projections(), "to_qkv"),
    "forward hook": (lambda module: module.mid_block.register_forward_hook(_hook), "forward hooks"),
    "forward pre-hook": (lambda module: module.register_forward_pre_hook(_hook), "forward pre"),
    "backward hook": (lambda module: module.conv_in.register_full_backward_hook(_hook), "backward"),
    "replaced forward": (lambda module: setattr(module, "forward", _hook), "method forward"),
    "replaced convolution": (
        lambda module: setattr(module.conv_in, "_conv_forward", _hook),
        "method _conv_forward",
    ),
    "tiling": (
        lambda module: setattr(module.conv_in, "padding_mode", "circular"),
        "padding_mode='circular'",
    ),
    "dilation": (lambda module: setattr(module.conv_in, "dilation", (2, 2)), "dilation"),
    "attention scale": (lambda module: setattr(_attention(module), "scale", 1.0), "scale=1.0"),
    "group norm": (lambda module: setattr(module.conv_norm_out, "eps", 1e-3), "eps=0.001"),
    "class of a block": (_merge_tokens, "ToMeBlock"),
    "unknown layer": (
        lambda module: setattr(module, "conv_act", torch.nn.ReLU()),
        "ReLU",
    ),
    "gradient checkpointing": (
        lambda module: module.enable_gradient_checkpointing(),
        "gradient checkpointing",
    ),
    "gradient": (
        lambda module: setattr(
            module.conv_in.weight, "grad", torch.zeros_like(module.conv_in.weight)
        ),
        "gradient on weight",
    ),
    "pending patches": (
        lambda module: setattr(module.conv_in, "weight_function", [_hook]),
        "pending weight patches",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_live_changes_are_named(name):
    change, expected = CHANGES[name]
    module = build(CONFIGS["tiny-sd15"])
    assert unsupported_state(module) is None
    change(module)
    reason = unsupported_state(module)
    assert reason is not None and expected in reason
    assert "\n" not in reason


def test_live_changes_that_are_undone_or_harmless():
    module = build(CONFIGS["tiny-sd15"])
    module.enable_freeu(0.9, 0.2, 1.2, 1.4)
    module.disable_freeu()
    hook = module.register_forward_hook(_hook)
    hook.remove()
    module.set_attn_processor(SlicedAttnProcessor(1))
    assert unsupported_state(module) is None
    module.conv_in.weight_function = [_hook]
    assert unsupported_state(module, patches_applied=True) is None


def test_replaced_class_methods_and_global_hooks_are_named(monkeypatch):
    module = build(CONFIGS["tiny-sd15"])
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.GroupNorm, "forward", _hook)
        assert "its class's forward replaced" in unsupported_state(module)
    handle = torch.nn.modules.module.register_module_forward_hook(_hook)
    assert "all modules" in unsupported_state(module)
    handle.remove()
    assert unsupported_state(module) is None


def test_injected_adapters_are_named():
    from peft import LoraConfig

    module = build(CONFIGS["tiny-sd15"])
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UnsupportedModel, match="unload the adapters first"):
        config_of_module(module)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_names_cover_every_layer(name):
    config = CONFIGS[name]
    names = adapter_names(config)
    layers = {
        path: f"{path}.weight"
        for path, layer in build(config).named_modules()
        if isinstance(
            layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
        )
    }
    assert set(names.values()) == set(layers.values())
    for path, weight in layers.items():
        ldm = parameters(config)[weight].ldm_name.removesuffix(".weight")
        for spelling in (path, ldm):
            assert names[spelling] == weight
            assert names[spelling.replace(".", "_")] == weight


def test_adapter_names_as_files_have_them():
    sd15, sdxl = adapter_names(CONFIGS["sd15"]), adapter_names(CONFIGS["sdxl"])
    attention = "attentions.0.transformer_blocks.0.attn1"
    assert sd15["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"] == (
        f"down_blocks.0.{attention}.to_q.weight"
    )
    assert sd15[f"mid_block.{attention}.to_out"] == f"mid_block.{attention}.to_out.0.weight"
    assert sd15["down_blocks_0_downsamplers_0_conv"] == "down_blocks.0.downsamplers.0.conv.weight"
    assert sdxl["input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == (
        f"down_blocks.1.{attention}.to_q.weight"
    )
    assert sdxl["output_blocks_2_2_conv"] == "up_blocks.0.upsamplers.0.conv.weight"
    assert sdxl["output_blocks_5_1_proj_out"] == "up_blocks.1.attentions.2.proj_out.weight"
    assert sdxl["middle_block_1_transformer_blocks_9_ff_net_0_proj"] == (
        "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight"
    )
    assert sdxl["input_blocks_1_0_emb_layers_1"] == "down_blocks.0.resnets.0.time_emb_proj.weight"
    assert sdxl["label_emb_0_0"] == "add_embedding.linear_1.weight"


def test_transformers_of_ssd1b():
    sites = transformers(CONFIGS["ssd1b"])
    assert [site.depth for site in sites] == [2, 2, 4, 4, 4, 4, 10, 2, 1, 1]
    assert {site.level for site in sites} == {1, 2}
    assert not any(site.name.startswith("mid_block") for site in sites)


def _comfyui_arguments(config):
    """Arguments of ComfyUI's classes for an architecture with square heads per level."""
    base = config.block_out_channels[0]
    equal = len(set(config.heads)) == 1
    arguments = {
        "image_size": 32,
        "in_channels": config.in_channels,
        "model_channels": base,
        "num_res_blocks": list(config.layers_per_block),
        "channel_mult": [width // base for width in config.block_out_channels],
        "num_heads": config.heads[0] if equal else -1,
        "num_head_channels": -1 if equal else config.block_out_channels[0] // config.heads[0],
        "use_spatial_transformer": True,
        "legacy": False,
        "context_dim": config.context_dim,
        "use_linear_in_transformer": config.linear_projection,
        "transformer_depth": [depth for depths in config.down_depths for depth in depths],
        "transformer_depth_middle": config.mid_depth,
        "num_classes": "sequential" if config.pooled_dim else None,
        "adm_in_channels": config.pooled_dim,
        "device": "meta",
    }
    if config.kind == "controlnet":
        return arguments | {"hint_channels": config.hint_channels}
    # ComfyUI reads this list from its end.
    output = [depth for depths in config.up_depths for depth in depths]
    return arguments | {
        "out_channels": config.out_channels,
        "transformer_depth_output": output[::-1],
    }


_COMFYUI = [name for name in CONFIGS if name not in ("tiny-sdxl", "no-attention")]


def _comfyui_findings(root):
    """Runs in a process of its own, since ComfyUI settles its devices while it is imported."""
    sys.path.insert(0, root)
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.ops
        import comfy.utils
        from comfy.cldm.cldm import ControlNet
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    except Exception as error:
        return f"ComfyUI cannot be imported: {error}"
    findings = {}
    for name in _COMFYUI:
        config = CONFIGS[name]
        if name == "tiny-sd15-controlnet":
            config = dataclasses.replace(config, hint_block_channels=(16, 32, 96, 256))
        arguments = _comfyui_arguments(config)
        kind = UNetModel if config.kind == "unet" else ControlNet
        module = kind(**arguments, operations=comfy.ops.disable_weight_init)
        names = comfy.utils.unet_to_diffusers(arguments) if config.kind == "unet" else None
        module.input_blocks[1][0].use_scale_shift_norm = True
        changed = unsupported_state(module)
        module.input_blocks[1][0].use_scale_shift_norm = False
        findings[name] = {
            "shapes": shapes_of(module) == ldm_shapes(config),
            "config": config_of_module(module) == config,
            "state": unsupported_state(module),
            "key": structure_hash(module),
            "changed": changed,
            "names": names is None
            or all(names.get(n) == p.ldm_name for n, p in parameters(config).items()),
        }
    temporal = _comfyui_arguments(CONFIGS["tiny-sd15"]) | {
        "use_temporal_resblock": True,
        "video_kernel_size": [3, 1, 1],
        "merge_strategy": "fixed",
    }
    try:
        config_of_module(UNetModel(**temporal, operations=comfy.ops.disable_weight_init))
    except UnsupportedModel as error:
        findings["temporal"] = str(error)
    return findings


@pytest.fixture(scope="module")
def comfyui():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        findings = pool.apply(_comfyui_findings, (os.environ["COMFYUI_PATH"],))
    if isinstance(findings, str):
        pytest.skip(findings)
    return findings


@pytest.mark.comfyui
@pytest.mark.parametrize("name", _COMFYUI)
def test_comfyui_module_is_the_same_network(comfyui, name):
    found = comfyui[name]
    assert found["shapes"] and found["names"]
    assert found["config"]
    assert found["state"] is None
    if name in {family.name for family in FAMILIES}:
        assert found["key"] == structure_hash(build(CONFIGS[name]))
    assert "use_scale_shift_norm=True" in found["changed"]


@pytest.mark.comfyui
def test_comfyui_video_network_is_refused(comfyui):
    assert "use_temporal_resblocks=True" in comfyui["temporal"]
