"""Pictures of the trained networks, for the check and the sheet of samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from accel.demo import world
from accel.demo.latents import load_vae
from accel.demo.modules import empty_module, load_weights, merge_lora
from accel.demo.prompts import text_encoder
from accel.demo.sampling import Conditioning, sample
from accel.models import UNetConfig
from accel.tensorfile import TensorFile

from .check import Finding, checked_scenes, judge, nearest_colour
from .draw import distances, edges
from .scenes import Scenes, caption_tokens, captions, empty_tokens

OTHER_GUIDANCE = (1.0, 1.5, 3.0, 4.5)  # measured as well, to see how much it matters
NEEDED = 0.9  # of the prompts that must be drawn right


@dataclass(frozen=True)
class Painter:
    """The networks that every picture needs, and how it is made."""

    text: Any
    vae: Any
    device: torch.device
    steps: int
    seed: int

    @staticmethod
    def of(folder: Path, device: torch.device, steps: int, seed: int) -> Painter:
        """With the text encoder and the autoencoder in an exported base checkpoint."""
        file = TensorFile(folder / world.CHECKPOINTS[0].name)
        text, vae = text_encoder(file, world.TEXT_HEADS), load_vae(file, world.VAE)
        nn.Module.to(vae, device)
        return Painter(text.to(device), vae, device, steps, seed)

    @torch.no_grad()
    def paint(
        self,
        unet: Any,
        scenes: Scenes,
        size: tuple[int, int] = (128, 128),
        controlnet: Any = None,
        guidance: float = world.GUIDANCE,
    ) -> Tensor:
        """Pictures [B, 3, height, width] in 0..1 of the scenes' captions, on the CPU.

        With a ControlNet, its hint is the scenes' own edges.
        """
        height, width = (side // world.PIXELS for side in size)
        count = len(scenes)
        nothing = empty_tokens(scenes.kind.device).repeat(count, 1)
        tokens = torch.cat([nothing, caption_tokens(scenes)])
        context = self.text(tokens.to(self.device)).last_hidden_state
        random = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(count, 4, height, width, generator=random)
        hint = None
        if controlnet is not None:
            hint = edges(scenes, *size).expand(-1, 3, -1, -1)
        latent = sample(unet, controlnet, noise, Conditioning(context), hint, self.steps, guidance)
        again = [self.vae.decode(some / world.SCALE).sample for some in latent.split(16)]
        return (torch.cat(again) / 2 + 0.5).clamp(0, 1).cpu()


def check(
    folder: Path, device: torch.device, seed: int, steps: int = 20, prompts: int = 64
) -> bool:
    """Judge `prompts` pictures of the base checkpoint; write check.json and samples.png.

    folder: what `export` wrote. Returns whether NEEDED of them are right. Raises InvalidFile.
    """
    painter = Painter.of(folder, device, steps, seed)
    scenes = checked_scenes(prompts, seed)
    base, sketch = (network(folder / world.CHECKPOINTS[i].name, device) for i in range(2))
    controlnet = network(folder / world.CONTROLNET_FILE.name, device, world.CONTROLNET)
    pictures = painter.paint(base, scenes)
    findings = findings_of(pictures, scenes)
    share = _share(findings)
    shares = {str(world.GUIDANCE): share}
    for guidance in OTHER_GUIDANCE:
        other = painter.paint(base, scenes, guidance=guidance)
        shares[str(guidance)] = _share(findings_of(other, scenes))
    controlled = painter.paint(base, scenes, controlnet=controlnet)
    overlap = {
        "with ControlNet": _overlap(controlled, scenes),
        "without": _overlap(pictures, scenes),
    }
    shown = scenes[:8]
    rows = [pictures[:8], painter.paint(base, shown, (96, 160))]
    rows += [edges(shown, 128, 128).expand(-1, 3, -1, -1), controlled[:8]]
    rows += [painter.paint(sketch, shown), painter.paint(sketch, shown, controlnet=controlnet)]
    merge_lora(base, folder / world.LORA.name, world.UNET, 1.0)
    rows.append(painter.paint(base, shown))
    _sheet(rows).save(folder / "samples.png")
    wrong = [[f.caption, *f.why] for f in findings if not f.right]
    report = {
        "prompts": len(findings),
        "right": share,
        "right by guidance": shares,
        "steps": steps,
        "guidance": world.GUIDANCE,
        "seed": seed,
        "outline overlap": overlap,
        "wrong": wrong,
        "sha256": {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))},
    }
    (folder / "check.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(f"check: {share:.0%} of {len(findings)} prompts are right", flush=True)
    print(f"  by guidance {shares}; outlines overlap {overlap}", flush=True)
    for caption, *why in wrong[:8]:
        print(f"  {caption}: {', '.join(why)}", flush=True)
    return share >= NEEDED


def digest(path: Path) -> str:
    """SHA-256 of a file: which weights a result is of."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def network(path: Path, device: torch.device, config: UNetConfig = world.UNET) -> Any:
    """The UNet or ControlNet in an exported file, float32."""
    module = empty_module(config, torch.float32)
    load_weights(module, path, config)
    return module.to(device)


def _share(findings: Sequence[Finding]) -> float:
    return sum(finding.right for finding in findings) / len(findings)


def findings_of(pictures: Tensor, scenes: Scenes) -> list[Finding]:
    """What each picture shows of its scene's caption."""
    texts = captions(scenes)
    return [judge(picture, scenes, i, texts[i]) for i, picture in enumerate(pictures)]


def _overlap(pictures: Tensor, scenes: Scenes) -> float:
    """Mean intersection over union of what is not ground, in the pictures and in the scenes."""
    inside = distances(scenes, *pictures.shape[2:]).amin(1) < 0
    shares = []
    for picture, wanted, ground in zip(pictures, inside, scenes.ground.tolist(), strict=True):
        seen = nearest_colour(picture) != ground
        shares.append(float((seen & wanted).sum() / (seen | wanted).sum().clamp(min=1)))
    return round(sum(shares) / len(shares), 3)


def _sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of pictures of different sizes in one, white between them."""
    gap = 4
    height = sum(row.shape[2] + gap for row in rows)
    width = max(len(row) * (row.shape[3] + gap) for row in rows)
    canvas = torch.ones(3, height, width)
    top = 0
    for row in rows:
        for index, picture in enumerate(row):
            left = index * (row.shape[3] + gap)
            canvas[:, top : top + row.shape[2], left : left + row.shape[3]] = picture
        top += row.shape[2] + gap
    return Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
