"""What happened: runs, why they were slow, how long they took, and how long they would have taken.

A run is one sampling. Speed-ups are never estimated: a run has one only where the host's own path
was timed on this machine for the same structure and size (a baseline). Totals and baselines are
kept in the cache folder; several processes may share it. Nothing here imports the host.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock

from ...settings import settings

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the file. One written by a newer version is left alone."""

KEPT_RUNS = 64
KEPT_BASELINES = 512
KEPT_SAMPLES = 5
FEWEST_CALLS = 3
"""A run with fewer timed calls is mostly warm-up, and gives no baseline."""

LOCK_SECONDS = 1.0

BEGIN_EVENT = "switchyard.begin"
RUN_EVENT = "switchyard.run"
BUILD_EVENT = "switchyard.build"
STATUS_EVENT = "switchyard.status"

GRAPH_KEY = re.compile(r"[0-9a-f]{32}")
"""The whole of a structure's key: the id of its engine and of its build."""

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and its data, plain JSON values, from any thread."""

Dims = Mapping[str, int]
"""width and height in pixels and batch, the denoiser's; perhaps controlnets, their number."""


@dataclass
class Run:
    """One sampling.

    mode:          "engine", "host", "building" (the host's path while the engine is made), or
                   "mixed" where some calls needed the host's path.
    gpu:           the device's name, for baselines; `device` is "cuda:0" or such.
    steps:         calls of the denoiser so far: engine_calls + host_calls.
    dims:          the distinct sizes it ran at, in order.
    reasons:       {"text", "node"}: why calls went the host's path.
    graphs:        CUDA graphs captured in this run. captures: networks traced in it.
    swaps_ms:      time spent bringing in weights.
    compiling:     whether libraries stood in for kernels that are being compiled.
    saved_seconds: against the baselines; None without one. speedup: the same as a ratio.
    compared_db:   how close the result is to the host's own, where that was asked for.
    error:         what ended it early, if anything did.
    """

    id: int
    started: float
    model: str
    family: str | None = None
    graph_key: str | None = None
    device: str = ""
    gpu: str = ""
    mode: str = "host"
    steps: int = 0
    engine_calls: int = 0
    host_calls: int = 0
    seconds: float = 0.0
    dims: list[dict[str, int]] = field(default_factory=list)
    loras: int = 0
    controlnets: int = 0
    reasons: list[dict[str, str | None]] = field(default_factory=list)
    graphs: int = 0
    captures: int = 0
    vram_bytes: int = 0
    swaps_ms: float = 0.0
    compiling: bool = False
    node_id: str | None = None
    saved_seconds: float | None = None
    speedup: float | None = None
    compared_db: float | None = None
    error: str | None = None
    finished: bool = False
    # (path, size) -> calls without a time, and the times in ms of the others
    _untimed: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)
    _times: dict[tuple[str, str], list[float]] = field(default_factory=dict, repr=False)
    _clock: float = field(default_factory=time.perf_counter, repr=False)

    def call(self, path: str, dims: Dims, ms: float | None = None) -> None:
        """Count one call of the denoiser on `path`, "engine" or "host".

        ms: its time on the device, where it was measured. Without it, the run's own time over its
        calls stands for it, if all of them were alike.
        """
        if path not in ("engine", "host"):
            raise ValueError(f"a call runs on the engine or on the host's path, not on {path!r}")
        size = {name: int(value) for name, value in dims.items()}
        if size not in self.dims:
            self.dims.append(size)
        self.steps += 1
        if path == "engine":
            self.engine_calls += 1
        else:
            self.host_calls += 1
        key = (path, _dims_key(size))
        if ms is None or not math.isfinite(ms):
            self._untimed[key] = self._untimed.get(key, 0) + 1
        else:
            self._times.setdefault(key, []).append(float(ms))

    def why(self, text: str, node: str | None = None) -> None:
        """Add a reason for the host's path, once."""
        reason: dict[str, str | None] = {"text": text, "node": node}
        if reason not in self.reasons:
            self.reasons.append(reason)

    def times(self, path: str) -> dict[str, list[float]]:
        """Milliseconds of each call on a path, by size. Of an unmeasured run, the mean for each.

        One that ended early has no mean: much of its time may have gone before the first call.
        """
        found = {size: times for (way, size), times in self._times.items() if way == path}
        if not found and len(self._untimed) == 1 and self.finished and self.error is None:
            ((way, size), calls), *_ = self._untimed.items()
            if way == path and not self._times:
                return {size: [self.seconds * 1000.0 / calls] * calls}
        return found

    def ms(self, path: str) -> float | None:
        """Median milliseconds of a call on a path."""
        values = [value for times in self.times(path).values() for value in times]
        return statistics.median(values) if values else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the fields, the medians `engine_ms` and `host_ms`, and `status`."""
        names = (entry.name for entry in fields(self) if not entry.name.startswith("_"))
        data = {name: getattr(self, name) for name in names}
        data["dims"] = [dict(size) for size in self.dims]
        data["reasons"] = [dict(reason) for reason in self.reasons]
        return {
            **data,
            "engine_ms": self.ms("engine"),
            "host_ms": self.ms("host"),
            "status": status_line(self),
        }


def status_line(run: Run, fraction: float | None = None) -> str:
    """The line on the node: "engine · 3.1x · 2 LoRAs", "host's path: FreeU changes the up blocks".

    fraction: how much of the engine is built, for a run that does not wait for it.
    """
    if run.mode == "building":
        done = "" if fraction is None else f" {100 * min(max(fraction, 0.0), 1.0):.0f} %"
        return f"building{done} · host's path meanwhile"
    why = _reasons_text(run.reasons)
    if run.mode == "host":
        return f"host's path: {why}" if why else "host's path"
    if run.finished and not run.steps:  # interrupted before, or nothing to do
        return "the network was not called"
    parts = ["engine"]
    if run.mode == "mixed":
        parts = [f"engine for {run.engine_calls} of {run.steps} calls"]
    ms = run.ms("engine")
    if run.speedup is not None:
        parts.append(f"{run.speedup:.1f}x")
    elif ms is not None:
        parts.append(f"{ms:.{0 if ms >= 10 else 1}f} ms/step")
    parts += [_count(run.loras, "LoRA")] * (run.loras > 0)
    parts += [_count(run.controlnets, "ControlNet")] * (run.controlnets > 0)
    if run.compiling:
        parts.append("compiling faster kernels")
    if run.mode == "mixed" and why:
        parts.append(f"host's path: {why}")
    return " · ".join(parts)


class Journal:
    """The last runs, totals, baselines and listeners of a process.

    path: the file for what outlives it; the user's cache folder by default.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = settings().cache_dir / "journal.json" if path is None else path
        self.runs: deque[Run] = deque(maxlen=KEPT_RUNS)
        self._lock = threading.RLock()
        self._saving = threading.Lock()
        self._ids = itertools.count(1)
        self._listeners: list[Listener] = []
        self._said: set[str] = set()
        self._kept = _Kept()
        self._unsaved = _Kept()
        stored = self._read()
        if stored is not None:
            self._kept = stored

    @property
    def totals(self) -> dict[str, float]:
        """saved_seconds, runs and engine_calls, of all processes that used this cache folder."""
        with self._lock:
            return {name: self._kept.totals[name] for name in _TOTALS}

    def begin(
        self,
        model: str,
        *,
        mode: str = "engine",
        family: str | None = None,
        graph_key: str | None = None,
        device: str = "",
        gpu: str = "",
        loras: int = 0,
        controlnets: int = 0,
        node_id: str | None = None,
        reasons: Iterable[tuple[str, str | None]] = (),
        fraction: float | None = None,
    ) -> Run:
        """Start a run, after its weights are loaded: its time counts from now.

        reasons: (text, node) of each thing already known to need the host's path.
        """
        run = Run(
            id=next(self._ids),
            started=time.time(),
            model=model,
            family=family,
            graph_key=graph_key,
            device=device,
            gpu=gpu,
            mode=mode,
            loras=loras,
            controlnets=controlnets,
            node_id=node_id,
        )
        for text, node in reasons:
            run.why(text, node)
        self.emit(BEGIN_EVENT, {"id": run.id, "model": model, "node_id": node_id})
        if mode != "engine":  # of an engine there is nothing to say before it has run
            self.status(node_id, _STATES[mode], status_line(run, fraction))
        return run

    def finish(self, run: Run, error: str | None = None) -> None:
        """End a run: settle its mode, time and speed-up, keep it, and tell the listeners.

        error: what ended it early, in words. A run that is finished twice counts once.
        """
        with self._lock:
            if run.finished:
                return
            run.finished = True
            run.error = error
            run.seconds = run.seconds or time.perf_counter() - run._clock
            if run.engine_calls and run.host_calls:
                run.mode = "mixed"
            elif run.engine_calls:
                run.mode = "engine"
            elif run.host_calls and run.mode != "building":
                run.mode = "host"
            self._compare(run)
            added = {
                "saved_seconds": run.saved_seconds or 0.0,
                "runs": 1,
                "engine_calls": run.engine_calls,
            }
            for kept in (self._kept, self._unsaved):
                for name, value in added.items():
                    kept.totals[name] += value
            self.runs.append(run)
            if run.mode == "building" and error is None and run.graph_key is not None:
                # The host's own path with nothing in its way, at the sizes of real work.
                for size, times in run.times("host").items():
                    if len(times) >= FEWEST_CALLS:
                        self._note(_key(run.graph_key, size, run.gpu), statistics.median(times))
        self._save()
        self.emit(RUN_EVENT, run.to_json())
        self.status(run.node_id, _STATES[run.mode], status_line(run))

    def baseline(self, graph_key: str, dims: Dims, gpu: str) -> float | None:
        """Milliseconds of a call on the host's path, measured on this machine; None if never.

        The shortest of the last few: a speed-up is rather too small than too large.
        """
        with self._lock:
            samples = self._kept.baselines.get(_key(graph_key, _dims_key(dims), gpu))
            return min(samples) if samples else None

    def note_baseline(self, graph_key: str, dims: Dims, gpu: str, ms: float) -> None:
        """Keep one measurement of the host's path, milliseconds per call of the denoiser."""
        if not _is_amount(ms) or ms == 0:
            raise ValueError(f"{ms!r} ms is no time of a call")
        with self._lock:
            self._note(_key(graph_key, _dims_key(dims), gpu), float(ms))
        self._save()

    def status(self, node_id: str | None, state: str, text: str) -> None:
        """Tell the front end what a node's line says: "build", "engine", "host" or "off"."""
        if node_id is not None:
            self.emit(STATUS_EVENT, {"node_id": node_id, "state": state, "text": text})

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called for each event; the returned function ends that."""
        with self._lock:
            self._listeners.append(listener)

        def stop() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Call the listeners. One that fails is logged and does not stop the run."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(event, data)
            except Exception:
                logger.warning("a listener of %s failed", event, exc_info=True)

    def _compare(self, run: Run) -> None:
        """Speed-up and seconds saved, over the calls whose size has a baseline."""
        if run.graph_key is None:
            return
        ours = theirs = 0.0
        for size, times in run.times("engine").items():
            samples = self._kept.baselines.get(_key(run.graph_key, size, run.gpu))
            if samples:
                # The median stands for each call: a first one may have captured a graph.
                ours += statistics.median(times) * len(times)
                theirs += min(samples) * len(times)
        if ours > 0:
            run.speedup = theirs / ours
            run.saved_seconds = (theirs - ours) / 1000.0

    def _note(self, key: str, ms: float) -> None:
        for kept in (self._kept, self._unsaved):
            kept.note(key, ms)

    def _read(self) -> _Kept | None:
        """What the file holds; None if it is of a newer version. A damaged file holds nothing."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return _Kept()
        except OSError as error:
            self._say(f"{self.path} cannot be read: {error.strerror or error}")
            return _Kept()
        try:
            data = json.loads(content)
            version = data["version"]
            if not isinstance(version, int):
                raise TypeError(version)
            if version > VERSION:
                self._say(f"{self.path} is of a newer version: nothing is added to it")
                return None
            return _Kept.from_json(data)
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
            self._say(f"{self.path} is damaged: totals and baselines start anew")
            return _Kept()

    def _save(self) -> None:
        """Add what is new to the file, under a lock, since other processes add to it as well."""
        with self._saving:
            with self._lock:
                added, self._unsaved = self._unsaved, _Kept()
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
                    stored = self._read()
                    if stored is None:
                        return
                    stored.add(added)
                    _write(self.path, stored.to_json())
            except (OSError, filelock.Timeout, NotImplementedError) as error:
                self._say(f"{self.path} cannot be written ({error}): totals are not kept")
                with self._lock:  # for the next try
                    added.add(self._unsaved)
                    self._unsaved = added
                return
            with self._lock:
                stored.add(self._unsaved)
                self._kept = stored

    def _say(self, problem: str) -> None:
        """Warn of a problem the first time."""
        if problem not in self._said:
            self._said.add(problem)
            logger.warning("%s", problem)


@lru_cache(maxsize=1)
def journal() -> Journal:
    """The process's journal."""
    return Journal()


_TOTALS = ("saved_seconds", "runs", "engine_calls")
_STATES = {"engine": "engine", "mixed": "engine", "host": "host", "building": "build"}


class _Kept:
    """What outlives a process: totals, and the samples of each baseline, oldest first."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(_TOTALS, 0)
        self.baselines: dict[str, list[float]] = {}

    def note(self, key: str, ms: float) -> None:
        samples = self.baselines.pop(key, [])
        self.baselines[key] = [*samples, ms][-KEPT_SAMPLES:]
        while len(self.baselines) > KEPT_BASELINES:
            self.baselines.pop(next(iter(self.baselines)))

    def add(self, other: _Kept) -> None:
        for name in _TOTALS:
            self.totals[name] += other.totals[name]
        for key, samples in other.baselines.items():
            for ms in samples:
                self.note(key, ms)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "totals": self.totals, "baselines": self.baselines}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> _Kept:
        """Inverse of `to_json`; single values that make no sense are left out."""
        kept = cls()
        for name in _TOTALS:
            value = data["totals"].get(name)
            # An engine may have been slower, so seconds saved may be negative.
            if _is_amount(abs(value) if _is_number(value) else value):
                kept.totals[name] = value
        for key, samples in data["baselines"].items():
            for ms in samples if isinstance(samples, list) else ():
                if _is_amount(ms) and ms > 0:
                    kept.note(key, float(ms))
        return kept


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _write(path: Path, data: dict[str, Any]) -> None:
    """Replace the file as a whole. Not forced to the disk: what a power cut loses are counts."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _dims_key(dims: Dims) -> str:
    key = f"{dims['width']}x{dims['height']}x{dims['batch']}"
    controlnets = dims.get("controlnets", 0)
    return f"{key}+{controlnets}" if controlnets else key


def _key(graph_key: str, size: str, gpu: str) -> str:
    return f"{graph_key} {size} {gpu}"


def _reasons_text(reasons: Iterable[Mapping[str, str | None]]) -> str:
    texts = []
    for reason in reasons:
        node = reason["node"]
        texts.append(f"{reason['text']} ({node})" if node else str(reason["text"]))
    return "; ".join(texts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
