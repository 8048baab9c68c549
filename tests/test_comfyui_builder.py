"""Builds in the background: a real process, its progress, and every way it can end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support import family_config, tiny_config, two_levels

from accel.cache import DiskCache
from accel.compiler import open_cache
from accel.hosts.comfyui import builder as module
from accel.hosts.comfyui.build_process import comfyui_arguments
from accel.hosts.comfyui.builder import Builder, BuildRefused, title_of
from accel.hosts.comfyui.journal import BEGIN_EVENT, STATUS_EVENT, Journal
from accel.models import FAMILIES, UNetConfig, parameters
from accel.plan.schema import Plan
from accel.structure import Structure, structure_of

ROOT = Path(__file__).parents[1]


class Network:
    """Stands for a live module: only its class is looked at."""


Diffusers = type("UNet2DConditionModel", (), {"__module__": "diffusers.models.unet"})


def tiny_structure(family: str = "sd15", **changes: Any) -> Structure:
    """The structure of a network of no published family."""
    config = dataclasses.replace(tiny_config(family), **changes)
    shapes = {name: p.shape for name, p in parameters(config).items()}
    structure = dataclasses.replace(structure_of(shapes), config=config)
    key = module_key(config)
    return dataclasses.replace(structure, graph_key=key)


def module_key(config: UNetConfig) -> str:
    from accel.structure import _structure_of_config

    return str(_structure_of_config(config).graph_key)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return open_cache(tmp_path / "cache", 1 << 30)


@pytest.fixture
def heard() -> list[dict[str, Any]]:
    return []


Make = Callable[..., Builder]


@pytest.fixture
def make(cache: DiskCache, heard: list[dict[str, Any]]) -> Iterator[Make]:
    """Makes builders whose process runs the given Python text, with `say(**answer)` in reach."""
    made = []

    def build(text: str | None = None) -> Builder:
        command = None
        if text is not None:
            start = (
                "import json, os, sys, time\n"
                "def say(**answer): print(json.dumps(answer), flush=True)\n"
                "request = json.loads(sys.stdin.readline())\n"
            )
            command = [sys.executable, "-c", start + textwrap.dedent(text)]
        made.append(Builder(cache, heard.append, host_root="/nowhere", command=command))
        return made[-1]

    yield build
    for builder in made:
        builder.close()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def state(builder: Builder, structure: Structure) -> str:
    return str(builder.status(str(structure.graph_key))["state"])


def children() -> list[psutil.Process]:
    """The processes of builds; other tests of a run may have left children of other kinds."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            command = " ".join(child.cmdline())
            if "build_process" in command or "def say(" in command:
                found.append(child)
    return found


FOREVER = "say(progress=0.5, text='tracing')\nsys.stdin.read()"
DEAF = "say(progress=0.5, text='tracing')\ntime.sleep(60)"


# A real build.


def test_an_unknown_structure_is_built_by_another_process_and_cached(
    make: Make, cache: DiskCache, heard: list[dict[str, Any]]
) -> None:
    builder, structure = make(), tiny_structure(**vars(two_levels()))
    key = str(structure.graph_key)
    assert state(builder, structure) == "unknown"
    assert builder.find(structure) is None
    assert builder.request(structure, Diffusers()) is None
    assert state(builder, structure) == "building"
    plan = builder.request(structure, Diffusers(), wait=True)
    assert isinstance(plan, Plan)
    assert plan.structure["graph_key"] == key
    assert builder.status(key) == {
        "state": "ready",
        "fraction": 1.0,
        "text": "ready",
        "error": None,
    }
    steps = [data["fraction"] for data in heard]
    assert steps == sorted(steps) and len(set(steps)) > 2
    stored = cache.get(key, "plan")
    assert stored is not None and Plan.from_json(stored) == plan
    assert heard[0]["state"] == "building" and heard[-1]["state"] == "ready"
    assert heard[-1]["id"] == key
    assert any("tracing" in data["text"] for data in heard)
    assert not children()
    # Another process finds it at once; nothing is started.
    other = make("raise SystemExit('not to be run')")
    assert other.request(structure, Diffusers()) == plan
    assert not other.builds()


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_comfyuis_arguments_say_what_the_published_families_are(family: str) -> None:
    config = family_config(family)
    arguments = comfyui_arguments(config)
    heads = arguments.get("num_heads")
    for level, channels in enumerate(config.block_out_channels):
        if config.has_attention(level):
            assert config.heads is not None
            assert config.heads[level] == heads or (
                channels // arguments["num_head_channels"] == config.heads[level]
            )
    assert ("hint_channels" in arguments) == (config.kind == "controlnet")
    if config.kind == "unet":
        flat = [depth for level in config.up_depths for depth in level]
        assert arguments["transformer_depth_output"][::-1] == flat


def test_a_level_may_be_narrower_than_the_first() -> None:
    config = dataclasses.replace(family_config("sd15"), block_out_channels=(96, 96, 192, 48))
    arguments = comfyui_arguments(config)
    first, multiples = arguments["model_channels"], arguments["channel_mult"]
    for channels, multiple in zip(config.block_out_channels, multiples, strict=True):
        assert multiple * first == first * multiple == channels
    assert multiples[:3] == [1, 1, 2]


def test_a_published_structure_comes_at_once(make: Make) -> None:
    builder = make("raise SystemExit('not to be run')")
    config = family_config("sd15")
    structure = structure_of({name: p.shape for name, p in parameters(config).items()})
    assert state(builder, structure) == "ready"
    plan = builder.request(structure, Network())
    assert plan is not None
    assert builder.request(structure, Network()) is plan
    assert not builder.builds()


def test_every_shipped_plan_is_known_by_its_key() -> None:
    shipped = {path.stem for path in module.SHIPPED.glob("*.json")}
    assert {family.name for family in module.shipped_families().values()} == shipped


def test_the_plan_arrives_even_where_nothing_can_be_stored(tmp_path: Path, tiny_plan: Plan) -> None:
    answer = tmp_path / "answer"
    answer.write_text(json.dumps({"plan": tiny_plan.to_json(), "source": "built"}))
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    command = [sys.executable, "-c", f"print(open({str(answer)!r}).read())"]
    builder = Builder(open_cache(blocked, 1 << 30), lambda data: None, "/nowhere", command)
    structure = tiny_structure()
    assert builder.request(structure, Network(), wait=True) == tiny_plan
    assert builder.request(structure, Network()) == tiny_plan
    assert state(builder, structure) == "ready"


# What the nodes say.


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Node, state and text of every line."""
    journal = Journal(tmp_path / "journal.json")
    monkeypatch.setattr(module, "journal", lambda: journal)
    monkeypatch.setattr(module, "EVENT_SECONDS", 0.0)
    found: list[tuple[str, str, str]] = []

    def listen(event: str, data: dict[str, Any]) -> None:
        if event == STATUS_EVENT:
            found.append((data["node_id"], data["state"], data["text"]))

    journal.subscribe(listen)
    return found


BY_AND_BY = """
    for percent in 10, 41:
        say(progress=percent / 100, text="tracing")
        while not os.path.exists(request["cache_dir"] + f"/after-{percent}"):
            time.sleep(0.02)
"""


def test_the_lines_of_the_nodes_follow_the_build_to_its_end(
    make: Make, cache: DiskCache, lines: list[tuple[str, str, str]], tiny_plan: Plan
) -> None:
    cache.root.mkdir()
    answer = cache.root / "answer"
    answer.write_text(json.dumps({"plan": tiny_plan.to_json(), "source": "built"}))
    builder = make(BY_AND_BY + f"    print(open({str(answer)!r}).read())")
    structure = tiny_structure()
    for node in ("5", "6", "7", None):
        assert builder.request(structure, Network(), node_id=node) is None
    waiting = threading.Thread(
        target=lambda: builder.request(structure, Network(), wait=True, node_id="8")
    )
    waiting.start()
    until(lambda: ("5", "build", "building 10 % · host's path meanwhile") in lines)
    until(lambda: ("8", "build", "building 10 %") in lines)
    # What a node says of another run, or of none, stays.
    builder.note(BEGIN_EVENT, {"id": 1, "model": "other", "node_id": "6"})
    builder.note(STATUS_EVENT, {"node_id": "7", "state": "off", "text": "not accelerated"})
    lines.clear()
    (cache.root / "after-10").touch()
    until(lambda: len(lines) == 2)
    (cache.root / "after-41").touch()
    waiting.join()
    until(lambda: len(lines) == 4)
    assert sorted(lines) == [
        ("5", "build", "building 41 % · host's path meanwhile"),
        ("5", "engine", "engine ready: used from the next run"),
        ("8", "build", "building 41 %"),
        ("8", "engine", "engine ready"),
    ]
    builder.show(str(structure.graph_key), "5")
    assert lines.pop() == ("5", "engine", "engine ready: used from the next run")
    assert builder.request(structure, Network(), node_id="5") == tiny_plan
    builder.show(str(structure.graph_key), "5")
    assert len(lines) == 4


def test_a_line_says_how_the_build_failed(make: Make, lines: list[tuple[str, str, str]]) -> None:
    builder, structure = make("say(error='no', kind='failed')"), tiny_structure()
    assert builder.request(structure, Network(), wait=True, node_id="5") is None
    assert lines[-1] == ("5", "host", "host's path: its engine could not be built: no")


# Endings.


def test_a_build_that_fails_is_remembered_on_disk_and_not_begun_again(
    make: Make, cache: DiskCache, heard: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = """
        open(request["cache_dir"] + "/begun", "a").write(".")
        say(error="the network works only where height is 64", kind="unsupported")
    """
    cache.root.mkdir()
    builder, structure = make(text), tiny_structure()
    key = str(structure.graph_key)
    assert builder.request(structure, Network(), wait=True) is None
    status = builder.status(key)
    assert (status["state"], status["error"]) == (
        "failed",
        "the network works only where height is 64",
    )
    assert builder.request(structure, Network(), wait=True) is None
    later = make(text)
    assert later.status(key)["error"] == status["error"]
    assert [data["id"] for data in later.builds()] == [key]
    assert later.request(structure, Network(), wait=True) is None
    assert later.status(key)["state"] == "failed"
    assert (cache.root / "begun").read_text() == "."
    assert heard[-1]["state"] == "failed" and heard[-1]["error"] == status["error"]

    later.retry(key)
    until(lambda: later.status(key)["state"] == "failed")
    assert (cache.root / "begun").read_text() == ".."


def test_a_failure_counts_for_the_same_versions_only(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "say(error='no', kind='failed')"
    builder, structure = make(text), tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    later = make("say(error='still not', kind='failed')")
    monkeypatch.setattr(module, "versions", lambda: {"pack": "99"})
    assert state(later, structure) == "unknown"
    assert later.builds() == []
    assert later.request(structure, Network(), wait=True) is None
    assert later.status(str(structure.graph_key))["error"] == "still not"


def test_a_failure_known_from_disk_alone_can_be_retried(make: Make) -> None:
    builder, structure = make("say(error='no', kind='failed')"), tiny_structure()
    builder.request(structure, Network(), wait=True)
    later = make(FOREVER)
    later.retry(str(structure.graph_key))
    assert state(later, structure) == "unknown"
    later.request(structure, Network())
    assert state(later, structure) == "building"


def test_a_killed_process_fails_with_the_signal_and_for_this_process_only(
    make: Make, heard: list[dict[str, Any]]
) -> None:
    builder, structure = make(FOREVER), tiny_structure()
    builder.request(structure, Network())
    until(lambda: builder.status(str(structure.graph_key))["fraction"] == 0.5)
    (child,) = children()
    child.kill()
    assert builder.request(structure, Network(), wait=True) is None
    status = builder.status(str(structure.graph_key))
    assert status["state"] == "failed"
    assert "killed by SIGKILL" in status["error"] and "memory" in status["error"]
    assert builder.request(structure, Network()) is None  # not begun again at every run
    assert not children()
    assert state(make(), structure) == "unknown"


def test_a_process_that_ends_without_an_answer_says_its_last_words(make: Make) -> None:
    builder, structure = make("sys.exit('no such module')"), tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    error = builder.status(str(structure.graph_key))["error"]
    assert error == "the build's process ended with status 1: no such module"


@pytest.mark.parametrize("answer", ["print('chatter')", "print('[1]')", "print('\\xff{')"])
def test_lines_that_are_no_answers_say_nothing(make: Make, answer: str) -> None:
    builder, structure = make(f"{answer}\nsay(error='no', kind='failed')"), tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    assert builder.status(str(structure.graph_key))["error"] == "no"


def test_a_plan_that_is_none_is_a_failure(make: Make) -> None:
    builder, structure = make("say(plan={'version': -1}, source='built')"), tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    assert state(builder, structure) == "failed"


def test_a_command_that_cannot_be_started_is_a_failure(cache: DiskCache) -> None:
    builder = Builder(cache, lambda data: None, "/nowhere", ["/no/such/python"])
    structure = tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    assert "/no/such/python" in builder.status(str(structure.graph_key))["error"]


def test_without_a_host_the_failure_says_so(cache: DiskCache) -> None:
    builder, structure = Builder(cache, lambda data: None), tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    error = builder.status(str(structure.graph_key))["error"]
    assert error == "ComfyUI's own modules were not found in this process"


def test_a_process_that_falls_silent_is_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.5)
    builder, structure = make("time.sleep(60)"), tiny_structure()
    assert builder.request(structure, Network(), wait=True) is None
    assert "said nothing" in builder.status(str(structure.graph_key))["error"]
    assert not children()


def test_a_process_deaf_to_its_input_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KILL_SECONDS", 0.3)
    builder, structure = make(DEAF), tiny_structure()
    builder.request(structure, Network())
    until(children)
    builder.cancel(str(structure.graph_key))
    until(lambda: not children())
    assert state(builder, structure) == "cancelled"


def test_a_cancelled_build_ends_at_once_and_waits_for_retry(
    make: Make, heard: list[dict[str, Any]]
) -> None:
    builder, structure = make(FOREVER), tiny_structure()
    key = str(structure.graph_key)
    builder.request(structure, Network())
    waiter = threading.Thread(target=lambda: builder.request(structure, Network(), wait=True))
    waiter.start()
    until(lambda: builder.status(key)["fraction"] == 0.5)
    builder.cancel(key)
    waiter.join(10)
    assert not waiter.is_alive()
    assert builder.status(key)["state"] == "cancelled"
    assert heard[-1]["state"] == "cancelled"
    assert builder.request(structure, Network()) is None
    assert not children()
    builder.retry(key)
    until(lambda: builder.status(key)["fraction"] == 0.5)
    assert len(children()) == 1


def test_what_cannot_be_cancelled_or_retried_is_refused(make: Make) -> None:
    builder, structure = make(FOREVER), tiny_structure()
    key = str(structure.graph_key)
    for action in (builder.cancel, builder.retry):
        with pytest.raises(BuildRefused):
            action(key)
    builder.request(structure, Network())
    with pytest.raises(BuildRefused):
        builder.retry(key)
    builder.cancel(key)
    with pytest.raises(BuildRefused):
        builder.cancel(key)


def test_requests_at_once_share_one_build(make: Make, cache: DiskCache) -> None:
    cache.root.mkdir()
    text = """
        open(request["cache_dir"] + "/begun", "a").write(".")
        time.sleep(0.3)
        say(error="no", kind="failed")
    """
    builder, structure = make(text), tiny_structure()
    threads = [
        threading.Thread(target=lambda: builder.request(structure, Network(), wait=True))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (cache.root / "begun").read_text() == "."
    assert len(builder.builds()) == 1


def test_builds_run_one_at_a_time_and_a_waiting_one_can_be_cancelled(make: Make) -> None:
    builder = make(FOREVER)
    first, second = tiny_structure(), tiny_structure(in_channels=9)
    builder.request(first, Network())
    until(lambda: builder.status(str(first.graph_key))["fraction"] == 0.5)
    builder.request(second, Network())
    time.sleep(0.5)
    assert len(children()) == 1
    assert builder.status(str(second.graph_key))["text"] == "waiting for another build"
    assert [data["id"] for data in builder.builds()] == [second.graph_key, first.graph_key]
    builder.cancel(str(second.graph_key))
    assert state(builder, second) == "cancelled"
    assert state(builder, first) == "building"


def test_the_users_interrupt_ends_the_wait_and_not_the_build(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    host = SimpleNamespace(throw_exception_if_processing_interrupted=interrupt)
    monkeypatch.setitem(sys.modules, "comfy.model_management", host)  # type: ignore[arg-type]
    builder, structure = make(FOREVER), tiny_structure()
    with pytest.raises(Interrupted):
        builder.request(structure, Network(), wait=True)
    assert state(builder, structure) == "building"


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    """Even where a fork keeps the other end of its input open."""
    script = tmp_path / "host.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            import time, psutil
            from pathlib import Path
            from test_comfyui_builder import tiny_structure, Diffusers
            from accel.compiler import open_cache
            from accel.hosts.comfyui.builder import Builder
            builder = Builder(open_cache(Path({str(tmp_path)!r}), 1 << 30), lambda data: None)
            builder.request(tiny_structure(), Diffusers())
            while not psutil.Process().children():
                time.sleep(0.01)
            print(psutil.Process().children()[0].pid, flush=True)
            time.sleep(60)
            """
        )
    )
    host = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    child = psutil.Process(int(host.stdout.readline()))
    until(lambda: child.nice() > 0)  # it runs our code, at low priority
    host.kill()
    host.wait()
    child.wait(20)
    host.stdout.close()


def test_closing_ends_every_build(make: Make) -> None:
    builder = make(FOREVER)
    for channels in (4, 9):
        builder.request(tiny_structure(in_channels=channels), Network())
    until(children)
    builder.close()
    assert not children()
    assert {data["state"] for data in builder.builds()} == {"cancelled"}


def test_a_deleted_plan_is_built_again(make: Make, cache: DiskCache, tiny_plan: Plan) -> None:
    key = str(tiny_plan.structure["graph_key"])
    cache.put(key, "plan", tiny_plan.to_json())
    builder, structure = make(FOREVER), tiny_structure()
    assert structure.graph_key == key
    assert builder.request(structure, Network()) == tiny_plan
    cache.remove(key)
    assert builder.request(structure, Network()) == tiny_plan  # from memory
    builder.forget(key)
    assert builder.request(structure, Network()) is None
    assert state(builder, structure) == "building"


def test_a_cached_plan_of_another_form_is_built_again(make: Make, cache: DiskCache) -> None:
    builder, structure = make(FOREVER), tiny_structure()
    cache.put(str(structure.graph_key), "plan", {"version": -1})
    assert builder.request(structure, Network()) is None
    assert state(builder, structure) == "building"


def test_a_structure_without_an_architecture_has_no_plan(make: Make) -> None:
    with pytest.raises(ValueError, match="known architecture"):
        make().request(structure_of({"a.weight": (2, 2)}), Network())


def test_structures_have_names_for_people() -> None:
    config = family_config("sdxl")
    shapes = {name: p.shape for name, p in parameters(config).items()}
    assert title_of(structure_of(shapes)) == next(f.title for f in FAMILIES if f.name == "sdxl")
    structure = tiny_structure()
    assert title_of(structure) == f"UNet of no published family ({structure.shape_key[:6]})"


def test_the_process_says_why_in_one_line() -> None:
    """Asked for a structure that is not the host's own network of this architecture."""
    config = tiny_config()
    request = {
        "config": config.to_json(),
        "graph_key": "0" * 32,
        "host_root": None,
        "cache_dir": "/nowhere",
        "cache_bytes": 1,
        "path": sys.path,
    }
    with subprocess.Popen(
        module.process_command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answers = [json.loads(line) for line in process.stdout]
        assert process.wait(20) == 1
    assert answers == [
        {"progress": 0.0, "text": "starting"},
        {
            "error": "the host's own network of this architecture is another one",
            "kind": "unsupported",
        },
    ]


def test_the_log_names_a_failure_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    builder, structure = make("say(error='no', kind='failed')"), tiny_structure()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            builder.request(structure, Network(), wait=True)
    assert [record.message for record in caplog.records] == [
        f"{title_of(structure)} could not be built: no"
    ]
