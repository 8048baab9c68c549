"""Where an engine's parameters come from: files, state dicts, modules, and sums of these.

Each is a `runtime.weights.Source`: parameters by canonical name, read when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InvalidFile, InvalidInput, StructureMismatch, SwitchyardError
from .models import UNetConfig
from .runtime.weights import Source
from .structure import Structure, canonical_names
from .tensorfile import TensorFile, TensorInfo

Weightlike = str | Path | Mapping[str, Tensor]


def source_of(given: Weightlike, config: UNetConfig) -> FileSource | StateDictSource:
    """A checkpoint of the structure `config`: a `.safetensors` path or a state dict.

    Raises `InvalidFile`, `InvalidInput` or `StructureMismatch`, the file named in each.
    """
    if isinstance(given, (str, Path)):
        return FileSource(TensorFile(given), config)
    return StateDictSource(given, config)


class ModuleSource:
    """The parameters of a host's module, by name at each read: hosts replace their objects."""

    lasting = False

    def __init__(self, module: nn.Module, structure: Structure) -> None:
        assert structure.config is not None
        self._module, self._own = module, object()
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self._names = canonical_names(shapes, structure.config)
        self.label = f"module {type(module).__name__}"

    def read(self, name: str) -> Tensor:
        """The parameter as the module has it now."""
        return self._module.get_parameter(self._names[name])

    def stamp(self) -> Hashable:
        """Where every parameter lies, and its version."""
        return self._own, _stamp(self.read(name) for name in self._names)


class FileSource:
    """The parameters of a `.safetensors` file, each read when it is asked for.

    Raises `StructureMismatch` for a file of another structure, `InvalidFile` for one without
    floating-point weights.
    """

    lasting = True

    def __init__(self, file: TensorFile, config: UNetConfig) -> None:
        self.file, self._config = file, config
        try:
            self._names = canonical_names(file.tensors, config)
        except StructureMismatch as error:
            raise StructureMismatch(f"{file.path}: {error}") from None
        self.label = str(file.path)
        for name in self._names.values():
            _require_numbers(f"{file.path}: {name}", file.tensors[name].dtype, InvalidFile)

    def name_in_file(self, name: str) -> str:
        """What the file calls a parameter."""
        return self._names[name]

    def read(self, name: str) -> Tensor:
        """The tensor, backed by the mapped file."""
        return self.file.read(self._names[name])

    def stored(self, name: str) -> TensorInfo:
        """Shape and dtype of the parameter in the file."""
        return self.file.tensors[self._names[name]]

    def read_into(self, name: str, out: Tensor) -> None:
        """Read the parameter into `out`, of the stored shape and dtype, past the mapping."""
        self.file.read_into(self._names[name], out)

    def stamp(self) -> Hashable:
        """The file's fingerprint; InvalidFile once it has changed, since it is mapped."""
        self.file.check_unchanged()
        return self.file.fingerprint, self._config


class StateDictSource:
    """The parameters of a state dict, by reference."""

    lasting = False

    def __init__(self, tensors: Mapping[str, Tensor], config: UNetConfig) -> None:
        if not isinstance(tensors, Mapping) or not all(
            isinstance(value, Tensor) for value in tensors.values()
        ):
            raise InvalidInput("weights are given as a .safetensors path or a dict of tensors")
        names = canonical_names(tensors, config)
        self._tensors = {name: tensors[source] for name, source in names.items()}
        self._own = object()
        self.label = "state dict"
        for name, tensor in self._tensors.items():
            _require_numbers(name, tensor.dtype, InvalidInput)
            if tensor.is_meta or tensor.is_sparse:
                raise InvalidInput(f"{name} is a {tensor.device} tensor without plain values")

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]

    def stored(self, name: str) -> TensorInfo | None:
        """Shape and dtype of a tensor that a thread should carry to the device."""
        tensor = self._tensors[name]
        if tensor.device.type != "cpu" or tensor.is_pinned():
            return None
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy the tensor into `out`, of its shape and dtype."""
        out.copy_(self.read(name))

    def stamp(self) -> Hashable:
        """Where every tensor lies, and its version."""
        return self._own, _stamp(self._tensors.values())


class Combination:
    """Checkpoints of one structure put together, parameter by parameter, in float32.

    combine: the float32 parameters of all parts, on one device, to the float32 result; it may
    write to what it is given. Products and sums are operations of their own in a fixed order, so
    that the result is the same, bit for bit, on every device.
    """

    def __init__(
        self,
        parts: Sequence[Source],
        combine: Callable[[list[Tensor]], Tensor],
        label: str,
        recipe: Hashable,
    ) -> None:
        self.parts, self.combine = tuple(parts), combine
        self.label, self._recipe = label, recipe
        self.lasting = all(part.lasting for part in parts)

    def read(self, name: str) -> Tensor:
        """The parameter in float32, computed on the CPU; `Weights` does so on its device."""
        return self.combine(
            [part.read(name).to("cpu", torch.float32, copy=True) for part in self.parts]
        )

    def stamp(self) -> Hashable:
        """Those of the parts, and how they are put together."""
        return self._recipe, tuple(part.stamp() for part in self.parts)


def mixture(parts: Sequence[tuple[Weightlike, float]], config: UNetConfig) -> Combination:
    """The weighted sum of checkpoints: w₁·a + w₂·b + …, added in the order given.

    The weights need not add up to 1. Raises `InvalidInput` for an empty list or a weight that is
    no finite number, and what `source_of` raises.
    """
    if isinstance(parts, (str, Mapping)) or not isinstance(parts, Sequence) or not parts:
        raise InvalidInput("a mix is a list of at least one (path or state dict, weight)")
    for entry in parts:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise InvalidInput("a mix is a list of (path or state dict, weight)")
    weights = tuple(_finite(weight, "a weight of a mix") for _, weight in parts)
    sources = [source_of(given, config) for given, _ in parts]

    def combine(values: list[Tensor]) -> Tensor:
        total = values[0].mul_(weights[0])
        for value, weight in zip(values[1:], weights[1:], strict=True):
            total.add_(value.mul_(weight))
        return total

    label = " + ".join(
        f"{weight:g} · {source.label}" for weight, source in zip(weights, sources, strict=True)
    )
    return Combination(sources, combine, label, ("mix", weights))


def added_difference(
    a: Weightlike, b: Weightlike, c: Weightlike, strength: float, config: UNetConfig
) -> Combination:
    """What `b` learned beyond `c`, added to `a`: a + strength · (b - c).

    Raises `InvalidInput` for a strength that is no finite number, and what `source_of` raises.
    """
    factor = _finite(strength, "the strength of a difference")
    sources = [source_of(given, config) for given in (a, b, c)]

    def combine(values: list[Tensor]) -> Tensor:
        base, tuned, origin = values
        return base.add_(tuned.sub_(origin).mul_(factor))

    first, second, third = (source.label for source in sources)
    label = f"{first} + {factor:g} · ({second} - {third})"
    return Combination(sources, combine, label, ("difference", factor))


def _finite(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"{what} is a finite number, not {value!r}")
    return float(value)


def _stamp(tensors: Iterable[Tensor]) -> Hashable:
    # Tensors made in inference mode count no versions.
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _require_numbers(what: str, dtype: torch.dtype, error: type[SwitchyardError]) -> None:
    if not dtype.is_floating_point:
        raise error(f"{what} holds {dtype}: an engine takes floating-point weights")
