"""Prompts of SD1.5 and SDXL, encoded by the text encoders in the checkpoint, without a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidFile
from ..models import UNetConfig
from ..tensorfile import TensorFile
from .sampling import Conditioning

_LENGTH = 77
# OpenCLIP's names of a layer's parts -> those of transformers.
_OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOKENS = "embeddings.token_embedding.weight"
_SMALL = "transformer.text_model."  # CLIP ViT-L/14, in SD1.5 and SDXL
_LARGE = "conditioner.embedders.1.model."  # OpenCLIP ViT-bigG/14, in SDXL


def conditioning(
    file: TensorFile,
    config: UNetConfig,
    prompt: str,
    size: tuple[int, int] | None,
    tokenizer: Path | None,
    seed: int,
    heads: int = 12,
) -> tuple[Conditioning, str]:
    """Conditioning for guidance (nothing, then the prompt), and a line saying what it is.

    size: latent height and width. tokenizer: folder of CLIP's vocab.json and merges.txt; looked for
    where None. heads: of the attention in SD1.5's encoder. Where words cannot be encoded here,
    fixed random vectors stand in for them.
    Raises InvalidFile for a tokenizer folder without a tokenizer.
    """
    why = _missing(file, config)
    words = None if why else _tokenizer(tokenizer, _vocabulary(file))
    if why is None and words is None:
        why = (
            "CLIP's tokenizer is not on this machine; give --tokenizer FOLDER with its vocab.json "
            "and merges.txt, such as ComfyUI/comfy/sd1_tokenizer"
        )
    if why is not None or words is None:
        note = f"the prompt is NOT used, random vectors stand in for it: {why}"
        return _random(config, size, seed), note
    context, pooled = _encode(file, config, [words(text) for text in ("", prompt)], heads)
    if pooled is None:
        return Conditioning(context), f"prompts are encoded by the text encoder in {file.path.name}"
    note = f"prompts are encoded by the text encoders in {file.path.name}"
    return Conditioning(context, _added(pooled, size)), note


def text_encoder(file: TensorFile, heads: int = 12) -> torch.nn.Module:
    """The CLIP text encoder of SD1.5 in a single file, float32 on the CPU."""
    return _encoder(_strip(file, f"{_small_prefix(file)}"), heads, "quick_gelu")


def _missing(file: TensorFile, config: UNetConfig) -> str | None:
    """What is missing for the encoders, or None."""
    if _small_prefix(file) is None or (
        config.pooled_dim is not None and f"{_LARGE}ln_final.weight" not in file.tensors
    ):
        return f"{file.path.name} holds no text encoder"
    try:
        import transformers  # noqa: F401 - only whether it is here
    except ImportError:
        return "encoding words needs transformers: pip install transformers"
    return None


def _vocabulary(file: TensorFile) -> int:
    """How many tokens the text encoder knows. The last of them ends a text."""
    return file.tensors[f"{_small_prefix(file)}{_TOKENS}"].shape[0]


def _tokenizer(folder: Path | None, vocabulary: int) -> Callable[[str], list[int]] | None:
    """CLIP's tokenizer from files of this machine: text to at most 77 ids, ends included."""
    from transformers import CLIPTokenizer

    places: list[str] = []
    if folder is not None:
        if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
            raise InvalidFile(f"{folder} holds no CLIP tokenizer: vocab.json and merges.txt")
        places.append(str(folder))
    else:
        comfyui = os.environ.get("COMFYUI_PATH")
        # The pack's own host, when it lies in ComfyUI's custom_nodes.
        roots = [Path(comfyui)] if comfyui else []
        roots.append(Path(__file__).resolve().parents[4])
        found = (root / "comfy" / "sd1_tokenizer" for root in roots)
        places += [str(place) for place in found if (place / "merges.txt").is_file()]
        places.append("openai/clip-vit-large-patch14")  # where an earlier download may have left it
    for place in places:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError):
            continue
        if len(tokenizer) != vocabulary:  # without its files some versions give an empty one
            continue
        return lambda text: list(tokenizer(text, max_length=_LENGTH, truncation=True)["input_ids"])
    return None


def _encode(
    file: TensorFile, config: UNetConfig, texts: list[list[int]], heads: int
) -> tuple[Tensor, Tensor | None]:
    """Context [B, 77, width] and SDXL's pooled vector [B, 1280], float32, of texts as ids."""
    small = text_encoder(file, heads)
    # Each encoder is padded as it was trained: one with the end of text, the other with zeros.
    last, before_last = _states(small, texts, padding=_vocabulary(file) - 1)
    if config.pooled_dim is None:
        return last, None
    tensors = _from_open_clip(_strip(file, _LARGE))
    projection = tensors.pop("text_projection").float()
    large = _encoder(tensors, 20, "gelu")
    large_last, large_before_last = _states(large, texts, padding=0)
    ends = torch.tensor([len(ids) - 1 for ids in texts])
    pooled = large_last[torch.arange(len(texts)), ends] @ projection
    return torch.cat([before_last, large_before_last], dim=-1), pooled


def _small_prefix(file: TensorFile) -> str | None:
    name = f"{_SMALL}{_TOKENS}"
    for place in ("cond_stage_model.", "conditioner.embedders.0."):
        if place + name in file.tensors:
            return place + _SMALL
    return None


def _strip(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): file.read(name)
        for name in file.tensors
        if name.startswith(prefix)
    }


def _from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names to those of transformers, without `text_model.`; the projection as it is."""
    found = {
        _TOKENS: tensors["token_embedding.weight"],
        "embeddings.position_embedding.weight": tensors["positional_embedding"],
        "final_layer_norm.weight": tensors["ln_final.weight"],
        "final_layer_norm.bias": tensors["ln_final.bias"],
        "text_projection": tensors["text_projection"],
    }
    for name, tensor in tensors.items():
        if not name.startswith("transformer.resblocks."):
            continue
        number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
        layer = f"encoder.layers.{number}"
        part, _, kind = rest.rpartition(".")
        if part in _OPEN_CLIP:
            found[f"{layer}.{_OPEN_CLIP[part]}.{kind}"] = tensor
        else:  # attn.in_proj_weight and attn.in_proj_bias: query, key and value in one
            kind = rest.rpartition("_")[2]
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{layer}.self_attn.{letter}_proj.{kind}"] = third
    return found


def _encoder(tensors: Mapping[str, Tensor], heads: int, act: str) -> torch.nn.Module:
    """A CLIP text encoder with these weights in float32."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, width = tensors[_TOKENS].shape
    layers = sum(name.endswith(".layer_norm1.weight") for name in tensors)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # Versions of transformers differ in whether the names begin with `text_model.`.
    state = {
        name: tensors[name.removeprefix("text_model.")].float()
        for name, _ in model.named_parameters()
    }
    model.load_state_dict(state, strict=False, assign=True)
    for layer in model.modules():
        if "position_ids" in layer._buffers:
            layer.position_ids = torch.arange(_LENGTH).view(1, -1)
    encoder: torch.nn.Module = model.eval()
    return encoder


def _states(encoder: Any, texts: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """The last states, normed, and those before the last layer; each [B, 77, width]."""
    padded = [[*ids, *[padding] * (_LENGTH - len(ids))] for ids in texts]
    with torch.no_grad():
        result = encoder(torch.tensor(padded), output_hidden_states=True)
    return result.last_hidden_state, result.hidden_states[-2]


def _random(config: UNetConfig, size: tuple[int, int] | None, seed: int) -> Conditioning:
    """Vectors of about the size that encoders give, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    context = torch.randn(2, _LENGTH, config.context_dim, generator=random)
    if config.pooled_dim is None:
        return Conditioning(context)
    return Conditioning(context, _added(torch.randn(2, 1280, generator=random), size))


def _added(pooled: Tensor, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """SDXL's second conditioning: the pooled vector, and original size, crop and target size."""
    height, width = (8 * side for side in size or (128, 128))
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    return {"text_embeds": pooled, "time_ids": sizes.expand(2, -1)}
