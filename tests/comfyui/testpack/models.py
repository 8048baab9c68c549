"""Adds the sizes of the tiny checkpoints to what ComfyUI detects, with a text encoder to match."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils

_CLIP_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "pad_token_id": 1,
    "projection_dim": 32,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}


class TinyTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP with 32 channels and one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:  # 0.3.64 takes a file only
            path = Path(folder) / "clip.json"
            path.write_text(json.dumps(_CLIP_CONFIG), "utf-8")
            super().__init__(*args, textmodel_json_config=str(path), **kwargs)


class TinyClip(comfy.sd1_clip.SD1ClipModel):
    """What CLIPTextEncode calls for a tiny checkpoint."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(clip_model=TinyTextModel, **kwargs)


class _Tiny:
    """What both tiny models share."""

    def process_clip_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        replaced: dict[str, Any] = comfy.utils.state_dict_prefix_replace(
            state_dict, {"cond_stage_model.": "clip_l."}, filter_keys=True
        )
        return replaced

    def process_clip_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        replaced: dict[str, Any] = comfy.utils.state_dict_prefix_replace(
            state_dict, {"clip_l.": "cond_stage_model."}
        )
        return replaced

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> Any:
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TinyClip)


class TinySD15(_Tiny, comfy.supported_models.SD15):
    """Stable Diffusion 1.5 with a tenth of its channels."""

    unet_config: ClassVar = {
        **comfy.supported_models.SD15.unet_config,
        "context_dim": 32,
        "model_channels": 32,
    }
    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1}


class TinySDXL(_Tiny, comfy.supported_models.SDXL):
    """SDXL with a tenth of its channels and fewer transformer blocks."""

    unet_config: ClassVar = {
        **comfy.supported_models.SDXL.unet_config,
        "context_dim": 32,
        "model_channels": 32,
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "adm_in_channels": 6 * 256 + 32,
    }
    unet_extra_config: ClassVar = {"num_heads": -1, "num_head_channels": 16}


def register() -> None:
    """Make them known, once a process."""
    known = {kind.__name__ for kind in comfy.supported_models.models}
    for kind in (TinySD15, TinySDXL):
        if kind.__name__ not in known:
            comfy.supported_models.models.append(kind)
