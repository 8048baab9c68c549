"""The choice of a kernel for each call: what a profile says, what measuring says, or the default.

One selector serves a device. Its choices stay the same for the life of the process, so that equal
runs give equal bits; what is measured now counts from here on, also in later processes. Only while
something is being compiled in the background are they provisional at first: what is there runs
until that is done, and whoever runs it asks for better between two samplings (`renew`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import background, kernels
from ..errors import OutOfMemory
from ..hardware import Hardware, describe
from ..kernels.registry import Call, Config, Kernel
from ..settings import settings
from . import ahead
from .chips import chip_of, named
from .compiling import Compiler, Variant, deadly, launches_of, made_apart, variants_of
from .cost import NUMBERED, Fit, Model, Ranked, exactly, numbered
from .measure import TENSOR_CORES, WRONG, Measurement, measure
from .profile import OTHERS, Entry, Profile, family_of, profile_cache

logger = logging.getLogger(__name__)

TIE = 1.02
"""Times within this factor of the best are as good: the candidate that is preferred is taken.

What measuring leaves open is so decided alike from run to run.
"""

KEPT = 1.1
"""What a size near by runs is kept within this factor of the best that is predicted.

Its code is compiled, and predictions are not more exact than that: on sizes that were held out this
costs nothing.
"""

PLANNED = 1.05
"""By how much a library's plan has to be faster for a size that somebody waits for to have it made:
dozens of them take longer than all else."""

MARGIN = 1.3
"""By how much ours has to be faster than a library's where nothing was ever timed on such a GPU,
and tensor cores do the work: moving bytes takes alike on all."""

FIRST = 5.0
"""Seconds that a first result may take for which what is prepared waits: both are Python's work."""

SAVED_AT_ONCE = 16
"""Measurements that are written to disk together; a process that is killed loses no more."""

Candidates = Sequence[tuple[Kernel, Config]]

Named = tuple[Any, ...]
"""What tells a kernel's configuration from others."""


@dataclass(frozen=True)
class Choice:
    """A selected kernel, its configuration, why it was selected, and its time if that is known.

    provisional: another one is being compiled, and will be selected from then on. about: where the
    time is not known, what the performance model predicts, or one of a size near by, or of another
    GPU, suggests. elsewhere: where that was measured, if not on such a machine.
    """

    kernel: Kernel
    config: Config
    reason: str
    us: float | None = None
    provisional: bool = False
    about: float | None = None
    elsewhere: str | None = None


class Selector:
    """Chooses for one device. Thread-safe.

    measuring: time the candidates of a call that the profile does not know; needs the device.
    waiting: compile at once what is chosen; else in the background, if it is not measured anyway.
    Meanwhile what a size near by runs is taken, if that is compiled, or else a library's. Once
    `prepare` was called nothing is compiled for further sizes of the calls that were known by then:
    they choose among what there is. If they were measured, their fastest is compiled meanwhile.
    """

    def __init__(
        self,
        compiler: Compiler,
        device: torch.device,
        profile: Profile,
        measuring: bool,
        waiting: bool = True,
    ) -> None:
        self.compiler, self.device, self.profile = compiler, device, profile
        self.hardware = compiler.hardware
        self._measuring = measuring and device.type == "cuda"
        self._waiting = waiting or self._measuring
        self._choices: dict[str, Choice] = {}
        self._provisional: dict[str, Choice] = {}
        self._model = model_of(self.hardware, profile)
        self._guesses: dict[str, Choice] = {}
        self._by_guess: dict[str, Call] = {}
        self._timed: dict[str, dict[Named, Measurement]] = {}
        self._neighbours: dict[str, Choice] = {}
        self._refused: set[Named] = set()
        self._prepared: set[str] = set()
        self._ahead: dict[str, list[tuple[Kernel, Config]]] = defaultdict(list)
        self._running: dict[str, dict[Named, tuple[Kernel, Config]]] = defaultdict(dict)
        self._preparing = 0
        self._ran = threading.Event()
        self._lock = threading.Lock()
        if device.type == "cuda":
            kernels.load_triton()
            profile.ignore_unknown(kernel.name for kernel in kernels.kernels())

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        """A choice for each call; calls with equal keys get the same."""
        with self._lock:
            known = self._choices | self._provisional
            unknown = {call.key: call for call in calls if call.key not in known}
            absent = self._absent(unknown)
            found = {key: self._known(key, call) for key, call in unknown.items()}
            meanwhile = {} if self._waiting else self._postponed(unknown, found)
            proven = self._proven(
                {
                    key: (unknown[key], choice)
                    for key, choice in (found | meanwhile).items()
                    if choice is not None and choice.kernel.launches is not None
                }
            )
            for key, instead in meanwhile.items():
                able = proven.pop(key, instead) or self._library(unknown[key])
                self._provisional[key] = replace(able, provisional=True)
                del found[key]
            found |= proven
            for key, choice in found.items():
                if choice is not None and choice.provisional:
                    self._provisional[key] = choice
                elif choice is not None and key in absent:
                    self._provisional[key] = replace(choice, provisional=True)
                elif choice is not None:
                    self._choices[key] = choice
                    pair = choice.kernel, choice.config
                    self._running[family_of(key)[0]][_named(*pair)] = pair
                    if key in self._guesses:
                        self._by_guess[key] = unknown[key]
            unmeasured = [unknown[key] for key, choice in found.items() if choice is None]
            if unmeasured:
                self._measure(unmeasured)
            known = self._choices | self._provisional
            return [known[call.key] for call in calls]

    def renew(self) -> None:
        """Once nothing is being compiled, choose anew what was chosen provisionally.

        To be called between two samplings: till then a size that is bound again runs the same.
        """
        with self._lock:
            if self.settled:
                self._provisional.clear()

    @property
    def settled(self) -> bool:
        """Whether nothing is being compiled, for a provisional choice or ahead."""
        return not self.compiler.busy and not self._preparing

    def ran(self) -> None:
        """What was selected gave a result: what is prepared is in no picture's way any more."""
        if not self._ran.is_set():
            self._ran.set()

    def prepare(self, plan: str, calls: Callable[[], Iterable[Call]]) -> None:
        """From now on sizes that are new to the calls known so far wait for no compiler.

        They choose among kernels that are compiled. Of these `ahead.covering` names a few that
        serve every size well, which are compiled in the background, once the first result is there.

        plan: what tells the plan from others, also in later processes, which find the few in the
        cache. calls: those of the plan at the sizes of `ahead.SIZES`; called in another process.
        """
        if self._model is None or not self._waiting or self.device.type != "cuda":
            return
        if self.profile.model_made:  # what it says is not worth so many kernels
            return
        with self._lock:
            self._prepared |= {family_of(key)[0] for key in self._choices}
            self._preparing += 1
        background.start("ahead", self._prepare, plan, calls)

    def _prepare(self, plan: str, calls: Callable[[], Iterable[Call]]) -> None:
        try:
            self._ran.wait(FIRST)
            # What predictions take once is not for the first new size.
            self._make_ready()
            # All that decides it beside the calls: a later version of the pack has others.
            names = sorted(kernel.name for kernel in kernels.kernels())
            tables = [self.profile.fit, names, ahead.SIZES, ahead.MOST]
            about = f"{plan} {json.dumps(tables, sort_keys=True)}"
            variants = self.compiler.remembered(about)
            if variants is None:
                model = model_of(self.hardware, self.profile)
                assert model is not None, "there was one"
                job = partial(ahead.named_covering, calls, self.hardware, model)
                found = made_apart(job, self.hardware)
                if found is None:
                    return
                variants = variants_of(found)
                self.compiler.remember(about, variants)
            with self._lock:
                for kernel, config, call in variants:
                    self._ahead[family_of(call.key)[0]].append((kernel, config))
            self.compiler.compile_later([v for v in variants if not self.compiler.has(v)])
        except Exception as error:  # new sizes then choose among fewer
            logger.warning("kernels for other image sizes are not compiled ahead: %s", error)
        finally:
            with self._lock:
                self._preparing -= 1

    def _make_ready(self) -> None:
        """Other sizes of the calls known so far are predicted without delay from then on."""
        with self._lock:
            known = list(self._choices)
        for key in known:
            with self._lock:  # for one call only, as in `_times`
                if self._model is not None:
                    self._model.make_ready(key)

    def guessed(self) -> list[Call]:
        """The calls that run by what is predicted, those that take longest first."""
        with self._lock:
            known = [
                (self._choices[key].about or 0.0, call) for key, call in self._by_guess.items()
            ]
        return [call for _, call in sorted(known, key=lambda item: -item[0])]

    def compile_likely(self, call: Call) -> None:
        """Compile what `time_likely` will time."""
        self.compiler.compile((kernel, config, call) for kernel, config in self._likely(call))

    def time_likely(self, call: Call, undisturbed: Callable[[], bool] = lambda: True) -> None:
        """Time the few likeliest candidates of a guessed call; remembered, but not used here.

        The call stays guessed while others may well be quicker than those: they are timed when it
        is asked again. undisturbed: asked afterwards; if it was not, nothing of it counts.
        """
        with self._lock:
            if self._by_guess.pop(call.key, None) is None:  # another session was quicker
                return
        likely, so_far = self._likely(call), self._timed_so_far(call)
        if not likely:
            self._timed.pop(call.key, None)
            entry = fastest(so_far)
            if entry is not None and lasting(so_far):
                with self._lock:
                    self.profile.add({call.key: entry})
                logger.info("timed while idle: %s", call.key)
            return
        again = sorted((r for r in so_far if r.us is not None), key=lambda r: r.us or 0.0)[:1]
        wanted = {_named(*pair) for pair in likely}
        wanted |= {_named(r.kernel, r.config) for r in again}  # under the same conditions

        def prune(call: Call, found: Candidates) -> Candidates:
            return [pair for pair in found if _named(*pair) in wanted]

        for _, results in measure([call], self.compiler, self.device, prune):
            if undisturbed():
                tried = {_named(*pair): Measurement(*pair, None) for pair in likely}
                tried |= {_named(r.kernel, r.config): r for r in results}
                self._timed[call.key] = self._timed.get(call.key, {}) | tried
        with self._lock:
            self._by_guess[call.key] = call

    def _likely(self, call: Call) -> Candidates:
        """What is to be timed next of a guessed call."""
        so_far = self._timed_so_far(call)
        failed = {_named(r.kernel, r.config) for r in so_far if r.us is None}
        candidates = kernels.candidates(call, self.hardware)[:-1]
        candidates = [pair for pair in candidates if _named(*pair) not in failed]
        times = [(r.kernel.name, r.config, r.us) for r in so_far if r.us is not None]
        with self._lock:
            return [] if self._model is None else self._model.contenders(call, candidates, times)

    def _timed_so_far(self, call: Call) -> list[Measurement]:
        """Of a guessed call, in the order of preference."""
        timed = self._timed.get(call.key, {})
        order = [_named(*pair) for pair in kernels.candidates(call, self.hardware)]
        return sorted(timed.values(), key=lambda r: order.index(_named(r.kernel, r.config)))

    def _postponed(
        self, calls: Mapping[str, Call], found: Mapping[str, Choice | None]
    ) -> dict[str, Choice]:
        """Another kernel for each choice that is not compiled, until it is, in the background.

        What a size near by runs, whose code is there, or else a library's.
        """
        variants = {
            key: (choice.kernel, choice.config, calls[key])
            for key, choice in found.items()
            if choice is not None and choice.kernel.launches is not None
        }
        missing = {k: variant for k, variant in variants.items() if not self.compiler.has(variant)}
        if missing:
            self.compiler.compile_later(list(missing.values()))
        instead: dict[str, Choice] = {}
        for key in missing:
            choice = self._neighbours.get(key)
            if choice is not None and self._able(choice.kernel, choice.config, calls[key]):
                reason = f"{choice.reason}, until what is predicted is compiled"
            else:
                choice, reason = self._library(calls[key]), "the library's, until ours is compiled"
            instead[key] = replace(choice, reason=reason, provisional=True)
        return instead

    def _absent(self, calls: Mapping[str, Call]) -> set[str]:
        """Calls of new sizes that were measured, whose fastest is not compiled; it will be.

        In the background, and so they begin with what there is.
        """
        absent: dict[str, Variant] = {}
        for key, call in calls.items():
            entry = self.profile.get(key) if self._is_prepared(key) else None
            if entry is not None and entry.elsewhere is None:
                found = _offered(entry, call, self._variants_of(entry, call))
                if found is not None and not self._there(*found, call):
                    absent[key] = (*found, call)
        if absent:
            self.compiler.compile_later(list(absent.values()))
        return set(absent)

    def _compiled(self, key: str, call: Call) -> Candidates:
        """Candidates of which ours are compiled, or will be soon, or are known to be quick.

        To list all that there could be would take a new size longer than the rest of choosing.
        """
        family, near = family_of(key)[0], self.profile.near(key)
        registered = {kernel.name: kernel for kernel in kernels.kernels()}
        pairs = [*self._ahead.get(family, ()), *self._running.get(family, {}).values()]
        for entry in (self.profile.get(key), None if near is None else near[1]):
            times = [] if entry is None else entry.times()
            pairs += [(registered[name], config) for name, config, _ in times if name in registered]
        others = kernels.candidates(call, self.hardware, without_ours=True)
        listed = {_named(*pair) for pair in others}
        ours: dict[Named, tuple[Kernel, Config]] = {}
        for pair in pairs:
            if pair[0].launches is not None:
                ours.setdefault(_named(*pair), pair)
        new = [pair for which, pair in ours.items() if which not in listed]
        return [*ahead.fitting(new, call, self.hardware), *others]

    def _variants_of(self, entry: Entry, call: Call) -> Candidates:
        """Of all candidates those of the kernel that an entry names: listing all takes long."""
        return kernels.candidates(call, self.hardware, only=entry.kernel)[:-1]

    def _is_prepared(self, key: str) -> bool:
        return self._waiting and family_of(key)[0] in self._prepared

    def _there(self, kernel: Kernel, config: Config, call: Call) -> bool:
        """Whether a kernel runs without compiling anything."""
        return kernel.launches is None or self.compiler.has((kernel, config, call))

    def _able(self, kernel: Kernel, config: Config, call: Call) -> bool:
        """Whether it runs without compiling anything, and can be had at all."""
        return self._there(kernel, config, call) and _to_be_had(kernel, config, call) is not None

    def _known(self, key: str, call: Call) -> Choice | None:
        """The choice that needs no measurement.

        A profile's, the performance model's where it was calibrated, that of a size near by, or the
        only candidate there is. Where measuring is on, only sizes near by are left to the model.
        """
        prepared = self._is_prepared(key)
        entry = self.profile.get(key)
        if entry is not None and entry.elsewhere is None:
            found = _offered(entry, call, self._variants_of(entry, call))
            if found is not None and (not prepared or self._there(*found, call)):
                return Choice(*found, f"measured, {entry.us:.1f} us", entry.us)
        candidates = (
            self._compiled(key, call) if prepared else kernels.candidates(call, self.hardware)
        )
        found = None if entry is None else _offered(entry, call, candidates)
        if prepared and found is not None and not self._there(*found, call):
            entry = found = None
        another = entry is not None and entry.elsewhere and not self.profile.same_gpu
        if another and len(candidates) > 2:  # which is faster there need not be here
            predicted = self._predicted(call, candidates, None, prepared)
            if predicted is not None:
                return predicted
        if entry is not None and found is not None and entry.elsewhere is not None:
            reason = f"measured on {entry.elsewhere}"
            return Choice(*found, reason, about=entry.us, elsewhere=entry.elsewhere)
        if entry is not None and found is not None:
            return Choice(*found, f"measured, {entry.us:.1f} us", entry.us)
        near = None if entry is not None else self.profile.near(key)
        found = None if near is None else _adopted(near[1], call, candidates, self.hardware)
        if prepared and found is not None and not self._there(*found, call):
            found = None
        neighbour = None
        if near is not None and found is not None:
            about = near[1].us * family_of(key)[1] / family_of(near[0])[1]
            elsewhere = near[1].elsewhere
            where = f" on {elsewhere}" if elsewhere else ""
            reason = f"measured{where} at a size near this, {near[0]}"
            neighbour = Choice(*found, reason, about=about, elsewhere=elsewhere)
            self._neighbours[key] = neighbour
        if len(candidates) > 2 and (near is not None or not self._measuring or prepared):
            predicted = self._predicted(call, candidates, found, prepared)
            if predicted is not None:
                return predicted
        # While kernels are still coming, a better one may be there soon.
        coming = prepared and not self.settled
        if neighbour is not None and _to_be_had(neighbour.kernel, neighbour.config, call):
            return replace(neighbour, provisional=coming)
        if prepared:
            kernel, config = next(
                (kernel, config)
                for kernel, config in candidates
                if (kernel.unmeasured or kernel.launches is None)
                and self._able(kernel, config, call)
            )
            reason = "not measured, the first that is compiled"
            return Choice(kernel, config, reason, provisional=coming)
        kernel, config = candidates[0]
        if len(candidates) == 1:
            return Choice(kernel, config, f"no kernel for {self.hardware.kind}, the reference runs")
        if len(candidates) == 2 and (kernel.launches is None or kernel.unmeasured):
            return Choice(kernel, config, "the only kernel for this call")
        return None if self._measuring else _default(call, candidates)

    def _predicted(
        self,
        call: Call,
        candidates: Candidates,
        near: tuple[Kernel, Config] | None,
        prepared: bool = False,
    ) -> Choice | None:
        """What the performance model takes for the fastest, with the time that it expects.

        near: what a size near by runs, whose code is there: it is taken if it is as good.
        prepared: nothing is to be compiled, and little to be planned.
        """
        if call.key in self._guesses:  # asked again while its code is being compiled
            return self._guesses[call.key]
        if self._model is None:
            return None
        offered = [
            (kernel, config)
            for kernel, config in candidates[:-1]  # without the reference
            if _named(kernel, config) not in self._refused
        ]
        if near is not None and all(_named(*near) != _named(*pair) for pair in offered):
            offered.append(near)
        try:
            ranked = [r for r in self._model.rank(call, offered) if r.us is not None]
        except Exception as error:  # a guess must not cost a picture
            logger.warning("times are predicted no more: %s failed: %s", call.key, error)
            self._model = None
            return None
        if self.profile.model_made:
            ranked = _cautious(call, ranked)
        best = (ranked[0].us or 0.0) if ranked else 0.0

        def order(r: Ranked) -> tuple[bool, bool]:
            pair, us = (r.kernel, r.config), r.us or 0.0
            kept = near is not None and _same(near, pair) and us <= KEPT * best
            at_once = prepared and not r.kernel.planned and us <= PLANNED * best
            return not (kept and not r.kernel.planned), not at_once

        ranked.sort(key=order)
        for place, r in enumerate(ranked):
            if prepared and not self._there(r.kernel, r.config, call):
                continue
            if _to_be_had(r.kernel, r.config, call):
                which = ", the best that is compiled" if prepared and place else ""
                found = Choice(r.kernel, r.config, f"predicted, {r.us:.1f} us{which}", about=r.us)
                if prepared and not self.settled and (place or self._preparing):
                    # A better one may be there soon.
                    return replace(found, provisional=True)
                return self._guesses.setdefault(call.key, found)
        return None

    def _proven(self, choices: Mapping[str, tuple[Call, Choice]]) -> dict[str, Choice | None]:
        """The choices of our kernels, none of which ran in this process yet, where they can run.

        Elsewhere a library's; None for a call that is measured instead.
        """
        if self.device.type != "cuda" or not torch.cuda.is_available():
            return {key: choice for key, (_, choice) in choices.items()}
        proven: dict[str, Choice | None] = {}
        with torch.cuda.device(self.device):
            self.compiler.compile(
                (choice.kernel, choice.config, call) for call, choice in choices.values()
            )
            for key, (call, choice) in choices.items():
                proven[key] = choice
                if not self._launchable(call, choice):
                    proven[key] = None if self._measuring else self._library(call)
        return proven

    def _launchable(self, call: Call, choice: Choice) -> bool:
        """Whether the choice's own kernels, if it has any, fit on the GPU at this size."""
        variant = choice.kernel, choice.config, call
        if choice.kernel.launches is None or self.compiler.loaded(variant):
            return True
        if deadly(variant):
            return False
        try:
            for launch in launches_of(choice.kernel, choice.config, call):
                launch.warm()
        except Exception as error:
            if "out of memory" in str(error).lower():  # which says nothing of the kernel
                raise OutOfMemory(f"no memory is left for kernels: {error}") from error
            logger.info("%s cannot run %s: %s", choice.kernel.name, call.key, error)
            return False
        return True

    def _library(self, call: Call) -> Choice:
        """A library's kernel, or the reference, for a call that ours cannot run."""
        candidates = kernels.candidates(call, self.hardware)
        kernel, config = next(
            (kernel, config)
            for kernel, config in candidates
            if kernel.launches is None and _to_be_had(kernel, config, call)
        )
        return Choice(kernel, config, "the library's: our kernel does not run here")

    def _measure(self, calls: Sequence[Call]) -> None:
        started = time.perf_counter()
        logger.info("measuring %d operators on %s, once", len(calls), self.hardware.name)
        found: dict[str, Entry] = {}
        problems: Counter[tuple[str, str]] = Counter()
        measured = 0
        try:
            for call, results in measure(calls, self.compiler, self.device):
                self._choices[call.key], entry = self._best(call, results)
                if entry is not None:
                    if self._model is not None:
                        self._model.add({call.key: entry.times()})
                    found[call.key] = entry
                    measured += 1
                problems.update((r.kernel.name, r.problem) for r in results if r.problem)
                wrong = [r for r in results if r.problem == WRONG]
                self._refused.update(_named(r.kernel, r.config) for r in wrong)
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
        entry = fastest(results)
        if entry is None:
            why = next((r.problem for r in results if r.problem), "no memory")
            return replace(self._library(call), reason=f"the library's: none ran ({why})"), None
        kernel = next(r.kernel for r in results if r.kernel.name == entry.kernel)
        reason = f"measured, the fastest of {len(results)}"
        return Choice(kernel, entry.config, reason, entry.us), entry if lasting(results) else None


def lasting(results: Sequence[Measurement]) -> bool:
    """Whether later processes should go by it: where Triton does not work today it may tomorrow."""
    ours = [r for r in results if r.kernel.launches is not None]
    return not ours or any(r.us is not None for r in ours)


def fastest(results: Sequence[Measurement]) -> Entry | None:
    """The first of the fastest candidates, or None if none could be measured.

    results: in the order of preference.
    """
    measured = [(r.us, r) for r in results if r.us is not None]
    if not measured:
        return None
    limit = TIE * min(us for us, _ in measured)
    # What overlaps with its neighbours gains in a network what timing it alone does not show.
    tied = sorted(
        (pair for pair in measured if pair[0] <= limit),
        key=lambda pair: not pair[1].config.get("pdl", False),
    )
    us, best = tied[0]
    rest = sorted((pair for pair in measured if pair[1] is not best), key=lambda pair: pair[0])
    others = tuple((r.kernel.name, r.config, took) for took, r in rest[:OTHERS])
    return Entry(best.kernel.name, best.config, us, others)


def model_of(hardware: Hardware, profile: Profile) -> Model | None:
    """The performance model, if a profile has constants for it.

    What was measured on another GPU is carried over.
    """
    chip = chip_of(hardware)
    if chip is None or profile.fit is None:
        return None
    try:
        fitted = Fit.from_json(profile.fit)
    except ValueError as error:
        logger.warning("times are not predicted: %s", error)
        return None
    measured = {call: entry.times() for call, entry in profile.items()}
    carried = {call: _carried(entry) for call, entry in profile.elsewhere().items()}
    return Model(chip, fitted, measured, carried, named(profile.origin or ""))


def _cautious(call: Call, ranked: Sequence[Ranked]) -> list[Ranked]:
    """The ranking of a model whose constants are another kind of GPU's.

    Libraries know their chips: of what they do best ours has to be faster by far.
    """
    libraries = [r.us for r in ranked if r.kernel.launches is None and r.us is not None]
    if call.op not in TENSOR_CORES or not libraries:
        return list(ranked)
    limit = min(libraries) / MARGIN
    return [r for r in ranked if r.kernel.launches is None or (r.us or 0.0) <= limit]


def _carried(entry: Entry) -> list[tuple[str, Config, float]]:
    """The times of an entry that mean something here: of a library's own algorithms the best.

    That stands for the one which the library names first here.
    """
    found: dict[Named, tuple[str, Config, float]] = {}
    for kernel, config, us in entry.times():
        if numbered(kernel, config):
            config = {**config, **{name: 0 for name in NUMBERED.values() if name in config}}
        found.setdefault(exactly(kernel, config), (kernel, config, us))
    return list(found.values())


def _named(kernel: Kernel, config: Config) -> Named:
    return exactly(kernel.name, config)


def _same(one: tuple[Kernel, Config], other: tuple[Kernel, Config]) -> bool:
    return _named(*one) == _named(*other)


def _default(call: Call, candidates: Candidates) -> Choice:
    """What runs where nothing is measured: a library's, or ours that win wherever they run."""
    kernel, config = next(
        (kernel, config)
        for kernel, config in candidates
        if (kernel.unmeasured or kernel.launches is None) and _to_be_had(kernel, config, call)
    )
    if kernel.launches is None:
        reason = "the library's: nothing is measured and measuring is off"
    else:
        reason = "not measured, and measuring is off"
    return Choice(kernel, config, reason)


def _offered(entry: Entry, call: Call, candidates: Candidates) -> tuple[Kernel, Config] | None:
    """The candidate that a profile's entry names; None if it cannot be had here."""
    if _is_numbered(entry):
        return _first_of(entry, call, candidates)
    for kernel, config in candidates:
        if kernel.name == entry.kernel and dict(config) == dict(entry.config):
            return _to_be_had(kernel, config, call)
    return None


def _adopted(
    entry: Entry, call: Call, candidates: Candidates, hardware: Hardware
) -> tuple[Kernel, Config] | None:
    """What an entry of a size near by names, though this size would not offer that configuration.

    The code is the same, then, and need not be compiled anew. Whether it can be had is not known
    yet: a library's plan takes long to make.
    """
    if _is_numbered(entry):
        return next(((k, c) for k, c in candidates if k.name == entry.kernel), None)
    for kernel, _ in candidates:
        if kernel.name == entry.kernel:
            fitting = ahead.fitting([(kernel, entry.config)], call, hardware)
            return fitting[0] if fitting else None
    return None


def _is_numbered(entry: Entry) -> bool:
    """Whether it names a library's algorithm by a number that means another one here.

    The lists are heuristics' answers for one GPU and one version of the library: number 5 there is
    some other algorithm here, if there is one.
    """
    return entry.elsewhere is not None and numbered(entry.kernel, entry.config)


def _first_of(entry: Entry, call: Call, candidates: Candidates) -> tuple[Kernel, Config] | None:
    """What the entry's library itself names first here; None if it cannot be had."""
    for kernel, config in candidates:
        if kernel.name == entry.kernel:
            return _to_be_had(kernel, config, call)
    return None


def _to_be_had(kernel: Kernel, config: Config, call: Call) -> tuple[Kernel, Config] | None:
    try:
        kernel.workspace(call, config)  # a library's plan of that number may not exist
    except Exception as error:
        logger.debug("%s %s is not to be had: %s", kernel.name, dict(config), error)
        return None
    return kernel, config


_selectors: dict[tuple[str, Path, bool, bool], Selector] = {}
_compilers: dict[tuple[str, Path], Compiler] = {}
_selectors_lock = threading.Lock()


def selector_for(
    device: torch.device,
    cache_dir: Path | None = None,
    measuring: bool = False,
    waiting: bool = False,
) -> Selector:
    """The selector of a device, its profile kept under `cache_dir` (by default the user's).

    measuring: whether calls that no profile knows are timed, unless the user's settings say.
    waiting: whether kernels are compiled before they are needed, or in the background.
    """
    root = settings().cache_dir if cache_dir is None else cache_dir
    wanted = settings().tune
    key = (str(device), root, measuring if wanted is None else wanted, waiting)
    with _selectors_lock:
        if key not in _selectors:
            hardware = describe(device)
            kept = profile_cache(root) if device.type == "cuda" else None
            if key[:2] not in _compilers:
                _compilers[key[:2]] = Compiler(hardware, device, kept)
            _selectors[key] = Selector(
                _compilers[key[:2]], device, Profile(hardware, kept), key[2], waiting
            )
        return _selectors[key]


def settled() -> bool:
    """Whether nothing is being compiled in the background, for any device."""
    with _selectors_lock:
        return all(selector.settled for selector in _selectors.values())
