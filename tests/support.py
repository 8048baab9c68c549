"""Makers of tiny seeded networks, LoRAs and inputs that several test files share."""

from __future__ import annotations

import dataclasses

import torch

from accel.models import FAMILIES, UNetConfig, diffusers_kwargs, parameters


def family_config(name: str) -> UNetConfig:
    """The architecture of a published family."""
    return next(family.config for family in FAMILIES if family.name == name)


def tiny_config(family: str = "sd15") -> UNetConfig:
    """The family's layout with few channels: SD1.5's four levels, or SDXL's three."""
    config = family_config(family)
    small = {"block_out_channels": (32, 64, 64, 64)[: len(config.block_out_channels)]}
    changes = {**small, "context_dim": 32, "time_embed_dim": 128}
    if config.heads is not None:
        changes["heads"] = tuple(4 for _ in config.heads)
    if config.pooled_dim is not None:
        changes |= {"addition_time_embed_dim": 8, "pooled_dim": 6 * 8 + 16}
    if config.kind == "controlnet":
        changes["hint_block_channels"] = (16, 32)
    return dataclasses.replace(config, **changes)


def two_levels() -> UNetConfig:
    """A structure that captures in a second or two."""
    return dataclasses.replace(
        tiny_config(),
        block_out_channels=(32, 32),
        layers_per_block=(1, 1),
        down_depths=((1,), (0,)),
        up_depths=((0, 0), (1, 1)),
        heads=(4, 4),
    )


def make_unet(seed: int, config: UNetConfig | None = None) -> torch.nn.Module:
    """A diffusers UNet or ControlNet with weights that make every path of it matter."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    config = config or tiny_config()
    cls = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    torch.manual_seed(seed)
    module = cls(**diffusers_kwargs(config)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        elif parameter.abs().max() == 0:  # a ControlNet's zero convolutions would hide everything
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return module


def make_lora(
    seed: int, config: UNetConfig | None = None, rank: int = 4, scale: float = 0.1
) -> dict[str, torch.Tensor]:
    """A kohya LoRA over half of the network's matrices and 3x3 convolutions, chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)
    lora: dict[str, torch.Tensor] = {}
    for name, parameter in parameters(config or tiny_config()).items():
        adapted = "transformer_blocks" in name or ".conv1." in name
        if not adapted or not name.endswith(".weight") or len(parameter.shape) < 2:
            continue
        if torch.rand(1, generator=generator) < 0.5:
            continue
        out, *rest = parameter.shape
        base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        ones = [1] * (len(rest) - 1)
        lora[f"{base}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator) * scale
        lora[f"{base}.lora_up.weight"] = torch.randn(out, rank, *ones, generator=generator) * scale
        lora[f"{base}.alpha"] = torch.tensor(rank / 2)
    return lora


def residuals_for(
    config: UNetConfig, batch: int, height: int, width: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Random ControlNet residuals for a latent of this size: one a skip, the middle's last."""
    shapes = [(config.block_out_channels[0], height, width)]
    last = len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        shapes += [(channels, height, width)] * config.layers_per_block[level]
        if level < last:
            height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
            shapes.append((channels, height, width))
    shapes.append((config.block_out_channels[-1], height, width))
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]
