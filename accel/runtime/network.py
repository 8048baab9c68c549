"""One structure on one device: plan, live weights, seats, executables by shape.

A *seat* is a set of weights that belongs to the structure: a checkpoint and its LoRAs. One seat is
live, that is, in the arena which captured graphs read. What was live is *parked* in the pool, as a
copy of the arena that is found again by what stands in it, whichever seat asks: a checkpoint that
comes back, with the LoRAs it had, is one copy on the device, and LoRAs are put on and taken off
from the copy of the bare checkpoint. The tensors of LoRAs wait there too, beside such copies and
never in place of one. What finds no room in the pool is read from its source.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import torch

from ..background import closing
from ..errors import OutOfMemory, SwitchyardError
from ..plan.schema import Plan
from ..tuning import Selector, selector_for
from .adapters import InRam, Near, tensors_of
from .arena import Arena
from .calls import calls_ahead
from .executable import Executable, PromptState, bind_dims
from .pool import PINNED, Pool, process_pool
from .transfer import Combined, HostCopy, Overlay, Readable, Stageable, Sum, transfer_for
from .weights import Adapter, Adapters, Layered, Source, SwapReport, Waiting, Weights

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ADAPTER = object()
"""Marks what copies of adapters are in the pool, where others begin with a source's stamp."""

MAX_EXECUTABLES = 64
"""Shapes kept ready. A captured graph of a large UNet takes some 10 MiB beside the shared arena."""


@dataclass(eq=False)
class Seat:
    """Weights that may be live. `stamp`: that of the source when the weights were read."""

    source: Source | None = None
    stamp: Hashable = None
    adapters: Adapters = ()


@dataclass
class Counters:
    """What happened since the network was made; the report shows it."""

    binds: int = 0
    graphs: int = 0
    forwards: int = 0
    prompt_hits: int = 0
    evictions: int = 0
    renewed: int = 0
    activations: list[float] = field(default_factory=list)


class Network:
    """Runs a plan for any shape with any seat. Callers hold the session's lock.

    selector: chooses the kernels; by default the device's own, one that waits for compilers while
    `waiting` is set, or else one that lets libraries run meanwhile, until `refresh`.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        selector: Selector | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.plan, self.device, self.dtype = plan, device, dtype
        self.pool = process_pool() if pool is None else pool
        self._tier, self._owner = str(device), object()
        self._used: frozenset[Hashable] = frozenset()
        weakref.finalize(self, self.pool.forget, self._owner)
        self._selector = selector
        self.waiting = False
        self.arena = Arena(device)
        self.counters = Counters()
        self.live: Seat | None = None
        self._epoch = 0
        self._watched: dict[int, weakref.ref[Adapter]] = {}
        self._coming: dict[Hashable, _Coming] = {}
        self._fetching, self._unwanted = threading.Lock(), threading.Event()
        self._executables: OrderedDict[Any, Executable] = OrderedDict()
        self._prompts: dict[Any, PromptState] = {}
        self._optional = [entry.name for entry in plan.inputs if entry.optional]
        self._plans: dict[frozenset[str], Plan] = {}
        self._prepared: set[Any] = set()
        cuda = device.type == "cuda"
        self._graph_pool = torch.cuda.graph_pool_handle() if cuda else None
        self._last_run = torch.cuda.Event() if cuda else None
        self.weights = self._room_for(lambda: Weights(plan, device, dtype))

    def _room_for(self, make: Callable[[], T]) -> T:
        """What `make` makes; where memory runs out, again once what waits has been given up, and
        at last without the sizes that are ready.
        """
        for give_up in (self._give_up_waiting, self.clear_executables):
            # Swallowed before anything is given up: with the error goes what it holds in memory.
            with contextlib.suppress(OutOfMemory, torch.OutOfMemoryError):
                return make()
            give_up()
        return make()

    def _give_up_waiting(self) -> None:
        self._stop_fetching()
        self.pool.shrink(self._tier)
        self._give_back_slots()

    def _give_back_slots(self) -> None:
        for background in (False, True):
            transfer_for(self.device, background).give_back()

    # Weights.

    def load(self, seat: Seat, source: Source) -> SwapReport:
        """Seat the parameters of `source` with the seat's LoRAs on them, and make the seat live.

        On failure the seat keeps what it had, which is brought back when it is next used.
        """
        started = time.perf_counter()
        stamp = source.stamp()
        if self.live is not seat or (seat.source is not None and seat.source.lasting):
            self._park(_uses(source, stamp, seat.adapters))
        self._wait_for(stamp)
        return self._bring(seat, source, stamp, seat.adapters).since(started)

    def update(self, seat: Seat, names: Collection[str], source: Source) -> SwapReport:
        """Give a seat another source that differs from its own in the parameters `names` alone.

        The caller vouches for that. The seat is live afterwards; on failure it holds nothing.
        """
        if self.live is not seat and not self.parked(seat):
            return self.load(seat, source)
        try:
            self.activate(seat)
            stamp = source.stamp()
            origin = [self._nearest(source, stamp)]
            return self._write(seat, names, source, stamp, seat.adapters, origin)
        except BaseException:
            self.leave(seat)
            raise

    def set_adapters(self, seat: Seat, adapters: Adapters) -> SwapReport:
        """Replace the seat's whole LoRA set, rewriting only parameters whose adapters change.

        On failure the seat keeps what it had, which is brought back when it is next used.
        """
        started = time.perf_counter()
        source = _source_of(seat)
        stamp = source.stamp()
        if self.live is not seat or stamp != seat.stamp:  # all of it anew, never a mixture
            if self.live is not seat:
                self._park(_uses(source, stamp, adapters))
                self._wait_for(stamp)
            return self._bring(seat, source, stamp, adapters).since(started)
        if not _standing(seat.adapters):
            self._park()  # what LoRAs are put on, and taken off from
        names = _differing(self.weights.shapes, seat.adapters, adapters)
        if _differing(names, (), seat.adapters):
            origin = [self._nearest(source, stamp)]
        else:  # what stands in the arena is what would be read
            origin = [Waiting(self.weights, self.weights.storage)]
        return self._write(seat, names, source, stamp, adapters, origin).since(started)

    def activate(self, seat: Seat) -> None:
        """Make `seat` the live one."""
        if self.live is seat:
            return
        source = _source_of(seat)
        started = time.perf_counter()
        self._park(_uses(source, seat.stamp, seat.adapters))
        stamp = seat.stamp
        if not self.parked(seat):
            stamp = source.stamp()
            self._wait_for(stamp)
        self._bring(seat, source, stamp, seat.adapters)
        self.counters.activations.append(time.perf_counter() - started)

    def prefetch(
        self,
        source: Source,
        onto_device: bool = True,
        keep: Callable[[Hashable], bool] | None = None,
    ) -> Future[None]:
        """Bring a checkpoint nearer in the background: onto the device, else into pinned RAM.

        onto_device: whether the device is asked at all. keep: asked with the stamp of what waits,
        whether it has to stay, beside what is in use and what was fetched ahead and not yet used.

        A hint: where there is no room, or the source cannot be read by threads or found again,
        nothing happens. What fails is said in the log, and again when the checkpoint is loaded.
        """
        if not source.lasting:
            nothing: Future[None] = Future()
            nothing.set_result(None)
            return nothing
        stamp = source.stamp()
        with _coming_lock:
            for done in [key for key, coming in self._coming.items() if coming.job.done()]:
                del self._coming[done]
            if stamp not in self._coming:
                keep, wanted = keep or _nothing, threading.Event()
                # Weakly: what is yet to come must not keep a network whose engines are gone.
                network = weakref.ref(self)
                job = _prefetcher().submit(
                    _prefetch, network, source, stamp, onto_device, keep, wanted
                )
                self._coming[stamp] = _Coming(job, wanted)
            return self._coming[stamp].job

    def hasten(self, stamp: Hashable) -> Future[None] | None:
        """The prefetch of a checkpoint, if there is one, which hurries from now on.

        To be called by who waits for it. Otherwise it leaves the driver to those who render.
        """
        with _coming_lock:
            coming = self._coming.get(stamp)
        if coming is None:
            return None
        coming.wanted.set()
        return coming.job

    def _bring(self, seat: Seat, source: Source, stamp: Hashable, adapters: Adapters) -> SwapReport:
        """Make all of `source` with `adapters` live, from the nearest place that has it."""
        copy = self.pool.get(self._tier, self._owner, (stamp, _standing(adapters)))
        if copy is not None:
            with self._rewriting(seat, source, stamp, adapters):
                return self.weights.restore(copy.storage)
        bare = self._bare(source, stamp) if _standing(adapters) else []
        if bare:
            touched = _differing(self.weights.shapes, (), adapters)
            return self._write(seat, touched, source, stamp, adapters, bare, whole=True)
        origin = [self._nearest(source, stamp)]
        return self._write(seat, self.weights.shapes, source, stamp, adapters, origin)

    def _bare(self, source: Source, stamp: Hashable) -> list[Readable]:
        """A parked copy of a checkpoint without adapters, for these to be put on and taken off.

        None of it where there is no room.
        """
        parked: Parked | None = self.pool.get(self._tier, self._owner, (stamp, ()))
        if parked is not None:
            return [Waiting(self.weights, parked.storage)]
        origin = self._nearest(source, stamp)

        def read() -> Parked:
            storage = self.weights.blank()
            self.weights.write_copy(storage, origin, transfer_for(self.device))
            return Parked(storage, ())

        size = self.weights.bytes
        parked = self.pool.put(self._tier, self._owner, (stamp, ()), size, read)
        return [] if parked is None else [Waiting(self.weights, parked.storage)]

    def _nearest(self, source: Source, stamp: Hashable) -> Readable:
        """What to read a source's parameters from: a parked copy, a copy in RAM, or itself."""
        parked = self.pool.get(self._tier, self._owner, (stamp, ()))
        if parked is not None:
            return Waiting(self.weights, parked.storage)
        if isinstance(source, Layered) and source.bare is not None:
            known = source.bare.stamp()
            self._wait_for(known)
            return Overlay(self._nearest(source.bare, known), source.change, source.changed)
        if isinstance(source, Combined):
            # From copies in RAM alone: what is parked has been rounded to the arena's dtype.
            parts = [self._in_ram(part, part.stamp()) for part in source.parts]
            return Sum(parts, source.combine)
        return self._in_ram(source, stamp)

    def _in_ram(self, source: Readable, stamp: Hashable) -> Readable:
        copy = self.pool.get(PINNED, None, stamp)
        return source if copy is None else copy

    def _write(
        self,
        seat: Seat,
        names: Collection[str],
        source: Source,
        stamp: Hashable,
        adapters: Adapters,
        origin: list[Readable],
        whole: bool = False,
    ) -> SwapReport:
        """Write parameters of a seat, read from `origin`; it then holds `source` and is live.

        origin: one place, which the first try takes out, so that nobody holds it after that.
        whole: it is `Waiting`, and the arena becomes what it is a copy of first.
        """
        near = [self._near(adapters, names)]

        def write() -> SwapReport:
            if origin:
                return self.weights.write(names, origin.pop(), near.pop())
            # From anew where memory ran out: the arena that was read may be half written over, and
            # copies that wait have gone to make room.
            return self.weights.write(names, self._nearest(source, stamp), adapters)

        with self._rewriting(seat, source, stamp, adapters):
            start = self.weights.restore(cast(Waiting, origin[0]).storage) if whole else None
            report = self._room_for(write)
        return report if start is None else replace(start, bytes=start.bytes + report.bytes)

    def _near(self, adapters: Adapters, names: Collection[str]) -> Adapters:
        """The adapters that change any of `names`, on the device where the pool has room there."""
        return tuple(
            (self._copy_of(adapter), strength)
            for adapter, strength in adapters
            if strength != 0.0 and not adapter.patches.keys().isdisjoint(names)
        )

    def _copy_of(self, adapter: Adapter) -> Adapter:
        """An adapter's copy on the device, else in pinned RAM; itself where there is no room.

        It goes with the adapter: a file's stays while the file is known, a state dict's for as long
        as that LoRA is on. Pinning takes time: only what is used again is.
        """
        what, again = (_ADAPTER, id(adapter)), id(adapter) in self._watched
        copy: Near | None = self.pool.get(self._tier, self._owner, what)
        if copy is not None:
            return copy
        copy = self.pool.get(PINNED, self._owner, what)
        if copy is not None:
            return self._nearer(adapter, what, copy)
        in_ram = InRam(tensors_of(adapter, self.weights.shapes))
        if not in_ram.tensors:
            return adapter
        transfer = transfer_for(self.device)

        def bring() -> Near:
            self.pool.note("loras_brought")
            return Near(adapter, in_ram.brought(transfer))

        def pin() -> Near:
            self.pool.note("loras_pinned")
            copy = transfer.gather(list(in_ram.tensors), in_ram)
            return Near(adapter, in_ram.within(copy), copy)

        self._watch(adapter)
        pinned = HostCopy.bytes_for(list(in_ram.tensors), in_ram) or 0
        ways = (self._tier, in_ram.bytes, bring), (PINNED, pinned, pin)
        for tier, size, make in ways[: 1 + again]:
            copy = self.pool.put(
                *(tier, self._owner, what, size, make),
                instead_of=_is_adapter,  # all else takes longer to have again
            )
            if copy is not None:
                return copy
        return adapter

    def _nearer(self, adapter: Adapter, what: Hashable, copy: Near) -> Near:
        """An adapter's copy in pinned RAM, or one of it on the device where there is room by now.

        Nothing goes for it: what is there instead would have to cross the bus the next time.
        """
        kept = copy.kept
        assert kept is not None

        def bring() -> Near:
            self.pool.note("loras_brought")
            in_ram = InRam(tensors_of(adapter, self.weights.shapes))
            return Near(adapter, in_ram.brought(transfer_for(self.device), kept))

        size = kept.host.tensor.numel()
        found: Near | None = self.pool.put(
            *(self._tier, self._owner, what, size, bring), instead_of=_nothing
        )
        return copy if found is None else found

    def _watch(self, adapter: Adapter) -> None:
        """Give up an adapter's copy once it is gone: another may come to have its identity."""
        watched, pool, owner, known = self._watched, self.pool, self._owner, id(adapter)

        def gone(reference: object) -> None:
            watched.pop(known, None)
            pool.drop(owner, lambda what: what == (_ADAPTER, known))

        if known not in watched:
            watched[known] = weakref.ref(adapter, gone)

    @contextlib.contextmanager
    def _rewriting(
        self, seat: Seat, source: Source, stamp: Hashable, adapters: Adapters
    ) -> Iterator[None]:
        """The arena changes, and no seat is live until it has all that `seat` is to hold."""
        self._epoch += 1
        following = _uses(source, stamp, adapters)
        # What was used stays so as well: where the change fails, it is brought back.
        self.pool.use(self._owner, self._used | following)
        try:
            self.weights.synchronize()  # replays under way still read the arena
            self.live = None
            yield
            self._used = following
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"no memory is left on {self.device} to swap weights") from error
        finally:
            self.pool.use(self._owner, self._used)
        if seat.stamp != stamp:
            self._abandon(seat)
        seat.source, seat.stamp, seat.adapters = source, stamp, adapters
        self.live = seat

    def _abandon(self, seat: Seat) -> None:
        """Give up copies that nobody can ask for again once the seat holds something else."""
        stamp = seat.stamp
        if seat.source is not None and not seat.source.lasting:
            self.pool.drop(self._owner, lambda what: what[0] == stamp)

    def _park(self, following: Collection[Hashable] = ()) -> None:
        """Keep a copy of the live weights on the device, where the pool has room for it.

        following: what is about to be brought in, which does not go for it.
        """
        seat = self.live
        if seat is None:
            return
        if self.pool.trim(self._tier) and self.device.type == "cuda":
            torch.cuda.empty_cache()  # else PyTorch keeps for itself what others need
        self.pool.put(
            self._tier,
            self._owner,
            (seat.stamp, _standing(seat.adapters)),
            self.weights.bytes,
            lambda: Parked(self.weights.copy(), seat.adapters),
            instead_of=lambda other: other not in following,
        )

    def parked(self, seat: Seat) -> bool:
        """Whether a seat's weights wait in a copy on the device."""
        what = (seat.stamp, _standing(seat.adapters))
        return seat.source is not None and self.pool.holds(self._tier, self._owner, what)

    def free_parked(self) -> None:
        """Give up the copies of weights that wait, which are read from their sources again, and
        the room on the device that they went through.
        """
        self._stop_fetching()
        self.pool.drop(self._owner)
        self._give_back_slots()

    def leave(self, seat: Seat) -> None:
        """Forget a seat whose engine is gone. A copy of a file that it held is the pool's to keep.

        A finalizer may call this at any moment, in any thread, without the session's lock: at worst
        another seat, which has just become live, is brought in once more.
        """
        if self.live is seat:
            self.live = None
        self._abandon(seat)
        seat.source = None

    def _wait_for(self, stamp: Hashable) -> None:
        """Let a prefetch that is under way come to its end: it is ahead of one begun now."""
        job = self.hasten(stamp)
        if job is not None and not job.cancel():  # one that has not begun is not waited for
            wait([job])

    def _fetch(
        self,
        source: Source,
        stamp: Hashable,
        onto_device: bool,
        keep: Callable[[Hashable], bool],
        wanted: threading.Event,
    ) -> Callable[[], object] | None:
        """Bring a checkpoint onto the device, in the prefetcher's thread.

        Else what is left to do, which takes longer, and holds nothing of the network.
        """
        transfer = transfer_for(self.device, background=True)
        with self._fetching:
            what, size = (stamp, ()), self.weights.bytes
            if self.pool.expect(self._tier, self._owner, what):
                return None
            in_ram = self.pool.expect(PINNED, None, stamp)

            def read() -> Parked:
                copy = self.pool.get(PINNED, None, stamp)
                origin = copy or (
                    _Wanted(source, self._unwanted) if isinstance(source, Stageable) else source
                )
                storage = self.weights.blank()
                with _own_stream(self.device):
                    self.weights.write_copy(storage, origin, transfer)
                return Parked(storage, ())

            if onto_device and self.pool.put(
                self._tier, self._owner, what, size, read, lambda other: not keep(other[0]), True
            ):
                return None
            names = list(self.weights.shapes)
        if in_ram or not isinstance(source, Stageable):
            return None
        stored = HostCopy.bytes_for(names, source)
        if stored is None:
            return None
        size, gather = stored, partial(transfer.gather, names, source, wanted)
        put, may_go = self.pool.put, lambda other: not keep(other)
        return lambda: put(PINNED, None, stamp, size, gather, may_go, ahead=True)

    def _stop_fetching(self) -> None:
        """Let go of what is on its way to the device; it is not waited for to arrive."""
        with _coming_lock:
            jobs = [coming.job for coming in self._coming.values()]
        for job in jobs:
            job.cancel()
        self._unwanted.set()
        with self._fetching:
            self._unwanted.clear()

    # Running.

    def run(
        self, seat: Seat, inputs: Mapping[str, torch.Tensor], key: object | None
    ) -> list[torch.Tensor]:
        """The plan's outputs for `inputs` with the weights of `seat`.

        key: equal keys vouch for an equal prompt; weights are seen to here.
        """
        plan = self._specialised(inputs)
        dims = bind_dims(plan, {name: tuple(value.shape) for name, value in inputs.items()})
        with self._turn():
            self.activate(seat)
            vouched = None if key is None else (key, self._epoch)
            return self._room_for(lambda: self._run(self._executable(plan, dims), inputs, vouched))

    def _run(
        self, executable: Executable, inputs: Mapping[str, torch.Tensor], key: object | None
    ) -> list[torch.Tensor]:
        hits, captures = executable.prompt_hits, executable.captures
        try:
            results = executable.run(inputs, key)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"no memory is left on {self.device} to run in") from error
        self.counters.forwards += 1
        self.counters.prompt_hits += executable.prompt_hits - hits
        self.counters.graphs += executable.captures - captures
        return results

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """On the network's device, after the last run: one on another stream used its buffers."""
        if self._last_run is None:
            yield
            return
        with torch.cuda.device(self.device):
            self._last_run.wait()
            try:
                yield
            finally:
                self._last_run.record()

    def _specialised(self, inputs: Mapping[str, torch.Tensor]) -> Plan:
        absent = frozenset(self._optional).difference(inputs)
        if absent not in self._plans:
            self._plans[absent] = self.plan.without(absent)
        return self._plans[absent]

    def refresh(self) -> None:
        """Let go of kernels that have given way to others; to be called between two samplings.

        In the midst of one, its steps would not be of one kind.
        """
        outdated = [k for k, one in self._executables.items() if one.outdated(self.waiting)]
        if outdated:
            self.weights.synchronize()  # replays under way still use their buffers
        for key in outdated:
            self._executables.pop(key).release()
        self.counters.renewed += len(outdated)
        self._chooser().renew()

    def _chooser(self) -> Selector:
        if self._selector is not None:
            return self._selector
        return selector_for(self.device, waiting=self.waiting)

    def _executable(self, plan: Plan, dims: Mapping[str, int]) -> Executable:
        key = (plan.inputs, tuple(dims.items()))
        if key in self._executables:
            self._executables.move_to_end(key)
            return self._executables[key]
        while len(self._executables) >= MAX_EXECUTABLES:
            self._evict()
        selector = self._chooser()
        if self.counters.binds == 0:  # what was provisional for another's need not be here
            selector.renew()
        self.counters.binds += 1
        executable = self._executables[key] = Executable(
            plan,
            dims,
            self.weights.constants,
            self.dtype,
            self.arena,
            self._prompts,
            self._graph_pool,
            selector,
        )
        if plan.inputs not in self._prepared and {"height", "width"} <= dims.keys():
            self._prepared.add(plan.inputs)
            names = sorted(entry.name for entry in plan.inputs)
            about = f"{plan.structure.get('graph_key')} {plan.version} {names} {self.dtype}"
            selector.prepare(about, partial(calls_ahead, plan, dims, self.dtype))
        return executable

    def _evict(self) -> None:
        _, executable = self._executables.popitem(last=False)
        executable.release()
        self.counters.evictions += 1
        in_use = {id(other.prompt) for other in self._executables.values()}
        self._prompts = {k: state for k, state in self._prompts.items() if id(state) in in_use}

    def clear_executables(self) -> None:
        """Free every shape's graph and activation memory; the next call binds it anew."""
        if self._executables:
            self.weights.synchronize()  # replays under way still use their buffers
        while self._executables:
            self._evict()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def bytes(self) -> int:
        """Bytes on the device: weights, those of seats that wait, activations."""
        waiting = self.pool.bytes(self._tier, self._owner)
        return self.weights.bytes + waiting + self.activation_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of the arena, and of the prompts' results outside it."""
        prompts = sum(
            buffer.numel() * buffer.element_size()
            for state in self._prompts.values()
            for buffer in state.buffers.values()
        )
        return self.arena.bytes + prompts

    @property
    def provisional(self) -> bool:
        """Whether the size that ran last has kernels that give way once others are compiled."""
        last = next(reversed(self._executables.values()), None)
        return last is not None and last.provisional

    def shapes(self) -> list[dict[str, Any]]:
        """Every shape that is ready, its kernels, and the seconds it took to bind."""
        return [
            {
                "dims": dict(executable.dims),
                "controlnet": any(entry.optional for entry in executable.plan.inputs),
                "bind_seconds": executable.seconds,
                "kernels": dict(executable.kernels()),
                "reasons": executable.reasons(),
                "selection": executable.selection(),
                "provisional": executable.provisional,
            }
            for executable in self._executables.values()
        ]


@dataclass(frozen=True, eq=False)
class Parked:
    """A copy of the arena, and the adapters in it: while they live, their identity tells it."""

    storage: torch.Tensor
    adapters: Adapters


def _source_of(seat: Seat) -> Source:
    if seat.source is None:
        raise SwitchyardError("this engine has no weights: load_weights first")
    return seat.source


def _is_adapter(what: Any) -> bool:
    """Whether a block of the pool is an adapter's copy."""
    return isinstance(what, tuple) and what[:1] == (_ADAPTER,)


def _nothing(stamp: Hashable) -> bool:
    return False


def _uses(source: Source, stamp: Hashable, adapters: Adapters) -> frozenset[Hashable]:
    """By what the pool knows everything that these weights are, or are made, of."""
    found = {stamp, (stamp, ()), (stamp, _standing(adapters))}
    found |= {(_ADAPTER, id(adapter)) for adapter, strength in adapters if strength != 0.0}
    parts: Sequence[Any] = ()
    if isinstance(source, Layered) and source.bare is not None:
        parts = [source.bare]
    elif isinstance(source, Combined):
        parts = source.parts
    for part in parts:
        with contextlib.suppress(SwitchyardError):  # reading it says what is wrong with it
            own = part.stamp()
            found |= {own, (own, ())}
    return frozenset(found)


def _standing(adapters: Adapters) -> tuple[tuple[int, float], ...]:
    """What tells LoRA sets apart. Adapters are known by identity, which holds while they live."""
    return tuple((id(adapter), strength) for adapter, strength in adapters if strength != 0.0)


def _differing(names: Iterable[str], before: Adapters, after: Adapters) -> list[str]:
    """The parameters that two LoRA sets do not change alike."""

    def changes(name: str, adapters: Adapters) -> list[tuple[int, float]]:
        return [
            (id(adapter.patches[name]), strength)
            for adapter, strength in adapters
            if strength != 0.0 and name in adapter.patches
        ]

    touched = set[str]().union(*(adapter.patches for adapter, _ in (*before, *after)))
    return [
        name for name in names if name in touched and changes(name, before) != changes(name, after)
    ]


@dataclass(frozen=True)
class _Coming:
    """A prefetch, and what is set once somebody waits for it."""

    job: Future[None]
    wanted: threading.Event


_coming_lock = threading.Lock()


@lru_cache(maxsize=1)
def _prefetcher() -> ThreadPoolExecutor:
    """One checkpoint at a time is fetched ahead, by a transfer's readers."""
    return ThreadPoolExecutor(1, "switchyard-prefetch")


def _prefetch(
    network: weakref.ref[Network],
    source: Source,
    stamp: Hashable,
    onto_device: bool,
    keep: Callable[[Hashable], bool],
    wanted: threading.Event,
) -> None:
    alive = network()
    if alive is None:
        return
    pool = alive.pool
    try:
        with torch.inference_mode(False), torch.no_grad():
            rest = alive._fetch(source, stamp, onto_device, keep, wanted)
            del alive  # whoever gives the network up meanwhile has its memory
            if rest is not None:
                rest()
        pool.note("prefetches")
    except CancelledError:
        pool.note("stopped_prefetches")
    except Exception as error:
        pool.note("failed_prefetches")
        logger.warning("%s was not fetched ahead: %s", source.label, error)


class _Wanted:
    """A source that is read from for as long as somebody wants it."""

    def __init__(self, source: Stageable, unwanted: threading.Event) -> None:
        self.read, self.stored = source.read, source.stored
        self._source, self._unwanted = source, unwanted

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """As the source does. Raises CancelledError once nobody does, or the process ends."""
        if self._unwanted.is_set() or closing.is_set():
            raise CancelledError
        self._source.read_into(name, out)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Work beside that of other threads, after what this one has asked for; done at the end."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        # Memory that was just taken may still be read by work that came before.
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            done = torch.cuda.Event(blocking=True)  # waiting for it leaves a core to others
            done.record(stream)
            done.synchronize()
