"""IA3: `….weight` with `….on_input` (LyCORIS), or `….ia3_l` (peft): one factor for each channel.

LyCORIS stores what is added to 1, and changes the weight alone. peft stores the factor itself, and
where it is of the outputs scales the layer's bias too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidLora
from .configuration import configuration, damaged
from .format import OTHER_MODEL, Format, Layer, Source

_PEFT = re.compile(r"(?P<layer>.+)\.ia3_l(?:\.[^.]+)?")
_ADDED = frozenset({"weight", "on_input"})
_FACTOR = frozenset({"ia3_l"})


@dataclass(frozen=True)
class Scaled:
    """delta = base * added, for a parameter of any shape. added: its size along `axis`, [n]."""

    target: str
    added: Tensor
    axis: int

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: fp32, of `base`'s shape and on its device."""
        with torch.no_grad():
            shape = [1] * base.dim()
            shape[self.axis] = -1
            return base * (self.added.to(base.device).float() * strength).reshape(shape)


def _parse(key: str, keys: Container[str]) -> tuple[str, str] | None:
    layer, _, part = key.rpartition(".")
    # A weight is of this format only beside the mark: alone it is a checkpoint's.
    if part in _ADDED and f"{layer}.on_input" in keys:
        return layer, part
    match = _PEFT.fullmatch(key)
    return (match["layer"], "ia3_l") if match else None


def _owns(parts: Mapping[str, tuple[int, ...]]) -> bool:
    return parts.keys() in (_ADDED, _FACTOR)


def _check(layer: Layer) -> str | None:
    found = layer.shapes[_factors(layer)]
    size = max(found, default=1)
    if math.prod(found) == size and size in layer.own[:2]:
        return None
    return _mismatch(layer)


def _factors(layer: Layer) -> str:
    return "weight" if "weight" in layer.keys else "ia3_l"


def _mismatch(layer: Layer) -> str:
    found = list(layer.shapes[_factors(layer)])
    return f"scales {found} channels of a parameter {list(layer.own)}; {OTHER_MODEL}"


def _read(layers: Sequence[Layer], source: Source) -> Iterator[Scaled]:
    for layer in layers:
        axis = _axis(layer, source)
        added = source.read(layer.keys[_factors(layer)]).float().flatten()
        if len(added) != layer.own[axis]:
            raise InvalidLora(f"LoRA {source.title!r}: layer {layer.name!r} {_mismatch(layer)}")
        if "ia3_l" in layer.keys:
            added = added - 1.0
            if axis == 0 and layer.bias is not None:
                yield Scaled(layer.bias, added, 0)
        yield Scaled(layer.target, added, axis)


def _axis(layer: Layer, source: Source) -> int:
    """0 where the factors are of the outputs, 1 where they are of the inputs.

    LyCORIS stores it. Of peft's, a linear layer's shape tells; a convolution's is [1, n, 1, 1]
    either way.
    """
    if "on_input" in layer.keys:
        return int(source.number(layer.keys["on_input"]) != 0)
    shape = layer.shapes["ia3_l"]
    if len(shape) == 2:
        return int(shape[0] == 1)
    inner = configuration(source).get("feedforward_modules")
    if inner is None:
        raise InvalidLora(
            f"LoRA {source.title!r}: whether {layer.keys['ia3_l']!r} scales inputs or outputs "
            "stands in peft's adapter_config.json; keep it beside the file"
        )
    if isinstance(inner, list):
        return int(any(layer.name == name or layer.name.endswith(f".{name}") for name in inner))
    try:
        return int(re.fullmatch(inner, layer.name) is not None)
    except (re.error, TypeError):
        raise damaged(source, "feedforward_modules") from None


IA3 = Format("IA3", _parse, _owns, _check, _read)
