"""What peft keeps out of its tensors: scales, and how a rotation was made.

It is in the header's `lora_adapter_metadata`, or in `adapter_config.json` beside a file that peft
itself saved.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import InvalidLora
from .format import DAMAGED, Layer, Source, alpha_of


def configuration_beside(path: Path) -> Path | None:
    """The file in which peft keeps the configuration of one that it saved. Raises OSError."""
    file = path.with_name("adapter_config.json")
    return file if path.name == "adapter_model.safetensors" and file.is_file() else None


def configuration(source: Source) -> dict[str, Any]:
    """peft's configuration of a file, {} where there is none. Raises InvalidLora for a bad one."""
    text = source.metadata.get("lora_adapter_metadata")
    try:
        if text is None and source.path is not None:
            file = configuration_beside(source.path)
            text = file.read_text("utf-8", "replace") if file else None
        config = {} if text is None else json.loads(text)
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise damaged(source, "peft configuration")
    # A pipeline's file has one configuration per component, told apart by a prefix.
    for component in ("unet.", "controlnet."):
        own = {k[len(component) :]: v for k, v in config.items() if k.startswith(component)}
        if own:
            return own
    return config


def number(source: Source, what: str, value: object) -> float:
    """A finite number of the configuration; InvalidLora, which names it, for anything else."""
    if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return float(value)
    raise damaged(source, what)


def damaged(source: Source, what: str) -> InvalidLora:
    """What to raise for a part of the configuration that makes no sense."""
    return InvalidLora(f"LoRA {source.title!r}: its {what} cannot be read; {DAMAGED}")


class PerLayer:
    """A number that holds for all layers, but for those that a pattern names.

    The first pattern that matches counts. Files of per-layer numbers hold hundreds of plain names:
    those are looked up, only real expressions are tried one after the other.
    """

    def __init__(self, source: Source, name: str, patterns_name: str) -> None:
        config = configuration(source)
        self._general = number(source, name, config[name]) if name in config else None
        patterns = config.get(patterns_name) or {}
        if not isinstance(patterns, dict):
            raise damaged(source, patterns_name)
        self._named: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, float, re.Pattern[str]]] = []
        for place, (pattern, value) in enumerate(patterns.items()):
            own = number(source, name, value)
            if re.fullmatch(r"[\w.]+", pattern):
                self._named[pattern] = (place, own)
                continue
            try:
                compiled = re.compile(rf"(?:.*\.)?(?:{pattern})")
            except re.error:
                raise damaged(source, patterns_name) from None
            self._expressions.append((place, own, compiled))

    def of(self, layer: str) -> float | None:
        """The number of a layer by its dotted name; None where the configuration has none."""
        words = layer.split(".")
        tails = (".".join(words[start:]) for start in range(len(words)))
        found = [self._named[tail] for tail in tails if tail in self._named]
        found += [(place, own) for place, own, e in self._expressions if e.fullmatch(layer)]
        return min(found)[1] if found else self._general


class LycorisScale:
    """What LoHa, LoKr and GLoRA multiply by: alpha / rank by the file's alphas.

    peft has alphas and ranks of its LoHa and LoKr in its configuration, and applies their ratio to
    factors of no rank too.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._alpha = self._rank = None
        if configuration(source).get("peft_type") in ("LOHA", "LOKR"):
            self._alpha = PerLayer(source, "alpha", "alpha_pattern")
            self._rank = PerLayer(source, "r", "rank_pattern")

    def of(self, layer: Layer, rank: float | None) -> float:
        """The scale of a layer. rank: that of its factors, None where none has one."""
        alpha = alpha_of(layer, self._source)
        if alpha is None and self._alpha and self._rank:
            alpha, rank = self._alpha.of(layer.name), rank or self._rank.of(layer.name)
        return alpha / rank if alpha is not None and rank else 1.0
