"""Train the tiny world of the demo and the fidelity tests: `python benchmarks/train_tiny_world.py`.

Two checkpoints ("flat", and "neon" fine-tuned from it), a LoRA that stripes the ground of "neon",
and a ControlNet that puts shapes where their outline is. The pictures are drawn while training.
Writes one fp16 .safetensors, as `accel.demo.world.weights` reads it, and a sheet of samples beside
it. Three minutes on an H100; on a CPU, hours. The seed fixes the pictures and the noise; the number
of steps is what fits into the minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from accel.demo import world
from accel.demo.sampling import Conditioning, sample, scheduler
from accel.models import diffusers_kwargs

# Latent sizes to learn on, odd ones too: the network shall paint at any size.
SIZES = ((32, 32), (32, 32), (32, 32), (24, 40), (40, 24), (33, 33), (48, 32), (33, 65), (65, 33))
LORA_RANK, LORA_ALPHA = 4, 2.0
DROPPED = 0.1  # of the prompts, so that there is something for guidance to move away from
SHARES = {"flat": 0.5, "neon": 0.15, "stripes": 0.1, "outline": 0.25}  # of the time
RATES = {"flat": 1e-3, "neon": 5e-4, "stripes": 1e-3, "outline": 1e-3}


@dataclass(frozen=True)
class Batch:
    """Drawn pictures as latents, the prompts that describe them, and their outlines."""

    latent: Tensor
    context: Tensor
    hint: Tensor | None


class Painter:
    """Draws training pictures, from one seed."""

    def __init__(self, seed: int, count: int, device: torch.device) -> None:
        self.random = torch.Generator(device).manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.count, self.device = count, device

    def integers(self, bound: int) -> Tensor:
        """One index below `bound` for each picture."""
        return torch.randint(bound, (self.count,), generator=self.random, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in 0..1."""
        return torch.rand(*shape, generator=self.random, device=self.device)

    def draw(self, style: str, stripes: bool, hinted: bool, dropped: float) -> Batch:
        """The next batch, all of one size; a share of `dropped` of it without a prompt."""
        pick = int(torch.randint(len(SIZES), (), generator=self.order))
        height, width = SIZES[pick]
        shape, colour = self.integers(len(world.SHAPES)), self.integers(len(world.COLOURS))
        ground = (colour + 1 + self.integers(len(world.COLOURS) - 1)) % len(world.COLOURS)
        radius = (0.2 + 0.16 * self.uniform(self.count)) * min(height, width)
        room = torch.tensor([height, width], device=self.device) - 2.2 * radius[:, None]
        centre = 1.1 * radius[:, None] + self.uniform(self.count, 2) * room
        edge = world.distance(shape, centre, radius, height, width)
        picture = world.paint(edge, colour, ground, radius, style, stripes)
        context = world.encode(shape, colour, ground)
        unsaid = self.uniform(self.count, 1, 1) < dropped
        context = torch.where(unsaid, world.empty_context(self.count).to(context), context)
        hint = world.outline(shape, centre, radius, height, width) if hinted else None
        return Batch(world.to_latent(picture), context, hint)


def train(
    name: str,
    parameters: list[nn.Parameter],
    predict: Callable[[Tensor, Tensor, Batch], Tensor],
    painter: Painter,
    seconds: float,
    style: str,
    stripes: bool = False,
    hinted: bool = False,
) -> None:
    """Adam on the noise's mean square error until the time is up; leaves the moving average."""
    alphas = scheduler().alphas_cumprod.to(painter.device)
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, RATES[name], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = [p.detach().clone() for p in parameters]
    started, step, shown, total = time.perf_counter(), 0, 0.0, 0.0
    while (done := (time.perf_counter() - started) / seconds) < 1 or step < 2:
        rate = (
            RATES[name]
            * min(1, (step + 1) / 100)
            * (0.02 + 0.98 * math.cos(min(done, 1) * math.pi / 2))
        )
        optimizer.param_groups[0]["lr"] = rate
        batch = painter.draw(style, stripes, hinted, 0.4 if hinted else DROPPED)
        noise = torch.randn(batch.latent.shape, generator=painter.random, device=painter.device)
        timestep = painter.integers(len(alphas))
        kept = alphas[timestep].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * batch.latent + (1 - kept).sqrt() * noise
        cuda = painter.device.type == "cuda"
        with torch.autocast(painter.device.type, torch.bfloat16, enabled=cuda):
            guess = predict(noisy, timestep, batch)
        loss = (guess.float() - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if step % 50 == 0 or done - shown > 0.1:
            total = loss.item()
        if done - shown > 0.1:
            shown = done
            print(f"{name}: step {step}, {100 * done:.0f} %, loss {total:.4f}", flush=True)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean).requires_grad_(False)
    print(f"{name}: {step} steps, last loss {total:.4f}", flush=True)


class Adapter(nn.Module):
    """The two factors that kohya's LoRA adds to a linear layer or a convolution."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            spec = (layer.kernel_size, layer.stride, layer.padding)
            self.down: nn.Module = nn.Conv2d(layer.in_channels, LORA_RANK, *spec, bias=False)
            self.up: nn.Module = nn.Conv2d(LORA_RANK, layer.out_channels, 1, bias=False)
        else:
            assert isinstance(layer, nn.Linear)
            self.down = nn.Linear(layer.in_features, LORA_RANK, bias=False)
            self.up = nn.Linear(LORA_RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for the input `x`."""
        return LORA_ALPHA / LORA_RANK * self.up(self.down(x))


def adapters(unet: nn.Module) -> dict[str, Adapter]:
    """One for each attention's and feed-forward's layer, and for the up path's convolutions."""
    found = {}
    for path, layer in unet.named_modules():
        linear = isinstance(layer, nn.Linear) and ".transformer_blocks." in path
        convolution = "up_blocks." in path and path.endswith((".conv1", ".conv2"))
        if linear or convolution:
            found[path] = Adapter(layer).to(next(unet.parameters()).device)
    return found


@contextmanager
def adapted(unet: nn.Module, with_adapters: dict[str, Adapter]) -> Iterator[None]:
    """The UNet with LoRA adapters at work while the block runs."""
    hooks = [
        unet.get_submodule(path).register_forward_hook(
            lambda layer, inputs, output, adapter=adapter: output + adapter(inputs[0])
        )
        for path, adapter in with_adapters.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kohya(with_adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """The adapters as a state dict in kohya's naming."""
    tensors = {}
    for path, adapter in with_adapters.items():
        layer = "lora_unet_" + path.replace(".", "_")
        tensors[f"{layer}.lora_down.weight"] = adapter.down.weight
        tensors[f"{layer}.lora_up.weight"] = adapter.up.weight
        tensors[f"{layer}.alpha"] = torch.tensor(LORA_ALPHA)
    return tensors


def tuned(name: str) -> bool:
    """Which parameters "neon" and "outline" learn anew; the rest stays that of "flat"."""
    return ".attentions." in name or name.startswith(("conv_in.", "conv_norm_out.", "conv_out."))


def make(
    seed: int, minutes: float, batch: int, steps: int, device: torch.device, out: Path
) -> None:
    """Train everything, write the weights to `out` and samples of `steps` steps to a PNG beside."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    painter = Painter(seed, batch, device)
    seconds = {name: 60 * minutes * share for name, share in SHARES.items()}
    unet = UNet2DConditionModel(**diffusers_kwargs(world.UNET)).to(device)
    unet.requires_grad_(False)

    def paint(noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        return unet(noisy, timestep, batch.context, return_dict=False)[0]

    train("flat", [*unet.parameters()], paint, painter, seconds["flat"], "flat")
    found = {f"flat/{name}": p.detach().clone() for name, p in unet.named_parameters()}
    rows = [samples(unet, None, painter, steps), samples(unet, None, painter, steps, size=(65, 33))]

    controlnet = ControlNetModel(**diffusers_kwargs(world.CONTROLNET)).to(device)
    controlnet.requires_grad_(False)
    copied = {name for name, _ in controlnet.named_parameters() if f"flat/{name}" in found}
    for name in copied:
        controlnet.get_parameter(name).copy_(found[f"flat/{name}"])

    def place(noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        assert batch.hint is not None
        skips, middle = controlnet(
            noisy, timestep, batch.context, controlnet_cond=batch.hint, return_dict=False
        )
        return unet(
            noisy,
            timestep,
            batch.context,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    learned = {n: p for n, p in controlnet.named_parameters() if n not in copied or tuned(n)}
    train("outline", [*learned.values()], place, painter, seconds["outline"], "flat", hinted=True)
    found |= {f"outline/{name}": p for name, p in learned.items()}
    rows.append(samples(unet, controlnet, painter, steps))

    learned = {name: p for name, p in unet.named_parameters() if tuned(name)}
    train("neon", [*learned.values()], paint, painter, seconds["neon"], "neon")
    found |= {f"neon/{name}": p for name, p in learned.items()}
    rows += [samples(unet, None, painter, steps), samples(unet, controlnet, painter, steps)]

    with_adapters = adapters(unet)
    learned_lora = [p for adapter in with_adapters.values() for p in adapter.parameters()]
    with adapted(unet, with_adapters):
        train("stripes", learned_lora, paint, painter, seconds["stripes"], "neon", stripes=True)
        rows.append(samples(unet, None, painter, steps))
    found |= {f"stripes/{name}": tensor for name, tensor in kohya(with_adapters).items()}

    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in found.items()}
    save_file(tensors, out, {"seed": str(seed), "minutes": str(minutes)})
    sheet(rows).save(out.with_suffix(".png"))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB; samples in {out.with_suffix('.png')}")


def samples(
    unet: nn.Module,
    controlnet: nn.Module | None,
    painter: Painter,
    steps: int,
    size: tuple[int, int] = (32, 32),
) -> list[Tensor]:
    """One picture [3, H, W] for each of some prompts; with a ControlNet, of a shape top left."""
    pictures = []
    random = torch.Generator().manual_seed(1)
    for number, prompt in enumerate(
        (
            "red disc on blue",
            "yellow square on green",
            "cyan triangle on purple",
            "white ring on red",
        )
    ):
        scene = world.parse(prompt)
        shape, colour, ground = (
            torch.tensor([index]) for index in (scene.shape, scene.colour, scene.ground)
        )
        context = torch.cat([world.empty_context(1), world.encode(shape, colour, ground)])
        hint = None
        if controlnet is not None:
            centre = torch.tensor([[10.0 + 3 * number, 11.0]])
            hint = world.outline(shape, centre, torch.tensor([8.0]), *size)
        latent = torch.randn(1, 4, *size, generator=random)
        with torch.no_grad():
            latent = sample(
                unet,
                controlnet,
                latent,
                Conditioning(context).to(painter.device, torch.float32),
                hint,
                steps,
                3.0,
            )
        pictures.append(world.to_picture(latent)[0].cpu())
    return pictures


def sheet(rows: list[list[Tensor]]) -> Image.Image:
    """The pictures in rows, four times enlarged."""
    height = max(picture.shape[1] for row in rows for picture in row)
    width = max(picture.shape[2] for row in rows for picture in row)
    canvas = torch.ones(3, (height + 2) * len(rows), (width + 2) * len(rows[0]))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = y * (height + 2), x * (width + 2)
            canvas[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    image = Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy())
    return image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description="Train the tiny world.")
    default = Path(__file__).parents[1] / "accel" / "demo" / "tiny_world.safetensors"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    make(options.seed, options.minutes, options.batch, options.sample_steps, device, options.out)


if __name__ == "__main__":
    main()
