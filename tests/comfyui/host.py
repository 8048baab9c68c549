"""Calling ComfyUI's own functions and nodes from tests that run inside it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from .checkpoints import CONFIGS
from .scenarios import relative_error

__all__ = ["call", "conditioning", "exists", "inputs_of", "relative_error", "sample"]


def call(module: str, name: str, **inputs: Any) -> tuple[Any, ...]:
    """The outputs of a node of ComfyUI, given by its module and class, in either style of node."""
    kind = getattr(importlib.import_module(module), name)
    if hasattr(kind, "define_schema"):
        result = kind.execute(**inputs)
        return tuple(getattr(result, "args", result))
    return tuple(getattr(kind(), kind.FUNCTION)(**inputs))


def exists(module: str, name: str) -> bool:
    """Whether this version has a node."""
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def inputs_of(module: str, name: str) -> set[str]:
    """The names of a node's inputs in this version."""
    kind = getattr(importlib.import_module(module), name)
    function = kind.execute if hasattr(kind, "define_schema") else getattr(kind, kind.FUNCTION)
    return set(inspect.signature(function).parameters) - {"self"}


def conditioning(kind: str, seed: int, tokens: int = 77) -> list[Any]:
    """A prompt drawn from a seed that fits the checkpoints of a kind."""
    config = CONFIGS[kind]
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, config.context_dim, generator=generator)
    extra: dict[str, Any] = {"pooled_output": None}
    if config.pooled_dim:
        extra["pooled_output"] = torch.randn(1, config.pooled_dim - 6 * 256, generator=generator)
    return [[context, extra]]


def sample(
    model: Any,
    positive: list[Any],
    negative: list[Any],
    *,
    size: tuple[int, int] = (16, 16),
    batch: int = 1,
    steps: int = 3,
    cfg: float = 4.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 1,
    latent: Tensor | None = None,
    denoise: float = 1.0,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """What KSampler computes: the last latent, `batch` x 4 x height x width (of the latent)."""
    if latent is None:
        latent = torch.zeros(batch, 4, *size)
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    result: Tensor = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        latent,
        denoise=denoise,
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=seed,
    )
    return result
