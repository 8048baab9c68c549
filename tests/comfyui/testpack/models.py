"""Adds the tiny checkpoints to what ComfyUI detects, with text encoder, tokenizer, VAE to match.

Stock ComfyUI knows Stable Diffusion's networks at their published widths only. The seeded ones of
`checkpoints` and the trained world in assets/tiny are the same networks, narrower.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

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


_WORLD = Path(__file__).resolve().parents[3] / "assets" / "tiny"
_WORLD_END = len(json.loads((_WORLD / "tokenizer" / "vocab.json").read_text("utf-8"))) - 1
_WORLD_CLIP_CONFIG = {
    **_CLIP_CONFIG,
    "bos_token_id": _WORLD_END - 1,
    "eos_token_id": _WORLD_END,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "pad_token_id": _WORLD_END,
    "projection_dim": 64,
}


class TinyTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP with 32 channels and one layer."""

    config: ClassVar = _CLIP_CONFIG

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:  # 0.3.64 takes a file only
            path = Path(folder) / "clip.json"
            path.write_text(json.dumps(self.config), "utf-8")
            super().__init__(*args, textmodel_json_config=str(path), **kwargs)


class WorldTextModel(TinyTextModel):
    """CLIP with 64 channels, two layers and few tokens."""

    config: ClassVar = _WORLD_CLIP_CONFIG

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        tokens = {"start": _WORLD_END - 1, "end": _WORLD_END, "pad": _WORLD_END}
        super().__init__(*args, special_tokens=tokens, **kwargs)
        published = (
            self.transformer.get_input_embeddings()
        )  # of 49408 tokens, whatever `config` says
        weight = published.weight
        mine = type(published)(_WORLD_END + 1, 64, dtype=weight.dtype, device=weight.device)
        self.transformer.set_input_embeddings(mine)


class TinyClip(comfy.sd1_clip.SD1ClipModel):
    """What CLIPTextEncode calls for a tiny checkpoint."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(clip_model=TinyTextModel, **kwargs)


class WorldClip(comfy.sd1_clip.SD1ClipModel):
    """What CLIPTextEncode calls for the trained world."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(clip_model=WorldTextModel, **kwargs)


class _WorldWords(comfy.sd1_clip.SDTokenizer):
    def __init__(self, **kwargs: Any) -> None:
        folder = str(_WORLD / "tokenizer")
        super().__init__(**{**kwargs, "tokenizer_path": folder, "embedding_size": 64})


class WorldTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """With the files in assets/tiny."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tokenizer=_WorldWords, **kwargs)


class _Tiny:
    """What the tiny models share."""

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


class _Half:
    """A level's width in `model_channels`: ComfyUI's own multiples are whole numbers."""

    def __mul__(self, channels: int) -> int:
        return channels // 2

    __rmul__ = __mul__


class TinyWorld(_Tiny, comfy.supported_models.SD15):
    """The trained one: Stable Diffusion 1.5 with three narrow levels."""

    unet_config: ClassVar = {
        **comfy.supported_models.SD15.unet_config,
        "context_dim": 64,
        "model_channels": 64,
    }
    unet_extra_config: ClassVar = {
        "num_heads": 4,
        "num_head_channels": -1,
        "channel_mult": [1, 1, _Half()],
    }

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> Any:
        return comfy.supported_models_base.ClipTarget(WorldTokenizer, WorldClip)


_VAE_GROUPS = 8  # of the world's norms
_VAE = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


class NarrowVAE(comfy.sd.VAE):
    """ComfyUI's VAE, whose width it does not detect: the world's where a file holds that."""

    def __init__(self, sd: Any = None, *args: Any, **kwargs: Any) -> None:
        first = (sd or {}).get("decoder.conv_in.weight")
        narrow = first is not None and tuple(first.shape[:2]) == (64, 4)
        if narrow:
            kwargs["config"] = {"params": _VAE}
        super().__init__(sd, *args, **kwargs)
        for layer in self.first_stage_model.modules() if narrow else ():
            if isinstance(layer, torch.nn.GroupNorm):
                layer.num_groups = _VAE_GROUPS


def register() -> None:
    """Make them known, once a process."""
    comfy.sd.VAE = NarrowVAE
    known = {kind.__name__ for kind in comfy.supported_models.models}
    for kind in (TinySD15, TinySDXL, TinyWorld):
        if kind.__name__ not in known:
            comfy.supported_models.models.append(kind)
