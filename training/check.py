"""Do the pictures mean what their prompts say? Colours and places, without a classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import words
from .draw import tones
from .scenes import (
    ABOVE,
    BELOW,
    LEFT,
    MIDDLE,
    PAIR,
    RADII,
    RIGHT,
    SEVERAL,
    SINGLE,
    Scenes,
    random_scenes,
)

_LEAST_AREA = 0.3  # of the area that a shape of its size has
_STRAY = 0.35  # of the shapes' own area: pixels of colours that nobody asked for
_BORDER = 0.03  # of the picture's side: where the ground is looked at
_COMPACT = 0.35  # of a shape's bounding circle that the thinnest shape fills


@dataclass(frozen=True)
class Finding:
    """What a picture shows of one prompt. `why` says what is wrong, empty where nothing is."""

    caption: str
    why: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether colours and places are as the prompt says."""
        return not self.why


def checked_scenes(count: int, seed: int) -> Scenes:
    """Scenes whose prompts fix what is measured, on the CPU.

    Plain grounds and shapes; a pair's colours differ; the place of a single shape is said.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        drawn = random_scenes(40 * count, torch.device("cpu"))
    finally:
        torch.random.set_rng_state(state)
    plain = (drawn.ground_texture == 0) & (drawn.texture[:, :2] == 0).all(1)
    told = (drawn.kind != SINGLE) | (drawn.side > 0)
    differ = (drawn.kind != PAIR) | (drawn.colour[:, 0] != drawn.colour[:, 1])
    fit = (plain & told & differ).nonzero()[:, 0]
    if len(fit) < count:
        raise ValueError(f"only {len(fit)} scenes of {count} can be checked: draw more")
    return drawn[fit[:count]]


def judge(picture: Tensor, scenes: Scenes, index: int, caption: str) -> Finding:
    """Compare a picture [3, H, W] in 0..1 with scene `index`: its colours and their places.

    Each pixel counts as the nearest colour of the palette. The ground must hold most of the
    picture's border, each colour asked for an area as its shape's, others next to nothing; then the
    centroid of each colour must stand where the prompt says.
    """
    nearest = nearest_colour(picture)
    names = list(words.COLOURS)
    ground = int(scenes.ground[index])
    number = int(scenes.number[index])
    said = [int(c) for c in scenes.colour[index, : 1 if scenes.kind[index] == SEVERAL else number]]
    why = []
    if _border(nearest == ground) < 0.6:
        why.append(f"the ground is not {names[ground]}")
    least = _least_area(scenes, index, picture.shape[1:])
    for place, colour in enumerate(said):
        if int((nearest == colour).sum()) < least[place]:
            why.append(f"too little {names[colour]}")
    wanted = torch.tensor([ground, *said])
    stray = (~torch.isin(nearest, wanted)).sum()
    if stray > _STRAY * sum(int((nearest == colour).sum()) for colour in said) + 16:
        most = torch.bincount(nearest[~torch.isin(nearest, wanted)], minlength=len(names)).argmax()
        why.append(f"{names[int(most)]} that nobody asked for")
    if not why:
        centres = [_centroid(nearest == colour) for colour in said]
        why += _misplaced(int(scenes.kind[index]), int(scenes.side[index]), centres)
    return Finding(caption, tuple(why))


def nearest_colour(picture: Tensor) -> Tensor:
    """Index of the palette's nearest colour for each pixel of [3, H, W]: [H, W] int64."""
    colours = torch.arange(len(words.COLOURS))
    palette = tones(colours)[0].to(picture)
    return (picture[None] - palette[:, :, None, None]).square().sum(1).argmin(0)


def _least_area(scenes: Scenes, index: int, size: torch.Size) -> list[float]:
    """Pixels of each colour at the least: of the smallest shape that the prompt allows."""
    kind = int(scenes.kind[index])
    found = []
    for size_word in scenes.size[index].tolist():
        small = RADII[kind][1 if size_word == 2 else 0][0] * min(size)
        several = int(scenes.number[index]) if kind == SEVERAL else 1
        found.append(_LEAST_AREA * several * _COMPACT * 3.14 * small**2)
    return found


def _border(ground: Tensor) -> float:
    """Share of the picture's outermost pixels that are `ground`."""
    height, width = ground.shape
    wide = max(1, round(_BORDER * min(height, width)))
    rim = torch.ones_like(ground)
    rim[wide : height - wide, wide : width - wide] = False
    return float(ground[rim].float().mean())


def _centroid(mask: Tensor) -> tuple[float, float]:
    """y and x of a mask's middle, as shares of the picture's sides."""
    y, x = mask.nonzero().double().mean(0) + 0.5
    return float(y) / mask.shape[0], float(x) / mask.shape[1]


def _misplaced(kind: int, side: int, centres: list[tuple[float, float]]) -> list[str]:
    y, x = centres[0]
    if kind == PAIR:
        other_y, other_x = centres[1]
        apart = {LEFT: other_x - x, RIGHT: x - other_x, ABOVE: other_y - y, BELOW: y - other_y}
        return [] if apart[side] > 0.15 else ["the pair stands wrong"]
    if kind == SINGLE:
        away = {LEFT: 0.5 - x, RIGHT: x - 0.5, ABOVE: 0.5 - y, BELOW: y - 0.5}
        off = max(abs(x - 0.5), abs(y - 0.5)) < 0.12 if side == MIDDLE else away[side] > 0.05
        return [] if off else [f"it stands at {x:.2f}, {y:.2f}"]
    return []
