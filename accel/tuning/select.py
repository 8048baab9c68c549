"""The choice of a kernel for each call: what a profile says, what measuring says, or the default.

One selector serves a device. Its choices stay the same for the life of the process, so that equal
runs give equal bits; what is measured now counts from here on, also in later processes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import kernels
from ..cache import DiskCache
from ..hardware import Hardware, describe
from ..kernels.registry import Call, Config, Kernel
from ..settings import settings
from .compiling import compile_ahead, launches_of
from .measure import Measurement, measure
from .profile import PROFILE_VERSION, Entry, Profile

logger = logging.getLogger(__name__)

SAVED_AT_ONCE = 16
"""Measurements that are written to disk together; a process that is killed loses no more."""

Candidates = Sequence[tuple[Kernel, Config]]


@dataclass(frozen=True)
class Choice:
    """A selected kernel, its configuration, why it was selected, and its time if that is known."""

    kernel: Kernel
    config: Config
    reason: str
    us: float | None = None


class Selector:
    """Chooses for one device. Thread-safe.

    measuring: time the candidates of a call that the profile does not know; needs the device.
    """

    def __init__(
        self, hardware: Hardware, device: torch.device, profile: Profile, measuring: bool
    ) -> None:
        self.hardware, self.device, self.profile = hardware, device, profile
        self._measuring = measuring and device.type == "cuda"
        self._choices: dict[str, Choice] = {}
        self._lock = threading.Lock()

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        """A choice for each call; calls with equal keys get the same."""
        with self._lock:
            unknown = {call.key: call for call in calls if call.key not in self._choices}
            self._choices |= self._near(
                {k: c for k, c in unknown.items() if not self.profile.get(k)}
            )
            unmeasured = []
            for key, call in unknown.items():
                choice = self._choices.get(key) or self._known(key, call)
                if choice is None:
                    unmeasured.append(call)
                else:
                    self._choices[key] = choice
            if unmeasured:
                self._measure(unmeasured)
            return [self._choices[call.key] for call in calls]

    def _near(self, calls: Mapping[str, Call]) -> dict[str, Choice]:
        """Choices that were measured at sizes near by, as far as their kernels can run these."""
        found: dict[str, tuple[Call, Choice]] = {}
        for key, call in calls.items():
            near = self.profile.near(key)
            candidates = kernels.candidates(call, self.hardware)
            offered = None if near is None else _offered(near[1], call, candidates)
            if near is not None and offered is not None:
                choice = Choice(*offered, f"measured at a size near this, {near[0]}")
                found[key] = call, choice
        if found and self.device.type == "cuda" and torch.cuda.is_available():
            with torch.cuda.device(self.device):
                compile_ahead(
                    ((c.kernel, c.config, call) for call, c in found.values()), self.hardware
                )
                return {key: c for key, (call, c) in found.items() if _launchable(call, c)}
        return {key: choice for key, (_, choice) in found.items()}

    def _known(self, key: str, call: Call) -> Choice | None:
        """The choice that needs no measurement: a profile's, or the only candidate there is."""
        candidates = kernels.candidates(call, self.hardware)
        entry = self.profile.get(key)
        found = None if entry is None else _offered(entry, call, candidates)
        if entry is not None and found is not None:
            return Choice(*found, f"measured, {entry.us:.1f} us", entry.us)
        kernel, config = _library(candidates)
        if len(candidates) == 1:
            return Choice(kernel, config, f"no kernel for {self.hardware.kind}, the reference runs")
        if len(candidates) == 2 and kernel is candidates[0][0]:
            return Choice(kernel, config, "the only kernel for this call")
        if not self._measuring:
            return Choice(kernel, config, "the library's: nothing is measured and measuring is off")
        return None

    def _measure(self, calls: Sequence[Call]) -> None:
        started = time.perf_counter()
        logger.info("measuring %d operators on %s, once", len(calls), self.hardware.name)
        found: dict[str, Entry] = {}
        problems: Counter[tuple[str, str]] = Counter()
        measured = 0
        try:
            for call, results in measure(calls, self.hardware, self.device):
                self._choices[call.key], entry = self._best(call, results)
                if entry is not None:
                    found[call.key] = entry
                    measured += 1
                problems.update((r.kernel.name, r.problem) for r in results if r.problem)
                if len(found) >= SAVED_AT_ONCE:
                    self.profile.add(found)
                    found = {}
        finally:
            self.profile.add(found)
        for (name, problem), count in problems.most_common(8):
            logger.info("%s could not be timed for %d calls: %s", name, count, problem)
        seconds = time.perf_counter() - started
        logger.info("measured %d operators in %.1f s", measured, seconds)

    def _best(self, call: Call, results: Sequence[Measurement]) -> tuple[Choice, Entry | None]:
        """The fastest and what to remember of it; of nothing measured a library's, for now."""
        best = min((r for r in results if r.us is not None), key=_us, default=None)
        if best is None:
            why = next((r.problem for r in results if r.problem), "no memory")
            reason = f"the library's: nothing was measured ({why})"
            return Choice(*_library(kernels.candidates(call, self.hardware)), reason), None
        us = _us(best)
        choice = Choice(best.kernel, best.config, f"measured, the fastest of {len(results)}", us)
        ours = [r for r in results if r.kernel.launches is not None]
        if ours and all(r.us is None for r in ours):  # Triton does not work here; it may tomorrow
            return choice, None
        return choice, Entry(best.kernel.name, best.config, us)


def _library(candidates: Candidates) -> tuple[Kernel, Config]:
    """The first that is a library's, or the reference: nothing unproven is taken on trust."""
    return next((kernel, config) for kernel, config in candidates if kernel.launches is None)


def _offered(entry: Entry, call: Call, candidates: Candidates) -> tuple[Kernel, Config] | None:
    """The candidate that a profile's entry names; None if it cannot be had here."""
    for kernel, config in candidates:
        if kernel.name == entry.kernel and dict(config) == dict(entry.config):
            try:
                kernel.workspace(call, config)  # a library's plan of that number may not exist
            except Exception as error:
                logger.debug("%s %s is not to be had: %s", kernel.name, dict(config), error)
                return None
            return kernel, config
    return None


def _launchable(call: Call, choice: Choice) -> bool:
    """Whether the choice's Triton kernels, if it has any, fit on the GPU at this size."""
    if choice.kernel.launches is None:
        return True
    try:
        for launch in launches_of(choice.kernel, choice.config, call):
            launch.warm()
    except Exception as error:
        logger.info("%s cannot run %s: %s", choice.kernel.name, call.key, error)
        return False
    return True


def _us(result: Measurement) -> float:
    assert result.us is not None
    return result.us


_selectors: dict[tuple[str, Path, bool], Selector] = {}
_selectors_lock = threading.Lock()


def selector_for(
    device: torch.device, cache_dir: Path | None = None, measuring: bool = False
) -> Selector:
    """The selector of a device, its profile kept under `cache_dir` (by default the user's).

    measuring: whether calls that no profile knows are timed, unless the user's settings say.
    """
    root = settings().cache_dir if cache_dir is None else cache_dir
    wanted = settings().tune
    key = (str(device), root, measuring if wanted is None else wanted)
    with _selectors_lock:
        if key not in _selectors:
            hardware = describe(device)
            cache = DiskCache(root, settings().cache_bytes, f"profile{PROFILE_VERSION}")
            profile = Profile(hardware, cache if device.type == "cuda" else None)
            _selectors[key] = Selector(hardware, device, profile, key[2])
        return _selectors[key]
