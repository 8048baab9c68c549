"""Scenes as pictures: signed distances, antialiased over one pixel, in three styles; and edges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import words
from .scenes import MOST, Scenes

STYLES = ("flat", "sketch", "night")
_PERIOD = 16.0  # pixels, of every texture
_PAPER = 0.97
_FAR = 1e3


def picture(scenes: Scenes, height: int, width: int, style: str) -> Tensor:
    """Pictures [B, 3, height, width] float32 in 0..1. style: one of STYLES."""
    distance = distances(scenes, height, width)
    paint = {"flat": _flat, "sketch": _sketch, "night": _night}[style]
    return paint(scenes, distance).clamp(0, 1)


def edges(scenes: Scenes, height: int, width: int) -> Tensor:
    """The ControlNet's hint [B, 1, height, width] in 0..1: the shapes' edges, white on black."""
    edge = distances(scenes, height, width).abs().amin(dim=1, keepdim=True)
    return (1.5 - edge).clamp(0, 1)


def distances(scenes: Scenes, height: int, width: int) -> Tensor:
    """Signed distance to each shape's edge in pixels, negative inside: [B, MOST, height, width]."""
    device = scenes.centre.device
    scale = torch.tensor([height, width], device=device)
    centre = (scenes.centre * scale)[..., None, None]
    y = torch.arange(height, device=device).view(-1, 1) + 0.5 - centre[:, :, 0]
    x = torch.arange(width, device=device).view(1, -1) + 0.5 - centre[:, :, 1]
    r = (scenes.radius * min(height, width))[..., None, None]
    shape = scenes.shape[..., None, None]
    found = torch.full((1,), _FAR, device=device)
    for index, kind in enumerate((_circle, _square, _triangle, _ring, _cross, _star)):
        found = torch.where(shape == index, kind(x, y, r), found)
    present = torch.arange(MOST, device=device) < scenes.number[:, None]
    return torch.where(present[..., None, None], found, _FAR)


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return _box(x, y, 0.85 * r, 0.85 * r)


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Upright and equilateral."""
    return torch.maximum(math.cos(math.pi / 6) * x.abs() - y / 2, y) - 0.55 * r


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76 * r).abs() - 0.24 * r


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.32 * r, 0.95 * r), _box(x, y, 0.95 * r, 0.32 * r))


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points, one upwards: the distance to the line from a tip to the notch beside it."""
    fifth = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2
    length = torch.hypot(x, y)
    along, across = length * angle.cos(), length * angle.abs().sin()
    notch = 0.5
    dx, dy = notch * math.cos(fifth / 2) - 1, notch * math.sin(fifth / 2)
    return ((along - r) * dy - across * dx) / math.hypot(dx, dy)


def _pattern(texture: Tensor, height: int, width: int) -> Tensor:
    """How much of the second tone a texture [B, ...] shows: [B, ..., height, width] in 0..1."""
    device = texture.device
    y = torch.arange(height, device=device).view(-1, 1) + 0.5
    x = torch.arange(width, device=device).view(1, -1) + 0.5
    stripes = _band(x + y)
    dots = 5.0 - torch.hypot(_fold(x), _fold(y))
    checks = -(_fold_signed(x) * _fold_signed(y)) / (_PERIOD / 4)
    plain = torch.full_like(dots, -1.0)
    kinds = torch.stack([plain, stripes.expand_as(dots), dots, checks])
    return (kinds + 0.5).clamp(0, 1)[texture]


def _fold(along: Tensor) -> Tensor:
    """Pixels from the middle of the period."""
    return (torch.remainder(along, _PERIOD) - _PERIOD / 2).abs()


def _fold_signed(along: Tensor) -> Tensor:
    """A triangle wave, `_PERIOD / 4` high: its zeros are half a period apart."""
    return _fold(along) - _PERIOD / 4


def _band(along: Tensor) -> Tensor:
    return _fold_signed(along) / math.sqrt(2)


def tones(colour: Tensor) -> tuple[Tensor, Tensor]:
    """Colours [..., 3] of indices [...], and a second tone for textures: lighter, or if light,
    darker."""
    first = torch.tensor(list(words.COLOURS.values()), device=colour.device)[colour]
    light = first.mean(-1, keepdim=True) > 0.6
    return first, torch.where(light, 0.7 * first, first + 0.4 * (1 - first))


def _surface(colour: Tensor, texture: Tensor, height: int, width: int) -> Tensor:
    """Textured colours [..., 3, height, width] of indices [...]."""
    first, second = (tone[..., None, None] for tone in tones(colour))
    return first + (second - first) * _pattern(texture, height, width).unsqueeze(-3)


def _flat(scenes: Scenes, distance: Tensor) -> Tensor:
    """Plain colours and textures."""
    height, width = distance.shape[-2:]
    canvas = _surface(scenes.ground, scenes.ground_texture, height, width)
    for index in range(MOST):
        fill = _surface(scenes.colour[:, index], scenes.texture[:, index], height, width)
        inside = (0.5 - distance[:, index, None]).clamp(0, 1)
        canvas = canvas + (fill - canvas) * inside
    return canvas


def _sketch(scenes: Scenes, distance: Tensor) -> Tensor:
    """Coloured pencil: paper shows through the hatching, and every shape has a dark outline."""
    height, width = distance.shape[-2:]
    device = distance.device
    y = torch.arange(height, device=device).view(-1, 1) + 0.5
    x = torch.arange(width, device=device).view(1, -1) + 0.5
    down = (1.5 - _fold(x - y)).clamp(0, 1) + (1.5 - _fold(x - y + _PERIOD / 2)).clamp(0, 1)
    level = (1.5 - _fold(y)).clamp(0, 1) * torch.ones_like(x)
    ground = _surface(scenes.ground, scenes.ground_texture, height, width)
    canvas = _PAPER + (ground - _PAPER) * (0.4 + 0.5 * level)
    for index in range(MOST):
        edge = distance[:, index, None]
        fill = _surface(scenes.colour[:, index], scenes.texture[:, index], height, width)
        fill = _PAPER + (fill - _PAPER) * (0.7 + 0.3 * down)
        line = 0.3 * tones(scenes.colour[:, index])[0][..., None, None]
        canvas = canvas + (fill - canvas) * (0.5 - edge).clamp(0, 1)
        canvas = canvas + (line - canvas) * (2.0 - edge.abs()).clamp(0, 1)
    return canvas


def _night(scenes: Scenes, distance: Tensor) -> Tensor:
    """The ground in the dark, and shapes that glow in their colours."""
    height, width = distance.shape[-2:]
    ground = _surface(scenes.ground, scenes.ground_texture, height, width)
    moonlight = torch.tensor([0.02, 0.03, 0.10], device=distance.device).view(3, 1, 1)
    canvas = 0.25 * ground + moonlight
    for index in range(MOST):
        edge = distance[:, index, None]
        fill = _surface(scenes.colour[:, index], scenes.texture[:, index], height, width)
        colour = tones(scenes.colour[:, index])[0][..., None, None]
        canvas = canvas + 0.6 * colour * torch.exp(-edge.clamp(min=0) / 8)
        canvas = canvas + (fill - canvas) * (0.5 - edge).clamp(0, 1)
    return canvas
