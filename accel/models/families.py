"""The published network families, by name. A file of one of them needs no module to be known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .unet_config import Shape, UNetConfig, infer_config


@dataclass(frozen=True)
class Family:
    """A published architecture: its short name, its name for people, and its configuration."""

    name: str
    title: str
    config: UNetConfig


_SD15 = UNetConfig(
    kind="unet",
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=(2, 2, 2, 2),
    down_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
    mid_depth=1,
    up_depths=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    heads=(8, 8, 8, 8),
    context_dim=768,
    linear_projection=False,
    pooled_dim=None,
    time_embed_dim=1280,
)
_SD21 = dataclasses.replace(_SD15, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
_SDXL = UNetConfig(
    kind="unet",
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280),
    layers_per_block=(2, 2, 2),
    down_depths=((0, 0), (2, 2), (10, 10)),
    mid_depth=10,
    up_depths=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    pooled_dim=2816,
    time_embed_dim=1280,
)
_REFINER = UNetConfig(
    kind="unet",
    in_channels=4,
    out_channels=4,
    block_out_channels=(384, 768, 1536, 1536),
    layers_per_block=(2, 2, 2, 2),
    down_depths=((0, 0), (4, 4), (4, 4), (0, 0)),
    mid_depth=4,
    up_depths=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
    heads=(6, 12, 24, 24),
    context_dim=1280,
    linear_projection=True,
    pooled_dim=2560,
    time_embed_dim=1536,
)
# SSD-1B drops the second half of SDXL's blocks, and the middle's attention with its last resnet.
_SSD1B = dataclasses.replace(
    _SDXL,
    down_depths=((0, 0), (2, 2), (4, 4)),
    mid_depth=-1,
    up_depths=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
)


def _inpaint(config: UNetConfig) -> UNetConfig:
    """Beside the latent: the mask, and the latent of the masked picture."""
    return dataclasses.replace(config, in_channels=9)


def _controlnet(config: UNetConfig) -> UNetConfig:
    return dataclasses.replace(
        config,
        kind="controlnet",
        up_depths=(),
        hint_channels=3,
        hint_block_channels=(16, 32, 96, 256),
    )


FAMILIES: tuple[Family, ...] = (
    Family("sd15", "Stable Diffusion 1.5", _SD15),
    Family("sd15-inpaint", "Stable Diffusion 1.5 inpainting", _inpaint(_SD15)),
    Family("sd21", "Stable Diffusion 2.1", _SD21),
    Family("sdxl", "SDXL", _SDXL),
    Family("sdxl-inpaint", "SDXL inpainting", _inpaint(_SDXL)),
    Family("sdxl-refiner", "SDXL refiner", _REFINER),
    Family("ssd1b", "SSD-1B", _SSD1B),
    Family("sd15-controlnet", "ControlNet for Stable Diffusion 1.5", _controlnet(_SD15)),
    Family("sd21-controlnet", "ControlNet for Stable Diffusion 2.1", _controlnet(_SD21)),
    Family("sdxl-controlnet", "ControlNet for SDXL", _controlnet(_SDXL)),
    Family("ssd1b-controlnet", "ControlNet for SSD-1B", _controlnet(_SSD1B)),
)


@lru_cache(maxsize=1)
def _by_shape() -> dict[UNetConfig, Family]:
    return {dataclasses.replace(family.config, heads=None): family for family in FAMILIES}


def family_of(shapes: Mapping[str, Shape]) -> Family | None:
    """The family whose parameters have exactly these canonical (or ldm) names and shapes."""
    config = infer_config(shapes)
    return None if config is None else _by_shape().get(config)
