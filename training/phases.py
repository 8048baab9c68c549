"""The phases of training, each from what earlier ones left in the work folder.

vae: the autoencoder. base: UNet and text encoder together, the checkpoint "flat". sketch: its UNet
trained on. night: a LoRA for it. edges: a ControlNet for it. The last three need only vae and base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from accel.demo import world
from accel.demo.sampling import scheduler

from . import draw, networks
from .adapter import adapted, adapters
from .fit import Budget, Task, fit, save
from .scenes import caption_tokens, empty_tokens, random_scenes

PHASES = ("vae", "base", "sketch", "night", "edges")
MINUTES = {"vae": 1.0, "base": 3.0, "sketch": 0.7, "night": 0.6, "edges": 1.0}
_BATCH = {"vae": 32, "base": 512, "sketch": 512, "night": 512, "edges": 256}
_RATE = {"vae": 8e-4, "base": 1e-3, "sketch": 5e-4, "night": 2e-3, "edges": 1e-3}
# Pictures drawn ahead, of the first size; an eighth as many of each other one.
_POOL = {"vae": 49152, "base": 163840, "sketch": 40960, "night": 40960, "edges": 40960}
# Height and width in pixels, and how often; the first is the one that counts.
SIZES = (((128, 128), 6), ((96, 160), 1), ((136, 104), 1))
_DROPPED = {"base": 0.1, "sketch": 0.1, "night": 0.1, "edges": 0.3}  # prompts left out
_KL = 2e-4  # weight of the latents' divergence from a normal distribution, per latent number
# Of a batch, starts from noise alone at the last timestep, as a sampler does. The schedule leaves
# a trace of the picture there (Lin et al. 2024), which tells a small flat picture's colours: a
# network that learned to trust it would not listen to the prompt.
_STARTS = 1 / 16
_CHUNK = 512  # pictures drawn and encoded at once


@dataclass(frozen=True)
class Settings:
    """Where and how to train. `small`: a pool and batch of so many pictures, one size: for CPUs.
    graphs: steps as CUDA graphs, where there is a GPU."""

    work: Path
    device: torch.device
    seed: int = 0
    steps: int | None = None
    small: int | None = None
    resume: bool = False
    graphs: bool = True

    def batch(self, phase: str) -> int:
        """Pictures in a step."""
        return self.small or _BATCH[phase]

    def pool(self, phase: str) -> int:
        """Pictures drawn ahead."""
        return self.small or _POOL[phase]

    @property
    def sizes(self) -> tuple[tuple[tuple[int, int], int], ...]:
        """Heights and widths to learn, with their weights."""
        return SIZES[:1] if self.small else SIZES

    def budget(self, minutes: float) -> Budget:
        """For one phase."""
        return Budget(minutes, self.steps)


def train(phase: str, minutes: float, settings: Settings) -> None:
    """Run one phase. Raises FileNotFoundError where an earlier one is missing."""
    torch.manual_seed(settings.seed + PHASES.index(phase))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run = {"vae": _vae, "base": _base, "sketch": _sketch, "night": _night, "edges": _edges}[phase]
    run(settings.budget(minutes), settings)


# What earlier phases left.


def result(work: Path, phase: str) -> dict[str, Tensor]:
    """A phase's weights, float32 on the CPU. Raises FileNotFoundError."""
    path = work / f"{phase}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: train the phase {phase} first")
    return load_file(path)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def load_vae(settings: Settings) -> Any:
    """The trained autoencoder."""
    vae = networks.make_vae()
    vae.load_state_dict(result(settings.work, "vae"))
    return _placed(vae, settings.device)


def load_text_encoder(settings: Settings) -> Any:
    """The trained text encoder."""
    text = networks.make_text_encoder()
    load_weights(text, part(result(settings.work, "base"), "text."))
    return _placed(text, settings.device)


def load_unet(settings: Settings, phase: str = "base") -> Any:
    """The trained UNet of a checkpoint: "base" or "sketch"."""
    unet = networks.make_unet()
    load_weights(unet, part(result(settings.work, phase), "unet."))
    return _placed(unet, settings.device)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill all parameters; buffers of transformers, which are no weights, stay."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])


def _placed(module: Any, device: torch.device) -> Any:
    return module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


# The autoencoder.


def _vae(budget: Budget, settings: Settings) -> None:
    vae = _placed(networks.make_vae(), settings.device)
    if settings.resume:
        vae.load_state_dict(result(settings.work, "vae"))
    pool = _pictures(settings)
    size = settings.batch("vae")

    def loss() -> Tensor:
        chosen = torch.randint(len(pool), (size,), device=settings.device)
        picture = pool[chosen].float() / 127.5 - 1
        with _autocast(settings.device):
            latents = vae.encode(picture).latent_dist
            latent = latents.mean + latents.std * torch.randn_like(latents.mean)
            again = vae.decode(latent).sample.float()
        mean, logvar = latents.mean.float(), latents.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return (again - picture).abs().mean() + mse_loss(again, picture) + _KL * divergence

    task = Task(
        "vae", dict(vae.named_parameters()), [(1, loss)], _RATE["vae"], {"batch": size, "kl": _KL}
    )
    fit(task, budget, settings.work, settings.device, settings.seed, settings.graphs)
    _normalise(vae, pool[: len(pool) // 2])  # of the flat ones
    save(vae.state_dict(), settings.work / "vae.safetensors")
    error = mse_loss(*_there_and_back(vae, pool[: min(len(pool), 256)]))
    print(f"vae: {-10 * torch.log10(error / 4).item():.1f} dB", flush=True)


def _pictures(settings: Settings) -> Tensor:
    """Pictures of all styles [N, 3, H, W] uint8, half of them flat."""
    (height, width), _ = settings.sizes[0]
    count = settings.pool("vae")
    shares = {"flat": count - 2 * (count // 4), "sketch": count // 4, "night": count // 4}
    drawn = [
        (255 * draw.picture(random_scenes(some, settings.device), height, width, style))
        .round()
        .byte()
        for style, share in shares.items()
        for some in _chunks(share)
    ]
    return torch.cat(drawn)


@torch.no_grad()
def _normalise(vae: Any, pictures: Tensor) -> None:
    """Give the latents mean 0 and, times SCALE, deviation 1: exactly, in the 1x1 convolutions.

    So SD1.5's own factor and its noise schedule suit them.
    """
    chosen = pictures[:: max(1, len(pictures) // 1024)][:1024]
    inputs = [some.float() / 127.5 - 1 for some in chosen.split(64)]
    means = torch.cat([vae.encode(some).latent_dist.mean for some in inputs])
    mean, factor = means.mean((0, 2, 3)), 1 / (world.SCALE * means.std((0, 2, 3)))
    after, before = vae.quant_conv, vae.post_quant_conv
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight /= factor.view(1, -1, 1, 1)
    channels = len(mean)
    after.weight[:channels] *= factor.view(-1, 1, 1, 1)
    after.bias[:channels] = (after.bias[:channels] - mean) * factor
    after.bias[channels:] += 2 * factor.log()


@torch.no_grad()
def _there_and_back(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    wanted = [p.float() / 127.5 - 1 for p in pictures.split(64)]
    again = [vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1) for p in wanted]
    return torch.cat(again), torch.cat(wanted)


# Latents and prompts, drawn ahead.


@dataclass(frozen=True)
class Pool:
    """Pictures of one size as the autoencoder's mean and deviation, times SCALE, [N, 4, h, w] fp16;
    their captions [N, 77] int16; their edges [N, 1, H, W] uint8, for the ControlNet alone."""

    mean: Tensor
    deviation: Tensor
    tokens: Tensor
    edges: Tensor | None


@torch.no_grad()
def _pool(
    vae: Any, settings: Settings, count: int, size: tuple[int, int], style: str, hinted: bool
) -> Pool:
    means, deviations, tokens, edges = [], [], [], []
    for some in _chunks(count):
        scenes = random_scenes(some, settings.device)
        picture = draw.picture(scenes, *size, style)
        with _autocast(settings.device):
            latents = vae.encode(2 * picture - 1).latent_dist
        means.append((world.SCALE * latents.mean).half())
        deviations.append((world.SCALE * latents.std).half())
        tokens.append(caption_tokens(scenes).short())
        if hinted:
            edges.append((255 * draw.edges(scenes, *size)).round().byte())
    hints = torch.cat(edges) if hinted else None
    return Pool(torch.cat(means), torch.cat(deviations), torch.cat(tokens), hints)


def _chunks(count: int) -> list[int]:
    return [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]


# The denoisers.


@dataclass(frozen=True)
class Noisy:
    """A batch to denoise: latents with noise [B, 4, h, w], timesteps [B], tokens [B, 77], hints."""

    latent: Tensor
    timestep: Tensor
    tokens: Tensor
    hint: Tensor | None


Predict = Callable[[Noisy], Tensor]


def _denoising(
    phase: str, style: str, predict: Predict, settings: Settings, hinted: bool = False
) -> list[tuple[float, Callable[[], Tensor]]]:
    """One loss for each size, with its weight: the noise's square error, in terms of v."""
    vae = load_vae(settings)
    losses = []
    for number, (size, weight) in enumerate(settings.sizes):
        count = settings.pool(phase) if number == 0 else settings.pool(phase) // 8
        pool = _pool(vae, settings, count, size, style, hinted)
        losses.append((float(weight), _denoising_loss(phase, pool, predict, settings)))
    return losses


def _denoising_loss(
    phase: str, pool: Pool, predict: Predict, settings: Settings
) -> Callable[[], Tensor]:
    device, size = settings.device, settings.batch(phase)
    # On the device once: a CUDA graph may copy nothing from the host.
    alphas = scheduler().alphas_cumprod.to(device)
    nothing = empty_tokens(device)
    strata = torch.arange(size, device=device) / size
    starts = torch.arange(size, device=device) < max(1, _STARTS * size)

    def loss() -> Tensor:
        chosen = torch.randint(len(pool.mean), (size,), device=device)
        mean, deviation = pool.mean[chosen].float(), pool.deviation[chosen].float()
        latent = mean + deviation * torch.randn_like(mean)
        noise = torch.randn_like(latent)
        # One number shifts all: every part of the schedule is in every batch.
        chance = (strata + torch.rand((), device=device)) % 1
        timestep = (chance * len(alphas)).long().clamp(max=len(alphas) - 1)
        timestep = timestep.masked_fill(starts, len(alphas) - 1)
        kept = alphas[timestep].view(-1, 1, 1, 1)
        noisy = torch.where(
            starts.view(-1, 1, 1, 1), noise, kept.sqrt() * latent + (1 - kept).sqrt() * noise
        )
        # What a sampler takes away to get at the latent; but for the starts it is the noise.
        wanted = (noisy - kept.sqrt() * latent) / (1 - kept).sqrt()
        said = torch.rand(size, 1, device=device) >= _DROPPED[phase]
        tokens = torch.where(said, pool.tokens[chosen].long(), nothing)
        hint = None if pool.edges is None else (pool.edges[chosen].float() / 255)
        given = Noisy(noisy, timestep, tokens, None if hint is None else hint.expand(-1, 3, -1, -1))
        with _autocast(device):
            guess = predict(given).float()
        # The error of v (Salimans and Ho 2022), which counts at every level of noise.
        return ((guess - wanted).square() / kept).mean()

    return loss


def predictor(unet: Any, text: Any, controlnet: Any = None) -> Callable[[Noisy], Tensor]:
    """What the networks together predict for a noisy batch."""

    def predict(noisy: Noisy) -> Tensor:
        context = text(noisy.tokens).last_hidden_state
        residuals = {}
        if controlnet is not None:
            skips, middle = controlnet(
                noisy.latent, noisy.timestep, context, controlnet_cond=noisy.hint, return_dict=False
            )
            residuals = {
                "down_block_additional_residuals": skips,
                "mid_block_additional_residual": middle,
            }
        predicted: Tensor = unet(
            noisy.latent, noisy.timestep, context, return_dict=False, **residuals
        )[0]
        return predicted

    return predict


def _base(budget: Budget, settings: Settings) -> None:
    unet = _placed(networks.make_unet(), settings.device)
    text = _placed(networks.make_text_encoder(), settings.device)
    if settings.resume:
        unet, text = load_unet(settings), load_text_encoder(settings)

    learned = {f"unet.{name}": p for name, p in unet.named_parameters()}
    learned |= {f"text.{name}": p for name, p in text.named_parameters()}
    losses = _denoising("base", "flat", predictor(unet, text), settings)
    _fit("base", learned, losses, budget, settings)


def _sketch(budget: Budget, settings: Settings) -> None:
    unet = load_unet(settings, "sketch" if settings.resume else "base")
    text = load_text_encoder(settings)

    learned = {f"unet.{name}": p for name, p in unet.named_parameters()}
    losses = _denoising("sketch", "sketch", predictor(unet, text), settings)
    _fit("sketch", learned, losses, budget, settings)


def _night(budget: Budget, settings: Settings) -> None:
    unet, text = load_unet(settings), load_text_encoder(settings)
    with_adapters = adapters(unet)
    if settings.resume:
        load_weights(with_adapters, result(settings.work, "night"))
    _placed(with_adapters, settings.device)

    with adapted(unet, with_adapters):
        losses = _denoising("night", "night", predictor(unet, text), settings)
        _fit("night", dict(with_adapters.named_parameters()), losses, budget, settings)


def _edges(budget: Budget, settings: Settings) -> None:
    unet, text = load_unet(settings), load_text_encoder(settings)
    controlnet = networks.make_controlnet()
    if settings.resume:
        load_weights(controlnet, result(settings.work, "edges"))
    else:  # as every ControlNet begins: the UNet's own encoder, with zero convolutions
        own = dict(controlnet.named_parameters())
        load_weights(controlnet, own | {n: p for n, p in unet.named_parameters() if n in own})
    _placed(controlnet, settings.device)
    losses = _denoising("edges", "flat", predictor(unet, text, controlnet), settings, hinted=True)
    _fit("edges", dict(controlnet.named_parameters()), losses, budget, settings)


def _fit(
    phase: str,
    learned: Mapping[str, nn.Parameter],
    losses: list[tuple[float, Callable[[], Tensor]]],
    budget: Budget,
    settings: Settings,
) -> None:
    about = {"batch": settings.batch(phase), "pool": settings.pool(phase)}
    task = Task(phase, learned, losses, _RATE[phase], about)
    fit(task, budget, settings.work, settings.device, settings.seed, settings.graphs)


def _autocast(device: torch.device) -> Any:
    # Without its cache, which may not outlive the capture of a CUDA graph.
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
