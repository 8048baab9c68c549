"""What the demo paints with, checked before it starts: the tiny world, or an artist's own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidFile, StructureMismatch, StructureUnknown
from ..lora import read_lora
from ..models import UNetConfig, adapter_names, parameters
from ..structure import canonical_names, structure_of
from ..tensorfile import TensorFile
from . import prompts, world
from .latents import Decoder
from .sampling import Conditioning

Size = tuple[int, int]
"""Height and width in latent pixels, an eighth of the picture's."""

SUPPORTED = ("sd15", "sdxl", "ssd1b")
PROMPT = "a lighthouse on a cliff at sunset, oil painting"
GUIDANCE = 6.0
WORLD_SIZE = (16, 16)
_SIDE = {"sd15": 64}  # of a square latent that the family was trained for; SDXL and its kin: 128


@dataclass(frozen=True)
class Material:
    """Everything the pictures are made of.

    config, control_config: of the UNet and of the ControlNet.
    hint: the ControlNet's input for a latent size, [1, 3, 8H, 8W].
    decode: final latent [1, 4, H, W] to a picture [3, 8H, 8W] in 0..1.
    remarks: what the reader has to know about these pictures.
    """

    title: str
    config: UNetConfig
    control_config: UNetConfig | None
    checkpoints: tuple[Path, ...]
    lora: Path | None
    controlnet: Path | None
    conditioning: Conditioning
    guidance: float
    size: Size
    other_size: Size
    hint: Callable[[Size], Tensor]
    decode: Callable[[Tensor], Tensor]
    remarks: tuple[str, ...]


def tiny_world(prompt: str | None, size: Size | None, seed: int, device: torch.device) -> Material:
    """The world that the demo brings along. Raises InvalidFile, or InvalidInput for its prompt."""
    text = prompt or world.PROMPT
    file = TensorFile(world.CHECKPOINTS[0])
    conditioning, about_prompt = world_conditioning(file, text, size, seed)
    decoder = Decoder(file, False, device, world.VAE)
    return Material(
        title=f"the tiny world, '{text}'",
        config=world.UNET,
        control_config=world.CONTROLNET,
        checkpoints=world.CHECKPOINTS,
        lora=world.LORA,
        controlnet=world.CONTROLNET_FILE,
        conditioning=conditioning,
        guidance=world.GUIDANCE,
        size=size or WORLD_SIZE,
        # Odd sides, which halve to fractions at every level of the network.
        other_size=(13, 17) if size != (13, 17) else (12, 20),
        hint=lambda latent: world.edges(8 * latent[0], 8 * latent[1]),
        decode=decoder,
        remarks=(
            about_prompt,
            decoder.about,
            f"the ControlNet's input is {world.EDGES.name}; all files are in {world.FOLDER}: try "
            "them in your own programs",
        ),
    )


def trained_size(family: str | None) -> Size:
    """The size of latents that a family was trained for."""
    side = _SIDE.get(family or "", 128)
    return side, side


def world_conditioning(
    file: TensorFile, text: str, size: Size | None, seed: int
) -> tuple[Conditioning, str]:
    """Of one of the tiny world's checkpoints. Raises InvalidInput for what it cannot paint."""
    world.check_prompt(text)
    return prompts.conditioning(
        file, world.UNET, text, size, world.TOKENIZER, seed, world.TEXT_HEADS
    )


def own_files(
    checkpoints: tuple[Path, ...],
    lora: Path | None,
    controlnet: Path | None,
    prompt: str | None,
    size: Size | None,
    tokenizer: Path | None,
    seed: int,
    device: torch.device,
) -> Material:
    """An artist's own files. Every file is checked by its header before anything is loaded.

    Raises InvalidFile, StructureUnknown, StructureMismatch or InvalidLora.
    """
    first = checkpoints[0]
    structure = structure_of(first)
    config = structure.config
    if config is None or structure.kind != "unet":
        raise StructureUnknown(
            f"{first} holds no UNet of a published family: give an SD1.5 or SDXL checkpoint"
        )
    family = structure.family
    if family not in SUPPORTED:
        raise StructureUnknown(
            f"{first} is of the family {family}, which the demo cannot paint with: give an SD1.5 "
            "or SDXL checkpoint"
        )
    for path in checkpoints[1:]:
        try:
            canonical_names(TensorFile(path).tensors, config)
        except StructureMismatch as error:
            raise StructureMismatch(f"{path}: {error}") from None
    if lora is not None:
        shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
        read_lora(lora, adapter_names(config), shapes)
    control_config = None if controlnet is None else _control_config(controlnet, config, family)
    file = TensorFile(first)
    text = prompt or PROMPT
    conditioning, about_prompt = prompts.conditioning(file, config, text, size, tokenizer, seed)
    decoder = Decoder(file, config.pooled_dim is not None, device)
    chosen = size or trained_size(family)
    remarks = [about_prompt, decoder.about]
    if controlnet is not None:
        remarks.append("the ControlNet's input is the outline of a disc in the middle")
    return Material(
        title=f"{first.name}, '{text}'",
        config=config,
        control_config=control_config,
        checkpoints=checkpoints,
        lora=lora,
        controlnet=controlnet,
        conditioning=conditioning,
        guidance=GUIDANCE,
        size=chosen,
        other_size=(chosen[0], chosen[1] * 3 // 4 if chosen[1] > 16 else chosen[1] + 8),
        hint=_disc,
        decode=decoder,
        remarks=tuple(remarks),
    )


def _disc(latent: Size) -> Tensor:
    """The outline of a disc in the middle, white on black."""
    height, width = (8 * side for side in latent)
    y = torch.arange(height).view(-1, 1) + 0.5 - height / 2
    x = torch.arange(width) + 0.5 - width / 2
    line = (5.5 - (torch.hypot(y, x) - 0.3 * min(height, width)).abs()).clamp(0, 1)
    return line.expand(1, 3, -1, -1).contiguous()


def _control_config(path: Path, unet: UNetConfig, family: str) -> UNetConfig:
    """The ControlNet's architecture, if its residuals fit the UNet."""
    structure = structure_of(path)
    if structure.kind != "controlnet" or structure.config is None:
        raise InvalidFile(f"{path} holds no ControlNet of a published family")
    if structure.config.down_depths != unet.down_depths or (
        structure.config.context_dim != unet.context_dim
    ):
        raise StructureMismatch(
            f"{path} is of the family {structure.family}: give a ControlNet made for {family}"
        )
    return structure.config
