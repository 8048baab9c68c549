"""peft and diffusers LoRA: `….lora_A.weight` / `….lora_B.weight`, and the older spellings.

The older ones are `….lora.down.weight`, `….processor.to_q_lora.down.weight` and
`….lora_linear_layer.down.weight`. `….lora_B.bias` is what the layer's own bias gains. peft keeps r,
alpha and rank-stabilised scaling out of the tensors, in its configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence

from ..errors import InvalidLora
from .configuration import PerLayer, configuration
from .format import OTHER_MODEL, Format, Layer, Patch, Source
from .full import Difference
from .lowrank import LowRank, check

_KEY = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<letter>[AB])(?:\.[^.]+)?"  # the name of peft's adapter, if it is there
    r"|[._]lora(?:_linear_layer)?\.(?P<way>up|down))"
    r"\.(?P<of>weight|bias)"
)
_LETTERS = {"down": "A", "up": "B"}
_FACTORS = frozenset({"lora_A", "lora_B"})
_BIAS = "lora_B_bias"

# Starting points that leave the trained model's own weights as they were. All others (PiSSA, OLoRA,
# CorDA, LoftQ, …) also change those, so that the factors alone do not give the trained model.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    match = _KEY.fullmatch(key)
    if not match:
        return None
    letter = match["letter"] or _LETTERS[match["way"]]
    return match["layer"], f"lora_{letter}" + ("" if match["of"] == "weight" else "_bias")


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    return _FACTORS <= parts.keys() <= _FACTORS | {"alpha", _BIAS}


def _check(layer: Layer) -> str | None:
    own = layer.shapes.get(_BIAS)
    if own is not None and (layer.bias is None or own != layer.own[:1]):
        has = f"one of {list(layer.own[:1])}" if layer.bias else "none"
        return f"has a bias {list(own)} where the model's has {has}; {OTHER_MODEL}"
    return check(layer, "lora_B", "lora_A")


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Patch]:
    scaling = _Scaling(source)
    for layer in layers:
        rank, key = layer.shapes["lora_A"][0], layer.keys.get("alpha")
        factors = LowRank(
            layer.target,
            source.read(layer.keys["lora_B"]),
            source.read(layer.keys["lora_A"]),
            None,
            source.number(key) if key else scaling.alpha(layer.name, rank),
        )
        yield factors
        if _BIAS in layer.keys:
            assert layer.bias is not None
            yield Difference(layer.bias, source.read(layer.keys[_BIAS]), factors.scale)


class _Scaling:
    """The part of a peft configuration that says how strongly the factors of a layer count."""

    def __init__(self, source: Source) -> None:
        config = configuration(source)
        start = config.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            raise InvalidLora(
                f"LoRA {source.title!r} started from {start!r}, which changed the weights under "
                "it too; have its trainer convert it to a plain LoRA"
            )
        self._stabilised = config.get("use_rslora") is True
        self._alpha = PerLayer(source, "lora_alpha", "alpha_pattern")

    def alpha(self, layer: str, rank: int) -> float | None:
        """The alpha that, over `rank`, gives the layer's scale; None for a scale of 1."""
        alpha = self._alpha.of(layer)
        if alpha is None or not self._stabilised:
            return alpha
        return alpha * math.sqrt(rank)  # over the rank: alpha / sqrt(rank)


DIFFUSERS = Format("diffusers", _parse, _owns, _check, _read, additive=True)
