"""A host's forward call as a plan's inputs, and a plan's outputs as what that forward returns.

Default deny: an argument is translated, is known to leave the result alone, or is refused by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedModel
from .twin import residual_count, skip_places
from .unet_config import UNetConfig

logger = logging.getLogger(__name__)

Host = Literal["diffusers", "comfyui"]

# Positional order of each forward that is understood.
_NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("diffusers", "unet"): (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "return_dict",
    ),
    ("diffusers", "controlnet"): (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "controlnet_cond",
        "conditioning_scale",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "guess_mode",
        "return_dict",
    ),
    ("comfyui", "unet"): ("x", "timesteps", "context", "y", "control", "transformer_options"),
    ("comfyui", "controlnet"): ("x", "hint", "timesteps", "context", "y"),
}
_PROMPT = ("encoder_hidden_states", "controlnet_cond", "context", "y", "hint")
_PROMPT_ADDED = ("text_embeds", "time_ids")

# What samplers and wrappers outside the network leave in `transformer_options`, and what the
# network itself writes there while it runs. Its result depends on none of it.
HARMLESS_OPTIONS = {
    "activations_shape",
    "block",
    "block_index",
    "callbacks",
    "cond_or_uncond",
    "easycache",
    "multigpu_thread_device",
    "original_shape",
    "prefetch_dynamic_vbars",
    "sample_sigmas",
    "sigmas",
    "transformer_index",
    "uuids",
    "wrappers",
}


@dataclass(frozen=True)
class Call:
    """One forward call, translated.

    inputs: by the plan's names: `latent` [B,C,H,W], `timestep` [B] float32, `context` [B,T,D], and
        as the network has them `pooled` [B,P], `hint` [B,3,8H,8W], `residual_i` from ControlNets,
        `adapter_i` from T2I-Adapters. Dtypes and devices are the caller's. Only the residuals that
        are given are there: the engine runs its plan specialised to that set.
    finish: the plan's outputs to the host's result, in the dtype and on the device of the latent.
    prompt: the caller's own tensor objects from which the prompt's part was made.
    """

    inputs: dict[str, Tensor]
    finish: Callable[[list[Tensor]], Any]
    prompt: tuple[Tensor, ...]


def bind_call(
    config: UNetConfig, host: Host, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """Translate one call of the forward of a diffusers or ComfyUI network.

    `Call.finish` gives: for a UNet the tensor; for a ControlNet of diffusers (list of residuals,
    that of the middle block), each scaled as asked; for one of ComfyUI `{"output": [...],
    "middle": [...]}`. diffusers' `return_dict` is the caller's to see to. Of ComfyUI's
    `transformer_options` only entries that leave the result alone pass: a host that handles others
    itself takes them out first. No argument is changed.

    Raises `UnsupportedModel` for an argument that would change the result and is not known, and for
    one that asks for gradients; `InvalidInput` for one that does not fit the network.
    """
    given = _Given(_NAMES[host, config.kind], args, kwargs)
    call = _diffusers(config, given) if host == "diffusers" else _comfyui(config, given)
    if torch.is_grad_enabled() and any(value.requires_grad for value in call.inputs.values()):
        raise _refused("an input that requires a gradient")
    return call


def prompt_tensors(
    config: UNetConfig, host: Host, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """`Call.prompt` of such a call, without translating it. Nothing is checked."""
    values = dict(zip(_NAMES[host, config.kind], args, strict=False)) | dict(kwargs)
    return _prompt(values)


def _prompt(values: Mapping[str, Any]) -> tuple[Tensor, ...]:
    found = [values.get(name) for name in _PROMPT]
    added = values.get("added_cond_kwargs") or {}
    found += [added.get(name) for name in _PROMPT_ADDED]
    return tuple(value for value in found if isinstance(value, Tensor))


class _Given:
    """The arguments of a call by name. Taking one out says that it has been understood."""

    def __init__(
        self, names: tuple[str, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        if len(args) > len(names):
            raise _refused(f"{len(args)} positional arguments instead of at most {len(names)}")
        self._values = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in self._values:
                raise InvalidInput(f"the argument {name} is given twice")
            self._values[name] = value
        self.prompt = _prompt(self._values)

    def take(self, name: str, default: Any = None) -> Any:
        return self._values.pop(name, default)

    def required(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise InvalidInput(f"the argument {name} is missing")
        return value

    def tensor(self, name: str) -> Tensor:
        value = self.required(name)
        if not isinstance(value, Tensor):
            raise InvalidInput(f"{name} must be a tensor, not a {type(value).__name__}")
        return value

    def latent(self, name: str) -> Tensor:
        value = self.tensor(name)
        if value.dim() != 4:
            raise InvalidInput(
                f"{name} must have 4 dimensions (batch x channels x height x width), "
                f"not {value.dim()}: {list(value.shape)}"
            )
        return value

    def refuse_rest(self) -> None:
        """Raise `UnsupportedModel` for whatever was given and not taken."""
        for name, value in self._values.items():
            if _is_given(value):
                raise _refused(f"the argument {name}")


def _refused(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{what} is not supported: the host's own path is used")


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, (dict, list, tuple)) and not value)


# diffusers.


def _diffusers(config: UNetConfig, given: _Given) -> Call:
    sample = given.latent("sample")
    timestep = given.required("timestep")
    context = given.tensor("encoder_hidden_states")
    added = given.take("added_cond_kwargs") or {}
    for name, value in added.items():
        if name not in _PROMPT_ADDED and _is_given(value):
            raise _refused(f"added_cond_kwargs[{name!r}]")
    for name, value in (given.take("cross_attention_kwargs") or {}).items():
        neutral = name == "scale" and isinstance(value, (int, float)) and value == 1.0
        if not neutral and _is_given(value):
            raise _refused(f"cross_attention_kwargs[{name!r}]={_shown(value)}")
    given.take("return_dict")
    finish: Callable[[list[Tensor]], Any]
    inputs: dict[str, Tensor] = {}
    if config.kind == "unet":
        down = given.take("down_block_additional_residuals")
        middle = given.take("mid_block_additional_residual")
        adapters = given.take("down_intrablock_additional_residuals")
        given.refuse_rest()
        if _is_given(down) and middle is None and adapters is None:  # as of old, until 1.3
            raise _refused("down_block_additional_residuals for T2I-Adapters")
        inputs |= _diffusers_residuals(config, down, middle, sample.shape[0])
        for name, state in _diffusers_adapters(config, adapters, sample).items():
            inputs[name] = inputs[name] + state if name in inputs else state
        finish = _same(sample)
    else:
        hint = given.tensor("controlnet_cond")
        scale = given.take("conditioning_scale", 1.0)
        guess = bool(given.take("guess_mode"))
        given.refuse_rest()
        number = scale.dim() == 0 if isinstance(scale, Tensor) else isinstance(scale, (int, float))
        if not number:
            raise _refused(f"conditioning_scale={_shown(scale)}")
        inputs["hint"] = _hint(config, hint, sample)
        finish = _scaled(sample, scale, guess)
    if config.pooled_dim is not None:
        inputs["pooled"] = _pooled(config, added)
    inputs["latent"] = sample
    inputs["timestep"] = _timestep(timestep, sample.shape[0])
    inputs["context"] = context
    return Call(inputs, finish, given.prompt)


def _diffusers_residuals(
    config: UNetConfig, down: Sequence[Tensor] | None, middle: Tensor | None, batch: int
) -> dict[str, Tensor]:
    skips = residual_count(config) - 1
    if not _is_given(down) and middle is None:
        return {}
    if down is None or middle is None:
        raise InvalidInput(
            "ControlNet residuals come together: down_block_additional_residuals and "
            "mid_block_additional_residual"
        )
    residuals = [*down, middle]
    if len(down) != skips or any(not isinstance(r, Tensor) for r in residuals):
        raise InvalidInput(
            f"down_block_additional_residuals must be {skips} tensors, "
            f"not {sum(isinstance(r, Tensor) for r in down)}"
        )
    return {f"residual_{i}": _batched(r, batch) for i, r in enumerate(residuals)}


def _diffusers_adapters(
    config: UNetConfig, states: Sequence[Tensor | None] | None, sample: Tensor
) -> dict[str, Tensor]:
    """A state for each block of the down path, in order, and one for the middle block.

    A block with attention adds its own after the last layer, before it halves the image; one
    without adds it to all that it has done. The middle block's may be of another shape: then it is
    ignored, as in diffusers.
    """
    if not _is_given(states):
        return {}
    known = isinstance(states, (list, tuple))
    if not known or any(s is not None and not isinstance(s, Tensor) for s in states or ()):
        raise InvalidInput("down_intrablock_additional_residuals must be a list of tensors")
    assert states is not None
    shapes = _added_shapes(config, sample)
    places, skips = [], 0
    for level, layers in enumerate(config.layers_per_block):
        halves = level < len(config.layers_per_block) - 1
        attends = any(config.down_depths[level])
        places.append(skips + layers + (1 if halves and not attends else 0))
        skips += layers + halves
    found = {}
    for place, state in zip(places, states, strict=False):
        if state is None:
            continue
        fitting = _expanded(state, shapes[place])
        if fitting is None:
            raise InvalidInput(
                "down_intrablock_additional_residuals does not fit the network: "
                f"{list(state.shape)} where it has {list(shapes[place])}"
            )
        found[f"adapter_{place}"] = fitting
    for state in states[len(places) : len(places) + 1]:
        if state is not None and tuple(state.shape) == shapes[-1]:
            found[f"residual_{len(shapes) - 1}"] = state
    return found


def _scaled(
    sample: Tensor, scale: float | Tensor, guess: bool
) -> Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]:
    """In guess mode the scales rise from a tenth at the first residual to all of it at the last."""
    device, dtype = sample.device, sample.dtype

    def finish(outputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        residuals = [output.to(device=device, dtype=dtype) for output in outputs]
        if guess:
            scales = torch.logspace(-1, 0, len(residuals), device=device) * scale
            residuals = [r * s for r, s in zip(residuals, scales, strict=True)]
        elif isinstance(scale, Tensor) or scale != 1.0:
            residuals = [r * scale for r in residuals]
        return residuals[:-1], residuals[-1]

    return finish


def _pooled(config: UNetConfig, added: Mapping[str, Any]) -> Tensor:
    """SDXL's vector: the pooled text, then each number of `time_ids` as sines and cosines.

    text_embeds [B,T], time_ids [B,N] -> [B, T + N * addition_time_embed_dim], in the wider dtype.
    """
    text, ids = (added.get(name) for name in _PROMPT_ADDED)
    if not isinstance(text, Tensor) or not isinstance(ids, Tensor):
        raise InvalidInput("added_cond_kwargs must have the tensors text_embeds and time_ids")
    assert config.pooled_dim is not None and config.addition_time_embed_dim is not None
    width = config.addition_time_embed_dim
    if text.dim() != 2 or text.shape[1] + ids[:1].numel() * width != config.pooled_dim:
        raise InvalidInput(
            f"text_embeds {list(text.shape)} and time_ids {list(ids.shape)} must give "
            f"{config.pooled_dim} channels, {width} of them for each time id"
        )
    if ids.shape[0] != text.shape[0]:
        raise InvalidInput(
            f"time_ids must have the batch of text_embeds, {text.shape[0]}, not {ids.shape[0]}"
        )
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=ids.device)
    frequencies = torch.exp(steps * -math.log(10000) / (half - config.freq_shift))
    angles = ids.flatten()[:, None].float() * frequencies
    waves = [torch.sin(angles), torch.cos(angles)]
    if config.flip_sin_to_cos:
        waves.reverse()
    if width % 2:
        waves.append(torch.zeros_like(angles[:, :1]))
    return torch.cat([text, torch.cat(waves, dim=-1).reshape(text.shape[0], -1)], dim=-1)


# ComfyUI.


def _comfyui(config: UNetConfig, given: _Given) -> Call:
    x = given.latent("x")
    timesteps = given.required("timesteps")
    context = given.tensor("context")
    pooled = given.take("y")
    inputs: dict[str, Tensor] = {}
    finish: Callable[[list[Tensor]], Any]
    if config.kind == "unet":
        control = given.take("control") or {}
        for name, value in (given.take("transformer_options") or {}).items():
            if name not in HARMLESS_OPTIONS and _is_given(value):
                raise _refused(f"transformer_options[{name!r}]")
        given.take("crossattn_controlnet")  # a second prompt, which ControlNets alone read
        given.refuse_rest()
        inputs |= _comfyui_residuals(config, control, x)
        finish = _same(x)
    else:
        hint = given.tensor("hint")
        given.take("control_type")  # read by union ControlNets alone, which have another structure
        given.refuse_rest()
        inputs["hint"] = _hint(config, hint, x)
        finish = _as_control(x)
    if (config.pooled_dim is None) != (pooled is None):
        raise InvalidInput(
            f"y is {'not an input' if config.pooled_dim is None else 'missing, but an input'} "
            "of this network"
        )
    if pooled is not None:
        inputs["pooled"] = pooled
    inputs["latent"] = x
    inputs["timestep"] = _timestep(timesteps, x.shape[0])
    inputs["context"] = context
    return Call(inputs, finish, given.prompt)


def _comfyui_residuals(
    config: UNetConfig, control: Mapping[str, Sequence[Tensor | None]], x: Tensor
) -> dict[str, Tensor]:
    """What ControlNets (`output`, `middle`) and T2I-Adapters (`input`, `middle`) add.

    The network takes from each list's end: of `input` the first block, of `output` the last skip
    first. What is None is left out, and so is, with a warning as there, what does not fit.
    """
    for name, entries in control.items():
        if name not in ("input", "middle", "output") and any(e is not None for e in entries):
            raise _refused(f"control[{name!r}]")
    skips = residual_count(config) - 1
    order: dict[str, tuple[str, Sequence[int]]] = {
        "input": ("adapter", range(skips)),
        "middle": ("residual", [skips]),
        "output": ("residual", range(skips - 1, -1, -1)),
    }
    shapes = _added_shapes(config, x) if any(control.values()) else []
    found = {}
    for name, (kind, places) in order.items():
        for place, entry in zip(places, reversed(control.get(name) or ()), strict=False):
            if entry is None:
                continue
            if not isinstance(entry, Tensor):
                raise _refused(f"control[{name!r}] of {type(entry).__name__}")
            fitting = _expanded(entry, shapes[place])
            if fitting is not None:
                found[f"{kind}_{place}"] = fitting
            else:
                logger.warning(
                    "control[%r] of %s does not fit %s and is left out, as the host does",
                    name,
                    list(entry.shape),
                    list(shapes[place]),
                )
    return found


def _as_control(x: Tensor) -> Callable[[list[Tensor]], dict[str, list[Tensor]]]:
    device, dtype = x.device, x.dtype

    def finish(outputs: list[Tensor]) -> dict[str, list[Tensor]]:
        residuals = [output.to(device=device, dtype=dtype) for output in outputs]
        return {"output": residuals[:-1], "middle": residuals[-1:]}

    return finish


# Both.


def _added_shapes(config: UNetConfig, latent: Tensor) -> list[tuple[int, ...]]:
    """[B,C,H,W] of each skip, and of the middle block's result: where residuals are added."""
    batch, _, height, width = latent.shape
    shapes: list[tuple[int, ...]] = [
        (batch, channels, -(-height // 2**level), -(-width // 2**level))
        for level, channels in skip_places(config)
    ]
    return [*shapes, shapes[-1]]


def _expanded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor broadcast to `shape` without a copy, or None where that cannot be."""
    if tuple(tensor.shape) == shape:
        return tensor
    try:
        return tensor.expand(shape)
    except RuntimeError:
        return None


def _same(latent: Tensor) -> Callable[[list[Tensor]], Tensor]:
    device, dtype = latent.device, latent.dtype
    return lambda outputs: outputs[0].to(device=device, dtype=dtype)


def _timestep(timestep: Any, batch: int) -> Tensor:
    if not isinstance(timestep, Tensor):
        return torch.full((batch,), float(timestep), dtype=torch.float32)
    if timestep.dim() > 1 or timestep.numel() not in (1, batch):
        raise InvalidInput(
            f"the timestep must be one number, or one for each of {batch} images, "
            f"not {list(timestep.shape)}"
        )
    return timestep.to(torch.float32).expand(batch)


def _hint(config: UNetConfig, hint: Tensor, latent: Tensor) -> Tensor:
    factor = 2 ** (len(config.hint_block_channels) - 1)
    expected = [factor * size for size in latent.shape[2:]]
    if hint.dim() != 4 or list(hint.shape[2:]) != expected:
        raise InvalidInput(
            f"the ControlNet's image must be {factor} times the latent, "
            f"{expected[0]} x {expected[1]}, not {' x '.join(str(n) for n in hint.shape[2:])}"
        )
    return _batched(hint, latent.shape[0])


def _batched(tensor: Tensor, batch: int) -> Tensor:
    """One for all images becomes one for each, without a copy."""
    if tensor.dim() > 0 and tensor.shape[0] == 1:
        return tensor.expand(batch, *tensor.shape[1:])
    return tensor


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
