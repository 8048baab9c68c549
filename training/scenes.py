"""Random scenes and their captions, whole batches at a time on any device.

"a large red circle left of a small striped blue square on green": single shapes with a place, pairs
with a relation, and several alike. What a caption does not say (a size, a place) is left to chance,
but an unnamed texture is plain.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from . import words

MOST = 4  # shapes in one scene
SINGLE, PAIR, SEVERAL = range(3)
LEFT, RIGHT, ABOVE, BELOW = range(1, 5)  # relations of a pair, and places of a single shape
MIDDLE = 5

_KIND_SHARES = (0.4, 0.4, 0.2)
_PLAIN_SHARE = 0.6
_SILENT_SHARE = 0.34  # of sizes and places that are not said
# Radii in the shorter side of the picture, from and to: for each kind, small and large.
RADII = (((0.10, 0.15), (0.22, 0.32)), ((0.09, 0.13), (0.16, 0.21)), ((0.09, 0.12), (0.15, 0.19)))
_SLACK = 1.1  # radii that a shape keeps from the picture's edge


@dataclass(frozen=True)
class Scenes:
    """B scenes of up to MOST shapes; index tensors are int64.

    kind [B]: SINGLE, PAIR or SEVERAL. number [B]: of shapes. shape, colour, texture, size
    [B, MOST]: indices into SHAPES, COLOURS, (plain, *TEXTURES), and (unsaid, *SIZES). side [B]:
    relation or place, 0 where unsaid. ground, ground_texture [B]. centre [B, MOST, 2]: y and x as
    shares of height and width. radius [B, MOST]: in shorter sides.
    """

    kind: Tensor
    number: Tensor
    shape: Tensor
    colour: Tensor
    texture: Tensor
    size: Tensor
    side: Tensor
    ground: Tensor
    ground_texture: Tensor
    centre: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        """Some of them."""
        fields = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)}
        return Scenes(**fields)


def random_scenes(count: int, device: torch.device) -> Scenes:
    """`count` scenes, drawn with the device's default generator."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device)

    def integer(bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, device=device)

    def among(shares: tuple[float, ...], *shape: int) -> Tensor:
        edges = torch.tensor(shares, device=device).cumsum(0)[:-1]
        return (uniform(*shape)[..., None] >= edges).sum(-1)

    kind = among(_KIND_SHARES, count)
    single, pair, several = (kind == which for which in (SINGLE, PAIR, SEVERAL))
    number = torch.where(several, 2 + integer(len(words.NUMBERS), count), 1 + pair.long())

    said = (1 - _PLAIN_SHARE) / len(words.TEXTURES)
    textures = (_PLAIN_SHARE, *(said,) * len(words.TEXTURES))
    ground, ground_texture = integer(len(words.COLOURS), count), among(textures, count)
    shape, texture = integer(len(words.SHAPES), count, MOST), among(textures, count, MOST)
    other = 1 + integer(len(words.COLOURS) - 1, count, MOST)
    colour = (ground[:, None] + other) % len(words.COLOURS)  # never the ground's own
    large = integer(2, count, MOST)
    unsaid = uniform(count, MOST) < _SILENT_SHARE
    # Several are all alike.
    shape, texture, colour, large, unsaid = (
        torch.where(several[:, None], field[:, :1], field)
        for field in (shape, texture, colour, large, unsaid)
    )
    bounds = torch.tensor(RADII, device=device)[kind[:, None], large]
    radius = bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * uniform(count, MOST)

    side = 1 + integer(5, count)
    side = torch.where(single & (uniform(count) < _SILENT_SHARE), 0, side)
    side = torch.where(pair, (side - 1) % 4 + 1, side)
    side = torch.where(several, 0, side)
    centre = torch.where(
        single[:, None, None],
        _places(side, radius, uniform(count, MOST, 2)),
        torch.where(
            pair[:, None, None],
            _relations(side, uniform(count, MOST, 2)),
            _cells(uniform(count, MOST), uniform(count, MOST, 2)),
        ),
    )
    return Scenes(
        kind=kind,
        number=number,
        shape=shape,
        colour=colour,
        texture=texture,
        size=torch.where(unsaid, 0, 1 + large),
        side=side,
        ground=ground,
        ground_texture=ground_texture,
        centre=centre,
        radius=radius,
    )


def _places(side: Tensor, radius: Tensor, chance: Tensor) -> Tensor:
    """Centres of single shapes, wholly inside the picture, where `side` says."""
    low = (_SLACK * radius)[..., None].expand_as(chance)
    anywhere = low + (1 - 2 * low) * chance
    near = low + (0.36 - low).clamp(min=0.02) * chance
    axis = torch.arange(2, device=side.device)  # y, x
    side = side[:, None, None]
    vertical, horizontal = axis == 0, axis == 1
    first = ((side == ABOVE) & vertical) | ((side == LEFT) & horizontal)
    last = ((side == BELOW) & vertical) | ((side == RIGHT) & horizontal)
    centre = torch.where(first, near, torch.where(last, 1 - near, anywhere))
    return torch.where(side == MIDDLE, 0.45 + 0.1 * chance, centre)


def _relations(side: Tensor, chance: Tensor) -> Tensor:
    """Centres of pairs: the first is `side` (left of, ...) of the second."""
    index = torch.arange(MOST, device=side.device).view(1, -1, 1)
    axis = torch.arange(2, device=side.device)
    side = side[:, None, None]
    along = (axis == 1) == (side <= RIGHT)
    first_is_low = (side == LEFT) | (side == ABOVE)
    low = (index == 0) == first_is_low
    apart = torch.where(low, 0.24 + 0.06 * chance, 0.70 + 0.06 * chance)
    return torch.where(along, apart, 0.3 + 0.4 * chance)


def _cells(order: Tensor, chance: Tensor) -> Tensor:
    """Centres in different quarters of the picture, in random order."""
    cell = order.argsort(dim=1)
    corner = torch.stack([cell // 2, cell % 2], dim=-1)
    return 0.26 + 0.48 * corner + 0.06 * (chance - 0.5)


def caption_tokens(scenes: Scenes) -> Tensor:
    """The scenes' captions as tokens, both ends and padding included: [B, LENGTH] int64."""
    device = scenes.kind.device

    def table(*entries: str | None) -> Tensor:
        """Token of each word, -1 for none."""
        tokens = [-1 if word is None else words.token(word) for word in entries]
        return torch.tensor(tokens, device=device)

    single, pair, several = (scenes.kind == which for which in (SINGLE, PAIR, SEVERAL))
    nothing = torch.full_like(scenes.kind, -1)
    first_letter = table("a", "an")
    orange = list(words.COLOURS).index("orange")

    def article(index: int) -> Tensor:
        bare = (scenes.size[:, index] == 0) & (scenes.texture[:, index] == 0)
        return first_letter[(bare & (scenes.colour[:, index] == orange)).long()]

    def described(index: int) -> list[Tensor]:
        shape = scenes.shape[:, index]
        names = torch.where(several, table(*words.PLURALS)[shape], table(*words.SHAPES)[shape])
        return [
            table(None, *words.SIZES)[scenes.size[:, index]],
            table(None, *words.TEXTURES)[scenes.texture[:, index]],
            table(*words.COLOURS)[scenes.colour[:, index]],
            names,
        ]

    numbers = table(None, None, *words.NUMBERS)[scenes.number]
    relation = table(None, "left", "right", "above", "below", None)[scenes.side]
    of = table(None, "of", "of", None, None, None)[scenes.side]
    second = [article(1), *described(1)]
    place = [
        table(None, "at", "at", "at", "at", "in")[scenes.side],
        table(None, *["the"] * 5)[scenes.side],
        table(None, "left", "right", "top", "bottom", "middle")[scenes.side],
    ]
    slots = [
        torch.where(several, numbers, article(0)),
        *described(0),
        *(torch.where(pair, word, nothing) for word in (relation, of, *second)),
        *(torch.where(single, word, nothing) for word in place),
        table("on").expand(len(scenes)),
        table(None, *words.TEXTURES)[scenes.ground_texture],
        table(*words.COLOURS)[scenes.ground],
    ]
    sentence = torch.stack(slots, dim=1)
    silent = sentence < 0
    order = silent.long().argsort(dim=1, stable=True)
    sentence = torch.where(silent, words.end(), sentence).gather(1, order)
    tokens = torch.full((len(scenes), words.LENGTH), words.end(), device=device)
    tokens[:, 0] = words.start()
    tokens[:, 1 : 1 + sentence.shape[1]] = sentence
    return tokens


def empty_tokens(device: torch.device) -> Tensor:
    """The prompt that says nothing: [1, LENGTH] int64."""
    tokens = torch.full((1, words.LENGTH), words.end(), device=device)
    tokens[:, 0] = words.start()
    return tokens


def captions(scenes: Scenes) -> list[str]:
    """The scenes' captions as text."""
    names = {words.token(word): word for word in words.WORDS}
    return [
        " ".join(names[index] for index in row if index in names)
        for row in caption_tokens(scenes).tolist()
    ]
