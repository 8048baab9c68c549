"""What a LoRA format is made of: a source of tensors, layers found in it, patches from them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InvalidLora
from ..tensorfile import TensorFile

OTHER_MODEL = "choose a LoRA made for this model"
DAMAGED = "get the file again"


class Patch(Protocol):
    """A change of one parameter: the only thing that the weight path knows of a format."""

    @property
    def target(self) -> str:
        """Canonical name of the parameter it changes."""

    def delta(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """What `strength` adds to the parameter: a new fp32 tensor, of its shape, on its device.

        base: the parameter without any adapter, fp32, not to be written to. Formats that rotate or
        scale the weight take their change from it, so that changes add up in any order.
        """


@dataclass(frozen=True)
class Source:
    """A LoRA before anything of it is read: names, shapes and metadata, and a way to read.

    `shapes` has () for a plain number, which a state dict may hold as an alpha.
    """

    title: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    path: Path | None
    load: Callable[[str], Tensor]

    def read(self, key: str) -> Tensor:
        """The tensor `key` in its stored dtype; InvalidLora unless its numbers are real and finite.

        On a GPU the dtype alone is looked at: a look at the numbers would wait for it. A file's is
        copied: factors are small, are kept, and must not follow what befalls the file.
        """
        value = self.load(key).detach()
        if self.path is not None:
            value = value.clone()
        if not value.dtype.is_floating_point:
            raise InvalidLora(
                f"LoRA {self.title!r}: {key!r} holds {value.dtype}, not floating-point numbers; "
                f"{DAMAGED}"
            )
        if value.device.type == "cpu" and not _finite(value):
            raise InvalidLora(f"LoRA {self.title!r}: {key!r} holds NaN or infinity; {DAMAGED}")
        return value

    def number(self, key: str) -> float:
        """The single finite number stored under `key`, such as an alpha, of any dtype."""
        value = self.load(key)
        real = value.numel() == 1 and not value.is_complex()
        number = float(value.item()) if real else math.nan
        if not math.isfinite(number):
            raise InvalidLora(f"LoRA {self.title!r}: {key!r} is no finite number; {DAMAGED}")
        return number


def _finite(value: Tensor) -> bool:
    if value.dtype.itemsize == 1:  # 8-bit floats have no order in PyTorch
        value = value.float()
    return not value.numel() or all(math.isfinite(end.item()) for end in torch.aminmax(value))


def alpha_of(layer: Layer, source: Source) -> float | None:
    """A layer's alpha. The trainers take one of 0, as none, for "as the rank"."""
    key = layer.keys.get("alpha")
    return (source.number(key) or None) if key else None


def split(key: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """The `layer` and the `part` of a key, or None if the pattern is not the whole of it."""
    match = pattern.fullmatch(key)
    return (match["layer"], match["part"]) if match else None


def open_source(source: str | Path | Mapping[str, Tensor | float]) -> Source:
    """A `.safetensors` path (mapped: tensors are read one by one) or a state dict as a `Source`.

    Raises InvalidFile for a file that cannot be opened, InvalidLora for a state dict that holds
    something else than tensors and numbers.
    """
    if isinstance(source, (str, Path)):
        file = TensorFile(source)
        shapes = {name: tuple(info.shape) for name, info in file.tensors.items()}
        return Source(file.path.stem, shapes, file.metadata, file.path, file.read)
    tensors: dict[str, Tensor] = {}
    for key, value in source.items():
        # The alphas that diffusers splits off a state dict are plain numbers.
        if not isinstance(key, str) or not isinstance(value, (Tensor, int, float)):
            raise InvalidLora(
                f"LoRA state dict: {key!r} is a {type(value).__name__}; "
                "only tensors and plain numbers are read, under names"
            )
        if not isinstance(value, Tensor):
            number = value if abs(value) <= sys.float_info.max else math.nan
            value = torch.tensor(number, dtype=torch.float64)
        if value.is_meta or value.layout is not torch.strided:
            raise InvalidLora(f"LoRA state dict: {key!r} is a tensor without plain values")
        tensors[key] = value
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Source("state dict", shapes, {}, None, tensors.__getitem__)


@dataclass(frozen=True)
class Layer:
    """One adapted layer as found in a header.

    `name` is its name without prefix, `target` the parameter it names, of shape `own`, `bias` the
    bias beside it, if there is one, `keys` and `shapes` go from a part (`lora_up`, `alpha`, …) to
    its key and shape.
    """

    name: str
    target: str
    own: tuple[int, ...]
    bias: str | None
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Format:
    """One LoRA format.

    name:  as shown to people.
    parse: (key, all keys of the file) -> (layer as spelled in the key, part), or None when the key
           is not of this format. `….alpha` and DoRA's magnitudes are common to several formats and
           not asked for.
    owns:  whether a layer with these parts, by their shapes, is of this format, whole and with
           nothing besides.
    check: layer -> None when it fits, else the end of the sentence "layer X …" with what to do.
           Header only. Of norms and biases it is asked only with `vectors`.
    read:  layers that fit -> their patches.
    vectors: whether it adapts norms and biases as well as linear layers and convolutions.
    additive: whether the change is the same whatever the weight: what DoRA and merged projections
           build on.
    """

    name: str
    parse: Callable[[str, Container[str]], tuple[str, str] | None]
    owns: Callable[[Mapping[str, tuple[int, ...]]], bool]
    check: Callable[[Layer], str | None]
    read: Callable[[Sequence[Layer], Source], Iterable[Patch]]
    vectors: bool = False
    additive: bool = False
