"""A user's first half hour: find the node, connect it, run, watch, read, compare, delete."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfyui.server import Server
from comfyui.workflows import Graph
from PIL import Image

from .browser import Desk
from .test_graph import BUILD, EMPTY, badges

pytestmark = pytest.mark.comfyui

NODE = "SwitchyardAccelerate"
LINE = """(id) => app.graph.getNodeById(id).widgets
    .find((widget) => widget.name === "$$node-text-preview")?.value"""
SIZE = 64

NODES = [
    ("loader", "CheckpointLoaderSimple"),
    ("positive", "CLIPTextEncode"),
    ("sampler", "KSampler"),
    ("report", "SwitchyardReport"),
    ("latent", "EmptyLatentImage"),
    ("negative", "CLIPTextEncode"),
    ("decode", "VAEDecode"),
    ("save", "SaveImage"),
]
LINKS = [
    ("loader", 0, "sampler", "model"),
    ("loader", 1, "positive", "clip"),
    ("loader", 1, "negative", "clip"),
    ("loader", 2, "decode", "vae"),
    ("positive", 0, "sampler", "positive"),
    ("negative", 0, "sampler", "negative"),
    ("latent", 0, "sampler", "latent_image"),
    ("sampler", 0, "report", "anything"),
    ("report", 0, "decode", "samples"),
    ("decode", 0, "save", "images"),
]
VALUES = {
    "loader": {"ckpt_name": "tiny-sd15-a.safetensors"},
    "positive": {"text": "a signal box at dusk"},
    "negative": {"text": "blurry"},
    "latent": {"width": SIZE, "height": SIZE, "batch_size": 1},
    "sampler": {"seed": 1, "control_after_generate": "fixed", "steps": 4, "cfg": 5.0},
    "save": {"filename_prefix": "story"},
}

PLACES = {
    "loader": [0, 0],
    "latent": [0, 200],
    "positive": [360, 200],
    "negative": [360, 460],
    "sampler": [820, 0],
    "report": [1150, 0],
    "decode": [1150, 320],
    "save": [1480, 0],
}
SIZES = {"positive": [400, 180], "negative": [400, 180], "report": [290, 230], "save": [290, 330]}

SET = """([ids, values, places, sizes]) => {
    for (const [name, place] of Object.entries(places)) {
        app.graph.getNodeById(ids[name]).pos = place;
        if (sizes[name]) app.graph.getNodeById(ids[name]).setSize(sizes[name]);
    }
    for (const [name, wanted] of Object.entries(values)) {
        const node = app.graph.getNodeById(ids[name]);
        for (const [key, value] of Object.entries(wanted)) {
            node.widgets.find((widget) => widget.name === key).value = value;
        }
    }
    app.canvas.ds.scale = 0.6;
    app.canvas.ds.offset[0] = 660;
    app.canvas.ds.offset[1] = 400;
    app.canvas.setDirty(true, true);
}"""


def queue(desk: Desk, server: Server, timeout: float = 240) -> dict[str, Any]:
    """Press the queue's shortcut; returns the history's entry when the run is over."""
    before = set(server.get("/history"))
    desk.page.keyboard.press("Control+Enter")
    return finished(desk, server, before, timeout)


def finished(desk: Desk, server: Server, before: set[str], timeout: float) -> dict[str, Any]:
    def entry() -> dict[str, Any] | None:
        history = server.get("/history")
        new = [history[key] for key in history if key not in before]
        return new[0] if new and new[0]["status"]["completed"] else None

    try:
        found: dict[str, Any] = desk.until(entry, timeout)
    except TimeoutError:
        raise TimeoutError(f"{server.get('/history')}\n{server.log[-3000:]}") from None
    return found


def seed(desk: Desk, value: int) -> None:
    desk.run(
        """(value) => {
            const node = app.graph.nodes.find(({ type }) => type === "KSampler");
            node.widgets.find(({ name }) => name === "seed").value = value;
        }""",
        value,
    )


def test_from_search_to_deletion(desk: Desk, server: Server) -> None:
    desk.load(EMPTY)
    ids = desk.run(BUILD, {"nodes": NODES, "links": LINKS})
    desk.run(SET, [ids, VALUES, PLACES, SIZES])
    desk.page.wait_for_timeout(500)

    # Found by search, put down, connected with the mouse.
    desk.page.mouse.dblclick(640, 130)
    desk.page.wait_for_timeout(600)
    desk.page.keyboard.type("accelerate model", delay=20)
    desk.page.get_by_text("Accelerate Model").first.wait_for()
    desk.picture("search")
    desk.page.wait_for_timeout(500)
    desk.page.keyboard.press("Enter")
    desk.wait(f"() => app.graph.nodes.some(({{ type }}) => type === '{NODE}')")
    node = desk.node(NODE)
    desk.page.wait_for_timeout(700)
    desk.page.mouse.click(715, 250)  # it hangs on the pointer until it is put down
    desk.page.wait_for_timeout(500)
    desk.connect(ids["loader"], 0, node, 0)
    desk.connect(node, 0, ids["sampler"], 0)
    prompt = desk.api()
    assert prompt[str(ids["sampler"])]["inputs"]["model"] == [str(node), 0]
    assert prompt[str(node)]["inputs"]["model"] == [str(ids["loader"]), 0]

    # The first picture does not wait for the engine, whose progress is in the panel.
    panel = desk.open_panel()
    panel.get_by_text("No run yet").wait_for()
    panel.get_by_text("Others that come with the pack").wait_for()
    entry = queue(desk, server)
    assert entry["status"]["status_str"] == "success", entry
    assert badges(desk, node)[0].startswith("building")
    building = panel.locator("[data-build]")
    building.wait_for()
    assert building.locator("progress").count() == 1
    desk.picture("building")
    desk.page.locator(".p-toast").get_by_text("is ready").wait_for(timeout=240_000)
    panel.locator('[data-section="builds"]').wait_for(state="hidden")
    engine = panel.locator("[data-engine]").filter(has_text="built here")
    engine.first.wait_for()
    assert engine.count() == 1

    # The second runs on it, and the report says so.
    seed(desk, 2)
    entry = queue(desk, server)
    run = server.get("/switchyard/state")["last_run"]
    assert (run["mode"], run["engine_calls"], run["host_calls"]) == ("engine", 4, 0), run
    assert badges(desk, node)[0].startswith("engine")
    panel.get_by_text("weights brought in").wait_for()
    (text,) = entry["outputs"][str(ids["report"])]["text"]
    assert "engine: 4 calls" in text
    shown = "(id) => app.graph.getNodeById(id).widgets.find(({ name }) => name === 'text').value"
    assert desk.run(shown, ids["report"]) == text
    assert "text" not in desk.api()[str(ids["report"])]["inputs"]
    desk.run("() => app.extensionManager.toast.removeAll?.()")
    desk.picture("engine")

    # Compared once, from the node's own menu.
    before = set(server.get("/history"))
    desk.run(
        """(id) => {
            const node = app.graph.getNodeById(id);
            app.canvas.selectNode(node);
            void app.extensionManager.command.execute("Switchyard.CompareOnce");
        }""",
        node,
    )
    finished(desk, server, before, 240)
    desk.until(lambda: " dB" in " ".join(badges(desk, node)))
    desk.run("() => app.extensionManager.toast.removeAll?.()")
    desk.picture("compared")

    # Chinese, the node's texts included.
    desk.set("Comfy.Locale", "zh")
    try:
        panel = desk.open_panel()
        panel.get_by_text("累计节省的时间").wait_for()
        assert badges(desk, node)[0].startswith("引擎")
        desk.open()  # titles of nodes are translated when the page is loaded
        desk.wait(f"() => LiteGraph.createNode('{NODE}').title === '加速模型'")
        desk.open_panel().get_by_text("累计节省的时间").wait_for()
        # What the server says of a run, too; the report that goes on to other nodes is as it was.
        seed(desk, 3)
        entry = queue(desk, server)
        desk.until(lambda: str(desk.run(LINE, node)).startswith("引擎 · "))
        assert "engine: 4 calls" in entry["outputs"][str(ids["report"])]["text"][0]
        assert "引擎：4 次调用" in desk.run(shown, ids["report"])
        desk.picture("chinese")
    finally:
        desk.set("Comfy.Locale", "en")

    # Deleted, after a question; the server has it no more.
    panel = desk.open_panel()
    (built,) = (
        one for one in server.get("/switchyard/state")["engines"] if one["source"] == "built"
    )
    panel.locator(f'[data-engine="{built["id"]}"] .sy-danger').click()
    dialog = desk.page.get_by_role("dialog")
    dialog.get_by_text("Delete this engine?").wait_for()
    desk.picture("delete")
    dialog.get_by_role("button", name="Delete").click()
    panel.locator(f'[data-engine="{built["id"]}"]').wait_for(state="detached")
    left = [one["id"] for one in server.get("/switchyard/state")["engines"]]
    assert built["id"] not in left


@pytest.mark.parametrize("extra", [{"extra_data": {"extra_pnginfo": {"workflow": {}}}}, {}])
def test_receipt_in_the_picture(server: Server, extra: dict[str, Any]) -> None:
    """No browser: what a front end sends along with a prompt, and the picture that comes back."""
    graph = Graph()
    model = graph.checkpoint("tiny-sd15")
    fast = graph.add(NODE, model=model, first_run="don't wait", compare_once=False)
    text = graph.add("CLIPTextEncode", text="dusk", clip=[model[0], 1])
    latent = graph.latent(SIZE, SIZE)
    settings = {"seed": 3 + len(extra), "steps": 2, "cfg": 4.0, "denoise": 1.0}
    names = {"sampler_name": "euler", "scheduler": "normal"}
    wires = {"model": fast, "positive": text, "negative": text, "latent_image": latent}
    samples = graph.add("KSampler", **settings, **names, **wires)
    images = graph.add("VAEDecode", samples=samples, vae=[model[0], 2])
    save = graph.add("SaveImage", images=images, filename_prefix="receipt")
    answer = server.post("/prompt", {"prompt": graph.workflow, **extra})
    result = server.wait(answer["prompt_id"])
    assert result.status == "success", result.error
    (image,) = result.outputs[save[0]]["images"]
    with Image.open(server.folder / "output" / image["filename"]) as picture:
        (written,) = json.loads(picture.info["switchyard"])
    assert written["steps"] == 2
    assert written["mode"] in ("building", "engine")
