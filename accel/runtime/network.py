"""One structure on one device: plan, live weights, seats, executables by shape.

A *seat* is a set of weights that belongs to the structure: a checkpoint and its LoRAs. One seat is
live, that is, in the arena which captured graphs read; the others wait, parked on the device while
there is room, otherwise at their source. A call for a seat that waits first brings it in, by copy.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import OutOfMemory, SwitchyardError
from ..hardware import available_memory
from ..plan.schema import Plan
from ..tuning import Selector, selector_for
from .arena import Arena
from .executable import Executable, PromptState, bind_dims
from .weights import Changes, Source, SwapReport, Weights

logger = logging.getLogger(__name__)

MAX_EXECUTABLES = 64
"""Shapes kept ready. A captured graph of a large UNet takes some 10 MiB beside the shared arena."""

PARKING_RESERVE = 2 << 30
"""Bytes that parking leaves free on the device, for the host's other models."""


@dataclass(eq=False)
class Seat:
    """Weights that may be live. `parked`: the arena as it was when another seat took over."""

    source: Source | None = None
    stamp: Hashable = None
    changes: Changes = field(default_factory=dict)
    parked: torch.Tensor | None = None


@dataclass
class Counters:
    """What happened since the network was made; the report shows it."""

    binds: int = 0
    graphs: int = 0
    forwards: int = 0
    prompt_hits: int = 0
    evictions: int = 0
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
    ) -> None:
        self.plan, self.device, self.dtype = plan, device, dtype
        self._selector = selector
        self.waiting = False
        self.weights = Weights(plan, device, dtype)
        self.arena = Arena(device)
        self.counters = Counters()
        self.live: Seat | None = None
        self._epoch = 0
        self._parked: weakref.WeakSet[Seat] = weakref.WeakSet()
        self._executables: OrderedDict[Any, Executable] = OrderedDict()
        self._prompts: dict[Any, PromptState] = {}
        self._optional = [entry.name for entry in plan.inputs if entry.optional]
        self._plans: dict[frozenset[str], Plan] = {}
        cuda = device.type == "cuda"
        self._graph_pool = torch.cuda.graph_pool_handle() if cuda else None
        self._last_run = torch.cuda.Event() if cuda else None

    # Weights.

    def load(self, seat: Seat, source: Source) -> SwapReport:
        """Seat the parameters of `source` with the seat's LoRAs on them, and make the seat live.

        On failure the seat keeps what it had.
        """
        self._park_other_than(seat)
        names = self.weights.shapes.keys()
        return self._write(seat, names, source, seat.changes)

    def update(self, seat: Seat, names: Collection[str], source: Source) -> SwapReport:
        """Give a seat another source that differs from its own in the parameters `names` alone.

        The caller vouches for that. The seat is live afterwards; on failure it holds nothing.
        """
        if self.live is not seat and seat.parked is None:
            return self.load(seat, source)
        try:
            self.activate(seat)
            return self._write(seat, names, source, seat.changes)
        except BaseException:
            self.leave(seat)
            raise

    def set_changes(self, seat: Seat, changes: Changes) -> SwapReport:
        """Replace what the seat's LoRAs change, rewriting only parameters where that differs."""
        self.activate(seat)
        assert seat.source is not None
        names: Collection[str] = self.weights.shapes.keys()
        if seat.source.stamp() == seat.stamp:  # else all of it is read anew, never a mixture
            names = [n for n in names if _known(seat.changes, n) != _known(changes, n)]
        return self._write(seat, names, seat.source, changes)

    def _write(
        self, seat: Seat, names: Collection[str], source: Source, changes: Changes
    ) -> SwapReport:
        stamp = source.stamp()
        self._epoch += 1
        self.weights.synchronize()  # replays under way still read the arena
        try:
            report = self.weights.write(names, source, changes)
        except BaseException as error:
            self._restore(seat, names)
            if isinstance(error, torch.OutOfMemoryError):
                raise OutOfMemory(f"no memory is left on {self.device} to swap weights") from error
            raise
        seat.source, seat.stamp, seat.changes, seat.parked = source, stamp, changes, None
        self.live = seat
        return report

    def _restore(self, seat: Seat, names: Collection[str]) -> None:
        """After a write that failed half-way: what the seat held before, or nothing live."""
        was_live, self.live = self.live is seat, None
        if not was_live or seat.source is None:
            return
        try:
            self.weights.write(names, seat.source, seat.changes)
        except Exception as error:  # the first error is the one to tell
            logger.warning("the weights from before could not be restored: %s", error)
        else:
            self.live = seat

    def activate(self, seat: Seat) -> None:
        """Make `seat` the live one."""
        if self.live is seat:
            return
        if seat.source is None:
            raise SwitchyardError("this engine has no weights: load_weights first")
        started = time.perf_counter()
        self._park_other_than(seat)
        if seat.parked is None:
            self._write(seat, self.weights.shapes.keys(), seat.source, seat.changes)
        else:
            self._epoch += 1
            self.weights.storage.copy_(seat.parked)
            self.live = seat
            self.weights.synchronize()
        self.counters.activations.append(time.perf_counter() - started)

    def _park_other_than(self, seat: Seat) -> None:
        """Keep a copy of the live weights on the device, where there is room to spare."""
        leaving = self.live
        if leaving is None or leaving is seat or leaving.parked is not None:
            return
        if available_memory(self.device) < self.weights.bytes + PARKING_RESERVE:
            return
        try:
            with torch.inference_mode(False):
                leaving.parked = self.weights.storage.clone()
            self._parked.add(leaving)
        except torch.OutOfMemoryError:
            leaving.parked = None

    def free_parked(self) -> None:
        """Give up the copies of seats that wait: they are read from their sources again."""
        for seat in self._parked:
            seat.parked = None
        self._parked.clear()

    def leave(self, seat: Seat) -> None:
        """Forget a seat whose engine is gone."""
        if self.live is seat:
            self.live = None
        seat.source, seat.changes, seat.parked = None, {}, None

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
            try:
                return self._run(self._executable(plan, dims), inputs, vouched)
            except OutOfMemory:  # what seats that wait and other shapes hold is given up for it
                self.free_parked()
                self.clear_executables()
                return self._run(self._executable(plan, dims), inputs, vouched)

    def _run(
        self, executable: Executable, inputs: Mapping[str, torch.Tensor], key: object | None
    ) -> list[torch.Tensor]:
        hits, captures = executable.prompt_hits, executable.captures
        results = executable.run(inputs, key)
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

    def _executable(self, plan: Plan, dims: Mapping[str, int]) -> Executable:
        key = (plan.inputs, tuple(dims.items()))
        if key in self._executables:
            self._executables.move_to_end(key)
            return self._executables[key]
        while len(self._executables) >= MAX_EXECUTABLES:
            self._evict()
        self.counters.binds += 1
        selector = self._selector
        if selector is None:
            selector = selector_for(self.device, waiting=self.waiting)
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
        return executable

    def _evict(self) -> None:
        _, executable = self._executables.popitem(last=False)
        executable.release()
        self.counters.evictions += 1
        in_use = {id(other.prompt) for other in self._executables.values()}
        self._prompts = {k: state for k, state in self._prompts.items() if id(state) in in_use}

    def clear_executables(self) -> None:
        """Free every shape's graph and activation memory; the next call binds it anew."""
        self.weights.synchronize()
        while self._executables:
            self._evict()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def bytes(self) -> int:
        """Bytes on the device: weights, those of seats that wait, activations."""
        waiting = sum(seat.parked.numel() for seat in self._parked if seat.parked is not None)
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
            }
            for executable in self._executables.values()
        ]


def _known(changes: Changes, name: str) -> list[tuple[int, float]]:
    """What is on a parameter. Patches are told apart by identity, which holds while they do."""
    return [(id(patch), strength) for patch, strength in changes.get(name, ())]
