"""Weights of a structure: one arena at fixed addresses, and how source parameters get into it.

Order of operations for every parameter, always: source value -> arena dtype -> float32 sum with the
deltas of all LoRAs -> one rounding -> its places in the constants. So what stands in the arena
depends on the source and the LoRA set alone, never on what stood there before. A LoRA that turns or
scales the weight takes its delta from the weight without any, so that none follows another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from ..errors import OutOfMemory
from ..plan.memory import align
from ..plan.recipe import Literal, places
from ..plan.schema import Constant, Plan, resolve
from .lowrank import Batch, batch_size, low_rank, ranks


class Source(Protocol):
    """Where parameters come from: a mapped file, a state dict, a host's module."""

    @property
    def label(self) -> str:
        """A name for reports."""

    def read(self, name: str) -> torch.Tensor:
        """The parameter by canonical name, any floating dtype, any device. Not to be written to."""

    def stamp(self) -> Hashable:
        """Something that differs once what `read` gives has changed.

        Raises `InvalidFile` where it changed in a way that must not be read on from.
        """


class Patch(Protocol):
    """One adapter's change of one parameter."""

    def delta(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        """The change that `strength` makes: new, float32, of `base`'s shape and on its device.

        base: the parameter without any adapter, float32. Not to be written to.
        """


Changes = Mapping[str, Sequence[tuple[Patch, float]]]
"""Canonical parameter name -> the patches on it, each with its strength, which is not 0."""


@dataclass(frozen=True)
class SwapReport:
    """What a change of weights cost: wall seconds, bytes written, constants touched."""

    seconds: float
    bytes: int
    constants: int


class Weights:
    """The live weights: constants of a plan as views of one allocation on the device.

    Raises `OutOfMemory` when the device has no room for them.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        *offsets, end = _offsets(plan, dtype)
        with torch.inference_mode(False):  # written in and out of inference mode
            self.storage = _allocate(end, device)
            self.constants: dict[str, torch.Tensor] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}
            self._places: dict[str, list[tuple[str, torch.Tensor]]] = {}
            for constant, offset in zip(plan.constants, offsets, strict=True):
                self._place(constant, offset)

    def _place(self, constant: Constant, offset: int) -> None:
        kind, shape = resolve(constant.dtype, self.dtype), constant.recipe.shape
        raw = self.storage[offset : offset + prod(shape) * kind.itemsize]
        view = self.constants[constant.name] = raw.view(kind).view(shape)
        for source, place in places(constant.recipe, view):
            if isinstance(source, Literal):
                place.copy_(torch.tensor(source.values, dtype=kind).view(source.shape))
            else:
                self.shapes[source.name] = source.shape
                self._places.setdefault(source.name, []).append((constant.name, place))

    @property
    def bytes(self) -> int:
        """Size of the allocation."""
        return self.storage.numel()

    def write(self, names: Collection[str], source: Source, changes: Changes) -> SwapReport:
        """Bring the parameters `names` to the values that `source` and `changes` give them."""
        started = time.perf_counter()
        written, touched = 0, set()
        with torch.inference_mode(False), torch.no_grad(), self._exact_matmul():
            stored = ((name, source.read(name)) for name in names)
            for name, value in self._values(stored, changes):
                for constant, place in self._places[name]:
                    place.copy_(value)
                    written += place.numel() * place.element_size()
                    touched.add(constant)
        self.synchronize()
        return SwapReport(time.perf_counter() - started, written, len(touched))

    def _values(
        self, stored: Iterable[tuple[str, torch.Tensor]], changes: Changes
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter with its changes, on the device.

        In the order given, but for low-rank changes on a GPU, which go together by shape. Of what
        is `stored`, each is used before the next is asked for.
        """
        batches: dict[Hashable, Batch] = {}
        for name, raw in stored:
            shape = self.shapes[name]
            # The raw bytes go over the bus; the cast and the transposition happen on the device.
            value = raw.detach().to(self.device, non_blocking=True).reshape(shape)
            own = changes.get(name, ())
            together = low_rank(own)
            key = (shape, ranks(together or ()))
            size = batch_size(*key, self.device) if together else 1
            if together is None or size == 1:
                yield name, self._value(value, own)
                continue
            if key not in batches:
                batches[key] = Batch(shape, size, self.device)
            if batches[key].add(name, value.to(self.dtype), together):
                yield from batches.pop(key).values()
        for batch in batches.values():
            yield from batch.values()

    def _value(self, value: torch.Tensor, changes: Sequence[tuple[Patch, float]]) -> torch.Tensor:
        if not changes:
            return value
        base = value.to(self.dtype).to(torch.float32)
        (patch, strength), *others = changes
        total = patch.delta(base, strength)
        for patch, strength in others:
            total += patch.delta(base, strength)
        return total.add_(base)

    @contextlib.contextmanager
    def _exact_matmul(self) -> Iterator[None]:
        """Deltas, the source's own too, in full float32, whatever the host allows its products.

        PyTorch has an older and a newer setting, and refuses the older's use after the newer's.
        """
        setting: Any = torch.backends.cuda.matmul
        if self.device.type != "cuda":
            yield
            return
        name: str
        exact: Any
        before: Any
        try:
            name, exact, before = "allow_tf32", False, setting.allow_tf32
        except RuntimeError:
            name, exact, before = "fp32_precision", "ieee", setting.fp32_precision
        if before == exact:
            yield
            return
        setattr(setting, name, exact)
        try:
            yield
        finally:
            setattr(setting, name, before)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def weights_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes that a structure's weights take on the device."""
    return _offsets(plan, dtype)[-1]


def _offsets(plan: Plan, dtype: torch.dtype) -> list[int]:
    """Where each constant starts, and the end of the last."""
    offsets = [0]
    for constant in plan.constants:
        size = prod(constant.recipe.shape) * resolve(constant.dtype, dtype).itemsize
        offsets.append(offsets[-1] + align(size))
    return offsets


def _allocate(size: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{size >> 20} MiB of weights do not fit on {device}") from error
