"""The weights of a ComfyUI MODEL as a source for the arena: its parameters with its patches on.

LoRAs and merges are the host's own patches, computed by the host's own code, so every format that
the host reads works. They are computed in float32 and rounded once, into the arena.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
import xxhash
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ...models import UNetConfig
from ...structure import canonical_names
from ...tensorfile import fingerprint_of

PREFIX = "diffusion_model."

FILE = "switchyard_file"
"""Attachment of a MODEL: the path that it was loaded from."""

_names: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
_found: weakref.WeakKeyDictionary[nn.Module, list[tuple[dict[str, Any], str, str]]] = (
    weakref.WeakKeyDictionary()
)
_tokens: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


class PatchedSource:
    """The parameters of a patcher's model, each with the patches that are on it.

    prefix: the keys' way from the patcher's model to the denoiser, "diffusion_model." or nothing.
    device: where patches are computed.
    Only a weak reference to the patcher is held: a seat must not keep in RAM what the host has
    given up.
    """

    lasting = False

    def __init__(
        self, patcher: Any, config: UNetConfig, prefix: str, device: torch.device, label: str
    ) -> None:
        self._patcher = weakref.ref(patcher)
        self._device = device
        self.label = label
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
        key = self._keys[name]
        patcher = self._alive()
        value = _stored(patcher, key)
        patches = patcher.patches.get(key)
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

    def _alive(self) -> Any:
        patcher = self._patcher()
        if patcher is None:
            raise UnsupportedModel(f"{self.label} is no longer loaded")
        return patcher

    def stamp(self) -> Hashable:
        """Another each time: what may change is compared before a sampling."""
        return object()

    def sample(self) -> str:
        """A digest of a few bytes of every parameter: writes into them in place show in it.

        A few milliseconds for SDXL. Parameters must be in RAM; others are left out.
        """
        patcher = self._alive()
        backup = patcher.backup
        digest = xxhash.xxh3_128()
        for parameters, leaf, key in _places(patcher.model, self._keys.values()):
            value = backup[key].weight if key in backup else parameters[leaf]
            if value is not None:
                digest.update(b"".join(contents(value)))
        return digest.hexdigest()


def identity(patcher: Any) -> Hashable:
    """What a MODEL's unpatched weights are known by: its file where that is known, else itself."""
    path = patcher.get_attachment(FILE)
    if path is None:
        made = getattr(patcher, "cached_patcher_init", None)
        arguments = made[1] if made else ()
        path = arguments[0] if arguments and isinstance(arguments[0], str) else None
    if path is not None and Path(path).suffix == ".safetensors":
        try:
            return fingerprint_of(path), patcher.model.get_dtype()
        except OSError:
            pass
    return _tokens.setdefault(patcher.model, object())


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


def contents(tensor: Tensor) -> list[bytes]:
    """What a tensor is known by: dtype, shape, and 64 bytes of its start, middle and end.

    Of one that is not in RAM, or not in one piece, dtype and shape alone.
    """
    known = [f"{tensor.dtype}{tuple(tensor.shape)}".encode()]
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return known
    address, size = tensor.data_ptr(), tensor.nbytes
    if address == 0:
        return known
    part = min(64, size)
    read = ctypes.string_at
    middle, end = address + (size - part) // 2, address + size - part
    return [*known, read(address, part), read(middle, part), read(end, part)]


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
