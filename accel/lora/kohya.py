"""kohya and LyCORIS LoRA / LoCon: `….lora_up.weight`, `….lora_down.weight`, `….lora_mid.weight`."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence

from .format import Format, Layer, Source, alpha_of, split
from .lowrank import LowRank, check

_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_(?:up|down|mid))\.weight")
_FACTORS = frozenset({"lora_up", "lora_down"})


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    return split(key, _KEY)


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    return _FACTORS <= parts.keys() <= _FACTORS | {"lora_mid", "alpha"}


def _check(layer: Layer) -> str | None:
    return check(layer, "lora_up", "lora_down", "lora_mid")


def _read(layers: Sequence[Layer], source: Source) -> Iterator[LowRank]:
    for layer in layers:
        mid = layer.keys.get("lora_mid")
        yield LowRank(
            layer.target,
            source.read(layer.keys["lora_up"]),
            source.read(layer.keys["lora_down"]),
            source.read(mid) if mid else None,
            alpha_of(layer, source),
        )


KOHYA = Format("kohya", _parse, _owns, _check, _read, additive=True)
