"""Which network is this? One answer for a module, a state dict and a file of the same network.

`shape_key` is made of the canonical names and shapes, all that a file can give. `graph_key` adds
the configuration that names and shapes do not fix, such as the number of attention heads: from the
module, or from the file's family. Weights, their dtype and tensors of other networks play no part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
import xxhash
from torch import nn

from .errors import StructureMismatch, StructureUnknown, UnsupportedModel
from .models.families import FAMILIES, family_of
from .models.unet import UNetConfig, config_of_module, infer_config, parameters
from .models.unet_live import layer_shapes, network_kind, unwrap
from .tensorfile import read_header

Shape = tuple[int, ...]

# The name at which a network of either naming is recognised; what stands before it is its prefix.
_MARKERS = ("time_embedding.linear_1.weight", "time_embed.0.weight")
# What shares a file with a UNet: other networks under a prefix of their own, and the schedule's
# tables and marks. The rest of a file whose UNet has no prefix must be the UNet's own, since an
# unknown extra layer would change the result.
_OTHERS = (
    "alphas_cumprod",
    "betas",
    "clip_g.",
    "clip_l.",
    "cond_stage_model.",
    "conditioner.",
    "control_model.",
    "controlnet.",
    "denoiser.",
    "edm_",
    "embedders.",
    "first_stage_model.",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "model_ema.",
    "posterior_",
    "sqrt_",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "v_pred",
    "vae.",
    "ztsnr",
)


@dataclass(frozen=True)
class Structure:
    """What a network is, apart from its weights.

    kind:      "unet", "controlnet", or "module" for anything else.
    family:    name of the published family, if it is one.
    shapes:    canonical parameter name -> shape.
    config:    the whole architecture; None for a "module", or a file of an unknown family.
    graph_key: 32 hexadecimal digits; None where the source does not fix the graph.
    shape_key: 32 hexadecimal digits.
    """

    kind: str
    family: str | None
    shapes: Mapping[str, Shape]
    config: UNetConfig | None
    graph_key: str | None
    shape_key: str


def structure_of(source: nn.Module | Mapping[str, Any] | str | os.PathLike[str]) -> Structure:
    """The structure of a module, a state dict (name -> tensor or shape) or a .safetensors file.

    No weight is read; a meta module will do. Raises InvalidFile for a file that cannot be used,
    UnsupportedModel for a UNet or ControlNet whose graph is not one of those known here.
    """
    if isinstance(source, nn.Module):
        source = unwrap(source)
        if network_kind(source) is None:
            return _structure_of_other(source)
        return _structure_of_config(config_of_module(source))
    shapes = _shapes(source)
    for prefix, names in _networks(shapes):
        config = infer_config({name: shapes[prefix + name] for name in names})
        if config is None:
            continue
        family = family_of({name: shapes[prefix + name] for name in names})
        if family is not None:
            return _structure_of_config(family.config)
        canonical = {name: parameter.shape for name, parameter in parameters(config).items()}
        return Structure(config.kind, None, canonical, None, None, _shape_key(canonical))
    return Structure("module", None, shapes, None, None, _shape_key(shapes))


def structure_hash(source: nn.Module | Mapping[str, Any] | str | os.PathLike[str]) -> str:
    """The `graph_key` under which engines are found: 32 hexadecimal digits.

    Raises StructureUnknown for a file or state dict of no known family, and what `structure_of`
    raises.
    """
    structure = structure_of(source)
    if structure.graph_key is None:
        what = (
            f"{os.fspath(source)}" if isinstance(source, (str, os.PathLike)) else "the state dict"
        )
        raise StructureUnknown(
            f"{what} is of no known family, and names and shapes alone do not fix the network: "
            "a module is needed"
        )
    return structure.graph_key


def canonical_names(source: Mapping[str, Any], config: UNetConfig) -> dict[str, str]:
    """Canonical parameter name -> name in `source`, for each parameter of the network `config`.

    `source` maps names to tensors or shapes, under any prefix and in either naming; tensors of
    other networks (VAE, text encoders, EMA) are left out. Raises StructureMismatch, saying what
    the source holds instead, where not exactly this network's parameters are found.
    """
    shapes = _shapes(source)
    reasons: list[str] = []
    for prefix, names in _networks(shapes):
        found, reason = _match(shapes, prefix, names, config)
        if found is not None:
            return found
        # A network of the wanted kind tells more than its neighbour in the file.
        reasons.insert(0 if _kind(names) == config.kind else len(reasons), reason)
    reason = reasons[0] if reasons else "holds no UNet and no ControlNet"
    raise StructureMismatch(f"the checkpoint {reason}; needed is {_title(config)}")


def _match(
    shapes: Mapping[str, Shape], prefix: str, names: set[str], config: UNetConfig
) -> tuple[dict[str, str] | None, str]:
    """The names of one network if it is the wanted one, else why not."""
    other = infer_config({name: shapes[prefix + name] for name in names})
    ldm = _MARKERS[1] in names
    found = {}
    difference = ""
    rest = set(names)
    for canonical, parameter in parameters(config).items():
        name = parameter.ldm_name if ldm else canonical
        if name not in rest:
            difference = difference or f"lacks {prefix}{name}"
        elif shapes[prefix + name] != parameter.shape:
            difference = difference or (
                f"has {prefix}{name} in shape {shapes[prefix + name]} instead of {parameter.shape}"
            )
        rest.discard(name)
        found[canonical] = prefix + name
    if rest and not difference:
        difference = f"has {prefix}{min(rest)}, which the network does not have"
    if not difference:
        return found, ""
    return None, f"holds {_title(other)}" if other is not None else difference


def _title(config: UNetConfig) -> str:
    for family in FAMILIES:
        if config in (family.config, _without_heads(family.config)):
            return f"{family.title} (structure {_structure_of_config(family.config).graph_key})"
    canonical = {name: parameter.shape for name, parameter in parameters(config).items()}
    what = "ControlNet" if config.kind == "controlnet" else "UNet"
    return f"a {what} of no published family (shapes {_shape_key(canonical)})"


@lru_cache(maxsize=64)
def _without_heads(config: UNetConfig) -> UNetConfig:
    return UNetConfig.from_json({**config.to_json(), "heads": None})


@lru_cache(maxsize=64)
def _structure_of_config(config: UNetConfig) -> Structure:
    canonical = {name: parameter.shape for name, parameter in parameters(config).items()}
    shape_key = _shape_key(canonical)
    family = next((family.name for family in FAMILIES if family.config == config), None)
    graph_key = _graph_key(shape_key, config.to_json())
    return Structure(config.kind, family, canonical, config, graph_key, shape_key)


def _shapes(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Shape]:
    values: Mapping[str, Any] = source if isinstance(source, Mapping) else read_header(source)
    return {name: tuple(getattr(value, "shape", value)) for name, value in values.items()}


def _networks(shapes: Mapping[str, Shape]) -> list[tuple[str, set[str]]]:
    """Prefix and prefix-less names of each network in a file, the likeliest first.

    ldm's training checkpoints of a ControlNet hold the UNet it belongs to as well, so a ControlNet
    comes first.
    """
    prefixes = []
    for name in shapes:
        for marker in _MARKERS:
            prefix = name.removesuffix(marker)
            if prefix != name and (not prefix or prefix[-1] == "."):
                prefixes.append(prefix)
    networks = []
    for prefix in sorted(prefixes, key=len):
        if prefix.startswith("model_ema."):
            continue
        if prefix:
            names = {name[len(prefix) :] for name in shapes if name.startswith(prefix)}
        else:
            names = {name for name in shapes if not name.startswith(_OTHERS)}
        networks.append((prefix, names))
    return sorted(networks, key=lambda network: _kind(network[1]) == "unet")


def _kind(names: set[str]) -> str:
    ends = ("controlnet_mid_block.weight", "middle_block_out.0.weight")
    return "unet" if names.isdisjoint(ends) else "controlnet"


def _shape_key(shapes: Mapping[str, Shape]) -> str:
    lines = "\n".join(f"{name} {tuple(shapes[name])}" for name in sorted(shapes))
    return xxhash.xxh3_128_hexdigest(lines.encode())


def _graph_key(shape_key: str, config: Any) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(f"{shape_key}\n{text}".encode())


def _structure_of_other(module: nn.Module) -> Structure:
    """Of a module that is no UNet or ControlNet: classes, their code and settings are the graph."""
    shapes = dict(layer_shapes(module))
    code: dict[type, str] = {}
    layers = []
    for path, layer in module.named_modules():
        path = path.replace("_orig_mod.", "")
        kind: type = type(layer)
        code[kind] = code.get(kind) or _code_key(kind)
        settings = {
            name: _setting(value, f"{path}.{name}")
            for name, value in vars(layer).items()
            if name not in _MODULE_STATE
        }
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                settings[f"buffer {name}"] = list(buffer.shape)
                if name not in layer._non_persistent_buffers_set:
                    shapes[f"{path}.{name}" if path else name] = tuple(buffer.shape)
        class_name = f"{kind.__module__}.{kind.__qualname__}"
        layers.append([path, class_name, code[kind], layer.training, settings])
    shape_key = _shape_key(shapes)
    return Structure("module", None, shapes, None, _graph_key(shape_key, layers), shape_key)


_MODULE_STATE = frozenset(vars(nn.Module()))


def _setting(value: Any, where: str) -> Any:
    """A value as JSON that is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_setting(item, where) for item in value]
    if isinstance(value, Mapping):
        # Keys with an underscore are bookkeeping, such as a configuration's list of defaults.
        items = ((str(key), item) for key, item in value.items())
        return {key: _setting(item, where) for key, item in items if not key.startswith("_")}
    if isinstance(value, (set, frozenset)):
        return sorted(str(_setting(item, where)) for item in value)
    if isinstance(value, torch.Tensor):
        raise UnsupportedModel(f"{where} is a tensor outside of parameters and buffers")
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, FunctionType):
        return [value.__module__, value.__qualname__, _function_key(value)]
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _code_key(kind: type) -> str:
    """Changes when a method of the class does: an engine of the old code must not be found."""
    digest = xxhash.xxh3_64()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in sorted(vars(base).items()):
            if isinstance(value, FunctionType):
                digest.update(f"{name} {_function_key(value)}\n".encode())
    return digest.hexdigest()


def _function_key(function: FunctionType) -> str:
    digest = xxhash.xxh3_64()

    def visit(code: CodeType) -> None:
        digest.update(code.co_code)
        digest.update(repr(code.co_names).encode())
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                visit(constant)
            elif not isinstance(constant, frozenset):
                digest.update(repr(constant).encode())

    visit(function.__code__)
    return digest.hexdigest()
