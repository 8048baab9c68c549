"""The tiny world: a Stable Diffusion in miniature that draws coloured shapes at 128x128 pixels.

Its files lie in `assets/tiny`, as artists have them; `training/` made them. What such files do not
tell of their networks (heads, groups of the norms) is said here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..models import FAMILIES, UNetConfig

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "tiny"
CHECKPOINTS = (FOLDER / "tiny-flat.safetensors", FOLDER / "tiny-sketch.safetensors")
LORA = FOLDER / "tiny-night-lora.safetensors"
CONTROLNET_FILE = FOLDER / "tiny-edges-controlnet.safetensors"
EDGES = FOLDER / "edges.png"
"""A drawing for the ControlNet, white on black, that suits PROMPT."""
TOKENIZER = FOLDER / "tokenizer"

PROMPT = "a large blue ring left of a large red triangle on yellow"
GUIDANCE = 2.0
"""Prompts are heard from the first step on: stronger guidance adds little."""

PIXELS = 8  # of a picture, per latent
SCALE = 0.18215  # latents are the VAE's times this, as in SD1.5
TEXT_WIDTH = 64
TEXT_HEADS = 4


def _narrow() -> tuple[UNetConfig, UNetConfig]:
    """SD1.5's UNet and ControlNet with three levels and narrow layers.

    They keep SD1.5's 32 groups of GroupNorm. With 32 channels a group is one channel, and a
    normalised channel forgets how bright it was: so 64 channels where colours are made.
    """
    published = {family.name: family.config for family in FAMILIES}
    unet = dataclasses.replace(
        published["sd15"],
        block_out_channels=(64, 64, 32),
        layers_per_block=(1, 1, 1),
        down_depths=((1,), (1,), (0,)),
        up_depths=((0, 0), (1, 1), (1, 1)),
        heads=(4, 4, 4),
        context_dim=TEXT_WIDTH,
        time_embed_dim=256,
    )
    control = published["sd15-controlnet"]
    return unet, dataclasses.replace(
        unet,
        kind="controlnet",
        up_depths=(),
        hint_channels=control.hint_channels,
        hint_block_channels=control.hint_block_channels,
    )


UNET, CONTROLNET = _narrow()

_LEVELS = 4
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * _LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * _LEVELS,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,  # for the same reason as the UNet's 64 channels
    "latent_channels": 4,
    "scaling_factor": SCALE,
}
"""Arguments of diffusers.AutoencoderKL."""


_UNTAUGHT = {"and", "background"}  # have a token, and stand in no caption


def check_prompt(prompt: str) -> None:
    """Raise InvalidInput for a word that the tiny world was not trained on, with those it was."""
    tokens = json.loads((TOKENIZER / "vocab.json").read_text("utf-8"))
    ends = (token.removesuffix("</w>") for token in tokens if token.endswith("</w>"))
    known = {word for word in ends if len(word) > 1} - _UNTAUGHT | {"a"}
    unknown = [word for word in prompt.lower().split() if word not in known]
    if unknown or not prompt.strip():
        raise InvalidInput(
            f"the tiny world does not know {' '.join(unknown) or 'an empty prompt'!r}: say such as "
            f"{PROMPT!r}; its words are {', '.join(sorted(known))}"
        )


def edges(height: int, width: int) -> Tensor:
    """The drawing for the ControlNet at a size in pixels: [1, 3, height, width] in 0..1."""
    from PIL import Image

    with Image.open(EDGES) as file:
        drawn = file.convert("L")
    drawn = drawn.resize((width, height), Image.Resampling.BILINEAR)
    values = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    return (values.view(1, 1, height, width) / 255).expand(-1, 3, -1, -1).contiguous()
