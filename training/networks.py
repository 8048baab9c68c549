"""The tiny world's networks in diffusers' and transformers' own classes: SD1.5's parts, narrow.

The UNet keeps SD1.5's 32 groups of GroupNorm, which no file tells. With 32 channels a group is one
channel, and a normalised channel forgets how bright it was: so 64 channels where colours are made,
and fewer groups in the autoencoder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from accel.models import FAMILIES, UNetConfig, diffusers_kwargs

from . import words

PIXELS = 8  # of a picture, per latent
SCALE = 0.18215  # latents are the VAE's times this, as in SD1.5
TEXT_WIDTH = 64

_SD15 = next(family.config for family in FAMILIES if family.name == "sd15")
_CONTROL = next(family.config for family in FAMILIES if family.name == "sd15-controlnet")

UNET = dataclasses.replace(
    _SD15,
    block_out_channels=(64, 64, 32),
    layers_per_block=(1, 1, 1),
    down_depths=((1,), (1,), (0,)),
    up_depths=((0, 0), (1, 1), (1, 1)),
    heads=(4, 4, 4),
    context_dim=TEXT_WIDTH,
    time_embed_dim=256,
)
CONTROLNET: UNetConfig = dataclasses.replace(
    UNET,
    kind="controlnet",
    up_depths=(),
    hint_channels=_CONTROL.hint_channels,
    hint_block_channels=_CONTROL.hint_block_channels,
)


def make_unet() -> Any:
    """diffusers.UNet2DConditionModel, float32, freshly initialised."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**diffusers_kwargs(UNET))


def make_controlnet() -> Any:
    """diffusers.ControlNetModel for that UNet."""
    from diffusers import ControlNetModel

    return ControlNetModel(**diffusers_kwargs(CONTROLNET))


def make_vae() -> Any:
    """diffusers.AutoencoderKL: SD1.5's four levels, one eighth of the picture's sides."""
    from diffusers import AutoencoderKL

    levels = 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=SCALE,
    )


def make_text_encoder() -> Any:
    """transformers.CLIPTextModel for the tokens of `words`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words.vocabulary_size(),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=words.start(),
            eos_token_id=words.end(),
            pad_token_id=words.end(),
        )
    )
