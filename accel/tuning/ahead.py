"""Which kernels of a plan are compiled ahead, so that a new image size waits for no compiler.

The sizes of a plan's calls choose among hundreds of variants, of which most are hardly better than
the next best. A few that stand for all are found greedily: the next one is always that which saves
most time for each piece of code, over the calls of image sizes that stand for the others, by what
the performance model predicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..hardware import Hardware
from ..kernels.registry import Call, Config, Kernel
from .compiling import Variant, launch_keys
from .profile import family_of

SIZES = ((520, 616), (776, 712), (904, 1160), (1024, 1024), (1320, 1000), (1496, 1240))
"""Image sizes in pixels that stand for the others: odd ones, whose pixels no tile of a convolution
covers evenly, since most sizes are such. What a plan's first image wants is compiled anyway."""

MOST = 120
"""Pieces of code that a plan's kernels are compiled to ahead."""

SLOW = 1.5
"""Where no library runs a call, what stands in for ours is taken to be so many times as slow."""

Predict = Callable[[Call, Sequence[tuple[str, Config]]], Sequence[float | None]]
"""Microseconds of a call's candidates, by kernels' names; None where they are not known."""


def covering(
    calls: Iterable[Call], hardware: Hardware, predict: Predict, most: int = MOST
) -> list[Variant]:
    """Variants of at most `most` pieces of code that serve the calls, and others between, well.

    calls: of one plan at several image sizes. Of each piece of code there is a variant for every
    kind of call that it can serve.
    """
    found = list(calls)
    lent = _by_family(found, hardware)
    codes: dict[frozenset[str], int] = {}
    variants: dict[int, dict[str, Variant]] = defaultdict(dict)
    best = np.empty(len(found))
    times: list[dict[int, float]] = []
    for place, call in enumerate(found):
        family = family_of(call.key)[0]
        offered = lent[family]
        own = [pair for pair in offered if pair[0].launches is None or fits(*pair, call, hardware)]
        predicted = predict(call, [(kernel.name, config) for kernel, config in own])
        known = [(*pair, us) for pair, us in zip(own, predicted, strict=True) if us is not None]
        ours: dict[int, float] = {}
        for kernel, config, us in known:
            keys = frozenset(launch_keys((kernel, config, call)))
            if keys:
                code = codes.setdefault(keys, len(codes))
                if us < ours.get(code, np.inf):
                    ours[code] = us
                    variants[code].setdefault(family, (kernel, config, call))
        libraries = [us for kernel, _, us in known if kernel.launches is None]
        best[place] = min(libraries, default=SLOW * max(ours.values(), default=0.0))
        times.append(ours)
    chosen = _greedy(list(codes), best, times, most)
    return [variant for code in chosen for variant in variants[code].values()]


def fits(kernel: Kernel, config: Config, call: Call, hardware: Hardware) -> bool:
    """Whether a configuration of another size can serve this call."""
    try:
        return kernel.supports(call, hardware) and kernel.fits(call, config, hardware)
    except (KeyError, ValueError, TypeError, ArithmeticError):  # of another version, or damaged
        return False


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
    have: set[str] = set()
    taken: list[int] = []
    while True:
        costs = np.array([len(keys - have) for keys in codes])
        saved = np.maximum(times[None, :] - table, 0.0).sum(axis=1)
        worth = np.where(len(have) + costs <= most, saved / np.maximum(costs, 0.5), 0.0)
        code = int(worth.argmax()) if len(codes) else 0
        if not len(codes) or worth[code] <= 0:
            return taken
        taken.append(code)
        have |= codes[code]
        times = np.minimum(times, table[code])
