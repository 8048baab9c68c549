"""A performance model: the time of a kernel in a configuration for a call that nobody measured.

Three layers, each of which may be missing:

1. A description (`work`): what the kernel does, in microseconds of the chip's own rates (`chips`).
   Waves of blocks and the last one's emptiness, the padding of tiles, filling and draining the
   pipeline, the second launch of a split sum, traffic of L2 and DRAM. Of its form
   `t = a + waves * (b + c * K)`, the largest of what overlaps standing for `c`.
2. Constants (`fit`): how many times what is written there each term really takes, a handful for
   each form of kernel, by robust least squares on the logarithm of measured times; and one factor
   for each tile, for what the compiler makes of it.
3. Neighbours (`Model(measured=...)`): by how much the prediction is off at measured calls of the
   same weights, of other sizes. That is carried over to the call in question, the more so the
   nearer its number of rows, the more alike kernel, tile and configuration (a Gaussian process
   over the logarithms). A library is taken to choose the best of its tiles at every size; by how
   much it does not is one more thing that neighbours tell.

What is left uncertain is known, too: spreads that hold at sizes held out, by which a choice is made
safely (`rank`) and idle time goes where something is to be gained (`contenders`).

What it leaves out: clocks that fall with the load before; where in the L2 a line lies; banks of
shared memory and the registers that the compiler really takes; blocks that start late within a
wave; what an operator leaves in the cache for the next one; heads and channels that no power of two
holds beyond their padding; what a library's heuristic does (it may choose badly, and another
algorithm for each size). Times of less than three microseconds are launches, and not predicted any
better than those are known.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.registry import Call, Config, Kernel
from .chips import Chip
from .keys import call_of
from .profile import NEAR, family_of
from .profile_file import FIT_VERSION, MOST_FACTOR, fit_fault
from .work import HIDDEN, Work, work_of

Array = NDArray[np.float64]

Times = Sequence[tuple[str, Config, float]]
"""Kernels' names, configurations and measured microseconds of one call."""

POWER = 4
"""Overlapping terms count as the `POWER`-norm of them: nearly the longest, but smooth."""

HUBER = 0.1
"""Logarithms of a time by which it may be off before it counts less: a tenth."""

PRIOR, PRIOR_HIDDEN = 0.003, 0.01
"""Pull of every constant's logarithm towards 0, beside one for each measured time: enough to hold
what the times do not determine."""

ROUNDS = 3
"""How often libraries' tiles are assigned and their constants fitted, in turn."""

FEW = 5
"""Times that a tile's factor is shrunk by, as if so many had been as predicted."""

# These few numbers, and those of libraries' tiles below, are the same for every chip. They were set
# on the times of an H100 and an H200 by holding out one image size after another.
# Spreads of logarithms of times, and the change of log(rows) over which likeness falls to 1/e.
_CALL = 0.03  # of all times of one call
_ANY, _KERNEL, _TILE, _CONFIG = 0.03, 0.06, 0.08, 0.03  # of what candidates have in common
_INDEX = 0.05  # of a library's algorithm of one number
_RANGE = 1.0
_CONFIG_NEAR, _INDEX_NEAR, _NEAR = 0.03, 0.1, 0.2  # the same, of sizes close by alone
_NOISE = 0.015  # of measuring
_ELSEWHERE = 0.06  # of carrying a time over from another GPU: so far an H100 and an H200 differ
_SIBLING = 0.85  # likeness of calls of the same weights with another epilogue

# How a library's tile is assigned when its constants are fitted.
_MISS, _MISS_MOST = 0.06, 8.0  # spread of a time about its tile's prediction; the most it tells
_FITTED_CHOICE = 0.15
_SMOOTH = 0.03  # logarithms of times of tiles within which they count together

NEAREST, NEAREST_LIKE = 3, 1
"""Of the measured calls with no more rows, and with more, so many tell of a call: of those of its
own family, and of each other one with the same weights. Few: a matrix of all that a profile knows
takes many threads to invert, which wait for one another while kernels are compiled."""

GROUPS = 8
"""Sets of such calls that are kept for each kind: sizes that lie between the same share one."""

DOUBT, HOPE = 0.75, 0.5
"""Standard deviations by which a candidate of uncertain time counts as slower when one is chosen,
and as quicker when several are to be timed."""

UNTOLD = 0.05
"""Logarithm of a time by which a kernel whose tile is not known counts as slower when one is
chosen: at a size that was not measured the library, or the number in its list, may have another
algorithm, which is the worst that held-out sizes got. Half of the first in a list take within a
fiftieth of the best of it, but on average they take a tenth to a fifteenth longer."""

MOST_ODD = 1.15
"""An algorithm of a library that takes longer than this times the best in its list says no more
than that of other sizes: there it has another number."""

NUMBERED = {"cublaslt.": "algorithm", "cudnn_frontend.": "plan"}
"""Kernels of libraries that choose by a number in a list of the library's own making, for each GPU,
version and size."""

NEAR_BY_ALONE = frozenset({"cuda.matmul"})
"""Kernels of which too little was measured to say how long they take elsewhere: constants that all
calls but one gave missed that one by up to a quarter, and what they chose took up to an eighth
longer than the best. They are known where the same weights were measured at a size near by
(`NEAR`)."""

WORTH = 0.0025
"""Expected gain, as a share of its time, for which a candidate is timed in idle time. At sizes that
were held out the choice is within a tenth of the best once all such were timed, and hardly any time
is lost on average (`benchmarks.tuning_regret`)."""

AT_ONCE = 3
"""Candidates that are timed together, beside the best so far, before the next are named."""

FAT = 0.8
"""Predictions miss, by their standard deviations, as Student's t of four degrees of freedom times
this: one in four by more than one, as normal ones would, but one in fifty by more than three. So it
was at sizes that were held out of the times of an H100 and an H200, of any kind of kernel."""

REACH = 1.25
"""How much slower than the best prediction a kernel's own best may be and still be timed."""


@dataclass(frozen=True)
class Fit:
    """What was calibrated on one chip.

    constants: by form and term, how many times the chip's own rates it takes. tiles: by kernel and
    tile, a further factor.
    """

    constants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tiles: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a profile keeps them."""
        return {
            "version": FIT_VERSION,
            "constants": {
                form: {term: _rounded(value) for term, value in sorted(terms.items())}
                for form, terms in sorted(self.constants.items())
            },
            "tiles": {tile: _rounded(value) for tile, value in sorted(self.tiles.items())},
        }

    @staticmethod
    def from_json(data: Any) -> Fit:
        """Raises ValueError for what cannot be a fit: another version, or nonsense constants."""
        wrong = fit_fault(data)
        if wrong is not None:
            raise ValueError(wrong[1])
        constants = {form: dict(terms) for form, terms in data["constants"].items()}
        return Fit(constants, dict(data["tiles"]))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Prediction:
    """Microseconds, and the standard deviation of their logarithm."""

    us: float
    doubt: float


@dataclass(frozen=True)
class Ranked:
    """A candidate with its predicted time; None: the model knows nothing of it."""

    kernel: Kernel
    config: Config
    us: float | None


class Model:
    """Predicts times on one chip.

    fitted: without it the chip's own rates count. measured: times by the keys of calls, which
    correct the predictions for calls that are like them. carried: times of another chip, `origin`,
    for calls that were not measured here: by as much as this chip should be slower or faster, they
    are taken for its own.
    """

    def __init__(
        self,
        chip: Chip,
        fitted: Fit | None = None,
        measured: Mapping[str, Times] | None = None,
        carried: Mapping[str, Times] | None = None,
        origin: Chip | None = None,
    ) -> None:
        self.chip, self.fitted = chip, fitted or Fit()
        self._origin = origin or chip
        self._carried: dict[str, dict[str, Times]] = defaultdict(dict)
        for key, times in (carried or {}).items():
            self._carried[_group_of(key)][key] = times
        self._measured: dict[str, dict[str, Times]] = defaultdict(dict)
        self._points: dict[str, list[_Point]] = {}
        self._groups: dict[str, dict[tuple[str, ...], _Group]] = defaultdict(dict)
        self.add(measured or {})

    def add(self, measured: Mapping[str, Times]) -> None:
        """More times, which replace those of the same calls."""
        for key, times in measured.items():
            group = _group_of(key)
            self._measured[group][key] = times
            self._points.pop(key, None)
            self._groups.pop(group, None)

    def make_ready(self, key: str) -> None:
        """Understand what was measured of the like of a call, by its key, ahead of predictions."""
        for other in self._like(key):
            if other not in self._points:
                self._points_of(other)
                time.sleep(0)  # whoever waits for Python's lock goes first

    def us(self, call: Call, kernel: str, config: Config) -> float | None:
        """Microseconds of a run; None for a kernel that the model does not know."""
        (found,) = self.predictions(call, [(kernel, config)])
        return None if found is None else found.us

    def predictions(
        self, call: Call, candidates: Sequence[tuple[str, Config]]
    ) -> list[Prediction | None]:
        """Of several candidates of one call."""
        known, carried = self._carried_to(call, candidates)
        found: list[Prediction | None] = [None] * len(candidates)
        if carried is not None:
            for place, time, doubt in zip(known, carried.times, carried.doubts, strict=True):
                found[place] = Prediction(math.exp(time), float(doubt))
        return found

    def rank(self, call: Call, candidates: Sequence[tuple[Kernel, Config]]) -> list[Ranked]:
        """The candidates, the one to choose first, then those that may be quicker, likeliest first.

        First comes the least time, doubt (and `UNTOLD`) counted as time lost; then the others,
        doubt counted as time that may be won. What the model does not know comes last.
        """
        named = [(kernel.name, config) for kernel, config in candidates]
        found = self.predictions(call, named)
        known = [(p, place) for place, p in enumerate(found) if p is not None]
        order = sorted(known, key=lambda item: math.log(item[0].us) - HOPE * item[0].doubt)
        if order:
            best = min(order, key=lambda item: _safely(item[0], named[item[1]][0]))
            order.remove(best)
            order.insert(0, best)
        places = [place for _, place in order]
        places += [place for place, p in enumerate(found) if p is None]
        return [
            Ranked(*candidates[place], None if (p := found[place]) is None else p.us)
            for place in places
        ]

    def contenders(
        self, call: Call, candidates: Sequence[tuple[Kernel, Config]], timed: Times = ()
    ) -> list[tuple[Kernel, Config]]:
        """Those of a call's candidates to time next, the one with the largest expected gain first.

        None if there is hardly anything to gain. At first the one to choose is among them, and what
        the model does not know. timed: so far, of the same candidates; it tells what is to be
        beaten, and what the like of it takes.
        """
        named = [(kernel.name, config) for kernel, config in candidates]
        known, carried = self._carried_to(call, named)
        unknown = [c for place, c in enumerate(candidates) if place not in known and not timed]
        if carried is None:
            return unknown
        times = {exactly(name, config): us for name, config, us in timed}
        measured = {
            place: math.log(times[which])
            for place, which in enumerate(exactly(*named[place]) for place in known)
            if which in times
        }
        if measured:
            best = min(measured, key=lambda place: measured[place])
            carried = carried.given(list(measured), list(measured.values()))
            first = unknown
        else:
            doubts = zip(carried.times, carried.doubts, strict=True)
            found = [Prediction(math.exp(time), float(doubt)) for time, doubt in doubts]
            best = min(
                range(len(known)), key=lambda place: _safely(found[place], named[known[place]][0])
            )
            first = [candidates[known[best]], *unknown]
        gains = carried.gains(best)
        worth = [place for place in np.argsort(-gains) if gains[place] >= WORTH]
        worth = [place for place in worth if place != best and place not in measured][:AT_ONCE]
        return [*first, *(candidates[known[place]] for place in worth)] if worth or unknown else []

    def prune(
        self, call: Call, candidates: Sequence[tuple[Kernel, Config]], keep: int
    ) -> list[tuple[Kernel, Config]]:
        """The few candidates that are worth timing, in the order given.

        The first `keep` of the ranking; the best of each kernel that is within reach of them, and
        of the libraries' in any case; and whatever the model does not know. Not the reference.
        """
        ranked = [r for r in self.rank(call, candidates) if not r.kernel.name.startswith("ref")]
        least = min((r.us for r in ranked if r.us is not None), default=0.0)
        kept = ranked[:keep]
        kept += [r for r in ranked[keep:] if r.us is None]
        if not any(r.kernel.launches is None for r in kept):
            kept += [r for r in ranked if r.kernel.launches is None][:1]
        for r in ranked:
            near = r.us is not None and r.us <= REACH * least
            if near and all(r.kernel.name != other.kernel.name for other in kept):
                kept.append(r)
        chosen = {(r.kernel.name, _text(r.config)) for r in kept}
        return [c for c in candidates if (c[0].name, _text(c[1])) in chosen]

    def _carried_to(
        self, call: Call, candidates: Sequence[tuple[str, Config]]
    ) -> tuple[list[int], _Carried | None]:
        """The places of the candidates that the model knows, and what is expected of these."""
        expected = self._expected(call, candidates)
        known = [
            place
            for place, time in enumerate(expected)
            if time is not None and self._may_say(call.key, candidates[place][0])
        ]
        if not known:
            return known, None
        named = [candidates[place] for place in known]
        points = _points(call.key, named, [expected[place] or 0.0 for place in known])
        return known, self._group(call.key).carried(points)

    def _may_say(self, key: str, kernel: str) -> bool:
        """Whether enough is known of a kernel to predict its times of a call."""
        if kernel not in NEAR_BY_ALONE:
            return True
        rows, group = family_of(key)[1], _group_of(key)
        measured = self._measured.get(group, {})
        if self._origin.name == self.chip.name:  # with other versions of libraries
            measured = {**self._carried.get(group, {}), **measured}
        return any(
            kernel == name and max(rows, there) <= NEAR * min(rows, there)
            for other, times in measured.items()
            for there in [family_of(other)[1]]
            for name, *_ in times
        )

    def _expected(
        self, call: Call, candidates: Sequence[tuple[str, Config]], chip: Chip | None = None
    ) -> list[float | None]:
        """Logarithms of the times by the constants alone; None for what is not described."""
        # Those of one form in one go, and algorithms that differ in their number alone once.
        forms: dict[str, dict[str, Work | None]] = defaultdict(dict)
        labels = [_labels(name, tuple(config.items())) for name, config in candidates]
        for (name, config), label in zip(candidates, labels, strict=True):
            if label.described not in forms[name]:
                forms[name][label.described] = work_of(chip or self.chip, call, name, config)
        logs: dict[tuple[str, str], float] = {}
        for name, described in forms.items():
            known = {text: work for text, work in described.items() if work is not None}
            flat = _logs(self.fitted.constants.get(name, {}), list(known.values()))
            end = 0
            for text, work in known.items():
                begin, end = end, end + work.tiles
                logs[name, text] = _of_best(flat[begin:end])
        factors = [math.log(self.fitted.tiles.get(label.fitted, 1.0)) for label in labels]
        return [
            None if (log := logs.get((name, label.described))) is None else log + factor
            for (name, _), label, factor in zip(candidates, labels, factors, strict=True)
        ]

    def _like(self, key: str) -> dict[str, Times]:
        """What was measured of calls of the same weights."""
        group = _group_of(key)
        return {**self._carried.get(group, {}), **self._measured.get(group, {})}

    def _group(self, key: str) -> _Group:
        """What was measured of the nearest calls of the same weights."""
        groups = self._groups[_group_of(key)]
        nearest = _nearest(key, self._like(key))
        group = groups.pop(nearest, None)
        if group is None:
            group = _Group([p for other in nearest for p in self._points_of(other)])
            while len(groups) >= GROUPS:
                del groups[next(iter(groups))]  # the one that was asked for longest ago
        groups[nearest] = group
        return group

    def _points_of(self, key: str) -> list[_Point]:
        """What was measured of one call."""
        if key not in self._points:
            own = self._measured.get(_group_of(key), {})
            times = own[key] if key in own else self._carried[_group_of(key)][key]
            self._points[key] = self._measured_points(key, times, here=key in own)
        return self._points[key]

    def _measured_points(self, key: str, times: Times, here: bool) -> list[_Point]:
        """here: whether these are times of this chip."""
        named = [(kernel, config) for kernel, config, _ in times]
        try:
            call = call_of(key)
            expected = self._expected(call, named)
            us = [us for *_, us in times]
            if not here:
                there = self._expected(call, named, self._origin)
                us = [
                    time if one is None or other is None else time * math.exp(one - other)
                    for time, one, other in zip(us, expected, there, strict=True)
                ]
            us = _capped(named, us)
            known = [place for place, time in enumerate(expected) if time is not None]
            return _points(
                *(key, [named[place] for place in known]),
                *([expected[place] or 0.0 for place in known], [us[place] for place in known]),
                _NOISE if here else _ELSEWHERE,
            )
        except ValueError:  # of another version, or damaged
            return []


def _capped(candidates: Sequence[tuple[str, Config]], times: Sequence[float]) -> list[float]:
    """The times, of a library's algorithms no more than so much above the best of them."""
    best: dict[str, float] = {}
    for (name, _), us in zip(candidates, times, strict=True):
        best[name] = min(us, best.get(name, math.inf))
    return [
        min(us, MOST_ODD * best[name]) if name in HIDDEN else us
        for (name, _), us in zip(candidates, times, strict=True)
    ]


def numbered(kernel: str, config: Config) -> bool:
    """Whether a library's algorithm is known by its number alone."""
    return any(kernel.startswith(prefix) and name in config for prefix, name in NUMBERED.items())


def _safely(predicted: Prediction, kernel: str) -> float:
    """The logarithm of a time that is hardly exceeded."""
    untold = UNTOLD if kernel in HIDDEN else 0.0
    return math.log(predicted.us) + DOUBT * predicted.doubt + untold


# Neighbours.


@dataclass(frozen=True)
class _Point:
    """One candidate of one call: what it has in common with others, and what is expected of it."""

    family: str
    rows: float  # the logarithm
    kernel: str
    tile: str
    config: str
    call: str
    expected: float  # the logarithm of microseconds
    time: float = 0.0  # the same, where measured
    noise: float = _NOISE  # of that


def _points(
    key: str,
    candidates: Sequence[tuple[str, Config]],
    expected: Sequence[float],
    times: Sequence[float] | None = None,
    noise: float = _NOISE,
) -> list[_Point]:
    family, rows = family_of(key)
    labels = [_labels(name, tuple(config.items())) for name, config in candidates]
    return [
        _Point(
            *(family, math.log(max(rows, 1)), name, label.tile, f"{name} {label.config}"),
            *(key, log, math.log(times[place]) if times is not None else 0.0, noise),
        )
        for place, ((name, _), label, log) in enumerate(
            zip(candidates, labels, expected, strict=True)
        )
    ]


def _nearest(key: str, others: Iterable[str]) -> tuple[str, ...]:
    """Of measured calls those with hardly fewer and hardly more rows, some of each family.

    What is farther tells nothing that these don't: likeness fades with the rows by a constant rate.
    """
    family, rows = family_of(key)
    found: dict[tuple[str, bool], list[tuple[int, str]]] = defaultdict(list)
    for other in others:
        its, its_rows = family_of(other)
        found[its, its_rows > rows].append((abs(its_rows - rows), other))
    return tuple(
        other
        for (its, _), side in sorted(found.items())
        for _, other in sorted(side)[: NEAREST if its == family else NEAREST_LIKE]
    )


class _Columns:
    """What points have in common, as numbers: by `ids`, which learns what it does not have."""

    def __init__(self, points: Sequence[_Point], ids: dict[str, int]) -> None:
        texts = [(p.family, p.kernel, p.tile, p.config, p.call) for p in points]
        numbers = [[ids.setdefault(text, len(ids)) for text in own] for own in texts]
        columns = np.array(numbers, dtype=np.int64).reshape(-1, 5).T
        self.family, self.kernel, self.tile, self.config, self.call = columns
        self.rows = np.array([point.rows for point in points])
        self.hidden = np.array([point.kernel in HIDDEN for point in points], dtype=bool)


def _covariance(one: _Columns, other: _Columns) -> Array:
    """Of the logarithms of the times of points of two kinds, without the noise of measuring."""
    apart = np.abs(one.rows[:, None] - other.rows)
    hidden = one.hidden[:, None]
    config = one.config[:, None] == other.config
    shared = _ANY**2 + _KERNEL**2 * (one.kernel[:, None] == other.kernel)
    shared = shared + np.where(hidden, 0.0, _TILE**2) * (one.tile[:, None] == other.tile)
    shared += np.where(hidden, _INDEX**2, _CONFIG**2) * config
    shared *= np.exp(-apart / _RANGE)
    near = np.where(hidden, _INDEX_NEAR**2, _CONFIG_NEAR**2) * config
    shared += np.exp(-apart / _NEAR) * near
    shared *= np.where(one.family[:, None] == other.family, 1.0, _SIBLING)
    return np.asarray(shared + _CALL**2 * (one.call[:, None] == other.call))


@dataclass(frozen=True)
class _Carried:
    """What is expected of a call's candidates: logarithms of their times and their covariance."""

    times: Array
    left: Array

    @property
    def doubts(self) -> Array:
        """The standard deviation of each, as it would be measured."""
        return np.asarray(np.sqrt(np.maximum(np.diag(self.left) + _NOISE**2, 0.0)))

    def given(self, places: Sequence[int], times: Sequence[float]) -> _Carried:
        """Once some of them were measured: the others are as much quicker or slower as is like."""
        left = self.left
        inverse = np.linalg.inv(left[np.ix_(places, places)] + _NOISE**2 * np.eye(len(places)))
        weights = left[:, places] @ inverse
        found = self.times + weights @ (np.array(times) - self.times[places])
        return _Carried(found, left - weights @ left[places])

    def gains(self, over: int) -> Array:
        """How much each is expected to win over that one: what it wins, times how likely it is."""
        own = np.diag(self.left)
        apart = own + own[over] - 2 * self.left[over]
        apart[over] = 0.0
        scales = FAT * np.sqrt(np.maximum(apart, 1e-12))
        won = (self.times[over] - self.times) / scales
        # Student's t of four degrees of freedom: its density and distribution.
        wide = 1 + won**2 / 4
        density = 3 / 8 * wide**-2.5
        below = 1 / 2 + 3 / 8 * won / np.sqrt(wide) * (1 - won**2 / wide / 12)
        return np.asarray(scales * (won * below + (4 + won**2) / 3 * density))


class _Group:
    """What was measured of calls that are alike, and what it tells of others."""

    def __init__(self, points: Sequence[_Point]) -> None:
        self._ids: dict[str, int] = {}
        self._columns = _Columns(points, self._ids)
        missed = np.array([point.time - point.expected for point in points])
        noise = np.array([point.noise for point in points])
        covariance = _covariance(self._columns, self._columns)
        self._inverse = np.linalg.inv(covariance + np.diag(noise**2))
        self._pulls = self._inverse @ missed

    def carried(self, wanted: Sequence[_Point]) -> _Carried:
        """What is expected of one call's candidates."""
        columns = _Columns(wanted, dict(self._ids))
        across = _covariance(columns, self._columns)
        times = np.array([point.expected for point in wanted]) + across @ self._pulls
        left = _covariance(columns, columns) - across @ self._inverse @ across.T
        return _Carried(times, left)


def _of_best(tiles: Array) -> float:
    """Logarithm of the time of the best of a library's tiles: a smooth one, so that a size at
    which two are alike is none at which they count for more."""
    least = float(tiles.min())
    return least - _SMOOTH * math.log(float(np.exp((least - tiles) / _SMOOTH).sum()))


_WEIGHT = re.compile(r"\d+(?:x\d+)+(?=:\w+!?c)")


@lru_cache(maxsize=1 << 14)
def _group_of(key: str) -> str:
    """The operator and its matrices of weights; without any, the widths of its result."""
    op, out = key.partition("(")[0], key.rpartition(" -> ")[2]
    weights = _WEIGHT.findall(key)
    return f"{op} {' '.join(weights) or out.partition(':')[0].rpartition('x')[2]}"


def exactly(name: str, config: Config) -> tuple[Any, ...]:
    """What tells a kernel's configuration from others, to look it up by."""
    return name, *sorted(config.items())


def _text(config: Config) -> str:
    """A configuration as text; of a box of pixels, their number."""
    return " ".join(f"{name}={_plain(name, value)}" for name, value in sorted(config.items()))


def _plain(name: str, value: int | str | bool) -> int | str | bool:
    if name == "box" and isinstance(value, str) and _BOX.fullmatch(value):
        return math.prod(map(int, value.split("x")))
    return value


_BOX = re.compile(r"[0-9]+(?:x[0-9]+)*")
_OF_A_TILE = {"pdl", "early", "stages", "weight_tma"}
_MANY = {"parts", "split", "programs", "grid"}


def _tile_of(name: str, config: Config, exact: bool = False) -> str:
    """The kernel and its tile; unless `exact`, of what depends on the size only if there is any."""
    kept = {
        key: value if exact or key not in _MANY else isinstance(value, int) and value > 1
        for key, value in config.items()
        if key not in _OF_A_TILE
    }
    return f"{name} {_text(kept)}"


@dataclass(frozen=True)
class _Labels:
    """Texts of a configuration: all of it; without a library's number; of the tile, exactly and as
    factors are fitted for it."""

    config: str
    described: str
    tile: str
    fitted: str


@lru_cache(maxsize=1 << 14)
def _labels(name: str, items: tuple[tuple[str, int | str | bool], ...]) -> _Labels:
    config = dict(items)
    numbers = NUMBERED.values()
    described = {key: value for key, value in config.items() if key not in numbers}
    return _Labels(
        *(_text(config), json.dumps(described, sort_keys=True)),
        *(_tile_of(name, config, exact=True), _tile_of(name, config)),
    )


# Fitting.


@dataclass(frozen=True)
class _Table:
    """Works of one form as matrices: microseconds of the terms that add up and that overlap."""

    names: tuple[str, ...]
    fixed: Array
    overlapped: Array

    @staticmethod
    def of(found: Sequence[Work]) -> _Table:
        adds = sorted({name for work in found for name in work.fixed})
        laps = sorted({name for work in found for name in work.overlapped})
        return _Table(
            (*adds, *laps),
            _matrix([work.fixed for work in found], [work.tiles for work in found], adds),
            _matrix([work.overlapped for work in found], [work.tiles for work in found], laps),
        )

    def logs(self, constants: Array) -> Array:
        """Logarithms of the times."""
        adds, _, longest = self._terms(constants)
        return np.asarray(np.log(adds.sum(axis=1) + longest))

    def slopes(self, constants: Array) -> Array:
        """Those of the logarithms of the times, by the logarithms of the constants."""
        adds, powers, longest = self._terms(constants)
        times, sums = adds.sum(axis=1) + longest, powers.sum(axis=1) + 1e-30
        return np.column_stack([adds / times[:, None], powers * (longest / sums / times)[:, None]])

    def _terms(self, constants: Array) -> tuple[Array, Array, Array]:
        """What adds up, the powers of what overlaps, and how long that takes together."""
        count = self.fixed.shape[1]
        adds = self.fixed * constants[:count]
        powers = (self.overlapped * constants[count:]) ** POWER
        return adds, powers, (powers.sum(axis=1) + 1e-30) ** (1 / POWER)


def _matrix(
    found: Sequence[Mapping[str, Any]], tiles: Sequence[int], names: Sequence[str]
) -> Array:
    """The terms in columns, a row for each tile of each work."""
    if max(tiles) == 1:
        return np.array([[terms.get(name, 0.0) for name in names] for terms in found])
    matrix = np.empty((sum(tiles), len(names)))
    end = 0
    for terms, count in zip(found, tiles, strict=True):
        begin, end = end, end + count
        for place, name in enumerate(names):
            matrix[begin:end, place] = terms.get(name, 0.0)
    return matrix


def _logs(constants: Mapping[str, float], found: Sequence[Work]) -> Array:
    if not found:
        return np.empty(0)
    table = _Table.of(found)
    values = np.array([constants.get(name, 1.0) for name in table.names])
    return table.logs(values)


def fit(chip: Chip, measured: Mapping[str, Times]) -> Fit:
    """Constants for a chip from times of some calls, by the calls' keys.

    Candidates far from a call's best count less. A library's tile is the one that explains its
    time among those that it may well choose. A key that is no call's counts for nothing.
    """
    by_form: dict[str, list[tuple[str, Config, Work, float, float]]] = defaultdict(list)
    for key, times in measured.items():
        try:
            call = call_of(key)
        except ValueError:  # a profile keeps the text of calls unread
            continue
        best = min((us for *_, us in times), default=0.0)
        for name, config, us in times:
            found = work_of(chip, call, name, config)
            if found is not None and us > 0:
                weight = 1 / (1 + 3 * (us / best - 1))
                by_form[name].append((name, config, found, math.log(us), weight))
    constants: dict[str, dict[str, float]] = {}
    misses: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for form, rows in by_form.items():
        logs = np.array([row[3] for row in rows])
        weights = np.array([row[4] for row in rows])
        if form in HIDDEN:
            constants[form] = {}
            for turn in range(ROUNDS):
                chosen = [
                    found.at(
                        _assigned(_logs(constants[form], [found]), log, _MISS * (ROUNDS - turn))
                    )
                    for _, _, found, log, _ in rows
                ]
                constants[form] = _fitted(chosen, logs, weights, PRIOR_HIDDEN)
        else:
            constants[form] = _fitted([row[2] for row in rows], logs, weights, PRIOR)
        # What is far from a call's best says least of what a tile takes where it is chosen.
        for name, config, found, log, weight in rows:
            missed = log - _of_best(_logs(constants[form], [found]))
            misses[_tile_of(name, config)].append((min(max(missed, -0.4), 0.4), weight**2))
    tiles = {
        tile: math.exp(sum(miss * weight for miss, weight in m) / (FEW + sum(w for _, w in m)))
        for tile, m in misses.items()
    }
    return Fit(constants, tiles)


def _assigned(options: Array, log: float, miss: float) -> int:
    """The tile that a library seems to have taken."""
    missed = np.minimum(((log - options) / miss) ** 2 / 2, _MISS_MOST)
    return int(np.argmin(missed + (options - options.min()) / _FITTED_CHOICE))


def _fitted(found: Sequence[Work], logs: Array, weights: Array, prior: float) -> dict[str, float]:
    """Constants by Levenberg and Marquardt's method, on Huber's loss."""
    table = _Table.of(found)
    size = len(table.names)
    bound = math.log(MOST_FACTOR)

    def loss(at: Array) -> float:
        off = np.abs(logs - table.logs(np.exp(at)))
        huber = np.where(off < HUBER, off**2 / 2, HUBER * (off - HUBER / 2))
        return float((weights * huber).sum() + prior * (at**2).sum() / 2)

    at, damping = np.zeros(size), 1e-2
    least = loss(at)
    for _ in range(40):
        predicted, slopes = table.logs(np.exp(at)), table.slopes(np.exp(at))
        off = logs - predicted
        pull = weights * np.minimum(1.0, HUBER / np.maximum(np.abs(off), 1e-9))
        matrix = (slopes * pull[:, None]).T @ slopes + prior * np.eye(size)
        gradient = slopes.T @ (pull * off) - prior * at
        for _ in range(8):
            step = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient)
            trial = np.clip(at + np.clip(step, -1.0, 1.0), -bound, bound)
            found_loss = loss(trial)
            if found_loss < least:
                break
            damping *= 5
        else:
            break
        done = least - found_loss < 1e-7 * least
        at, least, damping = trial, found_loss, max(damping / 5, 1e-6)
        if done:
            break
    return {name: float(value) for name, value in zip(table.names, np.exp(at), strict=True)}
