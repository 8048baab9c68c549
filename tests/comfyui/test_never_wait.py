"""No image waits for an engine that is not there yet, and the panel's routes say how far it is."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from accel.compiler import open_cache
from accel.hosts.comfyui import run
from accel.hosts.comfyui.builder import Builder
from accel.hosts.comfyui.catalog import Prefetcher, Reader
from accel.hosts.comfyui.journal import STATUS_EVENT, journal
from accel.hosts.comfyui.patcher import accelerate
from accel.hosts.comfyui.run import Options

from .host import conditioning, relative_error, sample
from .server import Installation, Server, ServerError
from .workflows import Graph, Workflow

KIND = "tiny-sd15"
CLOSE = 1e-3


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[Server]:
    """A server with a cache of its own. Each test brings a kind that it has no engine for."""
    installation = Installation(Path(os.environ["COMFYUI_ROOT"]).expanduser(), Path(sys.executable))
    folder = tmp_path_factory.mktemp("fresh")
    with Server(installation, folder, models=models_folder) as running:
        yield running


def workflow(
    server: Server,
    record: str,
    kind: str = KIND,
    accelerated: bool = True,
    steps: int = 3,
    **options: Any,
) -> Workflow:
    server.ensure(f"checkpoints/{kind}-a.safetensors")
    graph = Graph()
    model = graph.checkpoint(kind)
    if accelerated:
        model = graph.add("SwitchyardAccelerate", model=model, compare_once=False, **options)
    positive, negative = graph.prompt(kind, 1), graph.prompt(kind, 2)
    latent = graph.sample(model, positive, negative, graph.latent(), record, steps=steps)
    graph.add("TestSave", samples=latent, record=f"{record}-end")
    return graph.workflow


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/switchyard/state")
    return found


def build_of(server: Server) -> dict[str, Any]:
    builds: list[dict[str, Any]] = state(server)["builds"]
    return builds[0] if builds else {"state": "none"}


def until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def build_processes(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children()
    return [child for child in children if "build_process" in " ".join(child.cmdline())]


def test_the_first_image_comes_from_the_hosts_path_and_later_ones_from_the_engine(fresh):
    fresh.run(workflow(fresh, "plain", accelerated=False))
    fresh.run(workflow(fresh, "first", first_run="don't wait"))
    run = state(fresh)["last_run"]
    assert (run["mode"], run["engine_calls"]) == ("building", 0)
    until(lambda: build_of(fresh)["state"] == "ready")
    fresh.run(workflow(fresh, "later", first_run="don't wait"))
    later = state(fresh)
    assert (later["last_run"]["mode"], later["last_run"]["host_calls"]) == ("engine", 0)
    assert later["last_run"]["speedup"] is not None  # against the run that did not wait
    (built,) = [engine for engine in later["engines"] if engine["source"] == "built"]
    assert built["loaded"] and built["sizes"][0]["width"] == 128
    plain = fresh.record("plain-end")["latent"]
    assert relative_error(fresh.record("first-end")["latent"], plain) == 0
    assert relative_error(fresh.record("later-end")["latent"], plain) < CLOSE
    assert not build_processes(fresh)

    answer = fresh.post("/switchyard/engines/delete", {"id": built["id"]})
    assert answer["freed_bytes"] == built["bytes"]
    assert not [engine for engine in state(fresh)["engines"] if engine["source"] == "built"]


def test_waiting_is_the_users_choice(fresh):
    fresh.run(workflow(fresh, "waited", "wide-sd15", first_run="wait"))
    run = state(fresh)["last_run"]
    assert (run["mode"], run["host_calls"], run["captures"]) == ("engine", 0, 1)
    fresh.run(workflow(fresh, "later", "wide-sd15", first_run="wait", steps=2))
    assert state(fresh)["last_run"]["captures"] == 0


def test_interrupting_the_wait_stops_the_prompt_and_not_the_build(fresh):
    prompt = fresh.queue(workflow(fresh, "waited", "tiny-sd15-inpaint", first_run="wait"))
    until(lambda: build_of(fresh)["state"] == "building")
    fresh.post("/interrupt", {})
    result = fresh.wait(prompt, timeout=60)
    assert result.error == "interrupted"
    build = build_of(fresh)
    assert build["state"] == "building"
    fresh.post("/switchyard/builds/cancel", {"id": build["id"]})  # the next test has its own


def test_a_cancelled_build_is_begun_again_only_when_asked(fresh):
    fresh.run(workflow(fresh, "first", "tiny-sdxl", first_run="don't wait"))
    build = until(lambda: build_of(fresh))
    assert build["state"] == "building"
    until(lambda: build_processes(fresh))
    fresh.post("/switchyard/builds/cancel", {"id": build["id"]})
    assert build_of(fresh)["state"] == "cancelled" and not build_processes(fresh)
    fresh.run(workflow(fresh, "second", "tiny-sdxl", first_run="don't wait"))
    assert build_of(fresh)["state"] == "cancelled" and not build_processes(fresh)
    reasons = state(fresh)["last_run"]["reasons"]
    assert reasons == [{"text": "the build of its engine was cancelled", "node": None}]
    with pytest.raises(ServerError, match="409"):
        fresh.post("/switchyard/builds/cancel", {"id": build["id"]})
    fresh.post("/switchyard/builds/retry", {"id": build["id"]})
    until(lambda: build_of(fresh)["state"] == "ready")


def test_a_killed_build_is_said_and_the_image_comes(fresh):
    fresh.run(workflow(fresh, "first", "tiny-sdxl-inpaint", first_run="don't wait"))
    (process,) = until(lambda: build_processes(fresh))
    process.send_signal(signal.SIGKILL)
    build = until(lambda: build_of(fresh)["state"] == "failed" and build_of(fresh))
    assert "SIGKILL" in build["error"]
    fresh.run(workflow(fresh, "second", "tiny-sdxl-inpaint", first_run="don't wait"))
    run = state(fresh)["last_run"]
    assert run["mode"] == "host" and "could not be built" in run["reasons"][0]["text"]


def test_no_build_outlives_the_server(fresh):
    """The last to use that server; what was built of this kind the first has deleted again."""
    fresh.run(workflow(fresh, "outlived", first_run="don't wait"))
    (process,) = until(lambda: build_processes(fresh))
    psutil.Process(fresh.pid).kill()
    process.wait(30)


ENDS_WHEN_TOLD = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
print(json.dumps({"progress": 0.41, "text": "tracing"}), flush=True)
while not os.path.exists(request["cache_dir"] + "/end"):
    time.sleep(0.02)
print(json.dumps({"error": "no", "kind": "resources"}), flush=True)
"""


@pytest.mark.parametrize("ends", ["while it samples", "later"])
def test_the_nodes_line_follows_the_build(load, tmp_path, monkeypatch, ends):
    builder = Builder(open_cache(tmp_path, 1 << 30), command=[sys.executable, "-c", ENDS_WHEN_TOLD])
    monkeypatch.setattr(run, "builder", lambda: builder)
    lines: list[str] = []
    stop = journal().subscribe(
        lambda event, data: lines.append(data["text"]) if event == STATUS_EVENT else None
    )
    model = accelerate(load(), Options(node_id="5"))

    def end(*step: Any) -> None:
        (tmp_path / "end").touch()
        until(lambda: builder.builds()[0]["state"] == "failed")

    if ends == "while it samples":
        model.set_model_sampler_post_cfg_function(lambda args: (end(), args["denoised"])[1])
    sample(model, conditioning(KIND, 1), conditioning(KIND, 2), steps=1)
    if ends == "later":
        until(lambda: any(line.startswith("building 41 %") for line in lines))
        end()
        until(lambda: "could not be built" in lines[-1])
    stop()
    builder.close()
    assert lines[-1] == "host's path: its engine could not be built: no"


def test_the_panel_lists_the_models_folder(server):
    server.ensure(f"checkpoints/{KIND}-a.safetensors", f"controlnet/{KIND}-1.safetensors")
    answer = until(
        lambda: (found := server.get("/switchyard/checkpoints")) and not found["scanning"] and found
    )
    files = {(entry["folder"], entry["name"]): entry for entry in answer["checkpoints"]}
    assert files["checkpoints", f"{KIND}-a.safetensors"]["badge"] in ("build", "ready")
    assert files["controlnet", f"{KIND}-1.safetensors"]["badge"] in ("build", "ready")


def test_the_next_prompts_file_is_read_from_the_hosts_own_queue(tmp_path, monkeypatch):
    import execution
    import folder_paths

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("now", "next", "last"):
        (folder / f"{name}.safetensors").write_bytes(b"x" * 100)
    known = {
        **folder_paths.folder_names_and_paths,
        "checkpoints": ([str(folder)], {".safetensors"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    for number, name in ((3, "last"), (1, "now"), (2, "next")):
        graph = Graph()
        graph.add("AnyLoader", ckpt_name=f"{name}.safetensors")
        queue.put((number, name, graph.workflow, {}, [], {}))
    queue.get()
    prefetcher = Prefetcher(queue, folder_paths.get_full_path)
    prefetcher.look()
    assert prefetcher.wait(30)
    assert list(prefetcher.done) == [(str(folder / "next.safetensors"), 100)]


def test_what_is_asked_for_while_a_file_is_read_has_its_turn(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"x" * 10)
    begun, go_on = threading.Event(), threading.Event()

    def bring(path: str, stop: threading.Event, keep: Collection[str]) -> None:
        begun.set()
        assert go_on.wait(60)

    reader = Reader(bring)
    reader.begin(lambda: [str(paths[0])])
    assert begun.wait(60)
    for path in paths[1:]:  # the last that is asked for
        reader.begin(lambda path=path: [str(path)])
    go_on.set()
    assert reader.wait(60)
    assert [Path(path).name for path, _ in reader.done] == ["a", "c"]
    begun.clear()
    go_on.clear()
    reader.begin(lambda: [str(paths[1])])
    assert begun.wait(60)
    reader.begin(lambda: [str(paths[2])])
    threading.Timer(0.1, go_on.set).start()
    reader.stop()
    assert [Path(path).name for path, _ in reader.done] == ["a", "c", "b"]
