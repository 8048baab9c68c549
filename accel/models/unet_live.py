"""Reading a live UNet or ControlNet of diffusers or ComfyUI, without importing either.

Default deny: what is not known here to leave the network's result as it is raises or is named.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UnsupportedModel
from .unet_config import Shape, UNetConfig, parameters, transformers

# Fields of diffusers' configurations that UNetConfig represents.
_READ = {
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "norm_eps",
    "act_fn",
    "flip_sin_to_cos",
    "freq_shift",
    "time_embedding_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "conditioning_channels",
    "conditioning_embedding_out_channels",
}
# Fields without effect on the result: a size hint, dropout (off while sampling), attention's
# working precision, and the heads of an embedding that is refused anyway.
_NEUTRAL = {"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads"}
# Same attention, another schedule of its work.
_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}
# Every class a supported network is made of, by top-level package, and the only values under
# which its attributes mean what the graph of the class means. An absent attribute is fine.
_PARTS: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "torch": {
        "Linear": {},
        "Conv2d": {"padding_mode": ("zeros",), "dilation": ((1, 1),), "groups": (1,)},
        "GroupNorm": {"affine": (True,)},
        "LayerNorm": {"eps": (1e-5,), "elementwise_affine": (True,)},
        "SiLU": {},
        "Dropout": {},
        "Identity": {},
        "ModuleList": {},
        "Sequential": {},
    },
    "diffusers": {
        "UNet2DConditionModel": {"time_embed_act": (None,), "encoder_hid_proj": (None,)},
        "ControlNetModel": {"encoder_hid_proj": (None,)},
        "ControlNetConditioningEmbedding": {},
        "Timesteps": {"scale": (1,)},
        "TimestepEmbedding": {"cond_proj": (None,), "post_act": (None,)},
        "DownBlock2D": {},
        "CrossAttnDownBlock2D": {},
        "UNetMidBlock2D": {},
        "UNetMidBlock2DCrossAttn": {},
        # s1 … b2 are FreeU's, which acts where all four are set.
        "UpBlock2D": dict.fromkeys(("s1", "s2", "b1", "b2"), (None,)),
        "CrossAttnUpBlock2D": dict.fromkeys(("s1", "s2", "b1", "b2"), (None,)),
        "ResnetBlock2D": {
            "output_scale_factor": (1.0,),
            "time_embedding_norm": ("default",),
            "skip_time_act": (False,),
            "upsample": (None,),
            "downsample": (None,),
        },
        "Downsample2D": {"use_conv": (True,), "padding": (1,), "norm": (None,)},
        "Upsample2D": {"use_conv": (True,), "interpolate": (True,), "norm": (None,)},
        "Transformer2DModel": {"is_input_continuous": (True,)},
        "BasicTransformerBlock": {
            "only_cross_attention": (False,),
            "norm_type": ("layer_norm",),
            "pos_embed": (None,),
        },
        "Attention": {
            "fused_projections": (False,),
            "rescale_output_factor": (1.0,),
            "residual_connection": (False,),
            "is_causal": (False,),
        },
        "FeedForward": {},
        "GEGLU": {},
    },
    "comfy": {
        "UNetModel": {},
        "ControlNet": {},
        "TimestepEmbedSequential": {},
        "ResBlock": {
            "use_scale_shift_norm": (False,),
            "exchange_temb_dims": (False,),
            "skip_t_emb": (False,),
            "updown": (False,),
        },
        "Downsample": {"use_conv": (True,)},
        "Upsample": {"use_conv": (True,)},
        "SpatialTransformer": {},
        "BasicTransformerBlock": {
            "disable_self_attn": (False,),
            "ff_in": (False,),
            "is_res": (True,),
            "switch_temporal_ca_to_sa": (False,),
        },
        "CrossAttention": {},
        "FeedForward": {},
        "GEGLU": {},
    },
}
# ComfyUI's own Linear, Conv2d and norms live in these namespaces; its others quantise.
_COMFY_OPERATIONS = {"disable_weight_init", "manual_cast"}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_LEAVES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def config_of_module(module: nn.Module) -> UNetConfig:
    """The architecture of a live UNet or ControlNet of diffusers or ComfyUI.

    Reads configuration and attributes, never a weight, so a meta module will do. Raises
    UnsupportedModel, naming field and value, for whatever would make another graph.
    """
    module = unwrap(module)
    kind = network_kind(module)
    if kind is None:
        raise UnsupportedModel(f"{type(module).__name__} is neither a UNet nor a ControlNet")
    ldm = not hasattr(module, "down_blocks")
    config = _comfyui_config(module, kind) if ldm else _diffusers_config(module, kind)
    _check_layers(module, config, ldm)
    return dataclasses.replace(config, heads=_live_heads(module, config, ldm))


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def network_kind(module: nn.Module) -> Literal["unet", "controlnet"] | None:
    """Which network a module is by its class name and parts; None for any other module."""
    name = type(unwrap(module)).__name__
    parts = dict(unwrap(module).named_children())
    if name == "UNet2DConditionModel" or (name == "UNetModel" and "input_blocks" in parts):
        return "unet"
    if name == "ControlNetModel" or (name == "ControlNet" and "input_hint_block" in parts):
        return "controlnet"
    return None


def _diffusers_config(module: nn.Module, kind: Literal["unet", "controlnet"]) -> UNetConfig:
    fields: Mapping[str, Any] = module.config  # type: ignore[assignment]
    defaults = inspect.signature(type(module).__init__).parameters
    for field, value in fields.items():
        if field.startswith("_") or field in _READ or field in _NEUTRAL:
            continue
        default = defaults[field].default if field in defaults else None
        # Flags are given for all levels at once or one by one.
        values = value if isinstance(value, (list, tuple)) else (value,)
        if any(item != default and (item or default) for item in values):
            raise _refused(field, value)
    levels = len(fields["block_out_channels"])

    def per_level(field: str) -> tuple[Any, ...]:
        value = fields[field]
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels

    layers = per_level("layers_per_block")
    depth = per_level("transformer_layers_per_block")
    down = tuple(
        _depths(fields, "down_block_types", level, depth[level], layers[level])
        for level in range(levels)
    )
    up: tuple[tuple[int, ...], ...] = ()
    if kind == "unet":
        reverse = fields.get("reverse_transformer_layers_per_block") or depth[::-1]
        up = tuple(
            _depths(fields, "up_block_types", step, reverse[step], layers[levels - 1 - step] + 1)
            for step in range(levels)
        )
    middle = fields["mid_block_type"]
    if middle not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
        raise _refused("mid_block_type", middle)
    mid_depth = depth[-1][0] if isinstance(depth[-1], (list, tuple)) else depth[-1]
    contexts = set(per_level("cross_attention_dim"))
    if len(contexts) != 1:
        raise _refused("cross_attention_dim", fields["cross_attention_dim"])
    if fields["norm_num_groups"] is None:
        raise _refused("norm_num_groups", None)
    pooled = fields["addition_embed_type"]
    if pooled not in (None, "text_time"):
        raise _refused("addition_embed_type", pooled)
    if fields["act_fn"] not in ("silu", "swish"):
        raise _refused("act_fn", fields["act_fn"])
    channels = tuple(fields["block_out_channels"])
    try:
        return UNetConfig(
            kind=kind,
            in_channels=fields["in_channels"],
            out_channels=fields.get("out_channels", fields["in_channels"]),
            block_out_channels=channels,
            layers_per_block=layers,
            down_depths=down,
            mid_depth=mid_depth if middle == "UNetMidBlock2DCrossAttn" else -1,
            up_depths=up,
            heads=per_level("attention_head_dim"),
            context_dim=contexts.pop(),
            linear_projection=bool(fields["use_linear_projection"]),
            pooled_dim=fields["projection_class_embeddings_input_dim"] if pooled else None,
            time_embed_dim=fields.get("time_embedding_dim") or 4 * channels[0],
            addition_time_embed_dim=fields["addition_time_embed_dim"] if pooled else None,
            norm_groups=fields["norm_num_groups"],
            norm_eps=fields["norm_eps"],
            flip_sin_to_cos=fields["flip_sin_to_cos"],
            freq_shift=fields["freq_shift"],
            hint_channels=fields.get("conditioning_channels"),
            hint_block_channels=tuple(fields.get("conditioning_embedding_out_channels", ())),
        )
    except ValueError as error:
        raise UnsupportedModel(f"{type(module).__name__} is not supported: {error}") from None


def _depths(
    fields: Mapping[str, Any], types: str, index: int, depth: Any, layers: int
) -> tuple[int, ...]:
    """Transformer depth after each resnet of one down or up block."""
    block = fields[types][index]
    if block in ("DownBlock2D", "UpBlock2D"):
        return (0,) * layers
    if block not in ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"):
        raise _refused(types, block)
    depths = tuple(depth) if isinstance(depth, (list, tuple)) else (depth,) * layers
    if 0 in depths:
        # Such a block still projects in and out around no transformer at all.
        raise _refused("transformer_layers_per_block", depth)
    return depths


def _refused(field: str, value: Any) -> UnsupportedModel:
    return UnsupportedModel(f"{field}={value!r} is not supported: the host's own path is used")


def _comfyui_config(module: nn.Module, kind: Literal["unet", "controlnet"]) -> UNetConfig:
    """Reads the tree of layers; heads are filled in later from the attentions themselves."""
    expected: dict[str, tuple[Any, ...]] = {
        "num_classes": (None, "sequential"),
        "predict_codebook_ids": (False,),
        "use_temporal_resblocks": (False,),
        "default_num_video_frames": (None,),
        "conv_resample": (True,),
        "task_embedding": (None,),
        "control_add_embedding": (None,),
    }
    for field, allowed in expected.items():
        value = getattr(module, field, allowed[0])
        if not any(value is item or value == item for item in allowed):
            raise _refused(field, type(value).__name__ if isinstance(value, nn.Module) else value)
    try:
        return _comfyui_tree(module, kind)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{type(module).__name__} is not laid out as a Stable Diffusion network: {error}"
        ) from None


def _comfyui_tree(module: Any, kind: Literal["unet", "controlnet"]) -> UNetConfig:
    widths: list[int] = []
    down: list[tuple[int, ...]] = [()]
    for block in list(module.input_blocks)[1:]:
        if type(block[0]).__name__ == "Downsample":
            down.append(())
            continue
        if not down[-1]:
            widths.append(block[0].out_channels)
        down[-1] += (_comfyui_depth(block),)
    flat = [_comfyui_depth(block) for block in getattr(module, "output_blocks", ())]
    up: list[tuple[int, ...]] = []
    for layers in (len(depths) + 1 for depths in reversed(down)):
        up.append(tuple(flat[:layers]))
        flat = flat[layers:]
    transformer = next(
        (m for m in module.modules() if type(m).__name__ == "SpatialTransformer"), None
    )
    attention = transformer.transformer_blocks[0].attn2 if transformer is not None else None
    norm = module.input_blocks[1][0].in_layers[0]
    pooled = None if module.num_classes is None else module.label_emb[0][0].in_features
    hint: list[nn.Conv2d] = []
    if kind == "controlnet":
        hint = [layer for layer in module.input_hint_block if isinstance(layer, nn.Conv2d)]
    return UNetConfig(
        kind=kind,
        in_channels=module.input_blocks[0][0].in_channels,
        out_channels=module.out[2].out_channels if kind == "unet" else module.in_channels,
        block_out_channels=tuple(widths),
        layers_per_block=tuple(len(depths) for depths in down),
        down_depths=tuple(down),
        mid_depth=_comfyui_depth(module.middle_block) or -1,
        up_depths=tuple(up) if kind == "unet" else (),
        heads=None,
        context_dim=attention.to_k.in_features if attention is not None else 0,
        linear_projection=isinstance(getattr(transformer, "proj_in", None), nn.Linear),
        pooled_dim=pooled,
        time_embed_dim=module.time_embed[0].out_features,
        norm_groups=norm.num_groups,
        norm_eps=norm.eps,
        hint_channels=hint[0].in_channels if hint else None,
        hint_block_channels=tuple(layer.out_channels for layer in [*hint[:1], *hint[2:-1:2]]),
    )


def _comfyui_depth(block: Any) -> int:
    """Transformer depth of one entry of the input, middle or output list; 0 for none."""
    if len(block) < 2 or not hasattr(block[1], "transformer_blocks"):
        return 0
    return len(block[1].transformer_blocks)


def layer_shapes(module: nn.Module) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every parameter, from the layers' attributes: no weight is looked at.

    Under ComfyUI's dynamic memory a layer holds no weight until it runs.
    """
    for path, layer in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        prefix = prefix.replace("_orig_mod.", "")
        leaf = isinstance(layer, _LEAVES)
        for name, parameter in layer._parameters.items():
            if parameter is not None and not (leaf and name in ("weight", "bias")):
                yield prefix + name, tuple(parameter.shape)
        if not leaf:
            continue
        lazy_bias = getattr(layer, "comfy_need_lazy_init_bias", False)
        if isinstance(layer, nn.Linear):
            shape: Shape = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            inner = layer.in_channels // layer.groups
            shape = (layer.out_channels, inner, *layer.kernel_size)
        elif isinstance(layer, nn.GroupNorm):
            shape = (layer.num_channels,) if layer.affine else ()
        else:
            shape = tuple(layer.normalized_shape) if layer.elementwise_affine else ()
        if shape:
            yield prefix + "weight", shape
        if layer.bias is not None or lazy_bias:
            yield prefix + "bias", shape[:1]


def _check_layers(module: nn.Module, config: UNetConfig, ldm: bool) -> None:
    """Raises UnsupportedModel unless the module's layers are exactly those of `config`."""
    expected = {
        parameter.ldm_name if ldm else name: parameter.shape
        for name, parameter in parameters(config).items()
    }
    for name, shape in layer_shapes(module):
        if name not in expected:
            hint = ": unload the adapters first" if "lora_" in name or "base_layer" in name else ""
            raise UnsupportedModel(
                f"the module has a layer that its architecture does not have ({name}){hint}"
            )
        if expected[name] != shape:
            raise UnsupportedModel(f"{name} has shape {shape}, its architecture {expected[name]}")
        del expected[name]
    if expected:
        raise UnsupportedModel(f"the module lacks {next(iter(expected))} of its architecture")


def _live_heads(module: nn.Module, config: UNetConfig, ldm: bool) -> tuple[int, ...] | None:
    """Heads per level as the attentions have them; raises where two of a level disagree."""
    found: dict[int, int] = {}
    for site in transformers(config):
        path = site.ldm_name if ldm else site.name
        blocks: Any = module.get_submodule(path).transformer_blocks
        for block in blocks:
            for attention in (block.attn1, block.attn2):
                heads = found.setdefault(site.level, attention.heads)
                if heads != attention.heads:
                    raise UnsupportedModel(
                        f"{path} has {attention.heads} attention heads, others at its level {heads}"
                    )
    if not found:
        return config.heads
    levels = range(len(config.block_out_channels))
    return tuple(found.get(level, 1) for level in levels)


def unsupported_state(module: nn.Module, *, patches_applied: bool = False) -> str | None:
    """Why this live module would not compute what its architecture and weights say, or None.

    Finds changed layers, attention processors, FreeU, injected adapters, hooks, replaced methods,
    pending weight patches, quantised weights and training: whatever is not known to be harmless is
    named. `patches_applied`: the caller itself applies the patches that ComfyUI leaves pending on
    layers (`weight_function`), so they are no reason. Reads no weight. One line of text.
    """
    module = unwrap(module)
    try:
        config = config_of_module(module)
    except UnsupportedModel as error:
        return str(error)
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "hooks on all modules of the process are set"
    patched: dict[type, str | None] = {}
    for path, layer in module.named_modules():
        if type(layer).__name__ == "OptimizedModule":
            continue
        where = f"{path or 'the module'} ({type(layer).__name__})"
        if type(layer) not in patched:
            patched[type(layer)] = _replaced_forward(type(layer))
        reason = (
            patched[type(layer)]
            or _changed_part(path, layer, config)
            or _changed_instance(layer, patches_applied)
        )
        if reason is not None:
            return f"{where} {reason}"
    return None


def _replaced_forward(kind: type) -> str | None:
    """Whether someone put another function in place of the class's own forward."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = vars(owner)["forward"]
    own = (owner.__module__, f"{owner.__qualname__}.forward")
    if owner is nn.Module or (forward.__module__, forward.__qualname__) == own:
        return None
    return f"has its class's forward replaced by {forward.__module__}.{forward.__qualname__}"


def _changed_part(path: str, layer: Any, config: UNetConfig) -> str | None:
    """Whether a layer is of an unknown class, or an attribute of it is not as the graph has it."""
    kind = type(layer)
    package, name = kind.__module__.partition(".")[0], kind.__name__
    namespace = kind.__qualname__.rpartition(".")[0]
    if kind.__module__ == "comfy.ops" and namespace in _COMFY_OPERATIONS:
        package = "torch"
    if package == "peft":
        return "is an injected adapter: unload it, and give its file to the engine instead"
    if name not in _PARTS.get(package, {}):
        return f"is a layer of {kind.__module__} that is not known here"
    allowed = dict(_PARTS[package][name])
    if name == "GroupNorm":
        allowed["num_groups"] = (config.norm_groups,)
        # The norm in front of a transformer has its own constant in every host.
        allowed["eps"] = (1e-6,) if path.endswith(".norm") else (config.norm_eps,)
    elif name == "Timesteps":
        # The second one, for SDXL's sizes, shares both settings.
        allowed["flip_sin_to_cos"] = (config.flip_sin_to_cos,)
        allowed["downscale_freq_shift"] = (config.freq_shift,)
    elif name == "Dropout" and layer.training:
        allowed["p"] = (0,)
    elif name == "Conv2d":
        allowed["padding"] = (tuple(size // 2 for size in layer.kernel_size),)
    elif name == "Attention":
        processor = type(layer.processor)
        if processor.__name__ not in _PROCESSORS or not processor.__module__.startswith(
            "diffusers."
        ):
            return f"has the attention processor {processor.__name__}"
        allowed["scale"] = ((layer.inner_dim // layer.heads) ** -0.5,)
    for attribute, values in allowed.items():
        value = getattr(layer, attribute, values[0])
        if value not in values:
            return f"has {attribute}={value!r} instead of {values[0]!r}"
    return None


def _changed_instance(layer: nn.Module, patches_applied: bool) -> str | None:
    """Whether hooks, replaced methods, patches or training are attached to this very layer."""
    for hooks in _HOOKS:
        if getattr(layer, hooks, None):
            return f"has {hooks.strip('_').replace('_', ' ')}"
    for attribute in vars(layer):
        if callable(getattr(type(layer), attribute, None)):
            return f"has its method {attribute} replaced"
    if not patches_applied:
        for patches in ("weight_function", "bias_function"):
            if getattr(layer, patches, None):
                return f"has pending weight patches ({patches})"
    if getattr(layer, "gradient_checkpointing", False):
        return "has gradient checkpointing on: it is being trained"
    for name, parameter in layer._parameters.items():
        if parameter is None:
            continue
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            return f"keeps {name} as {type(parameter).__name__}"
        if parameter.grad is not None or parameter._backward_hooks:
            return f"has a gradient on {name}: it is being trained"
    return None
