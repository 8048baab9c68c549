"""The ComfyUI host's journal: status lines, baselines, totals that several processes share."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from accel.hosts.comfyui import journal as module
from accel.hosts.comfyui.journal import Journal, Run, status_line

KEY = "0123456789abcdef0123456789abcdef"
SIZE = {"width": 512, "height": 512, "batch": 2}
GPU = "Test GPU"


def finished(journal: Journal, path: str = "engine", ms: float | None = 20.0, **given: Any) -> Run:
    """A run of four calls."""
    run = journal.begin("a.safetensors", graph_key=KEY, gpu=GPU, **given)
    for _ in range(4):
        run.call(path, SIZE, ms)
    journal.finish(run)
    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "journal.json"


def test_there_is_no_speedup_without_a_measured_baseline(path: Path) -> None:
    run = finished(Journal(path), ms=42.0)
    assert (run.speedup, run.saved_seconds) == (None, None)
    assert status_line(run) == "engine · 42 ms/step"


def test_a_run_that_ended_early_has_calls_and_no_time_of_one(path: Path) -> None:
    """Most of its seconds may have gone into weights and kernels."""
    journal = Journal(path)
    journal.note_baseline(KEY, SIZE, GPU, 62.0)
    run = journal.begin("a.safetensors", graph_key=KEY, gpu=GPU)
    run.call("engine", SIZE)
    journal.finish(run, "interrupted")
    assert (run.mode, run.steps) == ("engine", 1)
    assert (run.ms("engine"), run.speedup, run.saved_seconds) == (None, None, None)
    assert status_line(run) == "engine"


def test_a_baseline_of_the_same_structure_size_and_gpu_gives_a_speedup(path: Path) -> None:
    journal = Journal(path)
    journal.note_baseline(KEY, SIZE, GPU, 62.0)
    run = finished(journal, loras=2)
    assert run.speedup == pytest.approx(3.1)
    assert run.saved_seconds == pytest.approx(4 * 0.042)
    assert status_line(run) == "engine · 3.1x · 2 LoRAs"
    assert journal.totals == {
        "saved_seconds": pytest.approx(0.168),
        "runs": 1,
        "engine_calls": 4,
    }


@pytest.mark.parametrize(
    ("key", "size", "gpu"),
    [
        ("f" * 32, SIZE, GPU),
        (KEY, {**SIZE, "width": 576}, GPU),
        (KEY, {**SIZE, "batch": 1}, GPU),
        (KEY, {**SIZE, "controlnets": 1}, GPU),
        (KEY, SIZE, "Another GPU"),
    ],
)
def test_a_baseline_of_anything_else_gives_none(
    path: Path, key: str, size: dict[str, int], gpu: str
) -> None:
    journal = Journal(path)
    journal.note_baseline(key, size, gpu, 62.0)
    assert finished(journal).speedup is None


def test_only_the_sizes_with_a_baseline_count(path: Path) -> None:
    journal = Journal(path)
    journal.note_baseline(KEY, SIZE, GPU, 40.0)
    run = journal.begin("a", graph_key=KEY, gpu=GPU)
    for ms in (20.0, 20.0, 500.0):  # the last one captured a graph
        run.call("engine", SIZE, ms)
    run.call("engine", {**SIZE, "width": 1024}, 90.0)
    journal.finish(run)
    assert run.speedup == pytest.approx(2.0)
    assert run.saved_seconds == pytest.approx(0.060)
    assert run.dims == [SIZE, {**SIZE, "width": 1024}]


def test_the_shortest_of_the_last_baselines_is_used(path: Path) -> None:
    journal = Journal(path)
    for ms in (10.0, *(60.0, 50.0, 70.0, 55.0, 80.0)):
        journal.note_baseline(KEY, SIZE, GPU, ms)
    assert journal.baseline(KEY, SIZE, GPU) == 50.0
    assert journal.baseline(KEY, {**SIZE, "controlnets": 0}, GPU) == 50.0


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_cannot_be_is_refused(path: Path, ms: float) -> None:
    with pytest.raises(ValueError, match="no time of a call"):
        Journal(path).note_baseline(KEY, SIZE, GPU, ms)


def test_an_unhindered_run_on_the_hosts_path_becomes_a_baseline(path: Path) -> None:
    journal = Journal(path)
    run = finished(journal, "host", 62.0, mode="building")
    assert run.mode == "building"
    assert journal.baseline(KEY, SIZE, GPU) == 62.0


@pytest.mark.parametrize("why", ["patched", "interrupted", "short"])
def test_other_runs_on_the_hosts_path_do_not(path: Path, why: str) -> None:
    journal = Journal(path)
    run = journal.begin(
        "a", graph_key=KEY, gpu=GPU, mode="host" if why == "patched" else "building"
    )
    for _ in range(2 if why == "short" else 4):
        run.call("host", SIZE, 62.0)
    journal.finish(run, "interrupted" if why == "interrupted" else None)
    assert journal.baseline(KEY, SIZE, GPU) is None


def test_unmeasured_calls_share_the_time_of_a_uniform_run(path: Path) -> None:
    journal = Journal(path)
    run = journal.begin("a")
    for _ in range(4):
        run.call("engine", SIZE)
    run.seconds = 0.2
    assert run.ms("engine") is None  # not known before the end
    journal.finish(run)
    assert run.ms("engine") == pytest.approx(50.0)
    assert run.to_json()["engine_ms"] == pytest.approx(50.0)

    odd = journal.begin("a")
    odd.call("engine", SIZE, float("nan"))
    assert (odd.steps, odd.ms("engine")) == (1, None)

    mixed = journal.begin("a")
    mixed.call("engine", SIZE)
    mixed.call("host", SIZE)
    journal.finish(mixed)
    assert mixed.mode == "mixed"
    assert (mixed.ms("engine"), mixed.ms("host")) == (None, None)


def test_the_run_is_timed_by_a_clock_that_does_not_jump(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    run = journal.begin("a")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    journal.finish(run)
    assert 0 < run.seconds < 10


def test_a_run_finished_twice_counts_once(path: Path) -> None:
    journal = Journal(path)
    run = finished(journal)
    journal.finish(run, "again")
    assert journal.totals["runs"] == 1
    assert run.error is None
    assert len(journal.runs) == 1


def test_the_mode_is_what_really_happened(path: Path) -> None:
    journal = Journal(path)
    assert finished(journal, "host", mode="engine").mode == "host"
    assert finished(journal, "engine", mode="host").mode == "engine"


def test_a_call_on_no_known_path_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="'gpu'"):
        Journal(path).begin("a").call("gpu", SIZE)


@pytest.mark.parametrize(
    ("fields", "fraction", "line"),
    [
        ({"mode": "building"}, 0.414, "building 41 % · host's path meanwhile"),
        ({"mode": "building"}, 3.0, "building 100 % · host's path meanwhile"),
        ({"mode": "building"}, None, "building · host's path meanwhile"),
        ({"mode": "host"}, None, "host's path"),
        (
            {"mode": "host", "reasons": [{"text": "FreeU changes the up blocks", "node": "FreeU"}]},
            None,
            "host's path: FreeU changes the up blocks (FreeU)",
        ),
        (
            {
                "mode": "mixed",
                "engine_calls": 18,
                "steps": 20,
                "reasons": [{"text": "a", "node": None}, {"text": "b", "node": "N"}],
            },
            None,
            "engine for 18 of 20 calls · host's path: a; b (N)",
        ),
        (
            {"mode": "engine", "speedup": 2.04, "loras": 1, "controlnets": 2},
            None,
            "engine · 2.0x · 1 LoRA · 2 ControlNets",
        ),
        ({"mode": "engine"}, None, "engine"),
        ({"mode": "engine", "finished": True}, None, "the network was not called"),
        (
            {"mode": "engine", "speedup": 2.04, "compiling": True},
            None,
            "engine · 2.0x · compiling faster kernels",
        ),
    ],
)
def test_status_lines(fields: dict[str, Any], fraction: float | None, line: str) -> None:
    assert status_line(Run(1, 0.0, "a", **fields), fraction) == line


def test_fast_steps_keep_a_digit(path: Path) -> None:
    assert status_line(finished(Journal(path), ms=4.25)) == "engine · 4.2 ms/step"


def test_a_reason_is_kept_once(path: Path) -> None:
    run = Journal(path).begin("a", reasons=[("FreeU", "n"), ("FreeU", "n"), ("FreeU", None)])
    assert run.reasons == [{"text": "FreeU", "node": "n"}, {"text": "FreeU", "node": None}]


def test_listeners_hear_of_runs_and_nodes(path: Path) -> None:
    journal, heard = Journal(path), []
    stop = journal.subscribe(lambda event, data: heard.append((event, data)))
    run = finished(journal, node_id="7")
    names = [event for event, _ in heard]
    assert names == ["switchyard.begin", "switchyard.run", "switchyard.status"]
    assert heard[0][1] == {"id": run.id, "model": "a.safetensors", "node_id": "7"}
    assert heard[1][1] == run.to_json()
    assert json.loads(json.dumps(heard[1][1], allow_nan=False)) == heard[1][1]
    assert heard[2][1] == {"node_id": "7", "state": "engine", "text": "engine · 20 ms/step"}

    heard.clear()
    journal.begin("a", mode="building", node_id="12:5", fraction=0.5)
    assert heard[1:] == [
        (
            "switchyard.status",
            {
                "node_id": "12:5",
                "state": "build",
                "text": "building 50 % · host's path meanwhile",
            },
        )
    ]
    heard.clear()
    stop()
    stop()
    finished(journal, node_id="7")
    assert heard == []


def test_a_listener_that_fails_stops_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, heard = Journal(path), []

    def fail(event: str, data: dict[str, Any]) -> None:
        raise RuntimeError("no browser")

    journal.subscribe(fail)
    journal.subscribe(lambda event, data: heard.append(event))
    finished(journal)
    assert heard == ["switchyard.begin", "switchyard.run"]
    assert "no browser" in caplog.text


def test_totals_and_baselines_outlive_the_process(path: Path) -> None:
    journal = Journal(path)
    journal.note_baseline(KEY, SIZE, GPU, 40.0)
    finished(journal)
    later = Journal(path)
    assert (
        later.totals
        == journal.totals
        == {
            "saved_seconds": pytest.approx(0.08),
            "runs": 1,
            "engine_calls": 4,
        }
    )
    assert later.baseline(KEY, SIZE, GPU) == 40.0
    assert not later.runs
    assert sorted(entry.name for entry in path.parent.iterdir()) in (
        ["journal.json"],
        ["journal.json", "journal.json.lock"],
    )


def test_old_runs_and_baselines_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BASELINES", 3)
    journal = Journal(path)
    for width in range(8, 8 * 6, 8):
        journal.note_baseline(KEY, {**SIZE, "width": width}, GPU, 1.0)
    known = [journal.baseline(KEY, {**SIZE, "width": w}, GPU) for w in range(8, 8 * 6, 8)]
    assert known == [None, None, 1.0, 1.0, 1.0]
    for _ in range(module.KEPT_RUNS + 3):
        journal.runs.append(Run(0, 0.0, "a"))
    assert len(journal.runs) == module.KEPT_RUNS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b"null",
        b'{"version": "1", "totals": {}, "baselines": {}}',
        b'{"version": 1, "totals": [], "baselines": {}}',
        b'{"version": 1, "totals": {}, "baselines": []}',
        b'{"version": 1, "totals": {"runs": 5}',
        b"[" * 100_000,
        b'{"version": 1, "totals": {"runs": 1' + b"0" * 400 + b'}, "baselines": {}}',
    ],
)
def test_a_damaged_file_is_said_once_and_replaced(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    journal = Journal(path)
    assert journal.totals["runs"] == 0
    finished(journal)
    finished(journal)
    assert [record.message for record in caplog.records] == [
        f"{path} is damaged: totals and baselines start anew"
    ]
    assert Journal(path).totals["runs"] == 2


def test_values_that_make_no_sense_are_left_out(path: Path) -> None:
    path.parent.mkdir()
    good = module._key(KEY, "512x512x2", GPU)
    totals = '{"saved_seconds": -2.5, "runs": NaN, "engine_calls": true}'
    baselines = json.dumps({good: [40.0, -1, "x", None, 0, True], "other": 7})
    path.write_text(f'{{"version": 1, "totals": {totals}, "baselines": {baselines}}}')
    journal = Journal(path)
    assert journal.totals == {"saved_seconds": -2.5, "runs": 0, "engine_calls": 0}
    assert journal.baseline(KEY, SIZE, GPU) == 40.0


def test_a_file_of_a_newer_version_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    content = '{"version": 99, "sums": {"runs": 7}}'
    path.write_text(content)
    journal = Journal(path)
    finished(journal)
    journal.note_baseline(KEY, SIZE, GPU, 40.0)
    assert path.read_text() == content
    assert journal.totals["runs"] == 1  # still counted for the panel
    assert journal.baseline(KEY, SIZE, GPU) == 40.0
    assert len(caplog.records) == 1
    assert "newer version" in caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    journal = Journal(blocked / "journal.json")
    journal.note_baseline(KEY, SIZE, GPU, 40.0)
    finished(journal)
    finished(journal)
    assert journal.totals["runs"] == 2
    assert journal.runs[-1].speedup == pytest.approx(2.0)
    messages = {record.message for record in caplog.records}
    assert len(messages) == len(caplog.records)  # each said once
    assert any("cannot be written" in message for message in messages)

    blocked.unlink()  # and what could not be kept is kept once it can be
    finished(journal)
    assert Journal(blocked / "journal.json").totals["runs"] == 3


def test_a_write_that_fails_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    finished(journal)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        finished(journal)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*tmp"))
    finished(journal)
    assert Journal(path).totals["runs"] == 3


def test_threads_lose_no_run(path: Path) -> None:
    journal = Journal(path)
    threads = [
        threading.Thread(target=lambda: [finished(journal) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.totals["runs"] == 40
    assert Journal(path).totals["runs"] == 40
    assert len({run.id for run in journal.runs}) == 40


def _run_ten(path: Path) -> None:
    journal = Journal(path)
    for _ in range(10):
        finished(journal)


def test_processes_add_to_one_file(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run_ten, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert Journal(path).totals["runs"] == 20


def test_the_processs_journal_is_one_and_lies_in_the_cache_folder(cache_folder: Path) -> None:
    module.journal.cache_clear()
    try:
        assert module.journal() is module.journal()
        assert module.journal().path == cache_folder / "journal.json"
    finally:
        module.journal.cache_clear()
