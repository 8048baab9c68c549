"""Timing of candidates on the GPU, as they will run: in a CUDA graph, on weights not in the cache.

A kernel of a few microseconds cannot be timed launch by launch, since launching takes longer.
Activations are left where the last launch put them, as in a network; each launch reads another copy
of the weights, since a network's weights never stay in the cache from one step to the next.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Protocol

import torch

from .. import kernels
from ..hardware import Hardware
from ..kernels.registry import Call, Config, Kernel, TensorSpec, reference
from .compiling import Compiler, deadly

logger = logging.getLogger(__name__)

LAUNCHES = 8
"""Launches in a timed graph."""

REPLAYS = 5

ENOUGH_REPLAYS, ENOUGH_US = 3, 20e3
"""Fewer replays are enough once they took so many microseconds: what is long is timed exactly."""

CLOSE = 1.12
"""Candidates within this factor of the best are timed again, by turns: what came first or last, or
just after another, is off by as much."""

ROUNDS = 4
"""How often they are."""

TENSOR_CORES = ("linear", "conv2d", "attention")
"""Operators of which tensor cores do the most."""

HEAVY_US = 10.0
"""From how many microseconds such a call is timed again under load: what takes all the power there
is runs at a lower clock in a network, which costs some candidates more than others."""

WARM_US, TURN_US = 40e3, 2e3
"""Microseconds of load before, until the clock is that of a long run, and of one turn."""

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative L2 distance from the reference in the same dtype beyond which a result is wrong: some
twenty times what rounding explains."""

WRONG = "wrong result"
"""The problem of a candidate that is off by more than that."""

MAX_COPY_BYTES = 1 << 30
"""What the copies of one call's weights may take."""


@dataclass(frozen=True)
class Measurement:
    """One candidate: microseconds of a run, or the problem that keeps it from being used."""

    kernel: Kernel
    config: Config
    us: float | None
    problem: str | None = None


Prune = Callable[[Call, Sequence[tuple[Kernel, Config]]], Sequence[tuple[Kernel, Config]]]
"""Of a call's candidates those that are worth timing, in the same order."""


def measure(
    calls: Sequence[Call], compiler: Compiler, device: torch.device, prune: Prune | None = None
) -> Iterator[tuple[Call, list[Measurement]]]:
    """Each call with the times of its candidates, in the order of preference.

    prune: leaves candidates out, which are neither compiled nor timed then.
    """
    hardware = compiler.hardware
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        compiler.compile(
            (kernel, config, call)
            for call in calls
            for kernel, config in _timed(call, hardware, prune)
        )
        torch.cuda.synchronize(device)
        clock = Clock(device, hardware)
        for call in calls:
            yield call, _measure(call, hardware, device, clock.timer, prune)
        del clock
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _timed(
    call: Call, hardware: Hardware, prune: Prune | None = None
) -> Sequence[tuple[Kernel, Config]]:
    found = kernels.candidates(call, hardware)[:-1]  # without the reference
    return found if prune is None else prune(call, found)


Run = Callable[[int], torch.Tensor]
"""Runs a kernel on the copy of the weights with that index."""


class Timer(Protocol):
    """Times a run once more."""

    def __call__(self) -> float:
        """Microseconds of a run by itself."""

    def under_load(self, us: float) -> Callable[[], float]:
        """Have it run for so long, right after what was asked before; then microseconds of one.

        What comes back waits until that is done.
        """


def _measure(
    call: Call,
    hardware: Hardware,
    device: torch.device,
    timer_of: Callable[[Run], Timer],
    prune: Prune | None = None,
) -> list[Measurement]:
    found = _timed(call, hardware, prune)
    try:
        operands = Operands(call, hardware, device)
        expected = operands.expected()
    except torch.OutOfMemoryError:
        return [Measurement(kernel, config, None, "no memory") for kernel, config in found]
    results: list[Measurement] = []
    timers: dict[int, Timer] = {}
    best = math.inf
    for kernel, config in found:
        if deadly((kernel, config, call)):
            results.append(Measurement(kernel, config, None, "it cannot be compiled"))
            continue
        try:
            run = operands.bind(kernel, config)
            distance = _distance(run(0), expected)
            timer = timer_of(run)
            us = timer()
            if not kernel.allocates:  # again, as it runs in a network: captured, back to back
                distance = max(distance, _distance(operands.out, expected), key=_worse)
        except Exception as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.debug("%s %s cannot run %s: %s", kernel.name, config, call.key, problem)
            results.append(Measurement(kernel, config, None, problem))
            continue
        if distance <= TOLERANCE.get(call.out.dtype, 1e-2):
            best = min(best, us)
            if us <= CLOSE * best:  # a timer holds its scratch memory
                timers[len(results)] = timer
            results.append(Measurement(kernel, config, us))
        else:
            logger.warning(
                "%s %s is not used: on this GPU its result for %s is off by %.2g",
                *(kernel.name, dict(config), call.key, distance),
            )
            results.append(Measurement(kernel, config, None, WRONG))
    close = {i: timer for i, timer in timers.items() if (results[i].us or math.inf) <= CLOSE * best}
    if len(close) > 1:
        heavy = call.op in TENSOR_CORES and best >= HEAVY_US
        for index, us in (_under_load if heavy else _by_turns)(results, close).items():
            results[index] = replace(results[index], us=us)
    return results


def _turns(close: Mapping[int, Timer]) -> Iterator[int]:
    """Each several times, in an order that favours none."""
    for round in range(ROUNDS):
        yield from close if round % 2 else reversed(close)


def _by_turns(results: Sequence[Measurement], close: Mapping[int, Timer]) -> dict[int, float]:
    """The median of several times of each, its first among them."""
    times = {index: [results[index].us or math.inf] for index in close}
    for index in _turns(close):
        times[index].append(close[index]())
    return {index: statistics.median(own) for index, own in times.items()}


def _under_load(results: Sequence[Measurement], close: Mapping[int, Timer]) -> dict[int, float]:
    """The median of several times of each, one right after the other, without a pause.

    As multiples of the first time of the quickest: to be set beside others, and those of other
    sizes, which were timed by themselves.
    """
    quickest = min(close, key=lambda index: results[index].us or math.inf)
    close[quickest].under_load(WARM_US)
    asked: dict[int, list[Callable[[], float]]] = {index: [] for index in close}
    for index in _turns(close):
        asked[index].append(close[index].under_load(TURN_US))
    times = {index: statistics.median(us() for us in own) for index, own in asked.items()}
    unit = (results[quickest].us or math.inf) / times[quickest]
    return {index: us * unit for index, us in times.items()}


def _worse(distance: float) -> float:
    return math.inf if math.isnan(distance) else distance


class Operands:
    """Random tensors of a call's specs, the weights several times over."""

    def __init__(self, call: Call, hardware: Hardware, device: torch.device) -> None:
        self.call, self.device = call, device
        weights = sum(_bytes(t) for t in call.tensors if t is not None and t.constant)
        wanted = 2 * (hardware.l2_bytes or 0) // max(weights, 1) + 1
        copies = max(1, min(wanted, LAUNCHES, MAX_COPY_BYTES // max(weights, 1)))
        generator = torch.Generator(device).manual_seed(0)
        self._sets: list[list[torch.Tensor | None]] = []
        for index in range(copies):
            tensors: list[torch.Tensor | None] = []
            for place, spec in enumerate(call.tensors):
                if index and (spec is None or not spec.constant):
                    tensors.append(self._sets[0][place])
                else:
                    tensors.append(None if spec is None else _random(spec, generator, device))
            self._sets.append(tensors)
        self.out = torch.empty(call.out.shape, dtype=call.out.dtype, device=device)

    def bind(self, kernel: Kernel, config: Config) -> Run:
        """A function that runs the kernel once, on the copy of that index.

        What it leaves unwritten is not a number, nor what another candidate wrote.
        """
        self.out.fill_(math.nan if self.out.dtype.is_floating_point else -1)
        extra: dict[str, Any] = {}
        if kernel.configs is not None:
            size = kernel.workspace(self.call, config)
            scratch = None
            if size:
                scratch = torch.full((size,), 255, dtype=torch.uint8, device=self.device)
            extra = {"config": config, "workspace": scratch}
        out = None if kernel.allocates else self.out
        attrs = dict(self.call.attrs)

        def run(index: int) -> torch.Tensor:
            return kernel.run(out, *self._sets[index % len(self._sets)], **extra, **attrs)

        return run

    def expected(self) -> torch.Tensor:
        """The reference's result for the first copy."""
        out = torch.empty_like(self.out)
        return reference(self.call.op).run(out, *self._sets[0], **self.call.attrs)


def _bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _random(spec: TensorSpec, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Normal values; a weight's are scaled so that a product over its rows stays of order one."""
    start = 0 if spec.aligned else 1
    extent = start + 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))
    if not spec.dtype.is_floating_point:
        flat = torch.zeros(extent, dtype=spec.dtype, device=device)
    else:
        flat = torch.randn(extent, generator=generator, device=device).to(spec.dtype)
        if spec.constant and len(spec.shape) > 1:
            flat *= prod(spec.shape[1:]) ** -0.5
    return flat.as_strided(spec.shape, spec.stride, start)


def _distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.float() - expected.float()).norm()
    return float(difference / expected.float().norm().clamp_min(1e-12))


@cache
def side_stream(index: int) -> torch.cuda.Stream:
    """One for all: the libraries keep memory for every stream that they have ever seen."""
    return torch.cuda.Stream(index)


class Clock:
    """Microseconds of one run: the median over replays of a graph of several."""

    def __init__(self, device: torch.device, hardware: Hardware) -> None:
        self._device = device
        self._stream = side_stream(device.index or 0)
        # Read before each replay: the cache then holds no weights, and while the GPU is busy with
        # it the graph is queued, so that no gap of the host's is timed.
        self._other = torch.ones(max(2 * (hardware.l2_bytes or 0), 64 << 20) // 4, device=device)

    def __call__(self, run: Run) -> float:
        """Time a function that runs the kernel on the copy of the index it is given."""
        return self.timer(run)()

    def timer(self, run: Run) -> Timer:
        """Record such a function in a graph, to be timed as often as wanted."""
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run(1)
            torch.cuda.synchronize(self._device)
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for index in reversed(range(LAUNCHES)):  # the last result is that of copy 0
                    run(index)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return GraphTimer(graph, self._other)


class GraphTimer:
    """Times a graph of `LAUNCHES` runs of a kernel.

    other: read before each replay that is timed by itself.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, other: torch.Tensor) -> None:
        self.graph, self._other = graph, other
        self._us = 0.0

    def __call__(self) -> float:
        """The median over some replays, each with a cold cache."""
        samples: list[float] = []
        while len(samples) < REPLAYS:
            self._other.sum()
            samples.append(self._asked(1)())
            if len(samples) >= ENOUGH_REPLAYS and sum(samples) * LAUNCHES >= ENOUGH_US:
                break
        self._us = statistics.median(samples)
        return self._us

    def under_load(self, us: float) -> Callable[[], float]:
        """As `Timer` has it: the mean over replays that follow one another."""
        return self._asked(max(1, round(us / (LAUNCHES * (self._us or self())))))

    def _asked(self, replays: int) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()

        def us() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e3 / (LAUNCHES * replays)

        return us
