"""kohya and LyCORIS LoRA / LoCon: `….lora_up.weight`, `….lora_down.weight`, `….lora_mid.weight`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set

from .format import Format, Layer, Source
from .lowrank import LowRank, check

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_(?:up|down|mid))\.weight")
_FACTORS = frozenset({"lora_up", "lora_down"})


def _parse(key: str) -> tuple[str, str] | None:
    match = _KEY.fullmatch(key)
    return (match["layer"], match["part"]) if match else None


def _owns(parts: Set[str]) -> bool:
    return _FACTORS <= parts <= _FACTORS | {"lora_mid", "alpha"}


def _check(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return check(layer, shapes, "lora_up", "lora_down", "lora_mid")


def _read(layers: Sequence[Layer], source: Source) -> Iterator[LowRank]:
    for layer in layers:
        assert layer.target is not None
        mid, alpha = layer.keys.get("lora_mid"), layer.keys.get("alpha")
        yield LowRank(
            layer.target,
            source.read(layer.keys["lora_up"]),
            source.read(layer.keys["lora_down"]),
            source.read(mid) if mid else None,
            # The trainers take an alpha of 0 for "as the rank".
            (source.number(alpha) or None) if alpha else None,
        )


KOHYA = Format("kohya", _parse, _owns, _check, _read)
