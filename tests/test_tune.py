"""`tune`: which sizes, what is kept when, and what the command says; with a clock of our own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.harness import chip

from accel.cache import DiskCache
from accel.cli import main
from accel.cli import tune as command
from accel.compiler import SHIPPED
from accel.errors import CacheUnavailable, InvalidInput, SwitchyardError
from accel.kernels import Call, TensorSpec, load_triton, registry
from accel.plan.schema import Plan
from accel.runtime.calls import calls_at
from accel.tuning import measure as measuring
from accel.tuning import profile as profiles
from accel.tuning import profile_file
from accel.tuning import tune as tuning
from accel.tuning.calibration import Calibration
from accel.tuning.chips import KNOWN
from accel.tuning.compiling import Compiler
from accel.tuning.cost import Fit, Model
from accel.tuning.profile import Entry, Profile, family_of, profile_cache
from accel.tuning.select import Selector
from accel.tuning.tune import Details, OwnProfile, ProfileFile, sizes_between, tune

CPU = torch.device("cpu")
GPU = chip()
H200 = next(chip for chip in KNOWN if chip.name == "NVIDIA H200")
ROOT = Path(__file__).resolve().parents[1]

# Which sizes.


@pytest.mark.parametrize(
    ("first", "last"), [(512, 1536), (512, 1024), (520, 1000), (256, 2048), (1024, 1024)]
)
def test_no_two_sizes_are_far_apart(first: int, last: int) -> None:
    sizes = sizes_between(first, last)
    assert sizes[0] == (first, first) and sizes[-1] == (last, last)
    assert len(set(sizes)) == len(sizes)
    pixels = [width * height for width, height in sizes]
    assert pixels == sorted(pixels)
    for small, large in itertools.pairwise(sizes):
        assert tuning.step(small, large) <= tuning.RATIO
    popular = {size for size in tuning.POPULAR if pixels[0] <= size[0] * size[1] <= pixels[-1]}
    assert popular <= set(sizes)


def test_popular_sizes_are_few_and_gaps_are_filled_sparingly() -> None:
    sizes = sizes_between(512, 1536)
    assert len(sizes) < 20
    assert any(width != height for width, height in sizes)
    for width, height in set(sizes) - set(tuning.POPULAR):
        assert width % 64 == height % 64 == 0, "no resolution of a network rounds these"


def test_where_no_size_is_near_enough_the_nearest_is_taken() -> None:
    """At the lowest resolution an image of 64 pixels is a single row."""
    sizes = sizes_between(64, 256)
    assert sizes[0] == (64, 64) and sizes[-1] == (256, 256) and len(sizes) > 4


@pytest.mark.parametrize("family", ["sd15", "sdxl-controlnet"])
def test_every_kind_of_call_is_measured_at_rows_close_to_each_other(family: str) -> None:
    plan = Plan.from_json(json.loads((SHIPPED / f"{family}.json").read_text(encoding="utf-8")))
    rows: dict[str, set[int]] = defaultdict(set)
    for width, height in sizes_between(512, 1024):
        for call in calls_at(plan, width, height, 2):
            kind, count = family_of(call.key)
            if count > 2:  # the timestep's have a row for each image of the batch
                rows[kind].add(count)
    grown = Counter[bool]()
    for counts in map(sorted, rows.values()):
        assert all(b <= tuning.RATIO * a for a, b in itertools.pairwise(counts))
        grown[len(counts) > 1] += 1
        # More than four times where the same layer stands at several resolutions.
        assert len(counts) == 1 or counts[-1] >= 4 * counts[0], "the smallest to the largest"
    assert grown[True] > 10 * grown[False], "the prompt's and the timestep's stay as they are"


def test_optional_inputs_are_measured_with_and_without() -> None:
    plan = Plan.from_json(json.loads((SHIPPED / "sd15.json").read_text(encoding="utf-8")))
    keys = {call.key for call in calls_at(plan, 512, 512, 2)}
    bare = plan.without(entry.name for entry in plan.inputs if entry.optional)
    assert {call.key for call in calls_at(bare, 512, 512, 2)} < keys


# What is kept.


def add_call(rows: int, width: int = 8) -> Call:
    spec = TensorSpec.of(torch.empty((rows, width), device="meta"))
    return Call("add", spec, (spec, spec), {})


CALLS = [add_call(rows) for rows in range(1, 41)]


class Clock:
    """What measuring takes for one: `asked` has the rows of each call that was timed.

    fails: after so many calls, with `error`.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.fails, self.error = 10**9, KeyboardInterrupt()

    def measure(
        self, calls: Any, compiler: Any, device: Any, prune: Any = None
    ) -> Iterator[tuple[Call, list[measuring.Measurement]]]:
        for call in calls:
            yield call, measuring._measure(call, GPU, CPU, self.timer, prune)

    def timer(self, run: Callable[[int], torch.Tensor]) -> Callable[[], float]:
        rows = run(0).shape[0]
        if rows not in self.asked:
            self.asked.append(rows)
        if len(self.asked) > self.fails:
            raise self.error
        return lambda: 0.5 + run(0).numel()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Two kernels for `add`, beside which there are none, and a clock that needs no GPU."""
    load_triton()  # not into this test's list
    monkeypatch.setattr(registry, "_KERNELS", [])

    def add(out: torch.Tensor, a: Any, b: Any, **_: Any) -> torch.Tensor:
        return torch.add(a, b, out=out)

    registry.kernel("add", name="library")(add)
    registry.kernel("add", name="tiled", configs=lambda call, hardware: [{"tile": 64}])(add)
    made = Clock()
    monkeypatch.setattr(tuning, "measure", made.measure)
    monkeypatch.setattr(profiles, "SHIPPED", Path("/nowhere"))
    monkeypatch.setattr(profiles, "_said", set())
    return made


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 1 << 20, "profile-test")


COMPILER: Any = None  # the clock asks for none


def to_file(path: Path, calls: list[Call] = CALLS, **options: Any) -> tuning.Tuned:
    store = ProfileFile(path, GPU, "tune", replace=options.get("fresh", False))
    return tune(calls, COMPILER, CPU, store, **options)


def test_the_engine_uses_what_was_tuned_from_then_on(clock: Clock, cache: DiskCache) -> None:
    done = tune(CALLS, COMPILER, CPU, OwnProfile(GPU, cache))
    assert (done.calls, done.known, done.measured, done.failed) == (40, 0, 40, 0)
    others = (("tiled", {"tile": 64}, 24.5),)
    assert Profile(GPU, cache).get(CALLS[2].key) == Entry("library", {}, 24.5, others)
    again = tune(CALLS, COMPILER, CPU, OwnProfile(GPU, cache))
    assert (again.known, again.measured, len(clock.asked)) == (40, 0, 40)


def test_a_file_is_a_profile_that_can_be_shipped(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_file(tmp_path / "gpu.json")
    text = (tmp_path / "gpu.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert list(data["entries"]) == sorted(data["entries"]) and len(data["entries"]) == 40
    assert sum('"kernel"' in line for line in text.splitlines()) == 40, "an entry a line"
    expected = profiles.identity(GPU) | {"memory_mib": 24 << 10, "driver": None, "command": "tune"}
    assert expected.items() <= data["meta"].items() and "date" in data["meta"]
    monkeypatch.setattr(profiles, "SHIPPED", tmp_path)
    others = (("tiled", {"tile": 64}, 8.5),)
    assert Profile(GPU, None).get(CALLS[0].key) == Entry("library", {}, 8.5, others)
    assert len(Profile(GPU, None)) == 40


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(1), SystemExit),
        (MemoryError(), None),
    ],
    ids=["Ctrl-C", "exit", "a candidate's own failure"],
)
def test_a_run_that_is_stopped_keeps_what_it_has_and_the_next_goes_on(
    error: Any, raised: Any, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    clock.fails, clock.error = 21, error
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        to_file(path)
    assert len(json.loads(path.read_text())["entries"]) == 21, "also those of an unfinished batch"
    assert os.listdir(tmp_path) == ["gpu.json"]
    clock.fails, clock.asked = 10**9, []
    done = to_file(path)
    assert (done.known, done.measured) == (21, 19)
    assert clock.asked == list(range(22, 41)), "nothing is measured twice"
    assert profile_file.read(path).entries.keys() == {call.key for call in CALLS}


def test_a_run_that_is_killed_loses_only_the_last_few(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if there were no chance to write at the end: what lies there at each moment."""
    path, seen = tmp_path / "gpu.json", []
    measure = clock.measure

    def watched(*arguments: Any) -> Iterator[Any]:
        for index, found in enumerate(measure(*arguments)):
            seen.append(index - len(json.loads(path.read_text())["entries"]) if index else 0)
            yield found

    monkeypatch.setattr(tuning, "measure", watched)
    monkeypatch.setattr(tuning, "AT_ONCE", 100)
    (path).write_text(profile_file.written(profile_file.Content(profiles.identity(GPU))))
    to_file(path)
    assert max(seen) < tuning.SAVED_EVERY and len(seen) == 40


def test_a_file_is_replaced_whole_or_not_at_all(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    to_file(path, CALLS[:3])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        SwitchyardError, match=r"gpu\.json cannot be written: No space left on device"
    ):
        to_file(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["gpu.json"]


def test_a_profile_that_cannot_be_kept_stops_the_run(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of measuring for nothing is worse than an error."""
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file", 1 << 20, "profile-test")
    with pytest.raises(CacheUnavailable):
        tune(CALLS, COMPILER, CPU, OwnProfile(GPU, cache))
    assert len(clock.asked) == tuning.SAVED_EVERY


def test_a_gpu_that_fails_is_one_line(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(calls: Any, *rest: Any) -> Iterator[Any]:
        yield from clock.measure(calls[:3], *rest)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(tuning, "measure", breaks)
    with pytest.raises(SwitchyardError, match="stopped: CUDA error: an illegal memory access was "):
        to_file(tmp_path / "gpu.json")
    assert len(json.loads((tmp_path / "gpu.json").read_text())["entries"]) == 3


def test_fresh_measures_again_and_loses_nothing_meanwhile(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    to_file(path)
    clock.asked, clock.fails = [], 5
    with pytest.raises(KeyboardInterrupt):
        to_file(path, fresh=True)
    assert clock.asked == [1, 2, 3, 4, 5, 6]
    assert len(json.loads(path.read_text())["entries"]) == 40


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "another GPU"}, "it was measured with gpu another GPU, here is sm_90"),
        ({"torch": "1.0"}, "it was measured with torch 1.0, here is"),
        ({"triton": None}, "it was measured with triton None, here is 3.6.0"),
    ],
    ids=str,
)
def test_a_file_of_another_machine_is_not_mixed_with_this_one(
    change: Any, complaint: str, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    tune(CALLS[:2], COMPILER, CPU, ProfileFile(path, replace(GPU, **change), "tune"))
    with pytest.raises(InvalidInput, match=complaint):
        to_file(path)
    to_file(path, CALLS[2:4], fresh=True)
    assert json.loads(path.read_text())["entries"].keys() == {c.key for c in CALLS[2:4]}


def test_a_file_that_is_no_profile_is_not_overwritten(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"version": 2,\n"mine": 1}')
    with pytest.raises(InvalidInput, match=r"line 2: a profile has no field 'mine'.*--fresh"):
        to_file(path)
    assert "mine" in path.read_text()


def test_where_nothing_is_left_to_time_the_call_fails_and_the_others_are_kept(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(next(iter(KNOWN)))
    monkeypatch.setattr(calibration, "in_full", lambda calls: calls[:3])
    monkeypatch.setattr(calibration, "worth_timing", lambda call, candidates: [])
    path = tmp_path / "gpu.json"
    done = to_file(path, CALLS[:5], calibration=calibration)
    assert (done.measured, done.failed, done.candidates) == (3, 2, 6)
    assert len(json.loads(path.read_text())["entries"]) == 3


def test_what_another_tool_added_to_a_file_stays(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    to_file(path, CALLS[:1])
    data = json.loads(path.read_text())
    data["fit"] = {"version": 1, "constants": {"x": {"launch": 2.5}}, "tiles": {}}
    data["entries"][CALLS[0].key]["others"] = [["tiled", {"tile": 64}, 9.0]]
    data["meta"]["note"] = "by hand"
    path.write_text(json.dumps(data))
    to_file(path, CALLS[:2])
    after = json.loads(path.read_text())
    assert after["fit"] == data["fit"] and after["meta"]["note"] == "by hand"
    assert after["entries"][CALLS[0].key] == data["entries"][CALLS[0].key]
    assert len(after["entries"]) == 2


def test_details_are_the_times_of_all_candidates(clock: Clock, tmp_path: Path) -> None:
    out, path = tmp_path / "gpu.json", tmp_path / "details.json"
    to_file(out, CALLS[:1])
    for calls in (CALLS[:2], CALLS[:3]):
        to_file(out, calls, details=Details(path, GPU, "tune"))
    found = json.loads(path.read_text())
    assert found["calls"].keys() == {call.key for call in CALLS[:3]}, "the first one was timed anew"
    assert found["calls"][CALLS[0].key] == [
        ["library", {}, 8.5, None],
        ["tiled", {"tile": 64}, 8.5, None],
    ]
    assert clock.asked == [1, 2, 3] and found["meta"]["gpu"] == GPU.name
    with pytest.raises(InvalidInput, match="gpu sm_90, here is other"):
        Details(path, replace(GPU, name="other"), "tune")
    path.write_text("[]")
    with pytest.raises(InvalidInput, match="it holds no candidates' times"):
        Details(path, GPU, "tune")
    assert Details(path, GPU, "tune", replace=True).known() == set()


def add_calls_of(kinds: int, sizes: int) -> list[Call]:
    """Calls that differ by their width, which makes another kind, and by their rows."""
    return [add_call(rows, 8 * (kind + 1)) for rows in range(1, sizes + 1) for kind in range(kinds)]


def test_of_each_kind_of_call_one_is_timed_in_full() -> None:
    calls = add_calls_of(kinds=3, sizes=5)
    full = Calibration(H200).in_full(calls)
    assert [call.out.shape for call in full] == [(3, 8), (3, 16), (3, 24)]
    known = {calls[0].key: [("library", {}, 1.0)]}
    assert [call.out.shape[1] for call in Calibration(H200, known).in_full(calls)] == [16, 24]
    assert Calibration(H200, known, keep=None).in_full(calls) == calls


def test_what_cannot_win_is_left_out_of_the_other_sizes(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []

    def prune(self: Any, call: Call, candidates: Any, keep: int) -> Any:
        return [pair for pair in candidates if pair[0].name == "tiled"]

    def measure(calls: Any, compiler: Any, device: Any, prune: Any) -> Iterator[Any]:
        for call, results in clock.measure(calls, compiler, device, prune):
            asked.append((call.out.shape[0], prune is not None))
            yield call, results

    monkeypatch.setattr(Model, "prune", prune)
    monkeypatch.setattr(tuning, "measure", measure)
    done = to_file(tmp_path / "gpu.json", CALLS[:3], calibration=Calibration(H200))
    assert asked == [(2, False), (1, True), (3, True)] and done.candidates == 4
    entries = json.loads((tmp_path / "gpu.json").read_text())["entries"]
    assert entries[CALLS[0].key] == {"kernel": "tiled", "config": {"tile": 64}, "us": 8.5}
    assert "others" in entries[CALLS[1].key]


@pytest.mark.parametrize("place", ["a file", "the user's profile"])
def test_the_constants_that_a_run_finds_are_those_that_engines_use(
    place: str, clock: Clock, cache: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.kernel("add", name="torch.silu")(lambda out, a, b: torch.add(a, b, out=out))
    store: tuning.Store = OwnProfile(GPU, cache)
    if place == "a file":
        store = ProfileFile(tmp_path / "gpu.json", GPU, "tune")
        monkeypatch.setattr(profiles, "SHIPPED", tmp_path)
    few = Calibration(H200)
    tune(CALLS[:5], COMPILER, CPU, store, calibration=few)
    assert Profile(GPU, cache).fit is None, "five calls say too little"
    known = {key: entry.times() for key, entry in store.known().items()}
    tune(add_calls_of(5, 12), COMPILER, CPU, store, calibration=Calibration(H200, known))
    found = Profile(GPU, cache).fit
    assert found is not None
    fitted = Fit.from_json(found)
    assert fitted.constants.keys() == {"torch.silu"}
    assert Selector(Compiler(GPU, CPU), CPU, Profile(GPU, cache), False)._model is not None


def test_on_recorded_times_half_the_candidates_are_timed_and_one_percent_is_lost() -> None:
    """Of an H100's products; nothing is known when the run begins."""
    from benchmarks.pruning import replayed
    from benchmarks.tuning_regret import chip_named, read

    meta, measured = read(ROOT / "benchmarks/results/h100/candidates.json")
    linears = {key: times for key, times in measured.items() if key.startswith("linear(")}
    found = {
        (row["operation"], row["calls"]): row["value"]
        for row in replayed(chip_named(meta["gpu"]), linears)
    }
    assert found["pruning_share", "pruned"] <= 0.5
    assert found["pruning_regret", "all"] <= 0.01
    assert found["pruning_worst", "all"] <= 0.35


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_what_pruning_costs_and_saves_by_the_evidence(gpu: str) -> None:
    """Of all calls; and eight minutes, estimated, for both families at all sizes from nothing."""
    rows = json.loads((ROOT / "benchmarks" / "results" / gpu / "pruning.json").read_text())["rows"]
    value = {(r["operation"], r.get("calls", "")): r["value"] for r in rows}
    assert value["pruning_share", "pruned"] <= 0.46 and value["pruning_regret", "all"] <= 0.01
    assert value["pruning_worst", "all"] <= 0.2
    took = {row["which"]: row for row in rows if row["operation"] == "tune_seconds"}
    assert took["pruned"]["value"] <= 480 and took["pruned"]["calls"] > 3000
    assert took["pruned"]["value"] < 0.75 * took["exhaustive"]["value"]


def test_what_says_nothing_of_later_is_not_kept(clock: Clock, tmp_path: Path) -> None:
    """Where Triton fails today it may work tomorrow."""

    def fails(out: torch.Tensor, *rest: Any) -> torch.Tensor:
        raise RuntimeError("no compiler was found")

    registry.kernel("add", name="ours", launches=lambda *arguments: [])(fails)
    done = to_file(tmp_path / "gpu.json", CALLS[:2])
    assert (done.measured, done.failed) == (0, 2) and not (tmp_path / "gpu.json").exists()


# The command.


@pytest.fixture
def here(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """As if there were a GPU, and few calls."""
    monkeypatch.setattr(command, "_gpu", lambda: (CPU, GPU))
    monkeypatch.setattr(command, "_calls", lambda families, sizes, batch: CALLS)
    return clock


def test_the_command_says_what_it_did(
    here: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, details = str(tmp_path / "gpu.json"), str(tmp_path / "details.json")
    arguments = ["tune", "--sizes", "512..768,64x128", "--out", out, "--details", details]
    assert main([*arguments, "--families", "sdxl, sd15", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("seconds") >= 0
    assert found == {
        "gpu": "sm_90",
        "families": ["sdxl", "sd15"],
        "sizes": ["512x512", "576x576", "512x768", "768x512", "704x704", "768x768", "64x128"],
        "batch": 2,
        **{"calls": 40, "known": 0, "measured": 40, "failed": 0, "candidates": 80},
        **{"out": out, "details": details},
    }
    meta = json.loads((tmp_path / "gpu.json").read_text())["meta"]
    wanted = "python -m accel tune --families sdxl,sd15 --sizes 512..768,64x128 --batch 2"
    assert meta["command"] == wanted
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("0 of 40 calls measured in 0 s, 40 were known: ") and out in said


def test_without_a_file_the_profile_is_the_users_own(
    here: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune"]) == 0
    assert "40 of 40 calls measured" in capsys.readouterr().out
    assert len(Profile(GPU, profile_cache())) == 40


def test_ctrl_c_says_where_things_are(
    here: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.fails = 3
    out = str(tmp_path / "gpu.json")
    assert main(["tune", "--out", out]) == 130
    said = capsys.readouterr().err
    assert f"what is measured is in {out}: the same command goes on from there\n" in said
    assert len(json.loads((tmp_path / "gpu.json").read_text())["entries"]) == 3


def test_the_calls_are_those_of_the_plans() -> None:
    calls = command._calls(["sd15-controlnet"], [(512, 512), (576, 576)], 2)
    assert len({call.key for call in calls}) == len(calls) > 100
    assert {call.op for call in calls} >= {"linear", "conv2d", "attention", "group_norm"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("accel: tune needs an NVIDIA GPU") and said.count("\n") == 1
    assert "cpu'" not in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--families sd99", "'sd99' is no family with a plan: use sd15, "),
        ("--families ,", "--families names none"),
        ("--out {}", "is a folder"),
        ("--out {}/no/gpu.json", "there is no such folder"),
        ("--out {}/a --details {}/a", "cannot both be"),
    ],
)
def test_bad_input_is_one_line_and_2(
    arguments: str,
    complaint: str,
    here: Clock,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tune", *arguments.replace("{}", str(tmp_path)).split(" ")]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1 and not here.asked


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--sizes 1024..512", "'1024..512' is no range of sizes"),
        ("--sizes 512..1001", "is no range of sizes"),
        ("--sizes 512", "'512' is no size"),
        ("--batch 0", "0 is no number of images"),
        ("--batch two", "invalid number value: 'two'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_2(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *arguments.split()])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and complaint in said and said.count("\n") == 1


def test_the_compiler_is_told_what_is_left(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """What a model leaves out is not compiled either."""
    asked: list[str] = []

    class Fake(Compiler):
        def compile(self, variants: Any) -> None:
            asked.extend(kernel.name for kernel, _, _ in variants)
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(KeyboardInterrupt):
        list(measuring.measure(CALLS[:1], Fake(GPU, CPU), CPU, lambda call, found: found[1:]))
    assert asked == ["tiled"]
