"""Spellings of a layer in the keys of a LoRA, apart from what its format adds to them."""

from __future__ import annotations

import re

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "control_model.",
    "controlnet.",
    "unet.",
    "lora_unet_",
    "oft_unet_",
    "lycoris_",
)

_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?"
    r"(lora_te\d?_|text_encoders?(_\d)?\.|te\d?\.|text_model\.|cond_stage_model\.|conditioner\."
    # Textual-inversion embeddings that trainers bundle with a LoRA.
    r"|bundle_emb\.)"
)


def is_text_encoder(key: str) -> bool:
    """Whether `key` belongs to a text encoder, which the engine does not run."""
    return _TEXT_ENCODER.match(key) is not None


def layer_name(spelled: str) -> str:
    """The layer as `models.unet.adapter_names` spells it: without prefix and processor wrappers.

    `unet.mid_block.attentions.0.….attn1.processor.to_out_lora` gives
    `mid_block.attentions.0.….attn1.to_out.0`; '_'-joined names stay joined.
    """
    name = spelled
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    name = name.removesuffix("_lora").removesuffix(".lora").replace(".processor.", ".")
    # The old attention processors had one output layer; the module keeps it first in a list.
    return f"{name}.0" if name.endswith(".to_out") else name


_MERGED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def merged(name: str) -> tuple[str, ...]:
    """The layers that the projection `name` stands for, where trainers merge those of attention.

    `….attn1.to_qkv` gives `….attn1.to_q`, `….to_k`, `….to_v`, whose outputs it has one after the
    other; () for a layer of its own.
    """
    for whole, parts in _MERGED.items():
        if name.endswith((f".{whole}", f"_{whole}")):
            return tuple(name.removesuffix(whole) + part for part in parts)
    return ()
