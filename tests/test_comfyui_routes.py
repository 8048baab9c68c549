"""The panel's routes, asked over HTTP as the front end asks them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import torch
from comfyui.server import installations, why_not
from sparse import ldm_shapes, sparse_file
from support import family_config

from accel import __version__
from accel.cache import DiskCache
from accel.compiler import _shipped, open_cache, shipped_plan
from accel.hardware import Hardware, describe
from accel.hosts.comfyui import catalog, routes
from accel.hosts.comfyui.builder import Builder, BuildRefused
from accel.hosts.comfyui.journal import Journal
from accel.hosts.comfyui.routes import Panel
from accel.runtime import calls
from accel.runtime.predict import forecast, predict_at
from accel.structure import structure_of
from accel.tuning import profile

web = pytest.importorskip("aiohttp.web")
test_utils = pytest.importorskip("aiohttp.test_utils")
URL = pytest.importorskip("yarl").URL

ROOT = Path(__file__).parents[1]
KEY = "a" * 32
SIZE = {"width": 512, "height": 512, "batch": 2}

Ask = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return open_cache(tmp_path / "cache", 1 << 30)


@pytest.fixture
def builder(cache: DiskCache) -> Builder:
    return Builder(cache, lambda data: None)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "cache" / "journal.json")


@pytest.fixture
def panel(tmp_path: Path, builder: Builder, journal: Journal) -> Panel:
    """A panel over a folder with one SD1.5 checkpoint."""
    path = sparse_file(tmp_path / "one.safetensors", ldm_shapes("sd15", "model.diffusion_model."))
    names = {"checkpoints": [path.name]}
    return Panel(
        lambda folder: names.get(folder, []), lambda folder, name: str(path), list, builder, journal
    )


@pytest.fixture
def built(cache: DiskCache) -> str:
    config = family_config("sd15").to_json() | {"in_channels": 5}
    cache.put(KEY, "plan", {"structure": {"config": config, "family": None}})
    return KEY


def served(panel: Panel, talk: Callable[[Ask], Awaitable[None]]) -> None:
    """Run a conversation with a server that has the panel's routes."""

    async def run() -> None:
        table = web.RouteTableDef()
        routes.add_routes(table, panel)
        app = web.Application()
        app.add_routes(table)
        async with test_utils.TestClient(test_utils.TestServer(app)) as client:

            async def ask(path: str, body: Any = None, **given: Any) -> tuple[int, Any]:
                if body is not None:
                    given["json"] = body
                method = "POST" if given else "GET"
                async with client.request(method, f"/switchyard/{path}", **given) as response:
                    assert response.content_type == "application/json", await response.text()
                    assert response.headers["Cache-Control"] == "no-store"
                    return response.status, await response.json()

            await talk(ask)

    asyncio.run(run())


def answer(panel: Panel, path: str, body: Any = None, **given: Any) -> tuple[int, Any]:
    """One request."""
    answers = []

    async def talk(ask: Ask) -> None:
        answers.append(await ask(path, body, **given))

    served(panel, talk)
    return answers[0]


def test_the_state_of_a_fresh_install(panel: Panel) -> None:
    status, state = answer(panel, "state")
    assert status == 200
    assert set(state) == {
        *("version", "gpu", "host", "engines", "builds", "totals", "last_run"),
    }
    assert state["version"] == __version__
    assert state["last_run"] is None and state["builds"] == []
    assert state["totals"] == {"saved_seconds": 0, "runs": 0, "engine_calls": 0}
    assert set(state["host"]) == {"comfyui", "dynamic_vram", "torch"}
    assert state["gpu"]["name"]
    assert {
        *("id", "family", "title", "structure", "bytes", "source", "sizes", "last_used"),
        *("loaded", "vram_mib", "deletable"),
    } == set(state["engines"][0])


def test_the_state_shows_what_happened(panel: Panel, journal: Journal, built: str) -> None:
    journal.note_baseline(KEY, SIZE, "GPU", 60.0)
    run = journal.begin("one", graph_key=KEY, gpu="GPU", node_id="7")
    for _ in range(4):
        run.call("engine", SIZE, 20.0)
    journal.finish(run)
    journal.finish(journal.begin("two", mode="host", reasons=[("FreeU", None)]))
    _, state = answer(panel, "state")
    assert state["engines"][0]["id"] == built
    assert state["totals"]["runs"] == 2
    assert state["totals"]["saved_seconds"] == pytest.approx(0.16)
    assert state["last_run"]["model"] == "two"
    _, runs = answer(panel, "runs")
    assert [run["model"] for run in runs["runs"]] == ["two", "one"]
    assert runs["runs"][1]["speedup"] == pytest.approx(3.0)
    assert runs["runs"][1]["status"] == "engine · 3.0x"


def test_checkpoints_have_badges(panel: Panel) -> None:
    status, data = answer(panel, "checkpoints")
    while data["scanning"]:
        status, data = answer(panel, "checkpoints")
    assert status == 200
    (one,) = data["checkpoints"]
    assert (one["name"], one["badge"], one["family"]) == ("one.safetensors", "ready", "sd15")


def test_a_built_engine_can_be_deleted_once(panel: Panel, cache: DiskCache, built: str) -> None:
    size = cache.entries()[0].bytes

    async def talk(ask: Ask) -> None:
        answers = await asyncio.gather(*(ask("engines/delete", {"id": built}) for _ in range(5)))
        good = [data for status, data in answers if status == 200]
        assert good == [{"deleted": True, "freed_bytes": size}]
        assert [data["error"] for status, data in answers if status == 404] == [
            "there is no such engine"
        ] * 4

    served(panel, talk)
    assert not cache.entries()


def test_a_shipped_engine_cannot_be_deleted(panel: Panel) -> None:
    key = next(iter(catalog.shipped_families()))
    status, data = answer(panel, "engines/delete", {"id": key})
    assert (status, data) == (
        409,
        {"error": "this engine comes with the pack and cannot be deleted"},
    )


ACTIONS = ("engines/delete", "builds/cancel", "builds/retry")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "body",
    [
        {"id": "../../etc/passwd"},
        {"id": f"{'a' * 31}/"},
        {"id": "A" * 32},
        {"id": f"{KEY}\n"},
        {"id": "a" * 33},
        {"id": "a" * 2000},
        {"id": ""},
        {"id": None},
        {"id": 7},
        {"id": [KEY]},
        {"path": KEY},
        [KEY],
        KEY,
        7,
    ],
)
def test_an_id_that_is_none_is_refused(panel: Panel, action: str, body: Any, built: str) -> None:
    status, data = answer(panel, action, body)
    assert status == 400
    assert list(data) == ["error"] and "\n" not in data["error"]
    assert panel.builder.cache.entries()


@pytest.mark.parametrize(
    "given",
    [
        {"data": json.dumps({"id": KEY})},  # as a page of another site might send it
        {"data": {"id": KEY}},
        {"data": b"{", "headers": {"Content-Type": "application/json"}},
        {"data": b"", "headers": {"Content-Type": "application/json"}},
        {"data": b"\xff\xfe", "headers": {"Content-Type": "application/json"}},
        {"data": b"[" * 1000, "headers": {"Content-Type": "application/json"}},
        {"data": b" " * 5_000_000, "headers": {"Content-Type": "application/json"}},
    ],
)
def test_a_body_that_is_no_request_is_refused(
    panel: Panel, given: dict[str, Any], built: str
) -> None:
    status, data = answer(panel, "engines/delete", **given)
    assert status == 400 and data["error"]
    assert panel.builder.cache.entries()


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_not_there_is_not_found(panel: Panel, action: str) -> None:
    status, data = answer(panel, action, {"id": KEY})
    assert status == 404 and "no such" in data["error"]


# What a sampling will take.

SAMPLING: dict[str, Any] = {
    **{"folder": "checkpoints", "name": "one.safetensors", "width": 712, "height": 904},
    **{"batch": 1, "steps": 20, "sampler": "euler", "guided": True, "controlnet": False},
}
UNKNOWN = {"seconds": None, "bytes": None}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """The GPU that the host computes on, of those with a profile; None: a CPU."""

    def use(gpu: str | None) -> None:
        found = describe(torch.device("cpu")) if gpu is None else profile.profiled()[gpu]
        monkeypatch.setattr(routes, "_hardware", lambda: (found.name, found, None))

    return use


def test_a_sampling_is_predicted_before_it_is_queued(panel: Panel, on: Any) -> None:
    on("NVIDIA H200")

    def predicted(**changes: Any) -> tuple[float, int]:
        status, found = answer(panel, "predict", SAMPLING | changes)
        assert status == 200
        return found["seconds"], found["bytes"]

    seconds, size = predicted()
    times = forecast(profile.profiled()["NVIDIA H200"])
    plan = shipped_plan(structure_of(panel._locate("checkpoints", "one.safetensors")))  # type: ignore[arg-type]
    assert plan is not None
    found = predict_at(plan, 712, 904, 2, times)
    assert found.step_ms is not None and found.prompt_ms is not None
    assert seconds == pytest.approx(1.07 * (found.prompt_ms + 20 * found.step_ms) / 1e3)
    assert size == found.weights_bytes + found.activation_bytes
    each = 1.07 * found.step_ms / 1e3
    assert predicted(steps=40)[0] - seconds == pytest.approx(20 * each)
    assert predicted(sampler="heun")[0] - seconds == pytest.approx(19 * each)
    assert predicted(guided=False)[0] < 0.75 * seconds
    assert predicted(batch=2)[0] > 1.4 * seconds and predicted(batch=2)[1] > size
    assert predicted(controlnet=True)[0] > seconds
    assert predicted() == (seconds, size)


@pytest.mark.parametrize(
    ("gpu", "changes"),
    [
        (None, {}),
        ("NVIDIA H200", {"sampler": "dpm_adaptive"}),  # chooses its steps itself
        ("NVIDIA H200", {"sampler": "of another pack"}),
        ("NVIDIA H200", {"name": "two.safetensors"}),  # not listed
        ("NVIDIA H200", {"name": "../one.safetensors"}),
        ("NVIDIA H200", {"folder": "diffusion_models"}),
    ],
)
def test_what_is_not_known_is_not_predicted(
    panel: Panel, on: Any, gpu: str | None, changes: dict[str, Any]
) -> None:
    on(gpu)
    assert answer(panel, "predict", SAMPLING | changes) == (200, UNKNOWN)


def test_a_structure_is_predicted_once_it_has_a_plan(
    panel: Panel, tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("NVIDIA H200")
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"")
    assert answer(panel, "predict", SAMPLING) == (200, UNKNOWN)
    # Of no published family: the file alone does not fix the graph, a build before it did.
    shapes = ldm_shapes("sd15", "model.diffusion_model.")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, 5, 3, 3)
    path.unlink()
    sparse_file(path, shapes)
    structure = structure_of(str(path))
    assert structure.graph_key is None
    assert answer(panel, "predict", SAMPLING) == (200, UNKNOWN)
    found = _shipped("sd15")
    assert found is not None
    own = {**found.structure, "graph_key": KEY, "shape_key": structure.shape_key}
    panel.builder.cache.put(KEY, "plan", replace(found, structure=own).to_json())
    assert answer(panel, "predict", SAMPLING)[1]["seconds"] > 0.1


@pytest.mark.parametrize("field", list(SAMPLING))
@pytest.mark.parametrize("wrong", [None, [], "", 0, -8, 1e300, 2**70, True, "x" * 20, {"a": 1}])
def test_a_sampling_that_is_none_is_refused(panel: Panel, on: Any, field: str, wrong: Any) -> None:
    on(None)
    status, data = answer(panel, "predict", SAMPLING | {field: wrong})
    right = type(wrong) is type(SAMPLING[field]) and field in ("name", "sampler", "guided")
    if right or (field, wrong) == ("controlnet", True):
        assert (status, data) == (200, UNKNOWN)
    else:
        assert status == 400 and data["error"].startswith(field) and len(data) == 1


@pytest.mark.parametrize("body", [[], 7, "text", None, {}, {"width": 512}])
def test_what_lacks_a_field_is_refused(panel: Panel, body: Any) -> None:
    status, data = answer(panel, "predict", json=body)
    assert status == 400 and data["error"]


# Builds.


def test_builds_are_cancelled_and_retried(
    panel: Panel, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(builder, "status", lambda key: {"state": "building"})
    monkeypatch.setattr(builder, "cancel", lambda key: asked.append(("cancel", key)))
    monkeypatch.setattr(builder, "retry", lambda key: asked.append(("retry", key)))
    assert answer(panel, "builds/cancel", {"id": KEY}) == (200, {"cancelled": True})
    assert answer(panel, "builds/retry", {"id": KEY}) == (200, {"retried": True})
    assert asked == [("cancel", KEY), ("retry", KEY)]


def test_what_the_builder_refuses_is_a_conflict(
    panel: Panel, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(key: str) -> None:
        raise BuildRefused("no such build is running")

    monkeypatch.setattr(builder, "status", lambda key: {"state": "ready"})
    monkeypatch.setattr(builder, "cancel", refuse)
    assert answer(panel, "builds/cancel", {"id": KEY}) == (
        409,
        {"error": "no such build is running"},
    )


@pytest.mark.parametrize("damage", ["file", "folder", "bytes", "unreadable"])
def test_a_damaged_cache_gives_an_answer(
    panel: Panel,
    cache: DiskCache,
    built: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = cache.entries()[0]
    if damage == "bytes":
        entry.path.write_bytes(b"\xff\x00")
    elif damage == "folder":
        entry.path.unlink()
        entry.path.mkdir()
    elif damage == "file":
        entry.path.unlink()
        entry.path.parent.rmdir()
        entry.path.parent.write_text("not a folder")
    else:

        def refuse(*args: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(type(cache), "entries", refuse)
    for path in ("state", "checkpoints", "runs"):
        assert answer(panel, path)[0] == 200
    status, data = answer(panel, "engines/delete", {"id": KEY})
    assert status in (200, 404, 409) and (status == 200 or data["error"])


def test_what_nobody_thought_of_is_one_line(
    panel: Panel, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.runs.append(SimpleNamespace())  # type: ignore[arg-type]
    status, data = answer(panel, "runs")
    assert status == 500
    assert data["error"].startswith("AttributeError: ")


def test_a_slow_folder_does_not_hold_up_the_server(
    tmp_path: Path, builder: Builder, journal: Journal
) -> None:
    go, asked = threading.Event(), threading.Event()

    def slow(folder: str) -> list[str]:
        asked.set()
        assert go.wait(20)
        return []

    panel = Panel(slow, lambda folder, name: None, list, builder, journal)

    async def talk(ask: Ask) -> None:
        waiting = asyncio.create_task(ask("checkpoints"))
        while not asked.is_set():
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(ask("runs"), 10))[0] == 200
        assert not waiting.done()
        go.set()
        assert (await waiting)[1] == {"checkpoints": [], "scanning": False}

    served(panel, talk)


def test_a_device_without_engines_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    management = SimpleNamespace(get_torch_device=lambda: torch.device("mps"))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)  # type: ignore[arg-type]
    routes._hardware.cache_clear()
    try:
        found = routes.gpu()
    finally:
        routes._hardware.cache_clear()
    assert found["name"] == "mps" and "not supported" in found["problem"]


def test_the_gpu_says_how_many_calls_were_timed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "profile_cache", lambda: kept)
    kept = DiskCache(tmp_path, 1 << 30, "profile")
    hardware = Hardware(
        name="NVIDIA H100 80GB HBM3",
        kind="cuda",
        capability=(9, 0),
        multiprocessors=132,
        memory_bytes=80 << 30,
        l2_bytes=None,
        driver=None,
        torch="2.9.0",
        cuda="12.8",
        cudnn=None,
        triton=None,
    )

    def timed(**changes: Any) -> int:
        described = replace(hardware, **changes)
        monkeypatch.setattr(routes, "_hardware", lambda: (described.name, described, None))
        found: int = routes.gpu()["timed_calls"]
        return found

    shipped = timed()
    assert shipped > 100
    assert timed(name="another GPU") == 0
    own = profile.Profile(replace(hardware, name="another GPU"), kept)
    own.add({"a call": profile.Entry("kernel", {}, 1.0)})
    assert timed(name="another GPU") == 1
    assert timed() == shipped
    assert timed(name="a CPU", kind="cpu", capability=None) == 0


def test_the_host_is_described_from_what_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    version = SimpleNamespace(__version__="0.33.0")
    monkeypatch.setitem(sys.modules, "comfyui_version", version)  # type: ignore[arg-type]
    memory = SimpleNamespace(aimdo_enabled=True)
    monkeypatch.setitem(sys.modules, "comfy.memory_management", memory)  # type: ignore[arg-type]
    found = routes.host()
    assert (found["comfyui"], found["dynamic_vram"]) == ("0.33.0", True)


# At the host's server.


def host_server(waiting: list[Any]) -> Any:
    queue = SimpleNamespace(
        mutex=threading.RLock(),
        currently_running={},
        queue=[(0, f"id{i}", prompt, {}, []) for i, prompt in enumerate(waiting)],
    )
    arrived: list[Callable[[Any], Any]] = []
    return SimpleNamespace(
        routes=web.RouteTableDef(),
        prompt_queue=queue,
        arrived=arrived,
        add_on_prompt_handler=arrived.append,
    )


def test_routes_are_registered_once(panel: Panel) -> None:
    server = host_server([])
    routes.register(server, panel)
    routes.register(server, panel)
    paths = [route.path for route in server.routes]
    assert sorted(paths) == sorted(
        f"/switchyard/{name}" for name in ("state", "checkpoints", "runs", "predict", *ACTIONS)
    )


@pytest.mark.parametrize("name", ["My pack", "速 {1}", "a+b%20\\d"])
def test_scripts_are_served_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "web"
    (folder / "js").mkdir(parents=True)
    (folder / "js" / "panel.js").write_text("export {};")
    (tmp_path / name / "secret.js").write_text("")
    (tmp_path / "link.js").write_text("")
    (folder / "link.js").symlink_to(tmp_path / "link.js")
    table = web.RouteTableDef()
    routes.serve_scripts(table, folder)
    app = web.Application()
    app.add_routes(table)

    async def ask() -> list[int]:
        base = f"/extensions/{quote(name)}"
        outside = ["..%2Fsecret.js", "%2e%2e/secret.js", "link.js", "js%00"]
        paths = ["js/panel.js", "js/none.js", "js", *outside]
        async with test_utils.TestClient(test_utils.TestServer(app)) as client:
            answers = [await client.get(URL(f"{base}/{p}", encoded=True)) for p in paths]
            other = await client.get("/extensions/another/js/panel.js")
            return [answer.status for answer in [*answers, other]]

    assert asyncio.run(ask()) == [200, *[404] * 7]


def test_a_folder_with_a_plain_name_is_the_hosts_to_serve(tmp_path: Path) -> None:
    table = web.RouteTableDef()
    routes.serve_scripts(table, tmp_path / "comfyui-switchyard" / "web")
    assert not list(table)


def test_when_a_sampling_begins_the_next_prompts_file_is_read(
    panel: Panel, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(catalog.Prefetcher, "_read", lambda self, path: read.append(path))
    prompt = {"1": {"inputs": {"ckpt_name": "one.safetensors"}}}
    routes.register(host_server([prompt]), panel)
    run = journal.begin("a")
    deadline = time.monotonic() + 20
    while not read:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    journal.finish(run)
    assert [Path(path).name for path in read] == ["one.safetensors"]


def test_a_prompt_that_is_queued_during_a_sampling_is_read_ahead_too(
    panel: Panel, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = threading.Event()
    monkeypatch.setattr(routes, "QUEUED_SECONDS", 0.05)
    monkeypatch.setattr(catalog.Prefetcher, "_read", lambda self, path: read.set())
    server = host_server([])
    routes.register(server, panel)
    (arrive,) = server.arrived
    run = journal.begin("a")
    prompt = {"1": {"inputs": {"ckpt_name": "one.safetensors"}}}
    assert arrive({"prompt": prompt}) == {"prompt": prompt}
    server.prompt_queue.queue.append((0, "id", prompt, {}, []))
    assert read.wait(20)
    journal.finish(run)
    # Without a sampling, nothing that is queued is any of its business.
    read.clear()
    server.prompt_queue.queue[:] = [(0, "another", prompt, {}, [])]
    arrive({"prompt": prompt})
    assert not read.wait(1)


def test_importing_the_routes_costs_the_host_nothing() -> None:
    """Neither torch nor the compiler: the server starts without them."""
    heavy = "[m for m in sys.modules if m in ('torch', 'sympy') or m.startswith('accel.compiler')]"
    code = f"import sys, accel.hosts.comfyui.routes; print({heavy})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
    assert not result.stderr


@pytest.mark.comfyui
def test_the_routes_answer_inside_comfyui(tmp_path: Path) -> None:
    """In ComfyUI's Python, over its own folders, queue and table of routes, without serving."""
    installation = installations()[0]
    reason = why_not(installation)
    if reason is not None:
        pytest.skip(reason)
    root, python = installation.root, installation.python
    models = tmp_path / "models" / "checkpoints"
    models.mkdir(parents=True)
    sparse_file(models / "one.safetensors", ldm_shapes("sdxl", "model.diffusion_model."))
    code = textwrap.dedent(
        f"""
        import asyncio, json, sys
        sys.path[:0] = [{str(root)!r}, {str(ROOT)!r}]
        from comfy.cli_args import args
        args.cpu = True
        import comfy.model_management, comfyui_version, folder_paths
        from types import SimpleNamespace
        from aiohttp import web
        from aiohttp.test_utils import TestClient, TestServer
        from accel.hosts.comfyui import routes

        folder_paths.folder_names_and_paths["checkpoints"] = (
            [{str(models)!r}], {{".safetensors"}}
        )
        server = SimpleNamespace(
            routes=web.RouteTableDef(), prompt_queue=None, add_on_prompt_handler=print
        )
        routes.register(server)
        app = web.Application()
        app.add_routes(server.routes)

        async def main():
            async with TestClient(TestServer(app)) as client:
                state = await (await client.get("/switchyard/state")).json()
                while True:
                    files = await (await client.get("/switchyard/checkpoints")).json()
                    if not files["scanning"]:
                        break
                print(json.dumps([state["host"], state["gpu"], files["checkpoints"]]))

        asyncio.run(main())
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    host, gpu, files = json.loads(result.stdout.splitlines()[-1])
    assert host["comfyui"][0].isdigit() and host["torch"][0].isdigit()
    assert gpu["problem"] is None
    one = next(file for file in files if file["name"] == "one.safetensors")
    assert (one["badge"], one["family"], one["folder"]) == ("ready", "sdxl", "checkpoints")
