"""Sheets of pictures: plain PyTorch above the engine, one column a change; or one cell each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 256  # pixels of the longer side of a picture on the sheet
MARGIN = 12
CAPTION = 40


@dataclass(frozen=True)
class Column:
    """One change: the two pictures [3, H, W] in 0..1, and what is written above and below."""

    title: str
    note: str
    plain: Tensor
    engine: Tensor


def sheet(columns: Sequence[Column]) -> Image.Image:
    """All columns in one picture."""
    left = 70
    width = left + len(columns) * (CELL + MARGIN) + MARGIN
    height = CAPTION + 2 * (CELL + MARGIN) + CAPTION
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    for row, name in enumerate(("plain", "engine")):
        draw.text((MARGIN, CAPTION + row * (CELL + MARGIN) + CELL // 2), name, "black", font)
    for index, column in enumerate(columns):
        x = left + index * (CELL + MARGIN)
        _centred(draw, column.title, x, MARGIN, font)
        for row, picture in enumerate((column.plain, column.engine)):
            tile = _tile(picture)
            y = CAPTION + row * (CELL + MARGIN)
            image.paste(tile, (x + (CELL - tile.width) // 2, y + (CELL - tile.height) // 2))
        _centred(draw, column.note, x, CAPTION + 2 * (CELL + MARGIN), font)
    return image


@dataclass(frozen=True)
class Cell:
    """One picture [3, H, W] in 0..1, and what is written above and below."""

    title: str
    note: str
    picture: Tensor


def times(steps_ms: float, swap_ms: float) -> str:
    """What is written below a picture of an audition."""
    return f"{steps_ms / 1e3:.2f} s, swap {swap_ms:.0f} ms"


def contact_sheet(heading: str, cells: Sequence[Cell], images: int = 1) -> Image.Image:
    """Pictures under a heading, in about a square; a row for each `images`, where they are more."""
    columns = images if images > 1 else math.ceil(math.sqrt(len(cells)))
    rows = -(-len(cells) // columns)
    step = CELL + 2 * CAPTION
    width = MARGIN + columns * (CELL + MARGIN)
    image = Image.new("RGB", (width, CAPTION + rows * step + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    draw.text((MARGIN, MARGIN), _cut(draw, heading, font, width - 2 * MARGIN), "black", font)
    for index, cell in enumerate(cells):
        x = MARGIN + index % columns * (CELL + MARGIN)
        y = CAPTION + index // columns * step
        _centred(draw, cell.title, x, y + MARGIN, font)
        tile = _tile(cell.picture)
        place = x + (CELL - tile.width) // 2, y + CAPTION + (CELL - tile.height) // 2
        image.paste(tile, place)
        _centred(draw, cell.note, x, y + CAPTION + CELL + MARGIN // 2, font)
    return image


def _tile(picture: Tensor) -> Image.Image:
    values = (picture * 255).round().byte().permute(1, 2, 0).contiguous()
    image = Image.fromarray(values.numpy())
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _centred(
    draw: ImageDraw.ImageDraw,
    text: str,
    x: int,
    y: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    text = _cut(draw, text, font, CELL)
    draw.text((x + (CELL - draw.textlength(text, font)) / 2, y), text, "black", font)


def _cut(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    width: int,
) -> str:
    """As much of a text as fits."""
    while len(text) > 1 and draw.textlength(text, font) > width:
        text = text[:-2].rstrip("…") + "…"
    return text
