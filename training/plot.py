"""Loss curves as a picture, one panel a phase, both axes logarithmic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 260, 60, 36, 30


def plot(folder: Path, out: Path) -> None:
    """Draw every curve (PHASE.json as `fit` writes it) in `folder` into one PNG.

    Raises FileNotFoundError where there is none.
    """
    curves = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    curves = [curve for curve in curves if len(curve.get("rows", [])) > 1]
    if not curves:
        raise FileNotFoundError(f"{folder} holds no loss curve")
    image = Image.new("RGB", (_WIDTH * len(curves), _HEIGHT), "white")
    for index, curve in enumerate(curves):
        image.paste(_panel(curve), (index * _WIDTH, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)


def _panel(curve: dict[str, Any]) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    steps = [math.log10(row[0]) for row in curve["rows"]]
    losses = [math.log10(max(row[2], 1e-12)) for row in curve["rows"]]
    low, high = min(losses), max(losses)
    box = (_LEFT, _TOP, _WIDTH - 16, _HEIGHT - _BOTTOM)

    def place(step: float, loss: float) -> tuple[float, float]:
        along = (step - steps[0]) / max(steps[-1] - steps[0], 1e-9)
        up = (loss - low) / max(high - low, 1e-9)
        return box[0] + along * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

    draw.rectangle(box, outline="grey")
    steps_done, batch = curve["steps"], curve["batch"]
    title = f"{curve['phase']}: {steps_done} steps of {batch}, {curve['seconds']:.0f} s"
    draw.text((box[0], 8), title, "black", font)
    for loss in (low, high):
        draw.text((4, place(steps[0], loss)[1] - 7), f"{10**loss:.3g}", "black", font)
    for step in (steps[0], steps[-1]):
        text = f"{10**step:.0f}"
        x = place(step, low)[0] - (draw.textlength(text, font) if step == steps[-1] else 0)
        draw.text((x, box[3] + 4), text, "black", font)
    draw.text(((box[0] + box[2]) / 2 - 20, box[3] + 18), "steps", "black", font)
    draw.line([place(s, x) for s, x in zip(steps, losses, strict=True)], fill="#2060c0")
    return image
