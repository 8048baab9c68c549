"""The pack as a user installs it: in a folder of any name, without the tests beside it."""

from __future__ import annotations

import importlib
import json
import queue
import re
import shutil
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .scenarios import relative_error
from .server import ROOT, Server, ServerError
from .workflows import Graph

PARTS = ("__init__.py", "accel", "example_workflows", "locales", "nodes", "pyproject.toml", "web")
NODES = {
    "SwitchyardAccelerate",
    "SwitchyardAccelerateControlNet",
    "SwitchyardAuditionCheckpoints",
    "SwitchyardLoadCheckpoint",
    "SwitchyardLoadDiffusionModel",
    "SwitchyardLoadLoraByBlock",
    "SwitchyardReport",
}


def install(folder: Path) -> None:
    """Copy what a user gets."""
    folder.mkdir(parents=True)
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def test_it_loads_from_any_folder_quickly_and_quietly(server, tmp_path, models_folder):
    name = "My switch-yard"
    base = tmp_path / "base"
    installed = Server(server.installation, base, models=models_folder, pack=False)
    (base / "custom_nodes" / "testpack").unlink()
    install(base / "custom_nodes" / name)
    install(base / "custom_nodes" / "incomplete")
    panel = base / "custom_nodes" / "incomplete" / "accel" / "hosts" / "comfyui" / "panel.py"
    panel.write_text("import package_that_is_not_there\n")
    with installed:
        assert set(installed.get("/object_info")) >= NODES
        assert installed.get("/switchyard/state")["last_run"] is None
        templates = installed.get("/workflow_templates")[name]
        assert len(templates) == len(set(templates)) == 5
        assert {"en", "zh"} <= set(installed.get("/i18n"))
        scripts = [path for path in installed.get("/extensions") if "My%20switch-yard/" in path]
        assert len([path for path in scripts if path.endswith("/switchyard.js")]) == 1
        for path in (*scripts, "/extensions/My%20switch-yard/docs/SwitchyardReport.md"):
            with urllib.request.urlopen(installed.url + path) as answer:
                assert answer.status == 200 and answer.read(), path
    said = [line for line in installed.log.splitlines() if name in line or "witchyard" in line]
    (line,) = said  # the host's own
    seconds = re.search(r"([\d.]+) seconds: ", line)
    assert seconds is not None and float(seconds[1]) <= 0.3, line
    (missing,) = [text for text in installed.log.splitlines() if "package_that" in text]
    assert "pip install -r" in missing


def test_a_prompt_needs_to_set_nothing(server):
    files = ("checkpoints/tiny-sd15-a", "controlnet/tiny-sd15-1", "loras/tiny-sd15-1")
    server.ensure(*(f"{file}.safetensors" for file in files))
    graph = Graph()
    name = "tiny-sd15-a.safetensors"
    loaded = graph.add("SwitchyardLoadCheckpoint", ckpt_name=name)
    model = graph.add("SwitchyardAccelerate", model=graph.checkpoint("tiny-sd15"))
    net = graph.add("ControlNetLoader", control_net_name="tiny-sd15-1.safetensors")
    net = graph.add("SwitchyardAccelerateControlNet", control_net=net)
    name = "tiny-sd15-1.safetensors"
    lora = graph.add("SwitchyardLoadLoraByBlock", model=model, lora_name=name)
    for thing in (loaded, model, net, lora):
        graph.add("SwitchyardReport", anything=thing)
    assert server.run(graph.workflow).status == "success"
    inputs = server.get("/object_info")["SwitchyardLoadDiffusionModel"]["input"]
    assert list(inputs["required"]) == ["unet_name"]


def test_a_report_is_about_the_samplings_that_lead_to_it(server):
    files = [f"tiny-sd15-{letter}.safetensors" for letter in "ab"]
    server.ensure(*(f"checkpoints/{file}" for file in files))

    def first_lines(fake: bool = False, plain: bool = False, **options: Any) -> list[list[str]]:
        """Of the reports after the first sampler and after both: what they tell of."""
        graph = Graph()
        prompts = graph.prompt("tiny-sd15", 1), graph.prompt("tiny-sd15", 2)
        latent, reports = graph.latent(), []
        for letter in "ab":
            model = graph.checkpoint("tiny-sd15", letter)
            if fake and letter == "a":
                model = graph.add("TestFake", model=model, kind="foreign_class")
            if plain and letter == "a":
                model = graph.add("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=False)
            else:
                model = graph.add("SwitchyardAccelerate", model=model, **options)
            latent = graph.sample(model, *prompts, latent, f"chain-{letter}", steps=2)
            reports.append(graph.add("SwitchyardReport", anything=latent))
        # The same MODEL in a sampler that no report looks at.
        other = graph.sample(model, *prompts, latent, "chain-other", steps=1)
        graph.add("TestSave", samples=other, record="chain-end")
        outputs = server.run(graph.workflow).outputs
        texts = [outputs[report[0]]["text"][0].split("\n\n") for report in reports]
        return [[part.splitlines()[0] for part in text[:-1]] for text in texts]

    first, both = first_lines(first_run="wait")
    assert [line.split(": ")[0] for line in first] == files[:1]
    assert [line.split(": ")[0] for line in both] == files
    # Of another workflow, whose nodes have the same ids, it says nothing.
    _, both = first_lines(plain=True)
    assert [line.split(": ")[0] for line in both] == files[1:]
    # Of a MODEL that is not accelerated any more, the run before says nothing.
    first, both = first_lines(fake=True, first_run="wait")
    (line,) = first
    assert "not accelerated" in line and "GGUFModelPatcher" in line
    assert both[0] == line and both[1].startswith(files[1])


def test_a_file_that_is_written_over_is_loaded_anew(server):
    """In place, while the host keeps the MODEL: as a download over the old file does."""
    names = [f"checkpoints/tiny-sd15-{letter}.safetensors" for letter in "ab"]
    server.ensure(*names)
    first, second = (server.models / name for name in names)
    ours = server.models / "checkpoints" / "模型 written over.safetensors"

    def latent(loader: str, name: str) -> torch.Tensor:
        graph = Graph()
        model = graph.add(loader, ckpt_name=name, first_run="wait")
        prompts = graph.prompt("tiny-sd15", 1), graph.prompt("tiny-sd15", 2)
        end = graph.sample(model, *prompts, graph.latent(), "over", steps=2)
        graph.add("TestSave", samples=end, record="over-end")
        server.run(graph.workflow)
        return server.record("over")["latent"]

    expected = latent("CheckpointLoaderSimple", second.name)
    try:
        shutil.copyfile(first, ours)
        assert relative_error(latent("SwitchyardLoadCheckpoint", ours.name), expected) > 0.01
        shutil.copyfile(second, ours)
        assert relative_error(latent("SwitchyardLoadCheckpoint", ours.name), expected) < 1e-4
        ours.write_bytes(second.read_bytes()[:5000])
        with pytest.raises(ServerError, match=r"SwitchyardLoadCheckpoint: .*rror"):
            latent("SwitchyardLoadCheckpoint", ours.name)
        shutil.copyfile(first, ours)  # and the process lives
        assert relative_error(latent("SwitchyardLoadCheckpoint", ours.name), expected) > 0.01
    finally:
        ours.unlink()


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as a process without the pack's nodes imports it."""
    # The real server's module cannot be imported into this process on every version of the host.
    host = SimpleNamespace(PromptServer=SimpleNamespace(instance=None))
    monkeypatch.setitem(sys.modules, "server", host)
    monkeypatch.delitem(sys.modules, "accel.hosts.comfyui.panel", raising=False)
    module = importlib.import_module("accel.hosts.comfyui.panel")
    monkeypatch.delitem(sys.modules, "accel.hosts.comfyui.panel")
    return module


def test_a_line_goes_to_the_client_that_queued_the_node(panel, monkeypatch, tmp_path):
    from comfy_execution.utils import CurrentNodeContext

    from accel.hosts.comfyui.journal import Journal

    kept = Journal(tmp_path / "journal.json")
    sent: list[tuple[Any, ...]] = []
    texts: list[tuple[Any, ...]] = []
    server = SimpleNamespace(
        client_id="one",
        prompt_queue=None,
        add_on_prompt_handler=lambda handler: None,
        send_sync=lambda event, data, sid=None: sent.append((event, sid)),
        send_progress_text=lambda text, node, sid=None: texts.append((text, node, sid)),
    )
    panel.PromptServer.instance = server
    monkeypatch.setattr(panel, "journal", lambda: kept)
    monkeypatch.setattr(panel.routes, "register", lambda server: None)
    panel.start()
    with CurrentNodeContext("prompt", "9"):
        kept.status("5", "build", "building 10 %")
    server.client_id = "two"
    with CurrentNodeContext("another", "9"):
        kept.status("6", "host", "host's path")
    kept.status("5", "build", "building 41 %")  # from a thread that builds
    assert texts == [
        ("building 10 %", "5", "one"),
        ("host's path", "6", "two"),
        ("building 41 %", "5", "one"),
    ]
    assert sent == [("switchyard.status", client) for client in ("one", "two", "one")]
    server.client_id = None  # a program that does not listen
    with CurrentNodeContext("third", "9"):
        kept.status("5", "off", "not accelerated")
    kept.emit("switchyard.build", {})
    assert len(texts) == 3 and sent[3:] == [("switchyard.build", None)]


@pytest.fixture
def metadata(panel: Any) -> Any:
    waiting: list[Any] = []
    prompts = SimpleNamespace(mutex=threading.RLock(), currently_running={}, queue=waiting)
    handlers: queue.Queue[Any] = queue.Queue()
    server = SimpleNamespace(prompt_queue=prompts, add_on_prompt_handler=handlers.put)
    found = panel._Metadata(server)
    return SimpleNamespace(add=found.add, queue=prompts, arrive=handlers.get())


def run_of(**values: Any) -> dict[str, Any]:
    from accel.hosts.comfyui.journal import Run

    return {**Run(1, 0.0, "a.safetensors").to_json(), **values}


OURS = {"1": {"class_type": "SwitchyardAccelerate", "inputs": {}}}
OTHERS = {"1": {"class_type": "KSampler", "inputs": {}}}


def test_a_prompt_without_the_packs_nodes_stays_as_it_is(metadata):
    # Other packs tell a prompt of the front end by its metadata being there at all.
    for prompt in (OTHERS, None, [], {"1": None}, {"1": {"class_type": 3}}):
        answer = metadata.arrive({"prompt": prompt, "extra_data": {"client_id": "x"}})
        assert answer == {"prompt": prompt, "extra_data": {"client_id": "x"}}
    for nothing in ([], "a prompt"):  # that it is none is for the server to say
        assert metadata.arrive(nothing) == nothing


def test_of_a_prompt_a_digest_is_kept_and_only_samplers_are_compared(panel, monkeypatch, tmp_path):
    from comfy_execution.utils import CurrentNodeContext

    from accel.hosts.comfyui.journal import Journal

    kept = Journal(tmp_path / "journal.json")
    monkeypatch.setattr(panel, "journal", lambda: kept)
    monkeypatch.setattr(panel, "pool", lambda: SimpleNamespace(networks=list))
    prompt = {
        "1": {"class_type": "SwitchyardAccelerate", "inputs": {}},
        "2": {"class_type": "Text", "inputs": {"text": "castle" * 10_000}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0]}},
        "4": {"class_type": "SwitchyardReport", "inputs": {"anything": ["3", 0]}},
    }
    running = {0: (0, "one", prompt)}
    panel.PromptServer.instance = SimpleNamespace(
        prompt_queue=SimpleNamespace(currently_running=running)
    )
    nodes = panel._nodes()
    kept.subscribe(nodes.note)
    with CurrentNodeContext("one", "3"):
        kept.finish(kept.begin("a.safetensors", node_id="1"))
    assert len(repr(nodes._samplers)) < 200
    asked: list[str] = []
    digest = panel._asked
    monkeypatch.setattr(panel, "_asked", lambda p, n: asked.append(n) or digest(p, n))
    assert "a.safetensors" in panel.report(prompt, "4")
    assert asked == ["3"]
    other = {**prompt, "2": {"class_type": "Text", "inputs": {"text": "a forest"}}}
    assert "a.safetensors" not in panel.report(other, "4")


def test_a_receipt_reaches_the_prompt_that_runs(metadata):
    first = metadata.arrive({"prompt": OURS, "extra_data": {"extra_pnginfo": {"workflow": 1}}})
    # Others arrive before the server has put the first into its queue.
    second = [metadata.arrive({"prompt": OURS, "prompt_id": f"{n}"}) for n in range(5)]
    metadata.queue.currently_running[0] = (0, first["prompt_id"], {}, {})
    metadata.add(run_of(mode="mixed", engine_ms=12.3456, host_ms=99.0))
    (written,) = json.loads(json.dumps(first["extra_data"]["extra_pnginfo"]["switchyard"]))
    assert written["ms_per_step"] == {"engine": 12.35, "host": 99.0}
    assert all(other["extra_data"]["extra_pnginfo"] == {} for other in second)


def test_what_ended_is_forgotten_and_what_waits_is_not(metadata):
    kept = metadata.arrive({"prompt": OURS, "prompt_id": "kept"})
    metadata.queue.queue.append((0, "kept", {}, {}))
    for number in range(40):
        ended = metadata.arrive({"prompt": OURS, "prompt_id": f"{number}"})
        if number == 0:
            first = ended
    metadata.queue.currently_running.update({0: (0, "kept", {}, {}), 1: (0, "0", {}, {})})
    metadata.add(run_of())
    assert "switchyard" in kept["extra_data"]["extra_pnginfo"]
    assert "switchyard" not in first["extra_data"]["extra_pnginfo"]
