"""Timing every kernel of many calls ahead: which image sizes, what is kept, and where.

A run takes minutes to hours, so that it may be stopped at any time: what is measured is written
every few calls, whole, and a later run goes on from there.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..cache import DiskCache, write_whole
from ..errors import CacheUnavailable, InvalidFile, InvalidInput, SwitchyardError
from ..hardware import Hardware
from ..kernels.registry import Call
from . import profile_file
from .calibration import Calibration
from .compiling import Compiler
from .cost import Fit, Times
from .measure import Measurement, Prune, measure
from .profile import Entry, Profile, entries_of, identity
from .select import fastest, lasting

logger = logging.getLogger(__name__)

RATIO = 1.35
"""How many times as many rows the next measured size may have."""

POPULAR = (
    *((512, 512), (512, 768), (768, 512), (768, 768), (768, 1024), (1024, 768)),
    *((832, 1216), (1216, 832), (768, 1344), (1344, 768), (896, 1152), (1152, 896), (1024, 1024)),
)
"""Sizes that users choose most, width and height in pixels: measured themselves."""

LEVELS = (8, 16, 32, 64)
"""Pixels of a side for one of the network's, at each of its resolutions."""

NARROWEST = 1.5
"""How much longer than the other a side may be of a size that only fills a gap."""

AT_ONCE = 512
"""Calls whose kernels are compiled together, before the first of them is timed: processes that
compile take seconds to start, and many calls have a kernel in common."""

SAVED_EVERY = 8
"""Calls that are written together; a process that is killed loses no more."""

Size = tuple[int, int]

Report = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is being done."""


def sizes_between(first: int, last: int) -> list[Size]:
    """Image sizes, smallest first, that stand for all from `first`² to `last`² pixels.

    For a fixed structure only the rows of a call, batch · height · width at one of the network's
    resolutions, change with the image. The rule: from the square of `first` to that of `last`, the
    next size has at most `RATIO` times the rows, at every resolution. So each size between is at
    most the root of that, 1.16, from one that is measured. Beside the two squares there are the
    `POPULAR` sizes between them, some of them squares and others not; what gaps they leave are
    filled with as few sizes as that takes, in multiples of 64 pixels, whose rows no resolution
    rounds. Where images are so small that no size is that near, the nearest there is.
    """
    ends = ((first, first), (last, last))
    inside = (size for size in POPULAR if first**2 < _pixels(size) < last**2)
    wanted = sorted({*ends, *inside}, key=lambda size: (_pixels(size), size))
    found = wanted[:1]
    for size in wanted[1:]:
        while step(found[-1], size) > RATIO:
            between = _between(found[-1], size)
            if between is None:
                break
            found.append(between)
        found.append(size)
    return found


def step(small: Size, large: Size) -> float:
    """How many times as many rows there are, at the resolution where that is the most."""
    return max(_rows(large, level) / _rows(small, level) for level in LEVELS)


def _between(small: Size, large: Size) -> Size | None:
    """The largest size within `RATIO` of `small`, or the least beyond; the squarest of these."""
    sides = range(64, int(math.sqrt(NARROWEST * _pixels(large))) + 1, 64)
    fitting = [
        (width, height)
        for width in sides
        for height in sides
        if height <= width <= NARROWEST * height
        and _pixels(small) < width * height
        and width * height < _pixels(large)
    ]
    if not fitting:
        return None

    def order(size: Size) -> tuple[Any, ...]:
        grown = step(small, size)
        near = grown <= RATIO
        return (not near, -_pixels(size) if near else grown, size[0] / size[1])

    return min(fitting, key=order)


def _pixels(size: Size) -> int:
    return size[0] * size[1]


def _rows(size: Size, level: int) -> int:
    return math.ceil(size[0] / level) * math.ceil(size[1] / level)


class Store(Protocol):
    """Where measurements go, and what there is already."""

    @property
    def place(self) -> str:
        """What to call it."""

    def known(self) -> Mapping[str, Entry]:
        """What is measured, by the calls' keys."""

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Keep these. Raises `SwitchyardError` if that cannot be done."""

    def keep_fit(self, fit: Fit) -> None:
        """Keep constants of the performance model, in place of others. Raises as `add` does."""


class OwnProfile:
    """The user's profile, which engines use from the next process on."""

    def __init__(self, hardware: Hardware, cache: DiskCache) -> None:
        self._profile, self._cache = Profile(hardware, cache, own_only=True), cache

    @property
    def place(self) -> str:
        """What to call it."""
        return f"the profile in {self._cache.root}"

    def known(self) -> Mapping[str, Entry]:
        """What was measured on this machine; not what came with the pack."""
        return self._profile.own()

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Keep these. Raises `CacheUnavailable` if the cache cannot be written."""
        self._profile.add(entries)
        self._check()

    def keep_fit(self, fit: Fit) -> None:
        """Keep constants of the performance model. Raises as `add` does."""
        self._profile.keep_fit(fit.to_json())
        self._check()

    def _check(self) -> None:
        if self._cache.problem is not None:
            raise CacheUnavailable(self._cache.problem)


class ProfileFile:
    """A file such as those in `tuning_profiles/`.

    replace: have it hold nothing but what is measured now, if it is of another GPU, of other
    versions of libraries, or no profile. Without it such a file raises `InvalidInput`.
    """

    def __init__(self, path: Path, hardware: Hardware, command: str, replace: bool = False) -> None:
        self._path, self._hardware, self._command = path, hardware, command
        self._content = profile_file.Content()
        if path.exists():
            try:
                content = profile_file.read(path)
                _check_same(content.meta, hardware)
            except InvalidFile as error:
                if not replace:
                    raise InvalidInput(
                        f"{path}: {error}: give another file, or --fresh to replace it"
                    ) from None
            else:
                self._content = content
                if content.faults:
                    logger.warning("%s: left out: %s", path, content.summary())

    @property
    def place(self) -> str:
        """What to call it."""
        return str(self._path)

    def known(self) -> Mapping[str, Entry]:
        """What it has."""
        return entries_of(self._content)

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Write these and what there was, in one step."""
        self._content.entries |= {call: entry.to_json() for call, entry in entries.items()}
        self._write()

    def keep_fit(self, fit: Fit) -> None:
        """Write these constants of the performance model and what there was, in one step."""
        self._content.fit = fit.to_json()
        self._write()

    def _write(self) -> None:
        self._content.meta = {**self._content.meta, **spec(self._hardware, self._command)}
        _write(self._path, profile_file.written(self._content))


def spec(hardware: Hardware, command: str) -> dict[str, Any]:
    """What a measurement depends on, and what else is worth knowing of where it was made."""
    return {
        **identity(hardware),
        "memory_mib": hardware.memory_bytes >> 20,
        "driver": hardware.driver,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def _check_same(meta: Mapping[str, Any], hardware: Hardware) -> None:
    for name, value in identity(hardware).items():
        if meta.get(name) != value:
            raise InvalidFile(f"it was measured with {name} {meta.get(name)}, here is {value}")


class Details:
    """A file with the times of all candidates: {"meta": …, "calls": {call: [[kernel, …], …]}}.

    Of each candidate the kernel's name, the configuration, microseconds, and the problem where
    there are none.
    """

    def __init__(self, path: Path, hardware: Hardware, command: str, replace: bool = False) -> None:
        self._path, self._meta = path, spec(hardware, command)
        # Each as its line of the file, since there may be tens of megabytes.
        self._lines: dict[str, str] = {}
        if path.exists():
            try:
                self._lines = _detailed(path, hardware)
            except InvalidFile as error:
                if not replace:
                    raise InvalidInput(
                        f"{path}: {error}: give another file, or --fresh to replace it"
                    ) from None

    def known(self) -> set[str]:
        """The calls that it has."""
        return set(self._lines)

    def add(self, measured: Mapping[str, Sequence[Measurement]]) -> None:
        """Write these and what there was, in one step."""
        for call, results in measured.items():
            rows = [[r.kernel.name, dict(r.config), _rounded(r.us), r.problem] for r in results]
            self._lines[call] = json.dumps(rows)
        calls = ",\n".join(
            f"{json.dumps(call)}: {self._lines[call]}" for call in sorted(self._lines)
        )
        text = f'{{"meta": {json.dumps(self._meta)},\n"calls": {{\n{calls}\n}}}}\n'
        _write(self._path, text)


def _detailed(path: Path, hardware: Hardware) -> dict[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        meta, calls = data["meta"], data["calls"]
        lines = {call: json.dumps(rows) for call, rows in calls.items()}
    except OSError as error:
        raise InvalidFile(error.strerror or str(error)) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InvalidFile("it holds no candidates' times") from None
    _check_same(meta, hardware)
    return lines


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise SwitchyardError(
            f"{path} cannot be written: {reason}; it has what was measured until then"
        ) from error


def _rounded(us: float | None) -> float | None:
    return None if us is None else round(us, 3)


@dataclass
class Tuned:
    """What a run did. calls: in all. failed: without a result that later processes may go by.

    candidates: how many were timed or tried.
    """

    calls: int
    known: int
    measured: int = 0
    failed: int = 0
    candidates: int = 0
    seconds: float = 0.0


def tune(
    calls: Iterable[Call],
    compiler: Compiler,
    device: torch.device,
    store: Store,
    details: Details | None = None,
    fresh: bool = False,
    calibration: Calibration | None = None,
    report: Report = lambda fraction, text: None,
) -> Tuned:
    """Time candidates of every call that is not known yet, and keep the fastest of each.

    fresh: measure what is known, too. calibration: what the performance model learns, which leaves
    candidates out that cannot win, and whose constants are kept; without it all are timed. Raises
    `SwitchyardError` where measuring cannot go on; what is measured until then is kept, and so it
    is when anything else ends the run.
    """
    distinct = {call.key: call for call in calls}
    known = set() if fresh else set(store.known())
    if details is not None:
        known &= details.known()
    todo = [call for key, call in distinct.items() if key not in known]
    done = Tuned(len(distinct), len(distinct) - len(todo))
    started = time.perf_counter()
    entries: dict[str, Entry] = {}
    measured: dict[str, Sequence[Measurement]] = {}

    def save() -> None:
        # The details first: a call that only they have is measured again, and not lost.
        if details is not None and measured:
            details.add(measured)
        if entries:
            store.add(entries)
        entries.clear()
        measured.clear()

    try:
        for group, prune in _groups(todo, calibration):
            report((done.measured + done.failed) / len(todo), "compiling")
            for call, results in measure(group, compiler, device, prune):
                best = fastest(results)
                if best is None or not lasting(results):
                    done.failed += 1
                else:
                    entries[call.key] = best
                    done.measured += 1
                done.candidates += len(results)
                measured[call.key] = results
                if calibration is not None:
                    calibration.learn(call.key, _times(results))
                report((done.measured + done.failed) / len(todo), call.op)
                if len(measured) >= SAVED_EVERY:
                    save()
    except RuntimeError as error:  # CUDA's own: the GPU is of no more use to this process
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SwitchyardError(
            f"measuring stopped: {reason}; what is measured is kept, the same command"
            f"{' without --fresh' if fresh else ''} goes on"
        ) from error
    finally:
        save()
        if calibration is not None and done.measured:
            fitted = calibration.fitted()
            if fitted is not None:
                store.keep_fit(fitted)
        done.seconds = time.perf_counter() - started
    return done


def _groups(
    calls: Sequence[Call], calibration: Calibration | None
) -> Iterator[tuple[Sequence[Call], Prune | None]]:
    """Calls that are compiled together, and what leaves candidates of theirs out."""
    full = list(calls) if calibration is None else calibration.in_full(calls)
    for start in range(0, len(full), AT_ONCE):
        yield full[start : start + AT_ONCE], None
    if calibration is None:
        return
    done = {call.key for call in full}
    rest = [call for call in calls if call.key not in done]
    for start in range(0, len(rest), AT_ONCE):
        yield rest[start : start + AT_ONCE], calibration.worth_timing


def _times(results: Sequence[Measurement]) -> Times:
    return [(r.kernel.name, r.config, r.us) for r in results if r.us is not None]
