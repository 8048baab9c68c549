"""The tiny world's networks in diffusers' and transformers' own classes, freshly initialised."""

from __future__ import annotations

from typing import Any

from accel.demo import world
from accel.models import diffusers_kwargs

from . import words


def make_unet() -> Any:
    """diffusers.UNet2DConditionModel, float32."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**diffusers_kwargs(world.UNET))


def make_controlnet() -> Any:
    """diffusers.ControlNetModel for that UNet."""
    from diffusers import ControlNetModel

    return ControlNetModel(**diffusers_kwargs(world.CONTROLNET))


def make_vae() -> Any:
    """diffusers.AutoencoderKL: SD1.5's four levels, one eighth of the picture's sides."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**world.VAE)


def make_text_encoder() -> Any:
    """transformers.CLIPTextModel for the tokens of `words`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words.vocabulary_size(),
            hidden_size=world.TEXT_WIDTH,
            intermediate_size=4 * world.TEXT_WIDTH,
            projection_dim=world.TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=world.TEXT_HEADS,
            max_position_embeddings=words.LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=words.start(),
            eos_token_id=words.end(),
            pad_token_id=words.end(),
        )
    )
