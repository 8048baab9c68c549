"""The weights of a ComfyUI MODEL as a source for the arena: its parameters with its patches on.

LoRAs and merges are the host's own patches, computed by the host's own code, so every format that
the host reads works. They are computed in float32 and rounded once, into the arena.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
import xxhash
from torch import Tensor, nn

from ...errors import SwitchyardError, UnsupportedModel
from ...models import UNetConfig
from ...sources import FileSource
from ...structure import canonical_names
from ...tensorfile import Fingerprint, TensorFile, TensorInfo, fingerprint_of
from .untouched import Part, digest, equal, parts_to_compare

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."

FILE = "switchyard_file"
"""Attachment of a MODEL: the path that it was loaded from."""

_names: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
_found: weakref.WeakKeyDictionary[nn.Module, list[tuple[dict[str, Any], str, str]]] = (
    weakref.WeakKeyDictionary()
)
_tokens: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()
_compared: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, bool]] = weakref.WeakKeyDictionary()
"""By model: what was seen of it when it was last compared with its file; and the result."""

SMALL_BYTES = 64 << 20
"""That are compared at every sampling."""


@lru_cache(maxsize=64)
def file_source(fingerprint: Fingerprint, config: UNetConfig) -> FileSource:
    """A file's network. It is not mapped by this. Raises as opening it does."""
    return FileSource(TensorFile(fingerprint[0]), config)


@lru_cache(maxsize=64)
def file_sample(
    fingerprint: Fingerprint, config: UNetConfig, dtype: torch.dtype | None = None
) -> str | None:
    """What `PatchedSource.sample` gives for a model whose parameters are those of the file.

    dtype: what the host has cast them to. None for a file that cannot be read, or is of another
    structure.
    """
    try:
        file = TensorFile(fingerprint[0])  # its mapping goes with it
        names = canonical_names(file.tensors, config)
        return _digest((file.read(names[name]) for name in sorted(names)), dtype)
    except SwitchyardError as error:
        logger.debug("%s is not read as a file: %s", fingerprint[0], error)
        return None


class Unpatched:
    """The parameters of a model without patches, where they are those of its file.

    mapped: whether the model has them from the mapped file; else they are copies in RAM. Readers
    stop at the user's interrupt.
    """

    lasting = True

    def __init__(self, owner: PatchedSource, file: FileSource, mapped: bool) -> None:
        self._owner, self._file, self._mapped = owner, file, mapped
        self.label = file.label

    def read(self, name: str) -> Tensor:
        """The parameter as the model has it."""
        return self._owner.stored_value(name)

    def stored(self, name: str) -> TensorInfo:
        """Its shape and dtype."""
        if self._mapped:
            return self._file.stored(name)
        value = self.read(name)
        return TensorInfo(tuple(value.shape), value.dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        """Bring it into `out`, of its shape and dtype."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._mapped:
            self._file.read_into(name, out)
        else:
            out.copy_(self.read(name))

    def stamp(self) -> Hashable:
        """The file's."""
        return self._file.stamp()


class PatchedSource:
    """The parameters of a patcher's model, each with the patches that are on it.

    prefix: the keys' way from the patcher's model to the denoiser, "diffusion_model." or nothing.
    device: where patches are computed.
    Only a weak reference to the patcher is held: a seat must not keep in RAM what the host has
    given up.

    bare: the model without patches, where `recognise` has found that it is its file. changed: the
    parameters that have patches then. lasting: whether it is the file, without any.
    """

    def __init__(
        self, patcher: Any, config: UNetConfig, prefix: str, device: torch.device, label: str
    ) -> None:
        self._patcher = weakref.ref(patcher)
        self._device = device
        self.label = label
        self.bare: Unpatched | None = None
        self.changed: frozenset[str] = frozenset()
        self.lasting = False
        self._config = config
        self._keys = {
            name: prefix + source
            for name, source in _canonical(patcher.model, config, prefix).items()
        }

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters."""
        return list(self._keys)

    @property
    def patched(self) -> dict[str, tuple[Any, ...]]:
        """By canonical name: what is on each parameter that is patched, comparable."""
        patches = self._alive().patches
        return {
            name: _description(patches[key]) for name, key in self._keys.items() if key in patches
        }

    def read(self, name: str) -> Tensor:
        """The parameter with its patches; float32 on the device if it has any.

        Raises `UnsupportedModel` for a patch that changes its shape, and the host's own exception
        when the user has interrupted the run.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self._patched(name, self.stored_value(name))

    def change(self, name: str, bare: Tensor) -> Tensor:
        """As `read`, from a copy of the parameter without patches that lies nearer.

        bare: the model's value, or the file's that the host has cast, in whatever dtype.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        own = self.stored_value(name)
        if not _holds(bare.dtype, own.dtype):
            return self._patched(name, own)
        # As the model's lies: sums may depend on it.
        return self._patched(name, bare.reshape(own.shape).to(own.dtype).contiguous())

    def _patched(self, name: str, value: Tensor) -> Tensor:
        key = self._keys[name]
        patches = self._alive().patches.get(key)
        if not patches:
            return value
        shape = value.shape
        # The raw bytes go over the bus: asked for both, PyTorch converts on the CPU and sends twice
        # as many. A copy: the host's code adds in place.
        start = value.detach().to(self._device).to(torch.float32, copy=True)
        changed = comfy.lora.calculate_weight(patches, start, key, torch.float32)
        if changed.shape != shape:
            raise UnsupportedModel(
                f"a LoRA changes the shape of {key}: {list(shape)} to {list(changed.shape)}"
            )
        return changed

    def stored_value(self, name: str) -> Tensor:
        """The parameter without its patches, as the host has it."""
        return _stored(self._alive(), self._keys[name])

    def recognise(self, dtype: torch.dtype) -> frozenset[Hashable]:
        """See whether the model's parameters are those of its file, and what they are known by.

        What is known of the file, such as a copy that was read ahead, is then known of the model.
        dtype: the engine's. A model that the host has cast to it is the file as well, since the
        engine would do the same.

        Two times that have something in common had the same values without patches. Copies in RAM
        of what the host read are compared with the file once; what is written into them later has
        to show in `sample`.
        """
        self.bare, self.changed, self.lasting = None, frozenset(), False
        patcher = self._alive()
        sample = self.sample()
        own = (_tokens.setdefault(patcher.model, object()), sample)
        file, mapped = self._file_like(sample, dtype)
        if file is None:
            return frozenset({own})
        values = self._values()
        try:
            parts = parts_to_compare(
                file.file, {file.name_in_file(name): value for name, value in values.items()}
            )
            same, seen = self._is(file, parts, values, sample)
        except SwitchyardError:  # the file has gone in this moment: the model's own serve as well
            return frozenset({own})
        if not same:
            return frozenset({(*own, seen)})
        self.bare = Unpatched(self, file, mapped)
        self.changed = frozenset(n for n, key in self._keys.items() if key in patcher.patches)
        self.lasting = not self.changed
        return frozenset({own, self.bare.stamp()})

    def _file_like(self, sample: str, dtype: torch.dtype) -> tuple[FileSource | None, bool]:
        """The model's file, if the sample speaks for it; whether it may be read in its place."""
        patcher = self._alive()
        fingerprint = fingerprint_of_model(patcher)
        if fingerprint is None:
            return None, False
        same = file_sample(fingerprint, self._config) == sample
        if not same and file_sample(fingerprint, self._config, dtype) != sample:
            return None, False
        try:
            file = file_source(fingerprint, self._config)
        except SwitchyardError:
            return None, False
        return file, same and patcher.get_attachment(FILE) is not None

    def _is(
        self,
        file: FileSource,
        parts: Sequence[Part],
        values: Mapping[str, Tensor],
        sample: str,
    ) -> tuple[bool, Hashable]:
        """Whether the parts are the file's; and what was looked at, for parameters that are not."""
        small = sum(part.end - part.begin for part in parts) <= SMALL_BYTES
        if small:
            return equal(file.file, parts), digest(file.file, parts)
        places = tuple(
            (value.data_ptr(), 0 if value.is_inference() else value._version)
            for value in values.values()
        )
        seen = (file.file.fingerprint, sample, places)
        model = self._alive().model
        known = _compared.get(model)
        if known is None or known[0] != seen:
            known = _compared[model] = seen, equal(file.file, parts)
        return known[1], None

    def _values(self) -> dict[str, Tensor]:
        """The parameters without their patches, by canonical name."""
        patcher = self._alive()
        names = {key: name for name, key in self._keys.items()}
        places = _places(patcher.model, (self._keys[name] for name in sorted(self._keys)))
        return {
            names[key]: patcher.backup[key].weight if key in patcher.backup else parameters[leaf]
            for parameters, leaf, key in places
        }

    def _alive(self) -> Any:
        patcher = self._patcher()
        if patcher is None:
            raise UnsupportedModel(f"{self.label} is no longer loaded")
        return patcher

    def stamp(self) -> Hashable:
        """The file's, where it is that; else another each time: what may change is compared before
        a sampling.
        """
        return self.bare.stamp() if self.bare is not None and self.lasting else object()

    def sample(self) -> str:
        """A digest of a few bytes of every parameter: writes into them in place show in it.

        A few milliseconds for SDXL. Parameters must be in RAM; others are left out.
        """
        return _digest(self._values().values())


def _digest(values: Iterable[Tensor | None], dtype: torch.dtype | None = None) -> str:
    digest = xxhash.xxh3_128()
    for value in values:
        if value is not None:
            digest.update(b"".join(contents(value, dtype)))
    return digest.hexdigest()


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of the one dtype is one of the other's."""
    one, other = torch.finfo(wide), torch.finfo(narrow)
    return one.eps <= other.eps and one.max >= other.max and one.tiny <= other.tiny


def identity(patcher: Any) -> Hashable:
    """What a MODEL's unpatched weights are known by: its file where that is known, else itself."""
    fingerprint = fingerprint_of_model(patcher)
    if fingerprint is not None:
        return fingerprint, patcher.model.get_dtype()
    return _tokens.setdefault(patcher.model, object())


def fingerprint_of_model(patcher: Any) -> Fingerprint | None:
    """Of the .safetensors file that a MODEL was loaded from; None where that is not known."""
    path = patcher.get_attachment(FILE)
    if path is None:
        made = getattr(patcher, "cached_patcher_init", None)
        arguments = made[1] if made else ()
        path = arguments[0] if arguments and isinstance(arguments[0], str) else None
    if path is not None and Path(path).suffix == ".safetensors":
        try:
            return fingerprint_of(path)
        except OSError:
            pass
    return None


def _places(owner: nn.Module, keys: Iterable[str]) -> list[tuple[dict[str, Any], str, str]]:
    """Where each parameter stands: its module's dictionary, its name there, its key.

    The host replaces parameters, and leaves modules alone: looked up once.
    """
    if owner not in _found:
        found = []
        for key in keys:
            path, _, leaf = key.rpartition(".")
            found.append((owner.get_submodule(path)._parameters, leaf, key))
        _found[owner] = found
    return _found[owner]


def _stored(patcher: Any, key: str) -> Tensor:
    """A parameter as it is without patches."""
    value, setter, converter = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:  # the host has put the original aside
        value = patcher.backup[key].weight
    if value is None or setter is not None or converter is not None:
        raise UnsupportedModel(f"{key} is stored in a format of its own")
    return value


def contents(tensor: Tensor, dtype: torch.dtype | None = None) -> list[bytes]:
    """What a tensor is known by: dtype, shape, and 64 bytes of its start, middle and end.

    Of one that is not in RAM, or not in one piece, dtype and shape alone. dtype: as if the tensor
    had been cast to it.
    """
    kind = tensor.dtype if dtype is None else dtype
    known = [f"{kind}{tuple(tensor.shape)}".encode()]
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return known
    size = tensor.numel() * kind.itemsize
    address = tensor.data_ptr()
    if address == 0:
        return known
    part = min(64, size)
    starts = 0, (size - part) // 2, size - part
    if kind == tensor.dtype:
        return [*known, *(ctypes.string_at(address + start, part) for start in starts)]
    flat = tensor.detach().reshape(-1)
    for start in starts:
        first, end = start // kind.itemsize, -(-(start + part) // kind.itemsize)
        raw = flat[first:end].to(kind).view(torch.uint8).numpy().tobytes()
        skipped = start - first * kind.itemsize
        known.append(raw[skipped : skipped + part])
    return known


class _Same:
    """Equals another that stands for the very same object. What is gone equals nothing."""

    def __init__(self, what: Any, weak: bool) -> None:
        self._what = weakref.ref(what) if weak else lambda: what

    def __eq__(self, other: object) -> bool:
        what = self._what()
        return isinstance(other, _Same) and what is not None and what is other._what()

    __hash__ = None  # type: ignore[assignment]


def _canonical(owner: nn.Module, config: UNetConfig, prefix: str) -> dict[str, str]:
    module = owner.get_submodule(prefix.rstrip(".")) if prefix else owner
    if module not in _names:
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        _names[module] = canonical_names(shapes, config)
    return _names[module]


def _description(value: Any) -> tuple[Any, ...]:
    """A patch, or a part of one, as nested tuples: tensors and functions by identity.

    Loaders make new adapter objects around the same tensors each time they run.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_description(entry) for entry in value)
    if isinstance(value, Tensor):  # held weakly: a merge's are another checkpoint
        return (_Same(value, weak=True),)
    if isinstance(value, dict):
        return tuple((key, _description(value[key])) for key in sorted(value, key=str))
    if hasattr(value, "weights") and hasattr(value, "calculate_weight"):
        return (type(value).__name__, _description(value.weights))
    if value is None or isinstance(value, (bool, int, float, str)):
        return (value,)
    return (_Same(value, weak=False),)
