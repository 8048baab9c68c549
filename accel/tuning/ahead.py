"""Which kernels of a plan are compiled ahead, so that a new image size waits for no compiler.

The sizes of a plan's calls choose among hundreds of variants, of which most are hardly better than
the next best. A few that stand for all are found greedily: the next one is always that which saves
most time for each piece of code, over the calls of image sizes that stand for the others, by what
the performance model predicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..hardware import Hardware
from ..kernels.registry import Call, Config, Kernel
from .compiling import Variant, launch_keys, named
from .cost import Model
from .profile import family_of

SIZES = (
    *((520, 616), (776, 712), (696, 1064), (904, 1160), (632, 1480)),
    *((1176, 872), (1320, 1000), (1496, 1240), (1432, 1432)),
)
"""Image sizes in pixels that stand for the others: odd ones, whose pixels no tile of a convolution
covers evenly, since most sizes are such. What a plan's first image wants is compiled anyway."""

MOST = 120
"""Pieces of code that a plan's kernels are compiled to ahead."""

SLOW = 1.5
"""Where no library runs a call, what stands in for ours is taken to be so many times as slow."""

NOTHING = 1e-3
"""Microseconds: a code that would save no more is left out."""


def named_covering(
    calls: Callable[[], Iterable[Call]], hardware: Hardware, model: Model
) -> list[list[Any]]:
    """`covering`, of calls that are still to be made, as another process may answer it."""
    return named(covering(calls(), hardware, model))


def covering(
    calls: Iterable[Call], hardware: Hardware, model: Model, most: int = MOST
) -> list[Variant]:
    """Variants of at most `most` pieces of code that serve the calls, and others between, well.

    calls: of one plan at several image sizes. model: predicts their times. Of each piece of code
    there is a variant for every kind of call that it can serve.
    """
    found = list(calls)
    lent = _by_family(found, hardware)
    codes: dict[frozenset[str], int] = {}
    variants: dict[int, dict[str, Variant]] = defaultdict(dict)
    best = np.empty(len(found))
    times: list[dict[int, float]] = []
    for place, call in enumerate(found):
        family = family_of(call.key)[0]
        own = fitting(lent[family], call, hardware)
        predicted = model.predictions(call, [(kernel.name, config) for kernel, config in own])
        known = [(*pair, p.us) for pair, p in zip(own, predicted, strict=True) if p is not None]
        libraries = [us for kernel, _, us in known if kernel.launches is None]
        compiled = [(k, config, us) for k, config, us in known if k.launches is not None]
        slowest = max((us for *_, us in compiled), default=0.0)
        best[place] = min(libraries, default=SLOW * slowest)
        ours: dict[int, float] = {}
        for kernel, config, us in compiled:
            if us >= best[place]:  # never run
                continue
            keys = frozenset(launch_keys((kernel, config, call)))
            if keys:
                code = codes.setdefault(keys, len(codes))
                if us < ours.get(code, np.inf):
                    ours[code] = us
                    variants[code].setdefault(family, (kernel, config, call))
        times.append(ours)
    chosen = _greedy(list(codes), best, times, most)
    return [variant for code in chosen for variant in variants[code].values()]


def fitting(
    offered: Iterable[tuple[Kernel, Config]], call: Call, hardware: Hardware
) -> list[tuple[Kernel, Config]]:
    """Of other sizes' kernels and configurations those that can serve this call."""
    supported: dict[str, bool] = {}

    def fits(kernel: Kernel, config: Config) -> bool:
        try:
            if kernel.name not in supported:
                supported[kernel.name] = kernel.supports(call, hardware)
            return supported[kernel.name] and kernel.fits(call, config, hardware)
        except (KeyError, ValueError, TypeError, ArithmeticError):  # of another version, or damaged
            return False

    return [(kernel, config) for kernel, config in offered if fits(kernel, config)]


def _by_family(
    calls: Iterable[Call], hardware: Hardware
) -> Mapping[str, Sequence[tuple[Kernel, Config]]]:
    """Of calls that differ in image size alone, the candidates of all together."""
    found: dict[str, dict[tuple[str, str], tuple[Kernel, Config]]] = defaultdict(dict)
    for call in calls:
        family = found[family_of(call.key)[0]]
        for kernel, config in kernels.candidates(call, hardware)[:-1]:
            family.setdefault((kernel.name, str(sorted(config.items()))), (kernel, config))
    return {family: list(pairs.values()) for family, pairs in found.items()}


def _greedy(
    codes: Sequence[frozenset[str]],
    times: NDArray[np.float64],
    options: Sequence[Mapping[int, float]],
    most: int,
) -> list[int]:
    """Places in `codes` of those to have. times: of each call without any; options: with a code."""
    table = np.full((len(codes), len(times)), np.inf)
    for call, ours in enumerate(options):
        for code, us in ours.items():
            table[code, call] = us
    times = times.copy()

    def savings(calls: NDArray[np.intp]) -> NDArray[np.float64]:
        """Microseconds that each code would save of these calls."""
        return np.asarray(np.maximum(times[calls] - table[:, calls], 0.0).sum(axis=1))

    saved = savings(np.arange(len(times)))
    have: set[str] = set()
    taken: list[int] = []
    while True:
        costs = np.array([len(keys - have) for keys in codes])
        worth = np.where(len(have) + costs <= most, saved / np.maximum(costs, 0.5), 0.0)
        code = int(worth.argmax()) if len(codes) else 0
        if not len(codes) or worth[code] <= NOTHING:
            return taken
        taken.append(code)
        have |= codes[code]
        changed = np.flatnonzero(table[code] < times)
        saved -= savings(changed)
        times[changed] = table[code, changed]
        saved += savings(changed)
