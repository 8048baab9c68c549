"""Diffusers' own modules with the weights of an artist's files, LoRAs merged the usual way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..lora import read_lora
from ..models import UNetConfig, adapter_names, diffusers_kwargs, parameters
from ..structure import canonical_names
from ..tensorfile import TensorFile


def empty_module(config: UNetConfig, dtype: torch.dtype) -> nn.Module:
    """A UNet2DConditionModel or ControlNetModel on the CPU whose weights are yet to be loaded."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    kind: Any = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    with torch.device("meta"):
        module: nn.Module = kind(**diffusers_kwargs(config)).eval()
    nn.Module.to(module, dtype)  # diffusers' own `to` warns about every cast
    return module.to_empty(device="cpu").requires_grad_(False)


def load_weights(module: nn.Module, path: Path, config: UNetConfig) -> None:
    """Fill a module from a .safetensors file. Raises InvalidFile or StructureMismatch."""
    file = TensorFile(path)
    for name, source in canonical_names(file.tensors, config).items():
        module.get_parameter(name).copy_(file.read(source))


def merge_lora(module: nn.Module, path: Path, config: UNetConfig, strength: float) -> None:
    """Add a LoRA to a module's weights: a float32 sum, one rounding. Raises InvalidLora."""
    shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
    lora = read_lora(path, adapter_names(config), shapes)
    for name, patch in lora.patches.items():
        weight = module.get_parameter(name)
        base = weight.float()
        weight.copy_(base + patch.delta(base, strength))
