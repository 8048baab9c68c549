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
   over the logarithms). Which tile a library takes is inferred the same way: from the times of
   the like, and from its choosing well itself.

What it leaves out: clocks that fall under load, and power; where in the L2 a line lies; banks of
shared memory and the registers that the compiler really takes; blocks that start late within a
wave; what an operator leaves in the cache for the next one; heads and channels that no power of two
holds beyond their padding; what a library's heuristic does (it may choose badly, and another
algorithm for each size). Times of less than three microseconds are launches, and not predicted any
better than those are known.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.registry import Call, Config, Kernel
from .chips import Chip
from .keys import call_of
from .profile import family_of
from .profile_file import FIT_VERSION, MOST_FACTOR, fit_fault
from .work import HIDDEN, Work, works

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
_CONFIG_NEAR, _INDEX_NEAR, _NEAR = 0.03, 0.1, 0.1  # the same, of sizes close by alone
_NOISE = 0.015  # of measuring
_SIBLING = 0.85  # likeness of calls of the same weights with another epilogue

# How a library's tile is inferred.
_MISS, _MISS_MOST = 0.06, 8.0  # spread of a time about its tile's prediction; the most it tells
_CHOOSES = {"cublas": 0.05, "cudnn": 0.3}  # how much slower than the best tile a choice may be
_TELLS = {"cublas": 0.3, "cudnn": 0.7}  # what another size's time tells of this one's tile
_TELLS_RANGE = 0.7
_TELLS_OTHER = 0.15  # what another algorithm's does
_FITTED_CHOICE = 0.15

DOUBT = 0.5
"""Standard deviations by which a candidate of uncertain time counts as slower when one is chosen,
and as quicker when several are to be timed."""

NUMBERED = {"cublaslt.": "algorithm", "cudnn_frontend.": "plan"}
"""Kernels of libraries that choose by a number in a list of the library's own making, for each GPU,
version and size."""

RENUMBERED = 0.05
"""Logarithm of a time by which such a kernel counts as slower when one is chosen: at a size that
was not measured the number may be another algorithm's, which is the worst that held-out sizes got.
"""

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
        self._groups: dict[str, _Group] = {}
        self.add(measured or {})

    def add(self, measured: Mapping[str, Times]) -> None:
        """More times, which replace those of the same calls."""
        for key, times in measured.items():
            group = _group_of(key)
            self._measured[group][key] = times
            self._groups.pop(group, None)

    def us(self, call: Call, kernel: str, config: Config) -> float | None:
        """Microseconds of a run; None for a kernel that the model does not know."""
        (found,) = self.predictions(call, [(kernel, config)])
        return None if found is None else found.us

    def predictions(
        self, call: Call, candidates: Sequence[tuple[str, Config]]
    ) -> list[Prediction | None]:
        """Of several candidates of one call."""
        options = self._options(call, candidates)
        known = [place for place, logs in enumerate(options) if logs.size]
        found: list[Prediction | None] = [None] * len(candidates)
        if known:
            named = [candidates[place] for place in known]
            wanted = _points(call.key, named, [options[place] for place in known])
            times, doubts = _carried(self._group(call.key), wanted)
            for place, time, doubt in zip(known, times, doubts, strict=True):
                found[place] = Prediction(math.exp(time), float(doubt))
        return found

    def rank(self, call: Call, candidates: Sequence[tuple[Kernel, Config]]) -> list[Ranked]:
        """The candidates, the one to choose first, then those that may be quicker, likeliest first.

        First comes the least time, doubt (and `RENUMBERED`) counted as time lost; then the others,
        doubt counted as time that may be won. What the model does not know comes last.
        """
        named = [(kernel.name, config) for kernel, config in candidates]
        found = self.predictions(call, named)
        known = [(p, place) for place, p in enumerate(found) if p is not None]
        order = sorted(known, key=lambda item: math.log(item[0].us) - DOUBT * item[0].doubt)
        if order:
            best = min(order, key=lambda item: _safely(item[0], *named[item[1]]))
            order.remove(best)
            order.insert(0, best)
        places = [place for _, place in order]
        places += [place for place, p in enumerate(found) if p is None]
        return [
            Ranked(*candidates[place], None if (p := found[place]) is None else p.us)
            for place in places
        ]

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

    def _options(
        self, call: Call, candidates: Sequence[tuple[str, Config]], chip: Chip | None = None
    ) -> list[Array]:
        """Of each candidate, logarithms of the times of all tiles that its kernel may have."""
        chip = chip or self.chip
        found = [works(chip, call, name, config) for name, config in candidates]
        forms: dict[str, list[int]] = defaultdict(list)
        for place, (name, _) in enumerate(candidates):
            forms[name].append(place)
        options = [np.empty(0)] * len(candidates)
        for form, places in forms.items():  # all of a form at once: each alone takes as long
            constants = self.fitted.constants.get(form, {})
            logs = _logs(constants, [work for place in places for work in found[place]])
            ends = np.cumsum([len(found[place]) for place in places])[:-1]
            for place, own in zip(places, np.split(logs, ends), strict=True):
                factor = self.fitted.tiles.get(_tile_of(form, candidates[place][1]), 1.0)
                options[place] = own + math.log(factor)
        return options

    def _group(self, key: str) -> _Group:
        """What was measured of calls of the same weights."""
        name = _group_of(key)
        if name not in self._groups:
            points: list[_Point] = []
            own = self._measured.get(name, {})
            for other, times in {**self._carried.get(name, {}), **own}.items():
                named = [(kernel, config) for kernel, config, _ in times]
                us = [us for *_, us in times]
                try:
                    call = call_of(other)
                    options = self._options(call, named)
                    if other not in own:
                        there = self._options(call, named, self._origin)
                        us = [
                            time * math.exp(float(here.min() - gone.min())) if here.size else time
                            for time, here, gone in zip(us, options, there, strict=True)
                        ]
                    made = _points(other, named, options, us)
                except ValueError:  # of another version, or damaged
                    continue
                points += [point for point in made if point.options.size]
            self._groups[name] = _Group(points)
        return self._groups[name]


def numbered(kernel: str, config: Config) -> bool:
    """Whether a library's algorithm is known by its number alone."""
    return any(kernel.startswith(prefix) and name in config for prefix, name in NUMBERED.items())


def _safely(predicted: Prediction, kernel: str, config: Config) -> float:
    """The logarithm of a time that is hardly exceeded."""
    unsure = RENUMBERED if numbered(kernel, config) else 0.0
    return math.log(predicted.us) + DOUBT * predicted.doubt + unsure


# Neighbours.


@dataclass(frozen=True)
class _Point:
    """One candidate of one call: what it has in common with others, and its options' times."""

    family: str
    rows: float  # the logarithm
    kernel: str
    tile: str
    config: str
    call: str
    options: Array
    time: float = 0.0  # the logarithm of microseconds, where measured

    def common(self) -> tuple[str, ...]:
        """What it may have in common with others."""
        return self.family, self.kernel, self.tile, self.config, self.call


@dataclass
class _Group:
    """What was measured of calls that are alike, and what follows from it, made once."""

    points: list[_Point]

    @cached_property
    def traits(self) -> _Traits:
        """Of the points."""
        return _Traits.of(self.points, self.ids)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Numbers for what the points may have in common."""
        texts = (text for point in self.points for text in point.common())
        return {text: number for number, text in enumerate(dict.fromkeys(texts))}

    @cached_property
    def inverse(self) -> Array:
        """Of the times' covariance."""
        noise = _NOISE**2 * np.eye(len(self.points))
        return np.asarray(np.linalg.inv(_covariance(self.traits, self.traits) + noise))

    @cached_property
    def hidden(self) -> dict[str, _Hidden]:
        """The points of which the tile is not known, by kernel."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, point in enumerate(self.points):
            if point.options.size > 1:
                places[point.kernel].append(place)
        return {
            kernel: _Hidden(
                np.array(own),
                np.array([self.points[place].options for place in own]),
                np.array([_evidence(self.points[place]) for place in own]),
            )
            for kernel, own in places.items()
        }


@dataclass(frozen=True)
class _Hidden:
    """Points of one kernel: their places, their options and what their times tell of these."""

    places: NDArray[np.int64]
    options: Array
    evidence: Array


@dataclass(frozen=True)
class _Traits:
    """Of several points: logarithms of rows, whether tiles are not known, and what is in common.

    common: one number each for the family, kernel, tile, configuration and call, in this order.
    """

    rows: Array
    hidden: NDArray[np.bool_]
    common: NDArray[np.int64]

    @staticmethod
    def of(points: Sequence[_Point], ids: Mapping[str, int]) -> _Traits:
        """ids: numbers for texts; those of others are not told apart."""
        common = [[ids.get(text, -1) for text in point.common()] for point in points]
        return _Traits(
            np.array([point.rows for point in points]),
            np.array([point.kernel in HIDDEN for point in points]),
            np.array(common, dtype=np.int64).reshape(len(points), 5).T,
        )


def _points(
    key: str,
    candidates: Sequence[tuple[str, Config]],
    options: Sequence[Array],
    times: Sequence[float] | None = None,
) -> list[_Point]:
    family, rows = family_of(key)
    return [
        _Point(
            *(family, math.log(max(rows, 1)), name, _tile_of(name, config, exact=True)),
            *(f"{name} {_text(config)}", key, logs),
            time=math.log(times[place]) if times is not None else 0.0,
        )
        for place, ((name, config), logs) in enumerate(zip(candidates, options, strict=True))
    ]


def _carried(group: _Group, wanted: Sequence[_Point]) -> tuple[Array, Array]:
    """Logarithms of the times of points of one call and their spreads, by those measured."""
    traits = _Traits.of(wanted, group.ids)
    means, expected, spreads = _inferred(group, wanted)
    same = np.array(True)
    own = _alike(0.0, traits.hidden, same, same, same, same, same) + _NOISE**2
    if not group.points:
        return expected, np.sqrt(own) + spreads
    across = _covariance(traits, group.traits)
    residuals = np.array([point.time for point in group.points]) - means
    weights = across @ group.inverse
    left = own - np.einsum("ij,ij->i", weights, across)
    return expected + weights @ residuals, np.sqrt(np.maximum(left, 0.0)) + spreads


def _covariance(some: _Traits, others: _Traits) -> Array:
    apart = np.abs(some.rows[:, None] - others.rows)
    same = some.common[:, :, None] == others.common[:, None, :]
    return _alike(apart, some.hidden[:, None], *same)


def _alike(
    apart: Array | float,
    hidden: NDArray[np.bool_],
    family: NDArray[np.bool_],
    kernel: NDArray[np.bool_],
    tile: NDArray[np.bool_],
    config: NDArray[np.bool_],
    call: NDArray[np.bool_],
) -> Array:
    """Covariances of logarithms of times, by how far rows are apart and what is the same."""
    shared = np.exp(-np.asarray(apart) / _RANGE) * (
        _ANY**2
        + _KERNEL**2 * kernel
        + np.where(hidden, 0.0, _TILE**2) * tile
        + np.where(hidden, _INDEX**2, _CONFIG**2) * config
    )
    near = np.where(hidden, _INDEX_NEAR**2, _CONFIG_NEAR**2) * config
    shared += np.exp(-np.asarray(apart) / _NEAR) * near
    return np.asarray(np.where(family, 1.0, _SIBLING) * shared + _CALL**2 * call)


def _inferred(group: _Group, wanted: Sequence[_Point]) -> tuple[Array, Array, Array]:
    """Means over the tiles that kernels may have: of what is measured and of what is wanted.

    And the spreads of the latter. Of a kernel that has one tile the mean is its time.
    """
    means = np.array([float(point.options[0]) for point in group.points])
    told = {kernel: _told(group, kernel, wanted[0]) for kernel in group.hidden}
    for kernel, hidden in group.hidden.items():
        configs = group.traits.common[3][hidden.places]
        for config in np.unique(configs):
            own = configs == config
            weights = _softmax(told[kernel](config))
            means[hidden.places[own]] = hidden.options[own] @ weights
    expected, spreads = [], []
    for point in wanted:
        if point.options.size == 1:
            expected.append(float(point.options[0]))
            spreads.append(0.0)
            continue
        known = told.get(point.kernel)
        tells = 0.0 if known is None else known(group.ids.get(point.config, -1))
        # The library will choose well at this size, too.
        slower = point.options - point.options.min()
        weights = _softmax(tells - slower / _CHOOSES[_library(point.kernel)])
        mean = float(weights @ point.options)
        expected.append(mean)
        spreads.append(math.sqrt(float(weights @ (point.options - mean) ** 2)))
    return means, np.array(expected), np.array(spreads)


def _told(group: _Group, kernel: str, wanted: _Point) -> Callable[[int], Array]:
    """What the measured times of a kernel tell of its tile at another size, by configuration."""
    traits, hidden = group.traits, group.hidden[kernel]
    family, _, _, configs, _ = traits.common[:, hidden.places]
    weight = _TELLS[_library(kernel)] * np.exp(
        -np.abs(traits.rows[hidden.places] - wanted.rows) / _TELLS_RANGE
    )
    weight = weight * np.where(family == group.ids.get(wanted.family, -1), 1.0, _SIBLING)

    def of(config: int) -> Array:
        alike = np.where(configs == config, 1.0, _TELLS_OTHER)
        return np.asarray((weight * alike) @ hidden.evidence)

    return of


def _softmax(logs: Array) -> Array:
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def _evidence(point: _Point) -> Array:
    """The logarithm of each tile's likelihood, by the point's time."""
    missed = ((point.time - point.options) / _MISS) ** 2 / 2
    return np.asarray(-np.minimum(missed, _MISS_MOST))


def _library(kernel: str) -> str:
    return "cublas" if kernel.startswith("cublas") else "cudnn"


_WEIGHT = re.compile(r"\d+(?:x\d+)+(?=:\w+!?c)")


@lru_cache(maxsize=1 << 14)
def _group_of(key: str) -> str:
    """The operator and its matrices of weights; without any, the widths of its result."""
    op, out = key.partition("(")[0], key.rpartition(" -> ")[2]
    weights = _WEIGHT.findall(key)
    return f"{op} {' '.join(weights) or out.partition(':')[0].rpartition('x')[2]}"


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
            np.array([[work.fixed.get(name, 0.0) for name in adds] for work in found]),
            np.array([[work.overlapped.get(name, 0.0) for name in laps] for work in found]),
        )

    def logs(self, constants: Array) -> tuple[Array, Array]:
        """Logarithms of the times, and their slopes by the logarithms of the constants."""
        count = self.fixed.shape[1]
        adds = self.fixed * constants[:count]
        powers = (self.overlapped * constants[count:]) ** POWER
        sums = powers.sum(axis=1) + 1e-30
        longest = sums ** (1 / POWER)
        times = adds.sum(axis=1) + longest
        slopes = np.column_stack(
            [adds / times[:, None], powers * (longest / sums / times)[:, None]]
        )
        return np.log(times), slopes


def _logs(constants: Mapping[str, float], found: Sequence[Work]) -> Array:
    if not found:
        return np.empty(0)
    table = _Table.of(found)
    values = np.array([constants.get(name, 1.0) for name in table.names])
    return table.logs(values)[0]


def fit(chip: Chip, measured: Mapping[str, Times]) -> Fit:
    """Constants for a chip from times of some calls, by the calls' keys.

    Candidates far from a call's best count less. A library's tile is the one that explains its
    time among those that it may well choose. A key that is no call's counts for nothing.
    """
    by_form: dict[str, list[tuple[str, Config, Sequence[Work], float, float]]] = defaultdict(list)
    for key, times in measured.items():
        try:
            call = call_of(key)
        except ValueError:  # a profile keeps the text of calls unread
            continue
        best = min((us for *_, us in times), default=0.0)
        for name, config, us in times:
            found = works(chip, call, name, config)
            if found and us > 0:
                weight = 1 / (1 + 3 * (us / best - 1))
                by_form[name].append((name, config, found, math.log(us), weight))
    constants: dict[str, dict[str, float]] = {}
    misses: dict[str, list[float]] = defaultdict(list)
    for form, rows in by_form.items():
        logs = np.array([row[3] for row in rows])
        weights = np.array([row[4] for row in rows])
        if form not in HIDDEN:
            constants[form] = _fitted([row[2][0] for row in rows], logs, weights, PRIOR)
            for name, config, found, log, _ in rows:
                missed = log - float(_logs(constants[form], found)[0])
                misses[_tile_of(name, config)].append(min(max(missed, -0.4), 0.4))
            continue
        constants[form] = {}
        for turn in range(ROUNDS):
            chosen = [
                found[_assigned(_logs(constants[form], found), log, _MISS * (ROUNDS - turn))]
                for _, _, found, log, _ in rows
            ]
            constants[form] = _fitted(chosen, logs, weights, PRIOR_HIDDEN)
    tiles = {tile: math.exp(sum(m) / (len(m) + FEW)) for tile, m in misses.items()}
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
        off = np.abs(logs - table.logs(np.exp(at))[0])
        huber = np.where(off < HUBER, off**2 / 2, HUBER * (off - HUBER / 2))
        return float((weights * huber).sum() + prior * (at**2).sum() / 2)

    at, damping = np.zeros(size), 1e-2
    least = loss(at)
    for _ in range(40):
        predicted, slopes = table.logs(np.exp(at))
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
