"""peft and diffusers LoRA: `….lora_A.weight` / `….lora_B.weight`, and the older spellings.

The older ones are `….lora.down.weight`, `….processor.to_q_lora.down.weight` and
`….lora_linear_layer.down.weight`. peft keeps r, alpha and rank-stabilised scaling out of the
tensors: in the header's `lora_adapter_metadata`, or in `adapter_config.json` beside a file that
peft itself saved.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from ..errors import InvalidLora
from .format import DAMAGED, Format, Layer, Source
from .lowrank import LowRank, check

_KEY = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<letter>[AB])(?:\.[^.]+)?"  # the name of peft's adapter, if it is there
    r"|[._]lora(?:_linear_layer)?\.(?P<way>up|down))"
    r"\.weight"
)
_LETTERS = {"down": "A", "up": "B"}
_FACTORS = frozenset({"lora_A", "lora_B"})

# Starting points that leave the trained model's own weights as they were. All others (PiSSA, OLoRA,
# CorDA, LoftQ, …) also change those, so that the factors alone do not give the trained model.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def _parse(key: str) -> tuple[str, str] | None:
    match = _KEY.fullmatch(key)
    if not match:
        return None
    return match["layer"], f"lora_{match['letter'] or _LETTERS[match['way']]}"


def _owns(parts: Set[str]) -> bool:
    return _FACTORS <= parts <= _FACTORS | {"alpha"}


def _check(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return check(layer, shapes, "lora_B", "lora_A")


def _read(layers: Sequence[Layer], source: Source) -> Iterator[LowRank]:
    scaling = _Scaling(source)
    for layer in layers:
        assert layer.target is not None
        rank, key = layer.shapes["lora_A"][0], layer.keys.get("alpha")
        yield LowRank(
            layer.target,
            source.read(layer.keys["lora_B"]),
            source.read(layer.keys["lora_A"]),
            None,
            source.number(key) if key else scaling.alpha(layer.name, rank),
        )


class _Scaling:
    """The part of a peft configuration that says how strongly the factors of a layer count."""

    def __init__(self, source: Source) -> None:
        self._title = source.title
        config = self._config(source)
        start = config.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            raise InvalidLora(
                f"LoRA {source.title!r} started from {start!r}, which changed the weights under "
                "it too; have its trainer convert it to a plain LoRA"
            )
        self._stabilised = config.get("use_rslora") is True
        self._alpha = self._number(config["lora_alpha"]) if "lora_alpha" in config else None
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._damaged("alpha_pattern")
        # The first that matches counts. Files of per-layer alphas hold hundreds of plain names:
        # those are looked up, only real expressions are tried one after the other.
        self._named: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, float, re.Pattern[str]]] = []
        for place, (pattern, value) in enumerate(patterns.items()):
            alpha = self._number(value)
            if re.fullmatch(r"[\w.]+", pattern):
                self._named[pattern] = (place, alpha)
                continue
            try:
                compiled = re.compile(rf"(?:.*\.)?(?:{pattern})")
            except re.error:
                raise self._damaged("alpha_pattern") from None
            self._expressions.append((place, alpha, compiled))

    def alpha(self, layer: str, rank: int) -> float | None:
        """The alpha that, over `rank`, gives the layer's scale; None for a scale of 1."""
        words = layer.split(".")
        tails = (".".join(words[start:]) for start in range(len(words)))
        found = [self._named[tail] for tail in tails if tail in self._named]
        found += [(place, alpha) for place, alpha, e in self._expressions if e.fullmatch(layer)]
        alpha = min(found)[1] if found else self._alpha
        if alpha is None or not self._stabilised:
            return alpha
        return alpha * math.sqrt(rank)  # over the rank: alpha / sqrt(rank)

    def _config(self, source: Source) -> dict[str, Any]:
        text = source.metadata.get("lora_adapter_metadata")
        if text is None and source.path and source.path.name == "adapter_model.safetensors":
            beside = source.path.with_name("adapter_config.json")
            text = beside.read_text("utf-8", "replace") if beside.is_file() else None
        if text is None:
            return {}
        try:
            config = json.loads(text)
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise self._damaged("peft configuration")
        # A pipeline's file has one configuration per component, told apart by a prefix.
        for component in ("unet.", "controlnet."):
            own = {k[len(component) :]: v for k, v in config.items() if k.startswith(component)}
            if own:
                return own
        return config

    def _number(self, value: object) -> float:
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
        raise self._damaged("lora_alpha")

    def _damaged(self, what: str) -> InvalidLora:
        return InvalidLora(f"LoRA {self._title!r}: its {what} cannot be read; {DAMAGED}")


DIFFUSERS = Format("diffusers", _parse, _owns, _check, _read)
