"""Weights of a structure: one arena at fixed addresses, and how source parameters get into it.

Order of operations for every parameter, always: source value -> arena dtype -> float32 sum with the
deltas of all LoRAs -> one rounding -> its places in the constants. So what stands in the arena
depends on the source and the LoRA set alone, never on what stood there before. A LoRA that turns or
scales the weight takes its delta from the weight without any, so that the order of LoRAs is none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import OutOfMemory
from ..plan.memory import align
from ..plan.recipe import Literal, places
from ..plan.schema import Constant, Plan, resolve
from .lowrank import OPEN_BATCHES, Batch, batch_size, low_rank, ranks
from .transfer import Readable, Transfer, transfer_for


class Source(Protocol):
    """Where parameters come from: a mapped file, a state dict, a host's module.

    One that is `transfer.Stageable` or `transfer.Combined` too is read faster.
    """

    @property
    def label(self) -> str:
        """A name for reports."""

    @property
    def lasting(self) -> bool:
        """Whether other sources can have its stamp, as two of one file have: copies are kept."""

    def read(self, name: str) -> torch.Tensor:
        """The parameter by canonical name, any floating dtype, any device. Not to be written to."""

    def stamp(self) -> Hashable:
        """Equal stamps, of whatever sources, vouch for equal values.

        Raises `InvalidFile` where what is read changed in a way that must not be read on from.
        """


@runtime_checkable
class Layered(Protocol):
    """A source whose parameters, but for some, are those of another that is found again."""

    @property
    def bare(self) -> Source | None:
        """The other, which lasts; None where there is none."""

    @property
    def changed(self) -> Collection[str]:
        """The parameters that are not its."""

    def change(self, name: str, bare: torch.Tensor) -> torch.Tensor:
        """One of these, on the device of `bare`: the other's, at least as exact as an arena's."""


class Patch(Protocol):
    """One adapter's change of one parameter."""

    def delta(self, base: torch.Tensor, strength: float) -> torch.Tensor:
        """The change that `strength` makes: new, float32, of `base`'s shape and on its device.

        base: the parameter without any adapter, float32. Not to be written to.
        """


class Adapter(Protocol):
    """A LoRA: its patches by canonical parameter name."""

    @property
    def name(self) -> str:
        """A name for reports."""

    @property
    def patches(self) -> Mapping[str, Patch]:
        """The change of each parameter that the adapter touches."""


Adapters = tuple[tuple[Adapter, float], ...]


@dataclass(frozen=True)
class SwapReport:
    """What a change of weights cost: wall seconds, bytes written, constants touched."""

    seconds: float
    bytes: int
    constants: int

    def since(self, started: float) -> SwapReport:
        """The same with all the time that has passed since `started`, of `time.perf_counter`."""
        return replace(self, seconds=time.perf_counter() - started)


class Weights:
    """The live weights: constants of a plan as views of one allocation on the device.

    Raises `OutOfMemory` when the device has no room for them.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._transfer = transfer_for(device)
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
                values = torch.tensor(source.values, dtype=kind, device="cpu")
                place.copy_(values.view(source.shape))
            else:
                self.shapes[source.name] = source.shape
                self._places.setdefault(source.name, []).append((constant.name, place))

    @property
    def bytes(self) -> int:
        """Size of the allocation."""
        return self.storage.numel()

    def write(self, names: Collection[str], source: Readable, adapters: Adapters) -> SwapReport:
        """Bring the parameters `names` to the values that `source` and `adapters` give them."""
        started = time.perf_counter()
        with self._exact_matmul():
            written, touched = self._write(names, source, adapters, self.storage, self._transfer)
        self.synchronize()
        return SwapReport(time.perf_counter() - started, written, touched)

    def blank(self) -> torch.Tensor:
        """Room for a copy of the arena. Raises `torch.OutOfMemoryError`."""
        with torch.inference_mode(False):
            return torch.empty_like(self.storage)

    def copy(self) -> torch.Tensor:
        """A copy of the arena. Raises `torch.OutOfMemoryError`."""
        with torch.inference_mode(False):
            return self.storage.clone()

    def write_copy(self, storage: torch.Tensor, source: Readable, transfer: Transfer) -> None:
        """Make `storage` what the arena would be with `source` in it and no adapters.

        Another thread may run the network meanwhile. On a GPU the work has only been asked for.
        """
        with torch.inference_mode(False):
            storage.copy_(self.storage)  # for the constants that no parameter changes
            self._write(self.shapes, source, (), storage, transfer)

    def restore(self, storage: torch.Tensor) -> SwapReport:
        """Make the arena what it was when `storage` was copied from it."""
        started = time.perf_counter()
        with torch.inference_mode(False):
            self.storage.copy_(storage)
        self.synchronize()
        return SwapReport(time.perf_counter() - started, self.bytes, len(self.constants))

    def _write(
        self,
        names: Collection[str],
        source: Readable,
        adapters: Adapters,
        storage: torch.Tensor,
        transfer: Transfer,
    ) -> tuple[int, int]:
        """Bytes and constants written."""
        written, touched = 0, set()
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            contextlib.closing(transfer.values(list(names), source)) as values,
        ):
            for name, value in self._values(zip(names, values, strict=True), adapters):
                for constant, place in self._places[name]:
                    _same_place(place, storage).copy_(value)
                    written += place.numel() * place.element_size()
                    touched.add(constant)
        return written, len(touched)

    def read_place(self, name: str, storage: torch.Tensor) -> torch.Tensor:
        """A parameter as it stands in a copy of the arena, at the widest where it has several."""
        places = (place for _, place in self._places[name])
        return _same_place(max(places, key=lambda place: place.element_size()), storage)

    def _values(
        self, stored: Iterable[tuple[str, torch.Tensor]], adapters: Adapters
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of those on the device with its adapters.

        In the order given, but for low-rank changes on a GPU, which go together by shape. Of what
        is `stored`, each is used before the next is asked for.
        """
        batches: dict[Hashable, Batch] = {}
        for name, raw in stored:
            shape = self.shapes[name]
            value = raw.reshape(shape)
            changes = [
                (adapter.patches[name], s)
                for adapter, s in adapters
                if name in adapter.patches and s != 0.0
            ]
            together = low_rank(changes)
            key = (shape, ranks(together or ()))
            size = batch_size(*key, self.device) if together else 1
            if together is None or size == 1:
                yield name, self._value(value, changes)
                continue
            if key not in batches:
                if len(batches) == OPEN_BATCHES:  # a LoRA may have a rank of its own in each layer
                    yield from batches.pop(next(iter(batches))).values()
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


class Waiting:
    """A copy of the arena as a source: the parameters of a checkpoint, cast and on the device."""

    def __init__(self, weights: Weights, storage: torch.Tensor) -> None:
        self._weights, self._storage = weights, storage

    def read(self, name: str) -> torch.Tensor:
        """The parameter, in the copy."""
        return self._weights.read_place(name, self._storage)


def _same_place(place: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
    """Where `place`, a view of the arena, would be if the arena were `storage`."""
    view = storage.view(place.dtype)
    return view.as_strided(place.shape, place.stride(), place.storage_offset())


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
