"""Kernels that are compiled ahead: which, and that a new image size compiles none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cost import GPU, resized, shipped

from accel import background
from accel.cache import DiskCache
from accel.compiler import SHIPPED
from accel.kernels import Call, Kernel, candidates, kernels, load_triton
from accel.plan.schema import Plan
from accel.runtime.calls import calls_ahead, dims_at
from accel.tuning import ahead, compiling, select
from accel.tuning.ahead import covering, named_covering
from accel.tuning.compiling import Compiler, launch_keys, made_apart
from accel.tuning.cost import Model
from accel.tuning.keys import call_of
from accel.tuning.profile import Profile, family_of
from accel.tuning.select import Choice, Selector, model_of

CUDA = torch.device("cuda")
ROWS = (2048, 8192, 18432)

KEYS = (
    "linear({m}x640:f16 640x640:f16c 640:f16c {m}x640:f16) -> {m}x640:f16 activation=none",
    "linear({m}x1280:f16 1280x1280:f16c 1280:f16c -) -> {m}x1280:f16 activation=none",
    "linear({m}x640:f16 5120x640:f16c 5120:f16c -) -> {m}x2560:f16 activation=geglu",
    "layer_norm({m}x1280:f16 1280:f16c 1280:f16c) -> {m}x1280:f16 eps=1e-05",
)


@dataclasses.dataclass(frozen=True)
class Code:
    """In place of a launch: the interpreter, in which tests run kernels, has none to compile."""

    name: str

    def key(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel, configuration and width are the code, whatever the rows."""

    def launches_of(kernel: Kernel, config: Any, call: Call) -> list[Code]:
        return [Code(f"{kernel.name} {sorted(config.items())} {call.out.shape[-1]}")]

    monkeypatch.setattr(compiling, "launches_of", launches_of)
    monkeypatch.setattr(select, "FIRST", 0.0)  # nothing runs here


def calls(rows: Iterable[int] = ROWS) -> list[Call]:
    return [call_of(key.format(m=m)) for m in rows for key in KEYS]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own, which would know nothing of such code."""
    monkeypatch.setattr(select, "made_apart", lambda job, hardware: job())


def chooser(profile: Profile | None = None, cache: DiskCache | None = None) -> Selector:
    return Selector(Compiler(GPU, CUDA, cache), CUDA, profile or Profile(GPU, None), False)


@cache
def model() -> Model:
    found = model_of(GPU, Profile(GPU, None))
    assert found is not None
    return found


# Which.


def cost(call: Call, have: set[str]) -> float:
    """Microseconds with what is compiled and the libraries."""
    found = [pair for pair in candidates(call, GPU)[:-1] if launch_keys((*pair, call)) <= have]
    times = model().predictions(call, [(kernel.name, config) for kernel, config in found])
    return min(time.us for time in times if time is not None)


def test_a_few_pieces_of_code_serve_sizes_that_are_not_among_those_asked() -> None:
    load_triton()
    between = calls((2304, 9216))
    spent = []
    for most in (0, 4, 12):
        chosen = covering(calls(), GPU, model(), most)
        have = set().union(*(launch_keys(variant) for variant in chosen))
        assert len(have) <= most
        spent.append(sum(cost(call, have) for call in between))
    everything = {k for c in between for pair in _pairs(c) for k in launch_keys((*pair, c))}
    best = sum(cost(call, everything) for call in between)
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 1.1 * best and spent[2] < 1.05 * best


def _pairs(call: Call) -> Any:
    return candidates(call, GPU)[:-1]


def test_a_kernel_of_two_launches_needs_both() -> None:
    codes = [frozenset("ab"), frozenset("c"), frozenset("abd")]
    times, options = np.array([10.0, 10.0]), [{0: 1.0, 2: 0.5}, {1: 9.0}]
    assert ahead._greedy(codes, times, options, 1) == [1]
    assert ahead._greedy(codes, times, options, 2) == [0]
    assert ahead._greedy(codes, times, options, 3) == [0, 1]
    assert ahead._greedy(codes, times, options, 4) == [0, 1, 2]
    assert ahead._greedy([], times, [{}, {}], 4) == []


def test_nothing_is_chosen_of_what_nobody_can_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "predictions", lambda self, call, found: [None] * len(found))
    assert covering(calls((64,)), GPU, model()) == []


# What a new size runs.


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What processes were asked to compile, each time; it is there at once."""
    asked: list[set[str]] = []

    def compile_apart(variants: Any, *rest: Any) -> set[str]:
        asked.append(set(variants))
        return set(variants)

    monkeypatch.setattr(compiling, "compile_apart", compile_apart)
    return asked


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def first_size(selector: Selector) -> list[Choice]:
    """A plan's first image size, with its own kernels."""
    own = calls((8192,))
    choices = selector.select(own)
    selector.compiler.compile_later(
        [(choice.kernel, choice.config, call) for choice, call in zip(choices, own, strict=True)]
    )
    wait_for(lambda: selector.settled)
    return choices


@pytest.mark.usefixtures("here")
def test_a_new_size_compiles_nothing_once_the_plan_is_prepared(
    compiled: list[set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    selector = chooser(cache=DiskCache(tmp_path, 1 << 20, "test"))
    first_size(selector)
    selector.prepare("a plan", calls)
    wait_for(lambda: selector.settled)
    assert len(compiled) == 2 and 0 < len(compiled[1]) <= ahead.MOST
    there = compiled[0] | compiled[1]
    for rows in (2560, 8192 + 64, 12544, 40000):
        new = calls((rows,))
        for call, choice in zip(new, selector.select(new), strict=True):
            assert launch_keys((choice.kernel, choice.config, call)) <= there, choice
            assert not choice.provisional
            free = chooser().select([call])[0]
            if choice.about is not None and free.about is not None:
                assert choice.about < 1.5 * free.about
    assert len(compiled) == 2
    # A later process finds the few by the plan's name, and their code.
    later = chooser(cache=DiskCache(tmp_path, 1 << 20, "test"))
    later.select(calls((8192,)))

    def never() -> list[Call]:
        raise AssertionError("they are known")

    later.prepare("a plan", never)
    wait_for(lambda: later.settled)
    assert len(compiled) == 2
    assert later._model is not None
    ready = set(later._model._points)
    later._model.predictions(call_of(KEYS[0].format(m=9216)), [("cublas.linear", {})])
    assert ready and set(later._model._points) == ready, "a new size has nothing left to learn"
    another = chooser(cache=DiskCache(tmp_path, 1 << 20, "test"))
    monkeypatch.setattr(ahead, "SIZES", ahead.SIZES[:1])
    with caplog.at_level(logging.WARNING):
        another.prepare("a plan", never)
        wait_for(lambda: another.settled)
    assert "they are known" in caplog.text, "other sizes decide anew"
    assert {f: sorted(map(str, v)) for f, v in later._ahead.items()} == {
        f: sorted(map(str, v)) for f, v in selector._ahead.items()
    }


@pytest.mark.usefixtures("here")
def test_what_was_measured_but_is_not_compiled_is_not_waited_for_and_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = threading.Event()

    def compile_apart(variants: Any, *rest: Any) -> set[str]:
        assert go.wait(20)
        return set(variants)

    monkeypatch.setattr(compiling, "compile_apart", compile_apart)
    profile, key = shipped()
    selector = chooser(profile)
    (free,) = chooser(profile).select([call_of(key)])
    assert free.reason.startswith("measured")
    selector.select([resized(key, 7168)])
    selector.prepare("a plan", list)
    wait_for(lambda: selector.settled)
    (choice,) = selector.select([call_of(key)])
    assert free.kernel.launches is not None
    assert choice.kernel.launches is None, "nothing but libraries is there"
    assert choice.provisional and not selector.settled
    go.set()
    wait_for(lambda: selector.settled)
    assert selector.select([call_of(key)]) == [choice], "equal bits, till a host asks for better"
    selector.renew()
    assert selector.select([call_of(key)]) == [free], "no size that was measured runs worse for it"
    # Calls of other weights were not there when it was prepared.
    other = call_of(KEYS[1].format(m=8192))
    assert family_of(other.key)[0] not in selector._prepared


@pytest.mark.usefixtures("here")
def test_what_is_under_way_gives_a_provisional_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = threading.Event()

    def slow() -> list[Call]:
        assert go.wait(20)
        return calls()

    monkeypatch.setattr(compiling, "compile_apart", lambda variants, *rest: set(variants))
    selector = chooser()
    selector.select(calls((8192,)))
    selector.prepare("a plan", slow)
    new = calls((9216,))
    early = selector.select(new)
    assert any(choice.provisional for choice in early) and not selector.settled
    go.set()
    wait_for(lambda: selector.settled)
    assert selector.select(new) == early, "equal bits, till a host asks for better"
    selector.renew()
    late = selector.select(new)
    assert not any(choice.provisional for choice in late)
    assert any(a.kernel.name != b.kernel.name for a, b in zip(early, late, strict=True))


@pytest.mark.usefixtures("here", "compiled")
def test_what_is_prepared_waits_for_the_first_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "FIRST", 60.0)
    asked = threading.Event()

    def told() -> list[Call]:
        asked.set()
        return calls()

    selector = chooser()
    selector.select(calls((8192,)))
    assert selector._model is not None
    learnt = set(selector._model._points)
    selector.prepare("a plan", told)
    assert not asked.wait(0.2) and not selector.settled
    assert set(selector._model._points) == learnt
    selector.ran()
    wait_for(lambda: selector.settled)
    assert asked.is_set() and selector._ahead and set(selector._model._points) > learnt


@pytest.mark.usefixtures("here", "compiled")
@pytest.mark.parametrize("near", [True, False])
def test_what_nobody_predicts_is_provisional_while_kernels_are_coming(
    near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, key = shipped()
    if not near:
        monkeypatch.setattr(profile, "near", lambda call: None)
    selector = chooser(profile)
    go = threading.Event()
    first_size(selector)

    def slow() -> list[Call]:
        assert go.wait(20)
        return []

    selector.select([resized(key, 7168)])
    selector.compiler._stored |= {k for v in _variants(profile, key) for k in launch_keys(v)}
    selector.prepare("a plan", slow)
    monkeypatch.setattr(selector, "_model", None)  # it knows none of the candidates
    call = resized(key, 7424)
    (early,) = selector.select([call])
    assert early.provisional and early.reason.startswith("measured" if near else "not measured")
    go.set()
    wait_for(lambda: selector.settled)
    selector.renew()
    (late,) = selector.select([call])
    assert not late.provisional


def _variants(profile: Profile, key: str) -> Any:
    """The kernel that the profile names for a call, there and at other sizes of it."""
    registered = {kernel.name: kernel for kernel in kernels()}
    entry = profile.get(key)
    assert entry is not None
    return [(registered[entry.kernel], entry.config, call_of(key))]


def test_without_a_model_nothing_changes(compiled: list[set[str]]) -> None:
    profile, key = shipped()
    profile.fit = None
    selector = chooser(profile)
    selector.select([call_of(key)])
    selector.prepare("a plan", calls)
    assert selector.settled and not selector._prepared


@pytest.mark.usefixtures("here")
def test_a_failure_costs_no_picture(
    compiled: list[set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> list[Call]:
        raise ZeroDivisionError("no sizes")

    selector = chooser()
    selector.select(calls((8192,)))
    selector.prepare("a plan", fails)
    wait_for(lambda: selector.settled)
    assert "not compiled ahead: no sizes" in caplog.text
    for choice in selector.select(calls((9216,))):
        assert choice.kernel.launches is None


def test_what_is_on_the_gpu_is_not_brought_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Brought(Code):
        def warm(self) -> None:
            asked.append(self.name)
            if self.name == "too large":
                raise RuntimeError(self.name)

    def launches_of(kernel: Kernel, config: Any, call: Call) -> list[Code]:
        return [Brought("too large" if call.op == "layer_norm" else call.op)]

    load_triton()
    monkeypatch.setattr(compiling, "launches_of", launches_of)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    compiler = Compiler(GPU, CUDA)
    ours = {call.op: next(p for p in _pairs(call) if p[0].launches) for call in calls((64,))}
    variants = [(*ours[call.op], call) for call in calls()]
    compiler.compile(variants)
    assert sorted(asked) == ["linear", "too large"]
    for variant in variants:
        assert compiler.loaded(variant) == (variant[0].op == "linear")
    compiler.compile(variants)
    assert sorted(asked) == ["linear", "too large", "too large"]


# In a process of its own.

NOTHING = "import sys; sys.stdin.buffer.read()"
HALF = "import sys; sys.stdin.buffer.read(); print(); print('[[', end='', flush=True)"
HANGS = "import time; print(flush=True); time.sleep(60)"
"""In place of a process that answers."""


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if not load_triton():
        pytest.skip("there is no Triton here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("triton")
def test_the_few_are_found_elsewhere_once_a_machine(
    compiled: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*rest: Any) -> Any:
        raise AssertionError("not here")

    monkeypatch.setattr(ahead, "covering", never)
    monkeypatch.setattr(
        compiling.pickle, "dumps", lambda job, dumps=pickle.dumps: renamed(dumps(job, protocol=0))
    )
    for _ in range(2):
        selector = chooser(cache=DiskCache(tmp_path, 1 << 20, "test"))
        selector.select(calls((8192,)))
        selector.prepare("a plan", partial(list, calls()))
        wait_for(lambda one=selector: one.settled)
        found = {family: len(pairs) for family, pairs in selector._ahead.items()}
        # Of some a library's kernel is the best at every size.
        assert found and found.keys() <= {family_of(call.key)[0] for call in calls()}
        monkeypatch.setattr(compiling, "_BOOT", NOTHING)  # the second finds them on disk
    (file,) = tmp_path.rglob("ahead/*.json")
    file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setattr(ahead, "covering", lambda *rest: [])
    damaged = chooser(cache=DiskCache(tmp_path, 1 << 20, "test"))
    damaged.select(calls((8192,)))
    damaged.prepare("a plan", partial(list, calls()))
    wait_for(lambda: damaged.settled)
    assert not damaged._ahead, "found anew, by what answers here now"


def renamed(pickled: bytes) -> bytes:
    """As it is pickled where ComfyUI imports the pack under its folder's name."""
    assert b"caccel." in pickled
    return pickled.replace(b"caccel.", b"c/pack's/folder.accel.")


@pytest.mark.usefixtures("triton")
@pytest.mark.skipif(os.name != "posix", reason="other systems set the priority from outside")
def test_it_has_low_priority_and_no_gpu() -> None:
    assert made_apart(partial(os.nice, 0), GPU) == min(os.nice(0) + compiling.NICENESS, 19)
    assert made_apart(partial(os.getenv, "CUDA_VISIBLE_DEVICES"), GPU) == ""
    assert not compiling._processes


@pytest.mark.parametrize("boot", [NOTHING, HALF, HANGS, "no Python", None])
def test_without_an_answer_it_is_done_here(
    boot: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "PATIENCE", 1.0)
    if boot is None:
        monkeypatch.setattr(compiling, "PROCESS_BYTES", 1 << 60)
    else:
        monkeypatch.setattr(compiling, "_BOOT", boot)
    assert made_apart(os.getpid, GPU) == os.getpid()
    assert not compiling._processes


def test_a_program_that_ends_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_BOOT", HANGS)
    monkeypatch.setattr(background, "closing", threading.Event())
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(made_apart(os.getpid, GPU)))
    thread.start()
    wait_for(lambda: bool(compiling._processes))
    compiling._end_those(None)
    thread.join(10)
    assert answers == [None] and not compiling._processes
    assert made_apart(os.getpid, GPU) is None, "none is started any more"


def test_what_is_asked_for_can_be_sent() -> None:
    """A plan's calls and the model, at a network's first size."""
    plan = Plan.from_json(json.loads((SHIPPED / "sd15.json").read_text()))
    dims = dims_at(plan, 512, 512, 2)
    job = partial(named_covering, partial(calls_ahead, plan, dims, torch.float16), GPU, model())
    sent = pickle.loads(pickle.dumps(job))
    assert sent.args[0].args[0] == plan and isinstance(sent.args[2], Model)


# How good they are.


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_a_hundred_and_twenty_pieces_of_code_cost_a_few_percent(gpu: str) -> None:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / gpu / "ahead.json"
    rows = {(r["model"], r["operation"]): r["value"] for r in json.loads(path.read_text())["rows"]}
    for model in ("sd15", "sdxl"):
        assert rows[model, "ahead_codes"] <= ahead.MOST
        assert rows[model, "ahead_regret"] <= 0.04
        assert rows[model, "used_regret"] <= 0.035
        assert rows[model, "libraries_regret"] > 0.85
