"""Timing while nothing runs: when, what, and what is remembered."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cost import GPU, resized, shipped

from accel.cache import DiskCache
from accel.kernels import Call
from accel.session import Session
from accel.tuning import select as selection
from accel.tuning.compiling import Compiler
from accel.tuning.idle import IdleTuner
from accel.tuning.measure import Measurement
from accel.tuning.profile import Profile
from accel.tuning.select import Selector


class Guesses:
    """Stands where a selector does: so many calls to time."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.left, self.fails = list(range(count)), fails
        self.timed: list[tuple[int, bool]] = []
        self.lock = threading.Lock()

    def guessed(self) -> list[Any]:
        return list(self.left)

    def compile_likely(self, call: Any) -> None:
        assert not self.lock.locked(), "an engine may run meanwhile"

    def time_likely(self, call: Any, undisturbed: Callable[[], bool]) -> None:
        assert undisturbed()
        if self.fails:
            raise torch.OutOfMemoryError("no memory")
        self.timed.append((call, self.lock.locked()))
        self.left.remove(call)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def idle(guesses: Guesses, after: float) -> IdleTuner:
    selector: Any = guesses
    return IdleTuner(selector, guesses.lock, after)


def test_what_was_guessed_is_timed_once_nothing_runs_with_the_lock_held() -> None:
    guesses = Guesses(3)
    tuner = idle(guesses, 0.02)
    tuner.used()
    wait_for(lambda: not guesses.left and tuner._thread is None)
    assert guesses.timed == [(0, True), (1, True), (2, True)]
    tuner.used()
    assert tuner._thread is None, "there is nothing left to do"


def test_nothing_is_timed_while_engines_run() -> None:
    guesses = Guesses(1)
    tuner = idle(guesses, 0.25)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        tuner.used()
        time.sleep(0.02)
    assert not guesses.timed
    wait_for(lambda: bool(guesses.timed))


def test_nothing_is_timed_while_another_session_runs() -> None:
    guesses, other = Guesses(1), idle(Guesses(0), 0.25)
    tuner = idle(guesses, 0.25)
    tuner.used()
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        other.used()
        time.sleep(0.02)
    assert not guesses.timed
    wait_for(lambda: bool(guesses.timed))


def test_it_ends_with_its_session() -> None:
    guesses = Guesses(3)
    tuner = idle(guesses, 60)
    tuner.used()
    assert tuner._thread is not None
    tuner.stop()
    wait_for(lambda: tuner._thread is None)
    assert not guesses.timed


def test_a_session_that_goes_takes_it_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHYARD_IDLE", "on")
    session = Session("cpu", "fp32")
    tuner = session._idle
    assert tuner is not None and not tuner._stopped.is_set()
    del session
    gc.collect()
    assert tuner._stopped.is_set()


def test_a_failure_ends_it_and_nothing_else() -> None:
    guesses = Guesses(2, fails=True)
    tuner = idle(guesses, 0.01)
    tuner.used()
    wait_for(lambda: tuner._thread is None)
    assert not guesses.lock.locked() and len(guesses.left) == 2


class Measured:
    """Stands where `measure` does: times by the candidates' places, None for what fails."""

    def __init__(self, us: Callable[[int], float | None]) -> None:
        self.us = us
        self.rounds: list[tuple[Call, list[int]]] = []

    def __call__(self, calls: list[Call], compiler: Any, device: Any, prune: Any) -> Iterator[Any]:
        (call,) = calls
        candidates = selection.kernels.candidates(call, GPU)[:-1]
        found = prune(call, candidates)
        places = [candidates.index(pair) for pair in found]
        self.rounds.append((call, places))
        yield call, [Measurement(*candidates[place], self.us(place)) for place in places]


def chooser(monkeypatch: pytest.MonkeyPatch, measured: Measured, cache: DiskCache) -> Selector:
    monkeypatch.setattr(selection, "measure", measured)
    device = torch.device("cuda")
    return Selector(Compiler(GPU, device, None), device, Profile(GPU, cache), measuring=False)


def timed_out(selector: Selector, call: Call) -> None:
    """Idle time without end."""
    for _ in range(20):
        if call not in selector.guessed():
            return
        selector.time_likely(call)
    raise AssertionError("there is always something left to time")


def test_what_is_timed_counts_in_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = shipped()
    cache = DiskCache(tmp_path, 1 << 20, "profile-test")
    measured = Measured(lambda place: 30.0 - place)
    small, large = resized(key, 7168), resized(key, 14000)
    selector = chooser(monkeypatch, measured, cache)
    before = selector.select([small, large, selection_of(key)])
    assert [choice.reason.split(",")[0] for choice in before] == ["predicted"] * 2 + ["measured"]
    assert selector.guessed() == [large, small], "what is measured is not timed again"
    selector.time_likely(large, lambda: False)
    assert selector.guessed() == [large, small], "what was disturbed is timed again"
    measured.rounds.clear()
    for call in selector.guessed():
        timed_out(selector, call)
        selector.time_likely(call)  # as another session might, at the same time
    assert {call.key for call, _ in measured.rounds} == {large.key, small.key}
    assert not selector.guessed()
    assert selector.select([small, large]) == before[:2], "equal runs give equal bits"
    later = chooser(monkeypatch, measured, cache).select([small])[0]
    mine = [place for call, places in measured.rounds if call.key == small.key for place in places]
    assert later.reason.startswith("measured, ") and later.us == pytest.approx(30.0 - max(mine))


def test_what_may_be_quicker_still_is_timed_beside_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = shipped()
    call = resized(key, 14000)
    slow = Measured(lambda place: None if place % 3 == 1 else 900.0 + 30 * place)  # some fail
    selector = chooser(monkeypatch, slow, DiskCache(tmp_path, 1 << 20, "profile-test"))
    selector.select([call])
    timed_out(selector, call)
    rounds = [places for _, places in slow.rounds]
    count = len(selection.kernels.candidates(call, GPU)) - 1
    assert len(rounds) > 1 and set().union(*rounds) == set(range(count)), "any may be better"
    for before, after in pairwise(rounds):
        best = min((p for p in before if p % 3 != 1), default=None)
        assert set(before) & set(after) <= {best}, "what failed is not tried again"
        assert best is None or best in after
    entry = selector.profile.get(call.key)
    assert entry is not None and entry.us == 900.0


def test_what_is_sure_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = shipped()
    call, measured = resized(key, 14000), Measured(lambda place: 9.0)
    monkeypatch.setattr("accel.tuning.cost.WORTH", 10.0)
    monkeypatch.setattr("accel.tuning.cost.NEAR_BY_ALONE", frozenset())
    selector = chooser(monkeypatch, measured, DiskCache(tmp_path, 1 << 20, "profile-test"))
    selector.select([call])
    assert selector.guessed() == [call]
    selector.time_likely(call)
    assert not measured.rounds and not selector.guessed()
    assert selector.profile.get(call.key) is None


def selection_of(key: str) -> Call:
    return resized(key, 8192)
