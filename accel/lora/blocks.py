"""Strengths of a LoRA by block of the UNet, as A1111's "LoRA Block Weight" writes them.

`1,0,0,0,1,1,…` has one number for the text encoder (`BASE`, which is not run here), then one for
each block from the input to the output: for every block (26 of SD1.5, 20 of SDXL), or for those
with attention alone (17 and 12), where the others' weight is 0. What lies outside the blocks, such
as the time embedding, keeps the LoRA's strength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import InvalidInput

BlockWeights = str | Sequence[float]
"""A preset's name, numbers between commas, or the numbers themselves."""

# Which parts of the blocks with attention a preset has at 1, and the others at 0. Shallow ones are
# near to the picture, deep ones to the middle.
_PARTS: Mapping[str, frozenset[str]] = {
    "NONE": frozenset(),
    "INS": frozenset({"in shallow"}),
    "IND": frozenset({"in deep"}),
    "INALL": frozenset({"in shallow", "in deep"}),
    "MIDD": frozenset({"in deep", "middle", "out deep"}),
    "OUTD": frozenset({"out deep"}),
    "OUTS": frozenset({"out shallow"}),
    "OUTALL": frozenset({"out deep", "out shallow"}),
}
# All blocks at one weight.
_LEVELS = {"ALL": 1.0, "ALL0.5": 0.5}

PRESETS = (*_PARTS, *_LEVELS)
"""Names of the presets, the same for every model."""


def block_weights(
    given: BlockWeights, names: Sequence[str], attention: Sequence[str]
) -> dict[str, float]:
    """Block -> weight. names: the model's blocks. attention: those of them with attention.

    Raises InvalidInput, which says what the model takes.
    """
    if isinstance(given, str) and given.strip().upper() in PRESETS:
        return _preset(given.strip().upper(), names, attention)
    numbers = _numbers(given)
    for blocks in (names, attention):
        if len(numbers) == 1 + len(blocks):
            listed = dict(zip(blocks, numbers[1:], strict=True))
            return {block: listed.get(block, 0.0) for block in names}
    raise InvalidInput(
        f"{len(numbers)} block weights, but this model takes {1 + len(attention)} "
        f"(BASE, {attention[0]} … {attention[-1]} where there is attention) or "
        f"{1 + len(names)} (BASE, {names[0]} … {names[-1]})"
        if attention
        else f"{len(numbers)} block weights, but this model takes {1 + len(names)}"
    )


def _preset(name: str, names: Sequence[str], attention: Sequence[str]) -> dict[str, float]:
    if name in _LEVELS:
        return dict.fromkeys(names, _LEVELS[name])
    inner = [block for block in attention if block.startswith("IN")]
    outer = [block for block in attention if block.startswith("OUT")]
    parts = {
        "in shallow": inner[: (len(inner) + 1) // 2],
        "in deep": inner[(len(inner) + 1) // 2 :],
        "middle": ["M00"],
        "out deep": outer[: len(outer) // 2],
        "out shallow": outer[len(outer) // 2 :],
    }
    on = {block for part, blocks in parts.items() if part in _PARTS[name] for block in blocks}
    return {block: float(block in on) for block in names}


def _numbers(given: BlockWeights) -> list[float]:
    values = [value.strip() for value in given.split(",")] if isinstance(given, str) else given
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            known = ", ".join(PRESETS)
            raise InvalidInput(
                f"block weights are finite numbers between commas or one of {known}, not {value!r}"
            )
        numbers.append(number)
    return numbers
