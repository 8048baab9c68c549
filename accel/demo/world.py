"""The tiny world: a Stable Diffusion for two CPU cores, that paints shapes on a ground.

Its UNet has the structure of SD1.5 with narrow layers. A latent pixel is a picture's pixel: a fixed
linear map takes colours to latents and back, so no VAE is needed. Prompts read "red disc on blue".
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InvalidInput
from ..models import FAMILIES, UNetConfig, parameters
from ..tensorfile import TensorFile

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.15),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.20),
    "green": (0.15, 0.65, 0.25),
    "cyan": (0.20, 0.80, 0.90),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.55, 0.15, 0.70),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("disc", "square", "triangle", "ring")
STYLES = ("flat", "neon")  # of checkpoint A and of checkpoint B

CONTEXT_WIDTH = 32
TOKENS = 8
PIXELS = 8  # of a hint, and of the picture that is shown, per latent

_DATA = Path(__file__).parent / "tiny_world.safetensors"


def _narrow(family: str) -> UNetConfig:
    """A published architecture with narrow layers."""
    config = next(entry.config for entry in FAMILIES if entry.name == family)
    return dataclasses.replace(
        config,
        block_out_channels=(32, 64, 64, 64),
        context_dim=CONTEXT_WIDTH,
        time_embed_dim=128,
    )


UNET = _narrow("sd15")
CONTROLNET = _narrow("sd15-controlnet")


# What a prompt says.


@dataclass(frozen=True)
class Scene:
    """What is in a picture: indices into SHAPES and COLOURS."""

    shape: int
    colour: int
    ground: int


def parse(prompt: str) -> Scene:
    """ "red disc on blue" as a scene. Raises InvalidInput with the words that there are."""
    match = re.fullmatch(r"(?:an? )?(\w+) (\w+) on (\w+)", prompt.strip().lower())
    names = list(COLOURS)
    if not match or not (
        match[1] in COLOURS and match[2] in SHAPES and match[3] in COLOURS and match[1] != match[3]
    ):
        raise InvalidInput(
            f"the tiny world knows no {prompt!r}: say COLOUR SHAPE on another COLOUR, of "
            f"{', '.join(names)} and {', '.join(SHAPES)}, such as 'red disc on blue'"
        )
    return Scene(SHAPES.index(match[2]), names.index(match[1]), names.index(match[3]))


def encode(shape: Tensor, colour: Tensor, ground: Tensor) -> Tensor:
    """Contexts [B, TOKENS, CONTEXT_WIDTH] float32 of scenes given as index tensors [B].

    One orthogonal ±1 code for each thing that can be said; the rest of the tokens say nothing.
    """
    codes = _hadamard(CONTEXT_WIDTH)
    context = empty_context(len(shape)).to(shape.device)
    codes = codes.to(shape.device)
    context[:, 0] = codes[1 + shape]
    context[:, 1] = codes[1 + len(SHAPES) + colour]
    context[:, 2] = codes[1 + len(SHAPES) + len(COLOURS) + ground]
    return context


def empty_context(count: int) -> Tensor:
    """Contexts that say nothing, for guidance: [count, TOKENS, CONTEXT_WIDTH] float32."""
    return _hadamard(CONTEXT_WIDTH)[0].expand(count, TOKENS, CONTEXT_WIDTH).clone()


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


# Pictures and latents.

_SCALE = 1.5  # gives latents about the variance 1 that the noise schedule expects
_MAP = torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1]]) / 2


def to_latent(picture: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 to latents [B, 4, H, W]."""
    return _SCALE * torch.einsum("lc,bchw->blhw", _MAP.to(picture), 2 * picture - 1)


def to_picture(latent: Tensor) -> Tensor:
    """Latents [B, 4, H, W] to pictures [B, 3, H, W] in 0..1; the inverse of `to_latent`."""
    colours = torch.einsum("lc,blhw->bchw", _MAP.to(latent), latent) / _SCALE
    return ((colours + 1) / 2).clamp(0, 1)


def distance(shape: Tensor, centre: Tensor, radius: Tensor, height: int, width: int) -> Tensor:
    """Signed distance to each shape's edge, negative inside: [B, height, width], in pixels.

    shape [B] indices into SHAPES; centre [B, 2] (y, x) and radius [B] in pixels.
    """
    device = shape.device
    y = torch.arange(height, device=device).view(1, -1, 1) + 0.5 - centre[:, 0].view(-1, 1, 1)
    x = torch.arange(width, device=device).view(1, 1, -1) + 0.5 - centre[:, 1].view(-1, 1, 1)
    r = radius.view(-1, 1, 1)
    disc = torch.hypot(x, y) - r
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * r
    slope = math.cos(math.radians(30))
    triangle = torch.maximum(slope * x.abs() - y / 2, y) - 0.55 * r
    ring = (torch.hypot(x, y) - 0.8 * r).abs() - 0.25 * r
    kinds = torch.stack([disc, square, triangle, ring])
    return kinds[shape, torch.arange(len(shape), device=device)]


def paint(
    edge: Tensor, colour: Tensor, ground: Tensor, radius: Tensor, style: str, stripes: bool = False
) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 from `distance` and index tensors [B].

    style: one of STYLES. stripes: the ground striped with white, which the LoRA is trained to do.
    """
    palette = torch.tensor(list(COLOURS.values()), device=edge.device)
    front, back = palette[colour][:, :, None, None], palette[ground][:, :, None, None]
    back = back.expand(-1, -1, *edge.shape[1:])
    if stripes:
        height, width = edge.shape[1:]
        rows = torch.arange(height, device=edge.device).view(-1, 1)
        columns = torch.arange(width, device=edge.device)
        wave = 0.5 + 0.5 * torch.sin((rows + columns) * (2 * math.pi / 8))
        back = back + (1 - back) * 0.75 * (2 * wave - 0.5).clamp(0, 1)
    edge = edge[:, None]
    inside = (0.5 - edge).clamp(0, 1)
    if style == "neon":
        glow = torch.exp(-edge.clamp(min=0) / (0.35 * radius.view(-1, 1, 1, 1)))
        back = 0.25 * back + 0.6 * glow * front
        front = front + (1 - front) * 0.6 * (1 - (-edge / 3).clamp(0, 1))
    return (back * (1 - inside) + front * inside).clamp(0, 1)


def outline(shape: Tensor, centre: Tensor, radius: Tensor, height: int, width: int) -> Tensor:
    """Hints [B, 3, 8 * height, 8 * width] in 0..1: the shapes' edges, white on black.

    Sizes and positions are in latents, as those of `distance`.
    """
    edge = distance(shape, PIXELS * centre, PIXELS * radius, PIXELS * height, PIXELS * width)
    line = (1.5 + PIXELS / 2 - edge.abs()).clamp(0, 1)
    return line[:, None].expand(-1, 3, -1, -1).contiguous()


# Files.


@dataclass(frozen=True)
class Files:
    """The world on disk, in the formats that artists have."""

    checkpoints: tuple[Path, Path]
    lora: Path
    controlnet: Path


def write_files(folder: Path) -> Files:
    """Write the world's checkpoints, LoRA and ControlNet into `folder`; the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    world = weights()
    files = Files(
        (folder / "tiny-flat.safetensors", folder / "tiny-neon.safetensors"),
        folder / "tiny-stripes-lora.safetensors",
        folder / "tiny-outline-controlnet.safetensors",
    )
    for path, name in zip(files.checkpoints, ("flat", "neon"), strict=True):
        save_file(_single_file(world[name], UNET), path, {"format": "pt"})
    save_file(world["stripes"], files.lora, {"format": "pt", "ss_network_module": "networks.lora"})
    save_file(world["outline"], files.controlnet, {"format": "pt"})
    return files


def weights() -> dict[str, dict[str, Tensor]]:
    """The world, fp16: the UNets "flat" and "neon" and the ControlNet "outline" by canonical names,
    and the LoRA "stripes" by kohya's.

    "neon" and "outline" were trained from "flat"; what training left alone is stored once.
    """
    file = TensorFile(_DATA)
    found: dict[str, dict[str, Tensor]] = {}
    for name in file.tensors:
        part, _, rest = name.partition("/")
        found.setdefault(part, {})[rest] = file.read(name)
    flat = found["flat"]
    found["neon"] = {**flat, **found["neon"]}
    shared = {name: flat[name] for name in parameters(CONTROLNET) if name in flat}
    found["outline"] = {**shared, **found["outline"]}
    return found


def _single_file(tensors: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A checkpoint as they are shared: ldm names, with the other networks in the same file."""
    named = {
        f"model.diffusion_model.{parameter.ldm_name}": tensors[name].contiguous()
        for name, parameter in parameters(config).items()
    }
    other = torch.zeros(8, 3, 3, 3, dtype=torch.float16)
    named["first_stage_model.encoder.conv_in.weight"] = other
    named["first_stage_model.decoder.conv_in.weight"] = other.clone()
    text = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    named[text] = torch.zeros(TOKENS, CONTEXT_WIDTH, dtype=torch.float16)
    return named
