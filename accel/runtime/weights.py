"""Weights of a structure: one arena at fixed addresses, and how source parameters get into it.

Order of operations for every parameter, always: source value -> arena dtype -> float32 sum with the
deltas of all LoRAs -> one rounding -> its places in the constants. So what stands in the arena
depends on the source and the LoRA set alone, never on what stood there before. A LoRA that turns or
scales the weight takes its delta from the weight without any, so that the order of LoRAs is none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import OutOfMemory
from ..plan.memory import align
from ..plan.recipe import Literal, places
from ..plan.schema import Constant, Plan, resolve
from . import lowrank
from .adapters import InRam, Near
from .transfer import Readable, Transfer, transfer_for

Entry = tuple[lowrank.Place, list[lowrank.Change]]
"""Where a parameter lies that is written by a launch of many, and its changes."""

Together = dict[str, Entry]
"""Parameters that one launch writes."""

FACTOR_BYTES = 64 << 20
"""Of LoRAs' factors that are brought to the device for one launch, where the pool has no room."""

LAUNCH_BYTES = 256 << 20
"""Of parameters that cross the bus, after which those that arrived get their changes."""


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
            self._fixed: list[torch.Tensor] = []
            self._table: dict[str, lowrank.Place | None] = {}
            self._launches = False
            for constant, offset, following in zip(
                plan.constants, offsets, [*offsets[1:], end], strict=True
            ):
                self._place(constant, offset, following)

    def _place(self, constant: Constant, offset: int, following: int) -> None:
        kind, shape = resolve(constant.dtype, self.dtype), constant.recipe.shape
        raw = self.storage[offset : offset + prod(shape) * kind.itemsize]
        if padding := self.storage[offset + raw.numel() : following].numel():
            self._fixed.append(self.storage[following - padding : following])
        view = self.constants[constant.name] = raw.view(kind).view(shape)
        for source, place in places(constant.recipe, view):
            if isinstance(source, Literal):
                values = torch.tensor(source.values, dtype=kind, device="cpu")
                place.copy_(values.view(source.shape))
                self._fixed.append(place)
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
            for place in self._fixed:  # no parameter changes it
                _same_place(place, storage).copy_(place)
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
        parked = source.storage if isinstance(source, Waiting) else None
        # Copies alone are not worth a compiler that somebody waits for.
        if adapters or (parked is not None and self._launches):
            self._launches = lowrank.available(self.device, self.dtype)
        launches = self._launches and bool(adapters or parked is not None)
        together: Together = {}
        if launches and parked is not None:
            entries = ((name, self._entry(name, adapters, parked=True)) for name in names)
            together = {name: entry for name, entry in entries if entry is not None}
        rest = [name for name in names if name not in together]
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            contextlib.closing(transfer.values(rest, source)) as values,
        ):
            base, size = storage if parked is None else parked, 0
            kept = (adapter.kept for adapter, _ in adapters if isinstance(adapter, Near))
            pinned = lowrank.Regions(
                (region for copy in kept if copy is not None for region in copy.regions()),
                transfer.lend,
            )
            for name, raw in zip(rest, values, strict=True):
                value = raw.reshape(self.shapes[name])
                entry = self._entry(name, adapters) if launches and parked is None else None
                changed = self._changed(name, value, adapters) if entry is None else value
                for _, place in self._places[name]:
                    _same_place(place, storage).copy_(changed)
                if entry is None:
                    continue
                # Changed in place together with others, while what is next crosses the bus.
                together[name] = entry
                size += value.nbytes
                if size >= LAUNCH_BYTES:
                    self._add(together, base, storage, transfer, pinned)
                    together, size = {}, 0
            self._add(together, base, storage, transfer, pinned)
        written = [place for name in names for place in self._places[name]]
        total = sum(place.numel() * place.element_size() for _, place in written)
        return total, len({constant for constant, _ in written})

    def read_place(self, name: str, storage: torch.Tensor) -> torch.Tensor:
        """A parameter as it stands in a copy of the arena, at the widest where it has several."""
        places = (place for _, place in self._places[name])
        return _same_place(max(places, key=lambda place: place.element_size()), storage)

    def _entry(self, name: str, adapters: Adapters, parked: bool = False) -> Entry | None:
        """A parameter for a launch of many; None if it is written by itself.

        parked: whether its value is parked; one without changes is then copied by the launch, too.
        """
        changes = _changes(name, adapters)
        place = self._tabled(name)
        if place is None or not (changes or parked):
            return None
        tabled = [lowrank.change_of(*change, self.device) for change in changes]
        known = [change for change in tabled if change is not None]
        return (place, known) if len(known) == len(changes) else None

    def _tabled(self, name: str) -> lowrank.Place | None:
        """A parameter's place as the kernel takes it; None for what it cannot write."""
        if name not in self._table:
            (_, place), *others = self._places[name]
            alone = not others and place.dtype == self.dtype
            self._table[name] = lowrank.place_of(place) if alone else None
        return self._table[name]

    def _add(
        self,
        together: Together,
        base: torch.Tensor,
        storage: torch.Tensor,
        transfer: Transfer,
        pinned: lowrank.Regions,
    ) -> None:
        """Write base + changes. What of the factors is in RAM crosses the bus, some at a time."""

        def is_away(factor: torch.Tensor) -> bool:
            return factor.device != self.device and not pinned.hold(factor)

        for portion in self._portions(together):
            changes = (change for _, own in portion.values() for change in own)
            away = InRam(f for change in changes for f in change.factors if is_away(f))
            if away.tensors:
                moved = away.brought(transfer)
                portion = {
                    name: (place, [change.with_factors(moved) for change in own])
                    for name, (place, own) in portion.items()
                }
            arenas = base.view(self.dtype), storage.view(self.dtype)
            lowrank.add(*arenas, list(portion.values()), pinned)

    def _portions(self, together: Together) -> Iterator[Together]:
        """Some at a time, whose factors in RAM are no more than `FACTOR_BYTES`."""
        portion: Together = {}
        size = 0
        for name, (place, changes) in together.items():
            factors = (factor for change in changes for factor in change.factors)
            own = sum(factor.nbytes for factor in factors if factor.device != self.device)
            if portion and size + own > FACTOR_BYTES:
                yield portion
                portion, size = {}, 0
            portion[name] = (place, changes)
            size += own
        if portion:
            yield portion

    def _changed(self, name: str, value: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        """A parameter with its adapters' changes, in float32; as it is without any."""
        changes = _changes(name, adapters)
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
        self._weights, self.storage = weights, storage

    def read(self, name: str) -> torch.Tensor:
        """The parameter, in the copy."""
        return self._weights.read_place(name, self.storage)


def _changes(name: str, adapters: Adapters) -> list[tuple[Patch, float]]:
    """What the adapters change of a parameter."""
    return [
        (adapter.patches[name], strength)
        for adapter, strength in adapters
        if strength != 0.0 and name in adapter.patches
    ]


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
