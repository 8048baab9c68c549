"""The trained weights as artists have them: single files, a kohya LoRA, a ControlNet; fp16."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from accel.demo import world
from accel.models import UNetConfig, parameters

from . import draw, words
from .adapter import RANK, kohya
from .fit import save
from .phases import PHASES, part, result
from .scenes import LEFT, MOST, PAIR, Scenes
from .words import write_tokenizer

FILES = {
    "base": world.CHECKPOINTS[0].name,
    "sketch": world.CHECKPOINTS[1].name,
    "night": world.LORA.name,
    "edges": world.CONTROLNET_FILE.name,
}
MOST_BYTES = 16_000_000  # of all of it together


def export(work: Path, folder: Path) -> None:
    """Write FILES, the tokenizer, a drawing and the loss curves into `folder`.

    Raises FileNotFoundError.
    """
    base, vae = result(work, "base"), result(work, "vae")
    text = part(base, "text.")
    sketch = part(result(work, "sketch"), "unet.")
    night, edges = result(work, "night"), result(work, "edges")
    folder.mkdir(parents=True, exist_ok=True)
    for name, unet in (("base", part(base, "unet.")), ("sketch", sketch)):
        _write(single_file(unet, vae, text), folder / FILES[name])
    about = {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK)}
    _write(kohya(night), folder / FILES["night"], about)
    control = _ldm(edges, world.CONTROLNET, "control_model.")
    _write(control, folder / FILES["edges"])
    write_tokenizer(folder / world.TOKENIZER.name)
    line = (255 * draw.edges(_drawing(), 128, 128)[0, 0]).round().byte()
    Image.fromarray(line.numpy()).save(folder / world.EDGES.name)
    (folder / "curves").mkdir(exist_ok=True)
    for phase in PHASES:
        if (work / f"{phase}.json").is_file():
            shutil.copyfile(work / f"{phase}.json", folder / "curves" / f"{phase}.json")


def _drawing() -> Scenes:
    """What the drawing for the ControlNet shows: world.PROMPT, with its ring below its triangle."""
    blue, red, yellow = (list(words.COLOURS).index(name) for name in ("blue", "red", "yellow"))
    ring, triangle = (words.SHAPES.index(name) for name in ("ring", "triangle"))

    def pair(first: float, second: float) -> Tensor:
        return torch.tensor([[first, second] + [0] * (MOST - 2)])

    def one(value: int) -> Tensor:
        return torch.tensor([value])

    return Scenes(
        kind=one(PAIR),
        number=one(2),
        shape=pair(ring, triangle),
        colour=pair(blue, red),
        texture=pair(0, 0),
        size=pair(2, 2),
        side=one(LEFT),
        ground=one(yellow),
        ground_texture=one(0),
        centre=torch.tensor([[[0.66, 0.3], [0.34, 0.72], [0, 0], [0, 0]]]),
        radius=pair(0.2, 0.19),
    )


def total_bytes(folder: Path) -> int:
    """Bytes of all .safetensors in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def single_file(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A checkpoint of Stable Diffusion 1.5's layout from diffusers' and transformers' names."""
    found = _ldm(unet, world.UNET, "model.diffusion_model.")
    found |= {f"first_stage_model.{n}": t for n, t in _ldm_vae(vae).items()}
    for name, tensor in text.items():
        # Versions of transformers differ in whether the names begin with `text_model.`.
        plain = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{plain}"] = tensor
    return found


def _write(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    save({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, path, about)


def _ldm(tensors: Mapping[str, Tensor], config: UNetConfig, prefix: str) -> dict[str, Tensor]:
    known = parameters(config)
    return {prefix + known[name].ldm_name: tensor for name, tensor in tensors.items()}


_LEVELS = 4
# Parts of the autoencoder: diffusers' names -> those of ldm files.
_VAE_PARTS = (
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv"),
    (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)", r"decoder.up.\1.block.\2"),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv", r"decoder.up.\1.upsample.conv"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def _ldm_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        # There the decoder's levels are counted from the finest.
        name = re.sub(r"(?<=^decoder\.up_blocks\.)\d", lambda m: str(_LEVELS - 1 - int(m[0])), name)
        for theirs, ldm in _VAE_PARTS:
            name = re.sub(theirs, ldm, name)
        # Attention's linear layers are 1x1 convolutions there.
        wide = ".attn_1." in name and tensor.ndim == 2
        found[name] = tensor[:, :, None, None] if wide else tensor
    return found
