"""Twins: networks of the same structure on the `meta` device, which capture can trace.

The live module is never traced. Its twin has no weights, no hooks, and no branch on the image's
size: the forward passes below take the same inputs whatever the host, by the names that plans use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .unet_config import UNetConfig, diffusers_kwargs, parameters
from .unet_live import unwrap

Size = int | str


@dataclass(frozen=True)
class TwinInput:
    """One positional argument of a twin: sizes are ints, dimension names or multiples ("8*height").

    `dtype` is "compute" or "float32"; `phase` says what changes it: "prompt", "timestep" or "step".
    """

    name: str
    shape: tuple[Size, ...]
    dtype: str
    phase: str


@dataclass(frozen=True)
class Twin:
    """A module on the `meta` device, its inputs, and how its parameters are called canonically.

    `example` has a size for each dimension name, all different, so that none is taken for another.
    """

    module: nn.Module
    inputs: tuple[TwinInput, ...]
    example: Mapping[str, int]
    names: Mapping[str, str]


Marker = Callable[[str], Any]
"""Makes the stand-in for an optional input; adding it to a tensor leaves a mark in a graph."""

# Even and odd, unlike each other at every level, and large enough for five halvings.
_EXAMPLE = {"batch": 2, "height": 72, "width": 104, "tokens": 77}

_MANY = 60
"""Diffusers passes on skips' sizes if a side is no multiple of 2**num_upsamplers: now always."""


def unet_twin(config: UNetConfig, source: nn.Module | type[nn.Module], marker: Marker) -> Twin:
    """The twin of a UNet or ControlNet.

    `source`: the live module, of diffusers or ComfyUI, or the diffusers class to make it from.
    A UNet's optional inputs are numbered in the order of the skips: `adapter_i`, as T2I-Adapters
    give it, is added to the tensor that is also the i-th skip; `residual_i`, as ControlNets give
    it, to the skip alone, and the last one to the middle block's result.
    """
    compute = torch.float16
    with torch.inference_mode(False):  # a host may be in it, and its tensors cannot be traced
        if isinstance(source, type) or hasattr(unwrap(source), "down_blocks"):
            cls = source if isinstance(source, type) else type(unwrap(source))
            with torch.device("meta"):
                net = cls(**diffusers_kwargs(config)).eval()
            nn.Module.to(net, compute)  # diffusers' own `to` warns about every cast
            call = _diffusers_call(config, net, marker)
            names = {f"net.{name}": name for name in parameters(config)}
        else:
            net = _meta_copy(unwrap(source), compute)
            call = _comfyui_call(config, net, marker)
            names = {f"net.{p.ldm_name}": name for name, p in parameters(config).items()}
    inputs = _inputs(config)
    return Twin(_Wrapper(net, inputs, call), inputs, _EXAMPLE, names)


def _inputs(config: UNetConfig) -> tuple[TwinInput, ...]:
    latent = ("batch", config.in_channels, "height", "width")
    inputs = [
        TwinInput("latent", latent, "compute", "step"),
        TwinInput("timestep", ("batch",), "float32", "timestep"),
        TwinInput("context", ("batch", "tokens", config.context_dim), "compute", "prompt"),
    ]
    if config.pooled_dim is not None:
        inputs.append(TwinInput("pooled", ("batch", config.pooled_dim), "compute", "prompt"))
    if config.kind == "controlnet":
        assert config.hint_channels is not None
        factor = 2 ** (len(config.hint_block_channels) - 1)  # each further convolution halves
        size = (f"{factor}*height", f"{factor}*width")
        shape = ("batch", config.hint_channels, *size)
        inputs.append(TwinInput("hint", shape, "compute", "prompt"))
    return tuple(inputs)


def residual_count(config: UNetConfig) -> int:
    """ControlNet residuals of a UNet of this architecture: one a skip, and the middle block's."""
    return len(skip_places(config)) + 1


def skip_places(config: UNetConfig) -> list[tuple[int, int]]:
    """(level, channels) of each skip of a UNet, in order: a level halves the image that often."""
    places = [(0, config.block_out_channels[0])]
    last = len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        places += [(level, channels)] * config.layers_per_block[level]
        if level < last:
            places.append((level + 1, channels))
    return places


def _meta_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy whose tensors are on `meta`: the structure is copied, no weight is."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        twin = torch.empty(tensor.shape, dtype=kind, device="meta")
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(twin, requires_grad=False)
        else:
            memo[id(tensor)] = twin
    return copy.deepcopy(module, memo).eval()


class _Wrapper(nn.Module):
    """Calls `net` with the plan's inputs; `call` spells them as the host's forward does."""

    def __init__(self, net: nn.Module, inputs: tuple[TwinInput, ...], call: Callable[..., Any]):
        super().__init__()
        self.net = net
        self._names = [entry.name for entry in inputs]
        self._call = call

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._call(self.net, **dict(zip(self._names, inputs, strict=True)))


def _residuals(config: UNetConfig, marker: Marker) -> tuple[tuple[Any, ...], Any]:
    *skips, middle = (marker(f"residual_{i}") for i in range(residual_count(config)))
    return tuple(skips), middle


def _adapters(config: UNetConfig, marker: Marker) -> list[Any]:
    return [marker(f"adapter_{i}") for i in range(len(skip_places(config)))]


def _diffusers_call(config: UNetConfig, net: Any, marker: Marker) -> Callable[..., Any]:
    if config.pooled_dim is not None:
        # The vector arrives whole: what the network would embed and append passes through as it is.
        net.add_time_proj = nn.Identity()
    net.num_upsamplers = _MANY
    if config.kind == "unet":
        # Its own argument for adapters reaches one place a block, the other host's all of them.
        for module, adapter in zip(_skip_makers(net), _adapters(config, marker), strict=True):
            module.register_forward_hook(_adding(adapter))

    def added(pooled: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
        if pooled is None:
            return None
        return {"text_embeds": pooled[:, :1], "time_ids": pooled[:, 1:]}

    def unet(net: Any, latent: Any, timestep: Any, context: Any, pooled: Any = None) -> Any:
        skips, middle = _residuals(config, marker)
        return net(
            latent,
            timestep,
            context,
            added_cond_kwargs=added(pooled),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    def controlnet(
        net: Any, latent: Any, timestep: Any, context: Any, hint: Any, pooled: Any = None
    ) -> Any:
        skips, middle = net(
            latent,
            timestep,
            context,
            controlnet_cond=hint,
            added_cond_kwargs=added(pooled),
            return_dict=False,
        )
        return (*skips, middle)

    return unet if config.kind == "unet" else controlnet


def _skip_makers(net: Any) -> list[nn.Module]:
    """The modules of a diffusers UNet whose results are its skips, in order."""
    makers = [net.conv_in]
    for block in net.down_blocks:
        makers += getattr(block, "attentions", block.resnets)
        makers += block.downsamplers or ()
    return makers


def _adding(marker: Any) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that adds `marker` to a module's result, or to the first of several."""

    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        return (result[0] + marker, *result[1:]) if isinstance(result, tuple) else result + marker

    return hook


def _comfyui_call(config: UNetConfig, net: nn.Module, marker: Marker) -> Callable[..., Any]:
    def attention(own: Any, query: Any, key: Any, value: Any, heads: int, **options: Any) -> Any:
        if options.get("mask") is not None or options.get("skip_reshape"):
            raise NotImplementedError("masked attention in the twin")
        return torch.ops.switchyard.attention(query, key, value, heads)

    def override(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "transformer_options": {"optimized_attention_override": attention}}

    # Which attention the host has chosen depends on its machine. A ControlNet passes on no options.
    for module in net.modules():
        if type(module).__name__ == "CrossAttention":
            module.register_forward_pre_hook(override, with_kwargs=True)

    def unet(net: Any, latent: Any, timestep: Any, context: Any, pooled: Any = None) -> Any:
        skips, middle = _residuals(config, marker)
        adapters = _adapters(config, marker)
        adapters.reverse()  # each list is taken from its end, this one by the first block first
        return net(
            latent,
            timesteps=timestep,
            context=context,
            y=pooled,
            control={"input": adapters, "middle": [middle], "output": list(skips)},
        )

    def controlnet(
        net: Any, latent: Any, timestep: Any, context: Any, hint: Any, pooled: Any = None
    ) -> Any:
        result = net(x=latent, hint=hint, timesteps=timestep, context=context, y=pooled)
        return (*result["output"], *result["middle"])

    return unet if config.kind == "unet" else controlnet
