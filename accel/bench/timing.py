"""Times, memory and launches of anything that can be called, on a GPU or the CPU."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import hardware

logger = logging.getLogger(__name__)

WARMUPS = 5
RUNS = 6
PYTHON_SAMPLES = 20


def enter(device: str) -> torch.device:
    """The device, made the current one. Raises `DeviceUnavailable` where there is none such."""
    found = hardware.require(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 means float32 here: no TF32 in matrix products and convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, until its result is there."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call: between CUDA events on a GPU, on the clock elsewhere."""
    if device.type != "cuda":
        return seconds(call, device) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def timed(call: Callable[[], Any], device: torch.device, iterations: int) -> dict[str, float]:
    """Median, fastest and slowest of single calls, each begun when the last one is done."""
    for _ in range(_least(WARMUPS, device)):
        call()
    samples = [milliseconds(call, device) for _ in range(iterations)]
    return {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}


def mean_step(run: Callable[[object], Any], device: torch.device, steps: int) -> float:
    """Milliseconds a step in a run of `steps` calls without a pause: the median of several runs.

    `run` is called with an object of the run's own, the same in all its steps.
    """
    samples = []
    for _ in range(_least(RUNS, device)):
        own = object()

        def whole(own: object = own) -> None:
            for _ in range(steps):
                run(own)

        samples.append(milliseconds(whole, device) / steps)
    return statistics.median(samples)


def python_ms(call: Callable[[], Any], device: torch.device) -> float | None:
    """Host time of a call until it returns, with the GPU idle: what Python costs a forward."""
    if device.type != "cuda":
        return None
    samples = []
    for _ in range(PYTHON_SAMPLES):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e3)
    return statistics.median(samples)


def driver_mib(device: torch.device) -> int | None:
    """Memory in use on the whole card, as its driver has it, MiB."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free) >> 20


def launches(call: Callable[[], Any], device: torch.device) -> Counter[str] | None:
    """The kernels that the GPU runs in one call, by name; None where that cannot be seen.

    Measure everything else before: the profiler may slow down what comes after it.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    found: Counter[str] = Counter()
    try:
        for _ in range(2):  # the first time may miss what ran while the profiler came up
            torch.cuda.synchronize(device)
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                call()
                torch.cuda.synchronize(device)
            found = Counter(
                event.name
                for event in trace.events() or ()
                if event.device_type.name == "CUDA"
                and not event.is_user_annotation
                and not event.name.startswith(("Memcpy", "Memset"))
            )
    except RuntimeError as error:
        logger.warning("kernels are not counted: %s", " ".join(str(error).split()))
        return None
    return found or None


def _least(count: int, device: torch.device) -> int:
    """On the CPU, where clocks hardly change and calls are slow, once is enough."""
    return count if device.type == "cuda" else 1
