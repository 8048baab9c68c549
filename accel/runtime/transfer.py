"""Bringing parameters to a device: several threads read ahead, large copies cross the bus.

Reading and crossing take turns in *slots*: a reader fills a slot's pinned half from a file, one
copy takes it to the slot's device half on a stream of its own, and from there the caller moves
each parameter to its place, casts and transpositions included. On a CPU a slot has one half.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Hashable,
    Iterator,
    Sequence,
)
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from mmap import PAGESIZE
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..background import closing
from ..plan.memory import align
from ..tensorfile import TensorInfo

READERS = 4
SLOTS = READERS + 2
KEPT = 2
"""Sets of slots that stay for the next time, since pinning takes longer than copying."""

SLOT_BYTES = 32 << 20
"""Large enough that a copy runs at the bus's speed, small enough that the first begins at once."""


PAUSE = 6
"""Times as long as pinning a piece took, for which pinning in the background leaves the driver to
those who render: a step beside it takes some 2 ms longer without pauses worth the name."""

PIECE_BYTES = 4 << 20
"""That are pinned at once, however large a value is: the driver may let no other thread launch
meanwhile, some 0.14 ms a MiB beside an H200. They cross the bus at once, too, for which they need
several times as long as to be asked for."""

REGION_BYTES = 16 << 20
"""Of a copy in RAM that are lent at once, more or less: what lies between two values that are used
is lent along with them."""


class Readable(Protocol):
    """What parameters are read from."""

    def read(self, name: str) -> Tensor:
        """The parameter by canonical name."""


@runtime_checkable
class Stageable(Readable, Protocol):
    """A source whose values reader threads can put where they are wanted."""

    def stored(self, name: str) -> TensorInfo | None:
        """Shape and dtype of what `read_into` gives; None where `read` is as good."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Put the value into `out`, on the CPU, contiguous. Several threads call this at once."""


class Stamped(Readable, Protocol):
    """What parameters are read from, and whether they are still the same."""

    def stamp(self) -> Hashable:
        """Equal stamps vouch for equal values."""


@runtime_checkable
class Combined(Protocol):
    """A source whose values are made of those of others, on the device."""

    @property
    def parts(self) -> Sequence[Stamped]:
        """The others."""

    @property
    def combine(self) -> Callable[[list[Tensor]], Tensor]:
        """Their float32 values, which it may write to, to the float32 result."""


@dataclass(frozen=True)
class Sum:
    """A `Combined` source with other parts, which hold the same."""

    parts: Sequence[Readable]
    combine: Callable[[list[Tensor]], Tensor]

    def read(self, name: str) -> Tensor:
        """The parameter, computed on the CPU."""
        values = [part.read(name).to("cpu", torch.float32, copy=True) for part in self.parts]
        return self.combine(values)


@dataclass(frozen=True)
class Overlay:
    """The parameters of a source, of which those in `names` are changed.

    change: a name and the parameter, on the device and not to be written to, to the other value.
    """

    below: Readable
    change: Callable[[str, Tensor], Tensor]
    names: Collection[str]

    def read(self, name: str) -> Tensor:
        """The parameter, changed if it is to be."""
        value = self.below.read(name)
        return self.change(name, value) if name in self.names else value


@dataclass(frozen=True)
class Item:
    """A parameter and where its bytes begin in a slot or a copy."""

    name: str
    info: TensorInfo
    start: int

    @property
    def bytes(self) -> int:
        """Size of the value."""
        return self.info.bytes

    def view(self, raw: Tensor, base: int = 0) -> Tensor:
        """The value in `raw`, bytes that begin at `base`."""
        start = self.start - base
        return raw[start : start + self.bytes].view(self.info.dtype).view(self.info.shape)


class HostBytes:
    """Bytes of RAM in pages of their own, since two pinned regions must share none.

    PyTorch's own pinned memory comes in powers of two. Raises `torch.OutOfMemoryError`.
    """

    def __init__(self, size: int) -> None:
        pages = _whole_pages(size)
        with torch.inference_mode(False):
            try:
                room = torch.empty(pages + PAGESIZE, dtype=torch.uint8, device="cpu")
            except RuntimeError as error:  # PyTorch's CPU allocator raises nothing finer
                raise torch.OutOfMemoryError(str(error)) from error
            start = -room.data_ptr() % PAGESIZE
            self.tensor = room[start : start + size]

    def pin(self, start: int, end: int) -> None:
        """Pin the bytes from `start`, where a page begins, to `end`, in whose page nothing else is.

        One copy must not cross two regions that were pinned apart: they are to meet where `_cut`
        cuts. Raises `torch.OutOfMemoryError`.
        """
        size = _whole_pages(end - start)
        if not size:
            return
        runtime: Any = torch.cuda.cudart()
        address = self.tensor.data_ptr() + start
        if int(runtime.cudaHostRegister(address, size, 0)) != 0:
            with contextlib.suppress(
                RuntimeError
            ):  # takes the error, which the next launch reports
                torch.zeros(1, device="cuda")
            raise torch.OutOfMemoryError(f"{size >> 20} MiB of RAM cannot be pinned")
        # The tensor is an argument, so that its memory goes after it has been unpinned.
        weakref.finalize(self, _unpin, address, self.tensor)


def _whole_pages(size: int) -> int:
    return -(-size // PAGESIZE) * PAGESIZE


def _unpin(address: int, tensor: Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


class HostCopy:
    """All parameters of a source side by side in RAM, as they are stored."""

    def __init__(self, names: Sequence[str], source: Stageable) -> None:
        self.items, end = _side_by_side(names, source)
        self.host = HostBytes(end)

    @staticmethod
    def bytes_for(names: Sequence[str], source: Stageable) -> int | None:
        """The size of such a copy; None where the source gives nothing that could be copied."""
        if not all(source.stored(name) for name in names):
            return None
        return _side_by_side(names, source)[1]

    def read(self, name: str) -> Tensor:
        """The value, in the copy."""
        return self.items[name].view(self.host.tensor)

    def stored(self, name: str) -> TensorInfo:
        """Its shape and dtype."""
        return self.items[name].info

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy it into `out`, of its shape and dtype."""
        out.copy_(self.read(name))

    def regions(self) -> list[Tensor]:
        """Its bytes in parts of whole values, of which those that are used are lent."""
        raw, runs = self.host.tensor, _neighbours(list(self.items.values()), REGION_BYTES)
        return [raw[run[0].start : run[-1].start + run[-1].bytes] for run in runs]


def _cut(raw: Tensor) -> list[tuple[int, int]]:
    """Where pieces of bytes begin and end, which is where an address is a multiple of their size.

    So a part of what was pinned in pieces is known to be cut in the same places.
    """
    size, first = raw.numel(), -raw.data_ptr() % PIECE_BYTES
    begins = [0, *range(first or PIECE_BYTES, size, PIECE_BYTES)]
    return [pair for pair in itertools.pairwise([*begins, size]) if pair[0] < pair[1]]


def _cross(raw: Tensor, there: Tensor) -> None:
    """Ask for pinned bytes to be copied to the beginning of `there`, on the device."""
    for begin, end in _cut(raw):
        there[begin:end].copy_(raw[begin:end], non_blocking=True)


def _side_by_side(names: Sequence[str], source: Stageable) -> tuple[dict[str, Item], int]:
    """Where each value of a source stands in a copy of it, and the end of the last."""
    items: dict[str, Item] = {}
    end = 0
    for name in names:
        info = source.stored(name)
        assert info is not None
        items[name] = Item(name, info, end)
        end = align(end + info.bytes)
    return items, end


class Slot:
    """Room for a batch of values: on the host, and on the device unless that is the CPU."""

    def __init__(self, size: int, device: torch.device, background: bool = False) -> None:
        self.size, self.device = size, device
        self._host: HostBytes | None = None
        if device.type == "cuda":
            with torch.inference_mode(False):
                self.there = torch.empty(size, dtype=torch.uint8, device=device)
            # A thread that waits for one that blocks leaves its core to others.
            self.crossed, self.used = torch.cuda.Event(blocking=background), torch.cuda.Event()
            self.used.record(torch.cuda.current_stream(device))

    @property
    def host(self) -> Tensor:
        """The host's half, which is made when it is first wanted: what is pinned needs none."""
        if self._host is None:
            self._host = HostBytes(self.size)
            if self.device.type == "cuda":
                with contextlib.suppress(torch.OutOfMemoryError):  # slower, and right
                    self._host.pin(0, self.size)
        return self._host.tensor

    def fill(self, items: Sequence[Item], source: Stageable) -> None:
        """Read values into the host's half, in a reader thread."""
        if self.device.type == "cuda":
            self.crossed.synchronize()  # what stood here before is still being sent
        with torch.inference_mode(False), torch.no_grad():
            for item in items:
                source.read_into(item.name, item.view(self.host))

    def send(self, raw: Tensor, stream: Any, whole: bool) -> Tensor:
        """`raw`, bytes in pinned RAM, on the device, for the work that is asked for after this.

        whole: pinned at once, as the slot's own half is: one copy takes less of the host, whose
        other threads render.
        """
        if stream is None:
            return raw
        stream.wait_event(self.used)
        with torch.cuda.stream(stream):
            if whole:
                self.there[: raw.numel()].copy_(raw, non_blocking=True)
            else:
                _cross(raw, self.there)
            self.crossed.record(stream)
        torch.cuda.current_stream(self.device).wait_event(self.crossed)
        return self.there[: raw.numel()]

    def done(self) -> None:
        """All work with what was sent last has been asked for."""
        if self.device.type == "cuda":
            self.used.record(torch.cuda.current_stream(self.device))


class Transfer:
    """Parameters of sources as tensors on `device`. Threads may share it.

    background: readers run at a low priority, for what nobody waits for yet.
    """

    def __init__(
        self, device: torch.device, background: bool = False, slot_bytes: int = SLOT_BYTES
    ) -> None:
        self.device, self._slot_bytes, self._background = device, slot_bytes, background
        self._readers = ThreadPoolExecutor(
            READERS, "switchyard-reader", initializer=_give_way if background else None
        )
        self._lock = threading.Lock()
        self._idle: list[list[Slot]] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def values(self, names: Sequence[str], source: Readable) -> Generator[Tensor, None, None]:
        """The value of each name in order, valid until the next is asked for, not to be written.

        Close it when it is not read to the end.
        """
        if isinstance(source, (Combined, Sum)):
            yield from self._combined(names, source)
        elif isinstance(source, Overlay):
            yield from self._overlaid(names, source)
        elif isinstance(source, HostCopy):
            yield from self._from_copy(names, source)
        elif isinstance(source, Stageable):
            yield from self._staged(names, source)
        else:
            for name in names:
                yield self._direct(name, source)

    def gather(
        self, names: Sequence[str], source: Stageable, wanted: threading.Event | None = None
    ) -> HostCopy:
        """A copy of the source in RAM, pinned where the device is a GPU; read by all readers.

        wanted: for a copy that nobody waits for yet; is set once somebody does. Until then pinning
        leaves the driver to others. Raises CancelledError where the process ends meanwhile.
        """
        copy = HostCopy(names, source)

        def read(name: str) -> None:
            if closing.is_set():  # the process ends, and waits for this
                raise CancelledError
            with torch.inference_mode(False), torch.no_grad():
                source.read_into(name, copy.read(name))

        reading = {name: self._readers.submit(read, name) for name in copy.items}
        try:
            pieces = deque(_cut(copy.host.tensor) if self.device.type == "cuda" else [])
            for name, item in copy.items.items():
                reading[name].result()
                # Once it is filled: to find the pages would take several times as long.
                while pieces and pieces[0][1] <= align(item.start + item.bytes):
                    if closing.is_set():
                        raise CancelledError
                    began = time.perf_counter()
                    copy.host.pin(*pieces.popleft())
                    if wanted is not None:
                        # Here, after each piece: the driver is not others' while one is pinned, and
                        # only then, and here alone it is known for how long it was not.
                        wanted.wait(PAUSE * (time.perf_counter() - began))
            if closing.is_set():
                raise CancelledError
        finally:
            for left in reading.values():
                left.cancel()
        return copy

    def bring(self, names: Sequence[str], source: Stageable) -> dict[str, Tensor]:
        """A copy of the source on the device, in one allocation, as it is stored.

        On a GPU the work has only been asked for. Raises `torch.OutOfMemoryError`.
        """
        items, end = _side_by_side(names, source)
        with torch.inference_mode(False), torch.no_grad():
            storage = torch.empty(end, dtype=torch.uint8, device=self.device)
            with contextlib.closing(self._sent(names, source)) as runs:
                for run, sent in runs:
                    assert run is not None
                    start = items[run[0].name].start  # they lie side by side here and there
                    storage[start : start + sent.numel()].copy_(sent)
            return {name: item.view(storage) for name, item in items.items()}

    def lend(self, raw: Tensor) -> Tensor:
        """Bytes of pinned RAM on the device, for what is asked for next; on a CPU they themselves.

        The work has only been asked for: they must stay until it is done. Raises
        `torch.OutOfMemoryError`.
        """
        if self._stream is None:
            return raw
        current = torch.cuda.current_stream(self.device)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            there = torch.empty_like(raw, device=self.device)
            _cross(raw, there)
            there.record_stream(current)
        current.wait_stream(self._stream)
        return there

    def _direct(self, name: str, source: Readable) -> Tensor:
        # The raw bytes go over the bus; the cast and the transposition happen on the device.
        return source.read(name).detach().to(self.device, non_blocking=True)

    def _combined(self, names: Sequence[str], source: Combined | Sum) -> Iterator[Tensor]:
        with contextlib.ExitStack() as stack:
            parts = [
                stack.enter_context(contextlib.closing(self.values(names, part)))
                for part in source.parts
            ]
            for values in zip(*parts, strict=True):
                yield source.combine([value.to(torch.float32, copy=True) for value in values])

    def _overlaid(self, names: Sequence[str], source: Overlay) -> Iterator[Tensor]:
        with contextlib.closing(self.values(names, source.below)) as values:
            for name, value in zip(names, values, strict=True):
                yield source.change(name, value) if name in source.names else value

    def _from_copy(self, names: Sequence[str], source: HostCopy) -> Iterator[Tensor]:
        """Neighbours cross the bus together, straight from where they lie."""
        raw = source.host.tensor
        items = [source.items[name] for name in names]
        size = self._size([item.bytes for item in items])
        with self._slots(size, SLOTS) as slots:
            runs = _neighbours(items, size)
            for run, slot in zip(runs, itertools.cycle(slots), strict=False):
                begin, end = run[0].start, run[-1].start + run[-1].bytes
                sent = slot.send(raw[begin:end], self._stream, whole=False)
                for item in run:
                    yield item.view(sent, begin)
                slot.done()

    def _staged(self, names: Sequence[str], source: Stageable) -> Iterator[Tensor]:
        with contextlib.closing(self._sent(names, source)) as runs:
            for run, sent in runs:
                if run is None:
                    yield sent
                    continue
                for item in run:
                    yield item.view(sent)

    def _sent(
        self, names: Sequence[str], source: Stageable
    ) -> Generator[tuple[list[Item] | None, Tensor], None, None]:
        """Runs of values as bytes on the device, valid until the next is asked for.

        What is not staged comes as its value, with None.
        """
        infos = {name: source.stored(name) for name in names}
        size = self._size([info.bytes for info in infos.values() if info is not None])
        found = list(_batches(infos, size))
        batches = iter(found)
        running: deque[tuple[str | list[Item], Slot | None, Future[None] | None]] = deque()
        with self._slots(size, min(SLOTS, len(found))) as slots:
            free = deque(slots)
            try:
                while True:
                    while free and (batch := next(batches, None)) is not None:
                        if isinstance(batch, str):
                            running.append((batch, None, None))
                            continue
                        slot = free.popleft()
                        future = self._readers.submit(slot.fill, batch, source)
                        running.append((batch, slot, future))
                    if not running:
                        return
                    first, filled, read = running[0]
                    if read is not None:
                        read.result()
                    running.popleft()
                    if isinstance(first, str):
                        yield None, self._direct(first, source)
                        continue
                    assert filled is not None
                    last = first[-1]
                    host = filled.host[: last.start + last.bytes]
                    yield first, filled.send(host, self._stream, whole=True)
                    filled.done()
                    free.append(filled)
            finally:
                for _, _, left in running:
                    if left is not None:
                        left.cancel()

    def _size(self, sizes: Sequence[int]) -> int:
        """The size of a slot for values of these sizes: as is usual, unless one is larger."""
        total = sum(map(align, sizes))
        return max(min(self._slot_bytes, total), max(map(align, sizes), default=0))

    @contextlib.contextmanager
    def _slots(self, size: int, count: int) -> Iterator[list[Slot]]:
        """Slots for one run through a source's values. Runs at the same time have slots each.

        Those of a run that was broken off are not used again: readers may still be at them.
        """
        with self._lock:
            slots = self._idle.pop() if self._idle else []
        slots = [slot for slot in slots if slot.size >= size]
        slots += [Slot(size, self.device, self._background) for _ in range(count - len(slots))]
        whole = False
        try:
            yield slots
            whole = True
        finally:
            with self._lock:
                keep = whole and len(self._idle) < KEPT
                if keep:
                    self._idle.append(slots)
            if not keep and self._stream is not None:
                # They go once nothing is sent from them or read on the device any more.
                self._stream.synchronize()
                torch.cuda.current_stream(self.device).synchronize()

    def give_back(self) -> None:
        """Free the slots that stay for the next time."""
        with self._lock:
            self._idle.clear()


def _batches(infos: dict[str, TensorInfo | None], size: int) -> Iterator[str | list[Item]]:
    """Names in order: those that are staged in lists that fill a slot, the others one by one."""
    batch: list[Item] = []
    end = 0
    for name, info in infos.items():
        if batch and (info is None or end + info.bytes > size):
            yield batch
            batch, end = [], 0
        if info is None:
            yield name
            continue
        batch.append(Item(name, info, end))
        end = align(end + info.bytes)
    if batch:
        yield batch


def _neighbours(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Runs of items that follow one another in a copy and together fit into a slot."""
    run: list[Item] = []
    for item in items:
        if run and (
            item.start != align(run[-1].start + run[-1].bytes)
            or item.start + item.bytes - run[0].start > size
        ):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _give_way() -> None:
    """Let the threads that render go first. Linux alone has priorities of threads by this call."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def transfer_for(device: torch.device, background: bool = False) -> Transfer:
    """The device's own, one for those who wait and one for reading ahead."""
    return _transfer(device, background)


@lru_cache(maxsize=16)
def _transfer(device: torch.device, background: bool) -> Transfer:
    return Transfer(device, background)
