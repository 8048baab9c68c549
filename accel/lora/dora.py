"""DoRA: `….dora_scale` (LyCORIS) or `….lora_magnitude_vector` (peft) beside another format's parts.

The weight and the other format's change, together, are scaled to the trained magnitudes: one for
each output, or for each input channel.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import OTHER_MODEL, Layer, Patch, Source

_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?P<lycoris>dora_scale)|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)"
)
PARTS = ("dora_scale", "lora_magnitude_vector")


@dataclass(frozen=True)
class Magnitude:
    """delta = (base + change) * magnitude / |base + change| - base, for one parameter [O, I, *k].

    change:     another format's patch, at its strength 1
    magnitude:  [O, 1, …], norms over each output's weights, or [1, I, …], over each input's
    eps:        added to the norms, as the trainer did

    Strength weighs the whole of it, as in ComfyUI and A1111, so that 0 is off. LyCORIS' own
    multiplier leaves the change in at 0 and weighs the scaling alone. (Of magnitudes for each
    output ComfyUI takes the norms of `base` alone, which is not what was trained.)
    """

    change: Patch
    magnitude: Tensor
    eps: float

    @property
    def target(self) -> str:
        """Canonical name of the parameter."""
        return self.change.target

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            merged = self.change.delta(base).add_(base)
            magnitude = self.magnitude.to(base.device).float()
            axes = [axis for axis in range(base.dim()) if magnitude.shape[axis] == 1]
            norm = torch.linalg.vector_norm(merged, dim=axes, keepdim=True) + self.eps
            # Nothing has no direction: without eps, 0 / 0.
            scale = torch.where(norm > 0, magnitude / norm, torch.ones_like(norm))
            return (merged.mul_(scale) - base) * strength


def parse(key: str) -> tuple[str, str] | None:
    """(layer as spelled in the key, part) of a key of magnitudes, else None."""
    match = _KEY.fullmatch(key)
    return (match["layer"], PARTS[0] if match["lycoris"] else PARTS[1]) if match else None


def part_of(layer: Layer) -> str | None:
    """Which part of a layer holds magnitudes, or None."""
    return next((part for part in PARTS if part in layer.keys), None)


def check(layer: Layer, part: str) -> str | None:
    """As `Format.check`, of the magnitudes alone."""
    own, found = layer.own, layer.shapes[part]
    if _axes(found, own, part) is not None:
        return None
    return f"has magnitudes {list(found)} where the model's parameter is {list(own)}; {OTHER_MODEL}"


def read(change: Patch, layer: Layer, part: str, source: Source) -> Magnitude:
    """The patch of a layer whose other parts are `change`."""
    axes = _axes(layer.shapes[part], layer.own, part)
    assert axes is not None
    eps = torch.finfo(torch.float32).eps if part == "dora_scale" else 0.0
    return Magnitude(change, source.read(layer.keys[part]).reshape(axes), eps)


def _axes(found: tuple[int, ...], own: tuple[int, ...], part: str) -> tuple[int, ...] | None:
    """The shape in which magnitudes spread over a parameter, or None if they do not fit it.

    peft has [O], or for a convolution [1, O, …]; LyCORIS [O, 1, …] or, by its inputs, [1, I, …].
    """
    outputs, inputs, *kernel = own
    ones = (1,) * len(kernel)
    by_output, by_input = (outputs, 1, *ones), (1, inputs, *ones)
    if part == "lora_magnitude_vector" or len(found) == 1:
        return by_output if outputs in found and math.prod(found) == outputs else None
    spread = (*found, *ones)[: len(own)]  # a 1x1 convolution's may be a linear layer's
    fits = spread in (by_output, by_input) and math.prod(found) == math.prod(spread)
    return spread if fits else None
