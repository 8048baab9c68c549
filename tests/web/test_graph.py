"""What the front end does to a workflow: inserting nodes, badges, comparing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .browser import Desk

pytestmark = pytest.mark.comfyui

EXAMPLES = Path(__file__).parents[2] / "example_workflows"
NODE = "SwitchyardAccelerate"

STATUS = """(detail) => {
    app.api.dispatchEvent(new CustomEvent("switchyard.status", { detail }));
}"""

# Makes a workflow from (name, type) and (source, slot, target, input), in the current graph.
BUILD = """async ({ nodes, links }) => {
    const made = {};
    for (const [index, [name, type]] of nodes.entries()) {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [(index % 4) * 400, Math.floor(index / 4) * 400];
        made[name] = node;
    }
    for (const [source, slot, target, input] of links) {
        const place = made[target].inputs.findIndex((one) => one.name === input);
        made[source].connect(slot, made[target], place);
    }
    return Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]));
}"""

EMPTY: dict[str, Any] = {
    "last_node_id": 0,
    "last_link_id": 0,
    "nodes": [],
    "links": [],
    "groups": [],
    "config": {},
    "extra": {},
    "version": 0.4,
}


def build(desk: Desk, nodes: list[tuple[str, str]], links: list[tuple[str, int, str, str]]) -> Any:
    desk.load(EMPTY)
    return desk.run(BUILD, {"nodes": nodes, "links": links})


def accelerate(desk: Desk) -> None:
    """As from any of the menus."""
    desk.run("() => app.extensionManager.command.execute('Switchyard.AccelerateWorkflow')")
    desk.page.wait_for_timeout(300)


def said(desk: Desk) -> str:
    """The last message; and it goes away."""
    text: str = desk.page.locator(".p-toast-detail").last.inner_text()
    desk.run("() => app.extensionManager.toast.removeAll?.()")
    desk.page.wait_for_timeout(400)
    return text


def meaning(prompt: dict[str, Any]) -> dict[str, Any]:
    """A workflow in API format in which the pack's node is a plain wire."""

    def follow(value: Any) -> Any:
        while isinstance(value, list) and prompt[value[0]]["class_type"] == NODE:
            value = prompt[value[0]]["inputs"]["model"]
        return value

    return {
        node_id: (
            node["class_type"],
            # None: a choice among no files at all
            {key: follow(value) for key, value in node["inputs"].items() if value is not None},
        )
        for node_id, node in prompt.items()
        if node["class_type"] != NODE
    }


def accelerated(prompt: dict[str, Any]) -> dict[str, int]:
    """For each sampler, how many of the pack's nodes its model goes through."""
    found = {}
    for node_id, node in prompt.items():
        if node["class_type"] != "KSampler":
            continue
        count, at = 0, node
        while isinstance(at["inputs"].get("model"), list):
            at = prompt[at["inputs"]["model"][0]]
            count += at["class_type"] == NODE or at["class_type"].startswith("SwitchyardLoad")
        found[node_id] = count
    return found


def example(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((EXAMPLES / f"{name}.json").read_text("utf-8"))
    return data


PLAIN = (
    [
        ("loader", "CheckpointLoaderSimple"),
        ("lora", "LoraLoader"),
        ("text", "CLIPTextEncode"),
        ("latent", "EmptyLatentImage"),
        ("with", "KSampler"),
        ("without", "KSampler"),
        ("decode", "VAEDecode"),
        ("save", "SaveImage"),
        ("other", "UNETLoader"),
        ("third", "KSampler"),
    ],
    [
        ("loader", 0, "lora", "model"),
        ("loader", 1, "lora", "clip"),
        ("lora", 1, "text", "clip"),
        ("lora", 0, "with", "model"),
        ("loader", 0, "without", "model"),
        ("other", 0, "third", "model"),
        *(
            link
            for sampler in ("with", "without", "third")
            for link in (
                ("text", 0, sampler, "positive"),
                ("text", 0, sampler, "negative"),
                ("latent", 0, sampler, "latent_image"),
            )
        ),
        ("with", 0, "decode", "samples"),
        ("loader", 2, "decode", "vae"),
        ("decode", 0, "save", "images"),
    ],
)


def test_accelerates_every_loader_once_keeping_all_links_in_one_step_for_undo(desk: Desk) -> None:
    build(desk, *PLAIN)
    desk.page.mouse.click(700, 850)  # the front end notes its own history at a click
    desk.page.wait_for_timeout(300)
    before, plain = desk.graph(), desk.api()
    accelerate(desk)
    assert "inserted: 2." in said(desk)
    after = desk.api()
    assert meaning(after) == meaning(plain)
    assert set(accelerated(after).values()) == {1}
    assert sum(node["class_type"] == NODE for node in after.values()) == 2
    graph = desk.graph()
    desk.picture("accelerate-workflow")
    accelerate(desk)
    assert "already" in said(desk)
    assert desk.graph()["nodes"] == graph["nodes"]
    desk.page.mouse.click(700, 850)
    desk.page.keyboard.press("Control+z")
    desk.wait(f"() => !app.graph.nodes.some((node) => node.type === '{NODE}')")
    desk.page.wait_for_timeout(300)
    undone = desk.graph()
    assert sorted(link[1:] for link in undone["links"]) == sorted(
        link[1:] for link in before["links"]
    )
    assert meaning(desk.api()) == meaning(plain)
    desk.page.keyboard.press("Control+y")
    desk.wait(f"() => app.graph.nodes.filter((n) => n.type === '{NODE}').length === 2")
    assert meaning(desk.api()) == meaning(plain)


def test_new_nodes_cover_no_others(desk: Desk) -> None:
    build(desk, *PLAIN)
    accelerate(desk)
    boxes = [
        (node["type"], *node["pos"], *(node["size"] if isinstance(node["size"], list) else
         (node["size"]["0"], node["size"]["1"])))
        for node in desk.graph()["nodes"]
    ]  # fmt: skip
    for kind, x, y, width, height in boxes:
        if kind != NODE:
            continue
        overlapping = [
            other
            for other, left, top, wide, high in boxes
            if (x, y) != (left, top)
            and x < left + wide
            and left < x + width
            and y - 30 < top + high
            and top - 30 < y + height
        ]
        assert overlapping == []


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_lora_controlnet", "hires_fix"])
def test_leaves_what_is_accelerated_already(desk: Desk, name: str) -> None:
    desk.load(example(name))
    before = desk.graph()
    accelerate(desk)
    # One that loads and accelerates in one is no loader to accelerate.
    assert said(desk)
    assert desk.graph()["nodes"] == before["nodes"]


def test_a_loader_whose_model_is_accelerated_later_is_left(desk: Desk) -> None:
    nodes, links = PLAIN
    nodes = [*nodes, ("late", NODE)]
    links = [link for link in links if link[:2] != ("lora", 0)]
    links = [*links, ("lora", 0, "late", "model"), ("late", 0, "with", "model")]
    build(desk, nodes, links)
    accelerate(desk)
    assert set(accelerated(desk.api()).values()) == {1}


def test_links_keep_their_reroutes(desk: Desk) -> None:
    build(desk, *PLAIN)
    made = desk.run(
        """() => {
            if (!app.graph.createReroute) return null;
            const sampler = app.graph.nodes.filter((node) => node.type === "KSampler")[1];
            const input = sampler.inputs.findIndex((one) => one.name === "model");
            const link = app.graph.getLink(sampler.inputs[input].link);
            const reroute = app.graph.createReroute([500, -80], link);
            return [reroute.id, sampler.id, input];
        }"""
    )
    assert made
    reroute, sampler, slot = made
    plain = meaning(desk.api())
    accelerate(desk)
    parent = desk.run(
        """([sampler, input]) => {
            const node = app.graph.getNodeById(sampler);
            return app.graph.getLink(node.inputs[input].link).parentId;
        }""",
        [sampler, slot],
    )
    assert parent == reroute
    assert meaning(desk.api()) == plain


SUBGRAPH = """(names) => {
    const chosen = app.graph.nodes.filter((node) => names.includes(node.id));
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(chosen));
    return node.id;
}"""


@pytest.mark.parametrize(
    "inside",
    [
        ("loader",),  # the model leaves the subgraph
        ("loader", "lora", "with", "text", "latent"),  # it stays inside, and leaves for another
        ("with", "without", "third"),  # it goes in
    ],
    ids=["loader", "loader-and-sampler", "samplers"],
)
def test_subgraphs(desk: Desk, inside: tuple[str, ...]) -> None:
    ids = build(desk, *PLAIN)
    plain = desk.api()
    desk.run(SUBGRAPH, [ids[name] for name in inside])
    desk.page.wait_for_timeout(300)
    accelerate(desk)
    desk.run("() => app.extensionManager.toast.removeAll?.()")
    after = desk.api()
    assert set(accelerated(after).values()) == {1}
    kinds = sorted(node["class_type"] for node in after.values())
    assert kinds.count(NODE) == 2
    assert [kind for kind in kinds if kind != NODE] == sorted(
        node["class_type"] for node in plain.values()
    )
    accelerate(desk)
    assert "already" in said(desk)
    assert desk.api() == after


def test_nothing_to_accelerate(desk: Desk) -> None:
    build(desk, [("latent", "EmptyLatentImage")], [])
    accelerate(desk)
    assert "No loader" in said(desk)
    assert len(desk.graph()["nodes"]) == 1


def test_canvas_menu(desk: Desk) -> None:
    build(desk, *PLAIN)
    desk.run("() => { app.canvas.ds.offset[1] = 0; app.canvas.ds.scale = 0.5; }")
    desk.page.mouse.click(400, 850, button="right")
    menu = desk.page.locator(".litecontextmenu")
    entry = menu.get_by_text("Accelerate this workflow", exact=True)
    entry.wait_for()
    desk.picture("canvas-menu")
    entry.click()
    desk.wait(f"() => app.graph.nodes.filter((n) => n.type === '{NODE}').length === 2")


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def vue(request: pytest.FixtureRequest, desk: Desk) -> Any:
    """Both ways of drawing nodes."""
    desk.set("Comfy.VueNodes.Enabled", request.param)
    desk.page.wait_for_timeout(500)
    yield request.param
    desk.set("Comfy.VueNodes.Enabled", False)


def badges(desk: Desk, node: Any) -> list[str]:
    """A node's badges, as its drawing reads them."""
    texts: list[str] = desk.run(
        """(id) => app.graph.getNodeById(id).badges
            .map((badge) => (typeof badge === "function" ? badge() : badge).text)""",
        node,
    )
    return [text for text in texts[1:] if text]


def test_badge_says_what_the_node_runs_on(desk: Desk, vue: bool) -> None:
    desk.load(example("sd15"))
    node = desk.node(NODE)
    assert badges(desk, node) == []
    shown = [
        ("build", "building 41 % · host's path meanwhile", "building · 41 %"),
        ("engine", "engine · 3.1x · 2 LoRAs", "engine · 3.1x"),
        ("engine", "engine · 3.1x · 52 dB from the host's own", "engine · 3.1x · 52 dB"),
        ("host", "host's path: FreeU changes the up blocks (FreeU_V2)", "host's path"),
        ("off", "not accelerated: its weights are quantised", "not accelerated"),
    ]
    for state, text, expected in shown:
        desk.run(STATUS, {"node_id": str(node), "state": state, "text": text})
        assert badges(desk, node) == [expected]
        if vue and not desk.run("() => __COMFYUI_FRONTEND_VERSION__.startsWith('1.27.')"):
            # Vue nodes were an experiment there, and drew no badges of extensions.
            badge = desk.page.locator(f'[data-node-id="{node}"]').get_by_text(expected, exact=True)
            badge.wait_for()
        elif not vue:
            assert drawn(desk, expected)
    desk.set("Switchyard.Node.Badge", False)
    assert badges(desk, node) == []
    desk.set("Switchyard.Node.Badge", True)
    assert badges(desk, node) == ["not accelerated"]
    for unknown in ("99999", "99:1", "", None):
        desk.run(STATUS, {"node_id": unknown, "state": "engine", "text": ""})
    assert badges(desk, node) == ["not accelerated"]


def drawn(desk: Desk, text: str) -> bool:
    """Whether the canvas draws this text."""
    result: bool = desk.run(
        """async (wanted) => {
            const context = CanvasRenderingContext2D.prototype;
            const original = context.fillText;
            let found = false;
            context.fillText = function (text, ...rest) {
                found ||= text === wanted;
                return original.call(this, text, ...rest);
            };
            app.canvas.setDirty(true, true);
            app.canvas.draw(true, true);
            await new Promise((done) => setTimeout(done, 100));
            context.fillText = original;
            return found;
        }""",
        text,
    )
    return result


def test_badge_inside_a_subgraph(desk: Desk) -> None:
    ids = build(desk, *PLAIN)
    accelerate(desk)
    inner = desk.node(NODE)
    outer = desk.run(SUBGRAPH, [ids["loader"], inner])
    desk.run(STATUS, {"node_id": f"{outer}:{inner}", "state": "engine", "text": "engine"})
    found = desk.run(
        """([outer, type]) => app.graph.getNodeById(outer).subgraph.nodes
            .find((node) => node.type === type).badges
            .map((badge) => (typeof badge === "function" ? badge() : badge).text)""",
        [outer, NODE],
    )
    assert found[-1] == "engine"


def test_compare_once_asks_for_one_comparison_and_leaves_the_switch(desk: Desk) -> None:
    desk.load(example("sd15"))
    node = desk.node(NODE)
    posted: list[Any] = []

    def take(route: Any) -> None:
        posted.append(json.loads(route.request.post_data))
        route.fulfill(json={"prompt_id": "0", "number": 1, "node_errors": {}})

    desk.page.route("**/api/prompt", take)
    before = desk.graph()["nodes"]
    desk.run(
        """(id) => {
            const node = app.graph.getNodeById(id);
            const ours = app.extensions.find(({ name }) => name === "Switchyard");
            ours.getNodeMenuItems(node).find((one) => one?.content).callback();
        }""",
        node,
    )
    desk.until(lambda: posted)
    assert posted[0]["prompt"][str(node)]["inputs"]["compare_once"] is True
    workflow = posted[0]["extra_data"]["extra_pnginfo"]["workflow"]
    saved = next(one for one in workflow["nodes"] if str(one["id"]) == str(node))
    assert True not in saved["widgets_values"]
    assert "host's own path" in said(desk)
    assert desk.graph()["nodes"] == before
    desk.run("() => app.queuePrompt(0, 1)")
    desk.until(lambda: len(posted) == 2)
    assert posted[1]["prompt"][str(node)]["inputs"]["compare_once"] is False


def test_compare_once_of_a_bypassed_node_says_why_not(desk: Desk) -> None:
    desk.load(example("sd15"))
    node = desk.node(NODE)
    desk.run(
        """(id) => {
            const node = app.graph.getNodeById(id);
            node.mode = 4;
            app.canvas.selectNode(node);
        }""",
        node,
    )
    desk.run("() => app.extensionManager.command.execute('Switchyard.CompareOnce')")
    desk.page.get_by_text("nothing to compare").wait_for()


def test_the_toolbox_of_a_selected_node_compares(desk: Desk) -> None:
    desk.load(example("sd15"))
    desk.run("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", desk.node(NODE))
    commands = desk.run(
        """() => app.extensions.find(({ name }) => name === "Switchyard")
            .getSelectionToolboxCommands([...app.canvas.selectedItems][0])"""
    )
    assert commands == ["Switchyard.CompareOnce"]
    desk.run(
        """() => app.canvas.selectNode(
            app.graph.nodes.find((node) => node.type === "KSampler"))"""
    )
    assert not desk.run(
        """() => app.extensions.find(({ name }) => name === "Switchyard")
            .getSelectionToolboxCommands([...app.canvas.selectedItems][0]).length"""
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_examples_open_without_missing_nodes(desk: Desk, path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    desk.load(data)
    assert desk.run("() => app.graph.nodes.every((n) => LiteGraph.registered_node_types[n.type])")
    graph = desk.graph()
    assert len(graph["nodes"]) == len(data["nodes"])
    assert len(graph["links"]) == len(data["links"])
    for old in data["nodes"]:
        new = next(node for node in graph["nodes"] if str(node["id"]) == str(old["id"]))
        assert (new.get("widgets_values") or []) == (old.get("widgets_values") or [])
    prompt = desk.api()
    assert any(node["class_type"].startswith("Switchyard") for node in prompt.values())
    for node in prompt.values():  # every link leads somewhere
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in prompt


def test_node_help_in_both_languages(desk: Desk) -> None:
    names = {"en": "# Accelerate Model", "zh": "# 加速模型"}
    page = desk.run(
        """async () => {
            const get = async (path) => (await fetch(path)).text();
            const root = "/extensions/switchyard/docs/SwitchyardAccelerate";
            return { en: await get(`${root}.md`), zh: await get(`${root}/zh.md`) };
        }"""
    )
    for language, title in names.items():
        assert page[language].startswith(title)
