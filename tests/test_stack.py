"""Calls take no longer at one depth of Python's stack than at another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from accel.hosts.stack import with_room


def leaf(x: int, y: int = 1, *, z: int = 2) -> int:
    return x + y + z


def caller(x: int) -> int:
    return leaf(x, z=3)


def microseconds(calls: int = 200) -> float:
    """Of one call of two functions, in the best of three rounds."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(calls):
            caller(1)
        best = min(best, time.perf_counter() - started)
    return best * 1e6 / calls


def at(depth: int, measure: Callable[[], float]) -> float:
    return measure() if depth == 0 else at(depth - 1, measure)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames lie elsewhere before Python 3.11")
def test_no_depth_is_slow() -> None:
    plain = {depth: at(depth, microseconds) for depth in range(250)}
    usual = sorted(plain.values())[len(plain) // 2]
    worst = max(plain, key=lambda depth: plain[depth])
    assert plain[worst] > 5 * usual, "this Python pays nothing for a new chunk: is it needed?"
    roomy = [at(depth, lambda: with_room(microseconds)) for depth in range(worst - 4, worst + 5)]
    assert max(roomy) < plain[worst] / 3


def test_it_is_the_call_itself() -> None:
    assert with_room(leaf, 1, z=5) == 7
    with pytest.raises(TypeError, match="leaf"):
        with_room(leaf)  # type: ignore[call-arg]
