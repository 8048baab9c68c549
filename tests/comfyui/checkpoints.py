"""Writes seeded checkpoints, LoRAs, ControlNets and a T2I-Adapter that stock ComfyUI loads by name.

The tiny ones are detected with `testpack` in place, which adds their sizes to ComfyUI's list of
models, and hold a small text encoder and VAE too. The wide ones are what ComfyUI detects by itself:
SD1.5 and SDXL have 320 channels at least. They hold no text encoder and no VAE. The full ones have
the published structures, with everything in them.

A file depends on its name and, where it is large, on the device that it is drawn on, COMFYUI_DEVICE
(by default cpu). `python -m comfyui.checkpoints FOLDER [NAME…]` writes some.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from accel.models import FAMILIES, UNetConfig, parameters
from benchmarks.checkpoints import text_shapes, vae_shapes, weight

Tensors = dict[str, Tensor]

_FAMILY = {family.name: family.config for family in FAMILIES}
_UNET = "model.diffusion_model."


def _narrow(family: str, **changes: object) -> UNetConfig:
    return dataclasses.replace(_FAMILY[family], **changes)  # type: ignore[arg-type]


# The width of SDXL's vector: six numbers as 256 sines and cosines each, then the pooled text.
_TINY_SDXL = {
    "block_out_channels": (32, 64, 128),
    "down_depths": ((0, 0), (1, 1), (2, 2)),
    "mid_depth": 2,
    "up_depths": ((2, 2, 2), (1, 1, 1), (0, 0, 0)),
    "heads": (2, 4, 8),
    "context_dim": 32,
    "pooled_dim": 6 * 256 + 32,
    "time_embed_dim": 128,
}
_TINY_SD15 = {
    "block_out_channels": (32, 64, 128, 128),
    "heads": (4, 4, 4, 4),
    "context_dim": 32,
    "time_embed_dim": 128,
}
# 320 channels at every level, as many levels as the family has.
_WIDE_SDXL = {"block_out_channels": (320, 320, 320), "heads": (5, 5, 5)}
_WIDE_SD15 = {
    "block_out_channels": (320, 320),
    "layers_per_block": (1, 1),
    "down_depths": ((1,), (0,)),
    "up_depths": ((0, 0), (1, 1)),
    "heads": (8, 8),
}
CONFIGS: dict[str, UNetConfig] = {
    "tiny-sd15": _narrow("sd15", **_TINY_SD15),
    "tiny-sd15-inpaint": _narrow("sd15-inpaint", **_TINY_SD15),
    "tiny-sdxl": _narrow("sdxl", **_TINY_SDXL),
    "tiny-sdxl-inpaint": _narrow("sdxl-inpaint", **_TINY_SDXL),
    # Stock ComfyUI's own detection takes these.
    "wide-sd15": _narrow("sd15", **_WIDE_SD15),
    "wide-sdxl": _narrow("sdxl", **_WIDE_SDXL),
    "wide-sdxl-inpaint": _narrow("sdxl-inpaint", **_WIDE_SDXL),
    # The published structures, for machines with the memory.
    "full-sd15": _FAMILY["sd15"],
    "full-sdxl": _FAMILY["sdxl"],
    "full-sdxl-inpaint": _FAMILY["sdxl-inpaint"],
}
# Half precision where float32 would cost too much disk and memory; ComfyUI on a CPU computes in
# float32 all the same.
_HALF = ("full-", "wide-sdxl")


def dtype_of(kind: str) -> torch.dtype:
    """The dtype that the checkpoints of a kind are written in."""
    return torch.float16 if kind.startswith(_HALF) else torch.float32


def _device(kind: str) -> str:
    """What the weights of a kind are drawn on: a CPU takes minutes for the full ones."""
    return os.environ.get("COMFYUI_DEVICE", "cpu") if kind.startswith("full-") else "cpu"


def _generator(name: str, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def unet_state(config: UNetConfig, name: str, prefix: str = "", device: str = "cpu") -> Tensors:
    """Seeded float32 weights of a UNet or ControlNet, by its ldm names.

    Scaled so that a latent of any usual size comes out with about unit variance, and so that no
    path (residuals, attention, embeddings, zero convolutions) is negligible.
    """
    generator = _generator(name, device)
    state = {}
    for parameter in parameters(config).values():
        ldm, shape = parameter.ldm_name, parameter.shape
        noise = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            tensor = noise / noise[0].numel() ** 0.5
            if ldm.endswith(("out_layers.3.weight", "proj_out.weight")):
                tensor *= 0.5  # what is added to the trunk
            elif ldm.startswith(("zero_convs", "middle_block_out")):
                tensor *= 0.3  # a ControlNet's residuals
        else:
            norm = ldm.endswith(".weight")
            tensor = 1 + 0.1 * noise if norm else 0.05 * noise
        state[prefix + ldm] = tensor
    return state


def _clip_state(name: str) -> Tensors:
    """The text encoder of `testpack`: CLIP with 32 channels and one layer."""
    generator = _generator(name + "/clip")

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width = 32
    root = "cond_stage_model.transformer.text_model."
    layer = root + "encoder.layers.0."
    state = {
        root + "embeddings.token_embedding.weight": noise(49408, width),
        root + "embeddings.position_embedding.weight": noise(77, width) * 0.1,
        root + "final_layer_norm.weight": torch.ones(width),
        root + "final_layer_norm.bias": torch.zeros(width),
        "cond_stage_model.transformer.text_projection.weight": noise(width, width) / width**0.5,
    }
    shapes = {f"self_attn.{part}_proj": (width, width) for part in "qkv"}
    shapes |= {"self_attn.out_proj": (width, width)}
    shapes |= {"mlp.fc1": (64, width), "mlp.fc2": (width, 64)}
    for part, (rows, columns) in shapes.items():
        state[f"{layer}{part}.weight"] = noise(rows, columns) / columns**0.5
        state[f"{layer}{part}.bias"] = noise(rows) * 0.05
    for part in ("layer_norm1", "layer_norm2"):
        state[f"{layer}{part}.weight"] = torch.ones(width)
        state[f"{layer}{part}.bias"] = torch.zeros(width)
    return state


def _vae_state(name: str) -> Tensors:
    """A TAESD: the small autoencoder that ComfyUI takes in place of Stable Diffusion's."""
    generator = _generator(name + "/vae")
    state: Tensors = {}

    def conv(key: str, inner: int, outer: int, bias: bool = True) -> None:
        weight = torch.randn(outer, inner, 3, 3, generator=generator)
        state[f"{key}.weight"] = weight * (2 / (9 * inner)) ** 0.5
        if bias:
            state[f"{key}.bias"] = torch.zeros(outer)

    def block(key: str) -> None:
        for index in (0, 2, 4):
            conv(f"{key}.conv.{index}", 64, 64)
        state[f"{key}.conv.4.weight"] *= 0.3

    conv("taesd_encoder.0", 3, 64)
    conv("taesd_decoder.1", 4, 64)
    for index in range(1, 14):
        if index in (2, 6, 10):
            conv(f"taesd_encoder.{index}", 64, 64, bias=False)
        else:
            block(f"taesd_encoder.{index}")
    for index in range(3, 18):
        if index in (7, 12, 17):
            conv(f"taesd_decoder.{index}", 64, 64, bias=False)
        elif index not in (6, 11, 16):  # upsampling
            block(f"taesd_decoder.{index}")
    conv("taesd_encoder.14", 64, 4)
    block("taesd_decoder.18")
    conv("taesd_decoder.19", 64, 3)
    return state


def checkpoint_state(kind: str, name: str) -> Tensors:
    """A whole checkpoint file: the UNet, and but for the wide ones text encoders and the VAE."""
    device = _device(kind)
    state = unet_state(CONFIGS[kind], name, _UNET, device)
    if kind.startswith("tiny-"):
        state |= _clip_state(name)
        state |= {f"first_stage_model.{key}": value for key, value in _vae_state(name).items()}
    elif kind.startswith("full-"):
        family = "sdxl" if "sdxl" in kind else "sd15"
        for key, shape in (text_shapes(family) | dict(vae_shapes())).items():
            state[key] = weight(key, shape, device, name)
    return {key: value.to(dtype_of(kind)) for key, value in state.items()}


def _kronecker(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Factors of a matrix's sizes as LoKr has them."""
    small = 4 if rows % 4 == 0 and columns % 4 == 0 else 1
    return (small, small), (rows // small, columns // small)


def lora_state(kind: str, name: str, algorithm: str = "lora", rank: int = 4) -> Tensors:
    """An adapter of a checkpoint's UNet in kohya's naming, over about half of its matrices.

    algorithm: `lora`, `loha` or `lokr`. Convolutions get LoRA's own form. At strength 1 a matrix
    changes by about a fifth of its size.
    """
    generator = _generator(name)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state: Tensors = {}
    for key, parameter in parameters(CONFIGS[kind]).items():
        shape = parameter.shape
        adapted = "transformer_blocks" in key or ".conv1." in key or "proj_in" in key
        if not adapted or len(shape) < 2 or torch.rand(1, generator=generator) < 0.5:
            continue
        base = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        rows, *rest = shape
        columns = int(torch.Size(rest).numel())
        size = 0.2 / columns**0.5  # of one element of the difference
        state[f"{base}.alpha"] = torch.tensor(float(rank))
        if algorithm == "lora" or len(rest) > 1:
            ones = [1] * (len(rest) - 1)
            state[f"{base}.lora_down.weight"] = noise(rank, *rest) * (size / rank**0.5)
            state[f"{base}.lora_up.weight"] = noise(rows, rank, *ones)
        elif algorithm == "loha":
            for factor in ("hada_w1", "hada_w2"):
                state[f"{base}.{factor}_a"] = noise(rows, rank) * (size / rank) ** 0.5
                state[f"{base}.{factor}_b"] = noise(rank, columns)
        else:
            first, second = _kronecker(rows, columns)
            state[f"{base}.lokr_w1"] = noise(*first) * size
            state[f"{base}.lokr_w2_a"] = noise(second[0], rank) / rank**0.5
            state[f"{base}.lokr_w2_b"] = noise(rank, second[1])
    return state


def controlnet_state(kind: str, name: str) -> Tensors:
    """A ControlNet of a checkpoint's structure, in the ldm layout."""
    config = dataclasses.replace(
        CONFIGS[kind],
        kind="controlnet",
        in_channels=4,
        up_depths=(),
        hint_channels=3,
        hint_block_channels=(16, 32, 96, 256),
    )
    state = unet_state(config, name, device=_device(kind))
    return {key: value.to(dtype_of(kind)) for key, value in state.items()}


def t2i_adapter_state(name: str) -> Tensors:
    """A T2I-Adapter for `tiny-sd15`: its features have 32, 64, 128 and 128 channels."""
    generator = _generator(name)
    widths = (32, 64, 128, 128)
    state: Tensors = {}

    def conv(key: str, inner: int, outer: int, kernel: int) -> None:
        weight = torch.randn(outer, inner, kernel, kernel, generator=generator)
        state[f"{key}.weight"] = weight / (inner * kernel**2) ** 0.5
        state[f"{key}.bias"] = 0.05 * torch.randn(outer, generator=generator)

    conv("conv_in", 3 * 64, widths[0], 3)
    for level, width in enumerate(widths):
        for index in range(2):
            key = f"body.{2 * level + index}"
            inner = widths[level - 1] if level and not index else width
            if inner != width:
                conv(f"{key}.in_conv", inner, width, 1)
            conv(f"{key}.block1", width, width, 3)
            conv(f"{key}.block2", width, width, 1)
    return state


def _checkpoint(kind: str) -> Callable[[str], Tensors]:
    return lambda name: checkpoint_state(kind, name)


def _lora(kind: str, algorithm: str = "lora", rank: int = 4) -> Callable[[str], Tensors]:
    return lambda name: lora_state(kind, name, algorithm, rank)


def _controlnet(kind: str) -> Callable[[str], Tensors]:
    return lambda name: controlnet_state(kind, name)


# Every file, by its path in a models folder.
FILES: dict[str, Callable[[str], Tensors]] = {}
for _kind in CONFIGS:
    for _letter in "abc":
        FILES[f"checkpoints/{_kind}-{_letter}.safetensors"] = _checkpoint(_kind)
    for _number, _rank in enumerate((4, 8, 16), 1):
        FILES[f"loras/{_kind}-{_number}.safetensors"] = _lora(_kind, rank=_rank)
    FILES[f"loras/{_kind}-loha.safetensors"] = _lora(_kind, "loha")
    FILES[f"loras/{_kind}-lokr.safetensors"] = _lora(_kind, "lokr")
    if "inpaint" not in _kind:
        for _number in (1, 2):
            FILES[f"controlnet/{_kind}-{_number}.safetensors"] = _controlnet(_kind)
FILES["controlnet/tiny-sd15-t2i.safetensors"] = t2i_adapter_state
FILES["vae/tiny.safetensors"] = _vae_state


def ensure(models: Path, *names: str) -> list[Path]:
    """Write the files that are not there yet into a models folder. Each appears whole, or not."""
    paths = []
    for name in names:
        path = models / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            state = FILES[name](name)
            save_file({key: value.cpu().contiguous() for key, value in state.items()}, part)
            part.replace(path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for written in ensure(folder, *(sys.argv[2:] or [n for n in FILES if "/tiny" in n])):
        print(written)
