"""Shapes of what a single-file checkpoint holds beside its UNet, and seeded weights for them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor


def text_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the text encoders: CLIP-L, for SDXL OpenCLIP's bigG too."""
    if model == "sd15":
        return dict(clip_l_shapes("cond_stage_model.transformer.text_model."))
    shapes = dict(clip_l_shapes("conditioner.embedders.0.transformer.text_model."))
    return shapes | dict(clip_g_shapes("conditioner.embedders.1.model."))


def clip_l_shapes(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """CLIP ViT-L/14's text part, as transformers names it."""
    width, inner = 768, 3072
    yield f"{prefix}embeddings.token_embedding.weight", (49408, width)
    yield f"{prefix}embeddings.position_embedding.weight", (77, width)
    yield from _norm(f"{prefix}final_layer_norm", width)
    for layer in range(12):
        block = f"{prefix}encoder.layers.{layer}"
        for part in "qkv":
            yield from _affine(f"{block}.self_attn.{part}_proj", width, width)
        yield from _affine(f"{block}.self_attn.out_proj", width, width)
        yield from _affine(f"{block}.mlp.fc1", inner, width)
        yield from _affine(f"{block}.mlp.fc2", width, inner)
        yield from _norm(f"{block}.layer_norm1", width)
        yield from _norm(f"{block}.layer_norm2", width)


def clip_g_shapes(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """OpenCLIP ViT-bigG/14's text part, as open_clip names it."""
    width, inner = 1280, 5120
    yield f"{prefix}token_embedding.weight", (49408, width)
    yield f"{prefix}positional_embedding", (77, width)
    yield f"{prefix}text_projection", (width, width)
    yield f"{prefix}logit_scale", ()
    yield from _norm(f"{prefix}ln_final", width)
    for layer in range(32):
        block = f"{prefix}transformer.resblocks.{layer}"
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield from _affine(f"{block}.attn.out_proj", width, width)
        yield from _affine(f"{block}.mlp.c_fc", inner, width)
        yield from _affine(f"{block}.mlp.c_proj", width, inner)
        yield from _norm(f"{block}.ln_1", width)
        yield from _norm(f"{block}.ln_2", width)


def vae_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The autoencoder with 4 latent channels and a factor of 8 that SD1.5 and SDXL share."""
    widths = (128, 256, 512, 512)
    for side in ("encoder", "decoder"):
        root = f"first_stage_model.{side}"
        encoder = side == "encoder"
        yield from _affine(f"{root}.mid.attn_1.q", 512, 512, 1, 1)
        yield from _affine(f"{root}.mid.attn_1.k", 512, 512, 1, 1)
        yield from _affine(f"{root}.mid.attn_1.v", 512, 512, 1, 1)
        yield from _affine(f"{root}.mid.attn_1.proj_out", 512, 512, 1, 1)
        yield from _norm(f"{root}.mid.attn_1.norm", 512)
        yield from _vae_block(f"{root}.mid.block_1", 512, 512)
        yield from _vae_block(f"{root}.mid.block_2", 512, 512)
        before = widths[0] if encoder else widths[-1]
        yield from _affine(f"{root}.conv_in", before, 3 if encoder else 4, 3, 3)
        for level in range(4) if encoder else reversed(range(4)):
            name = f"{root}.{'down' if encoder else 'up'}.{level}"
            for block in range(2 if encoder else 3):
                yield from _vae_block(f"{name}.block.{block}", widths[level], before)
                before = widths[level]
            if encoder and level < 3:
                yield from _affine(f"{name}.downsample.conv", before, before, 3, 3)
            elif not encoder and level > 0:
                yield from _affine(f"{name}.upsample.conv", before, before, 3, 3)
        yield from _norm(f"{root}.norm_out", before)
        yield from _affine(f"{root}.conv_out", 8 if encoder else 3, before, 3, 3)
    yield from _affine("first_stage_model.quant_conv", 8, 8, 1, 1)
    yield from _affine("first_stage_model.post_quant_conv", 4, 4, 1, 1)


def _vae_block(name: str, out: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", inner)
    yield from _affine(f"{name}.conv1", out, inner, 3, 3)
    yield from _norm(f"{name}.norm2", out)
    yield from _affine(f"{name}.conv2", out, out, 3, 3)
    if out != inner:
        yield from _affine(f"{name}.nin_shortcut", out, inner, 1, 1)


def _affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def weight(name: str, shape: tuple[int, ...], device: str, salt: str = "") -> Tensor:
    """A seeded fp16 tensor of about the size that keeps variances through the network."""
    generator = torch.Generator(device).manual_seed(zlib.crc32((salt + name).encode()))
    noise = torch.randn(shape, generator=generator, device=device)
    if not shape:  # CLIP's temperature, which nothing here uses
        tensor = noise * 0 + 4.6
    elif len(shape) > 1:
        tensor = noise / noise[0].numel() ** 0.5
        if name.endswith(("out_layers.3.weight", "proj_out.weight")):
            tensor *= 0.5  # what residual blocks add to the trunk
    elif name.endswith(".weight"):
        tensor = 1 + 0.1 * noise
    else:
        tensor = 0.05 * noise
    return tensor.half().cpu()
