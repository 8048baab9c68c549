"""What the panel says of a workflow before it is queued: how the workflow is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from comfyui.server import Server
from sparse import ldm_shapes, sparse_file

from accel.compiler import open_cache
from accel.hosts.comfyui import routes as server_side
from accel.hosts.comfyui.builder import Builder
from accel.hosts.comfyui.journal import Journal
from accel.tuning.profile import profiled

from .browser import Desk
from .samples import Routes
from .test_graph import BUILD, EMPTY, NODE, SUBGRAPH
from .test_run import SET as LAY_OUT

pytestmark = pytest.mark.comfyui

FILE = "tiny-sd15-a.safetensors"
SAMPLING: dict[str, Any] = {
    **{"folder": "checkpoints", "name": FILE, "width": 832, "height": 1216, "batch": 2},
    **{"steps": 25, "sampler": "dpmpp_2m", "guided": True, "controlnet": False},
}

NODES = [
    ("loader", "CheckpointLoaderSimple"),
    ("fast", NODE),
    ("text", "CLIPTextEncode"),
    ("latent", "EmptyLatentImage"),
    ("sampler", "KSampler"),
]
LINKS = [
    ("loader", 0, "fast", "model"),
    ("loader", 1, "text", "clip"),
    ("fast", 0, "sampler", "model"),
    ("text", 0, "sampler", "positive"),
    ("text", 0, "sampler", "negative"),
    ("latent", 0, "sampler", "latent_image"),
]
VALUES = {
    "loader": {"ckpt_name": FILE},
    "latent": {"width": 832, "height": 1216, "batch_size": 2},
    "sampler": {"steps": 25, "cfg": 7.0, "sampler_name": "dpmpp_2m"},
}

SET = """([ids, values]) => {
    for (const [name, given] of Object.entries(values)) {
        const node = app.graph.getNodeById(ids[name]);
        for (const [widget, value] of Object.entries(given)) {
            node.widgets.find((one) => one.name === widget).value = value;
        }
    }
}"""
MODE = "([id, mode]) => { app.graph.getNodeById(id).mode = mode; }"
MUTED, BYPASSED = 2, 4


@pytest.fixture
def routes(desk: Desk) -> Routes:
    return Routes(desk.page)


def build(
    desk: Desk,
    nodes: list[tuple[str, str]] | None = None,
    links: list[tuple[str, int, str, str]] | None = None,
    values: dict[str, Any] | None = None,
) -> Any:
    """A plain workflow with further nodes; a later link into an input takes an earlier one's place.

    Returns the nodes' ids by name.
    """
    every = {(target, name): one for one in [*LINKS, *(links or [])] for *_, target, name in [one]}
    desk.load(EMPTY)
    ids = desk.run(BUILD, {"nodes": [*NODES, *(nodes or [])], "links": list(every.values())})
    desk.run(SET, [ids, VALUES])
    desk.run(SET, [ids, values or {}])
    return ids


def asked(desk: Desk, routes: Routes) -> list[dict[str, Any]]:
    """Of which samplings the panel asks now."""
    desk.open_panel().get_by_text("NVIDIA GeForce RTX 4090").wait_for()
    desk.page.wait_for_timeout(1000)  # what has changed is asked of by then
    routes.asked.clear()
    desk.page.get_by_role("button", name="Refresh").click()
    desk.page.wait_for_timeout(1500)  # it looks every 0.7 s
    return list(routes.asked)


def test_the_panel_says_what_the_workflow_will_take(desk: Desk, routes: Routes) -> None:
    ids = build(desk)
    panel = desk.open_panel()
    panel.get_by_text("about 1.6 s · 5.0 GiB of VRAM").wait_for()
    assert "832 × 1216 · batch 2 · steps: 25" in panel.inner_text()
    assert routes.asked[0] == SAMPLING and routes.posts == []
    # It follows the workflow, and asks once for what is as it was.
    routes.prediction = {"seconds": 83.2, "bytes": 11.6 * 2**30}
    desk.run(SET, [ids, {"latent": {"width": 1024, "height": 1024, "batch_size": 1}}])
    panel.get_by_text("about 1 min 23 s · 12 GiB of VRAM").wait_for()
    assert "1024 × 1024 · steps: 25" in panel.inner_text()
    count = len(routes.asked)
    desk.page.wait_for_timeout(1600)
    assert len(routes.asked) == count
    # Nothing is said of what is not known, or not on the engine.
    routes.prediction = {"seconds": None, "bytes": None}
    desk.run(SET, [ids, {"sampler": {"steps": 30}}])
    panel.get_by_text("about ").wait_for(state="detached")
    routes.prediction = {"seconds": 2.0, "bytes": 2**30}
    desk.run(SET, [ids, {"sampler": {"steps": 31}}])
    panel.get_by_text("about 2.0 s · 1.0 GiB").wait_for()
    desk.run(MODE, [ids["fast"], BYPASSED])
    panel.get_by_text("about ").wait_for(state="detached")


def test_what_the_server_answers_is_what_is_said(
    desk: Desk, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack's own answers, as if an H200 that has run nothing were the device."""
    gpu, name = profiled()["NVIDIA H200"], "sd_xl_base_1.0.safetensors"
    monkeypatch.setattr(server_side, "_hardware", lambda: (gpu.name, gpu, None))
    path = sparse_file(tmp_path / name, ldm_shapes("sdxl", "model.diffusion_model."))
    names = {"checkpoints": [name]}
    answers = server_side.Panel(
        lambda folder: names.get(folder, []),
        lambda folder, name: str(path),
        list,
        Builder(open_cache(tmp_path / "cache", 1 << 30), lambda data: None),
        Journal(tmp_path / "cache" / "journal.json"),
    )
    state = answers.state() | {"host": server.get("/switchyard/state")["host"]}
    desk.page.route("**/switchyard/state", lambda route: route.fulfill(json=state))
    desk.page.route(
        "**/switchyard/checkpoints", lambda route: route.fulfill(json=answers.checkpoints())
    )
    said: list[dict[str, Any]] = []

    def predict(route: Any) -> None:
        said.append(answers.predict(route.request.post_data_json))
        route.fulfill(json=said[-1])

    desk.page.route("**/switchyard/predict", predict)
    size = {"width": 1024, "height": 1024, "batch_size": 1}
    ids = build(desk, values={"loader": {"ckpt_name": name}, "latent": size})
    places = {"loader": [0, 0], "latent": [0, 200], "text": [360, 200], "fast": [360, 0]}
    desk.run(LAY_OUT, [ids, {}, places | {"sampler": [820, 0]}, {"text": [400, 180]}])
    panel = desk.open_panel()
    panel.get_by_text(re.compile("^about ")).wait_for()
    panel.get_by_text(name).wait_for()
    (answer,) = said
    text = f"about {answer['seconds']:.1f} s · {answer['bytes'] / 2**30:.1f} GiB of VRAM"
    assert text in panel.inner_text() and 0.2 < answer["seconds"] < 2
    desk.picture("predicted")


def test_in_chinese(desk: Desk, routes: Routes) -> None:
    desk.set("Comfy.Locale", "zh")
    try:
        build(
            desk
        )  # the front end opens the workflow anew, as it knew it, when it changes language
        panel = desk.open_panel()
        panel.get_by_text("约 1.6 秒 · 显存 5.0 GiB").wait_for()
        assert "25 步" in panel.inner_text() and "next." not in panel.inner_text()
    finally:
        desk.set("Comfy.Locale", "en")


def test_a_closed_panel_asks_nothing(desk: Desk, routes: Routes) -> None:
    ids = build(desk)
    desk.open_panel().get_by_text("about ").wait_for()
    desk.page.locator(".switchyard-tab-button").click()
    desk.page.locator(".sy-panel").wait_for(state="detached")
    routes.asked.clear()
    desk.run(SET, [ids, {"sampler": {"steps": 30}}])
    desk.page.wait_for_timeout(1600)
    assert routes.asked == []


READ: dict[str, tuple[list[Any], list[Any], dict[str, Any], dict[str, Any] | None]] = {
    "reroutes and LoRAs": (
        [("lora", "LoraLoaderModelOnly"), ("wire", "Reroute"), ("size", "Reroute")],
        [
            ("loader", 0, "lora", "model"),
            ("lora", 0, "wire", ""),
            ("wire", 0, "fast", "model"),
            ("latent", 0, "size", ""),
            ("size", 0, "sampler", "latent_image"),
        ],
        {},
        {},
    ),
    "our own loader": (
        [("own", "SwitchyardLoadCheckpoint")],
        [("own", 0, "sampler", "model")],
        {"own": {"ckpt_name": FILE}},
        {},
    ),
    "not accelerated": ([], [("loader", 0, "sampler", "model")], {}, None),
    "without guidance": ([], [], {"sampler": {"cfg": 1.0}}, {"guided": False}),
    "with it in any case": (
        *([], []),
        {"sampler": {"cfg": 1.0, "sampler_name": "euler_cfg_pp"}},
        {"sampler": "euler_cfg_pp"},
    ),
    "a part of the steps": (
        [("part", "KSamplerAdvanced")],
        [
            ("fast", 0, "part", "model"),
            ("text", 0, "part", "positive"),
            ("text", 0, "part", "negative"),
            ("latent", 0, "part", "latent_image"),
            ("loader", 0, "sampler", "model"),  # is not on the engine
        ],
        {"part": {"steps": 25, "start_at_step": 20, "end_at_step": 10000, "cfg": 1.0}},
        {"steps": 5, "guided": False, "sampler": "euler"},
    ),
    "a number from elsewhere": (
        [("number", "PrimitiveInt")],
        [("number", 0, "latent", "width")],
        {"number": {"value": 640}},
        {"width": 640},
    ),
    "a number that is computed": (
        [("image", "EmptyImage"), ("number", "GetImageSize")],
        [("image", 0, "number", "image"), ("number", 0, "latent", "width")],
        {},
        None,
    ),
    "a ControlNet": (
        [("net", "ControlNetLoader"), ("apply", "ControlNetApplyAdvanced")],
        [
            ("net", 0, "apply", "control_net"),
            ("text", 0, "apply", "positive"),
            ("text", 0, "apply", "negative"),
            ("apply", 0, "sampler", "positive"),
        ],
        {},
        {"controlnet": True},
    ),
    "an upscaled latent": (
        [("larger", "LatentUpscaleBy")],
        [("latent", 0, "larger", "samples"), ("larger", 0, "sampler", "latent_image")],
        {"larger": {"scale_by": 1.5}},
        {"width": 1248, "height": 1824},
    ),
    "a latent made as large as said": (
        [("larger", "LatentUpscale")],
        [("latent", 0, "larger", "samples"), ("larger", 0, "sampler", "latent_image")],
        {"larger": {"width": 1024, "height": 768}},
        {"width": 1024, "height": 768},
    ),
    "a side that is to be found out": (
        [("larger", "LatentUpscale")],
        [("latent", 0, "larger", "samples"), ("larger", 0, "sampler", "latent_image")],
        {"larger": {"width": 1024, "height": 0}},
        None,
    ),
    "repeated": (
        [("more", "RepeatLatentBatch")],
        [("latent", 0, "more", "samples"), ("more", 0, "sampler", "latent_image")],
        {"more": {"amount": 3}},
        {"batch": 6},
    ),
    "a picture": (
        [("image", "EmptyImage"), ("encode", "VAEEncode")],
        [
            ("image", 0, "encode", "pixels"),
            ("loader", 2, "encode", "vae"),
            ("encode", 0, "sampler", "latent_image"),
        ],
        {},
        None,
    ),
}


def test_what_is_read_from_a_workflow(desk: Desk, routes: Routes) -> None:
    found, expected = {}, {}
    for case, (nodes, links, values, wanted) in READ.items():
        build(desk, nodes, links, values)
        found[case] = asked(desk, routes)
        expected[case] = [] if wanted is None else [SAMPLING | wanted]
    assert found == expected


@pytest.mark.parametrize(
    "inside",
    [("loader", "fast"), ("latent",), ("fast", "sampler"), ("loader", "fast", "text", "sampler")],
    ids="-".join,
)
def test_subgraphs_are_read_too(desk: Desk, routes: Routes, inside: tuple[str, ...]) -> None:
    ids = build(desk)
    outer = desk.run(SUBGRAPH, [ids[name] for name in inside])
    desk.page.wait_for_timeout(300)
    assert asked(desk, routes) == [SAMPLING]
    desk.run(MODE, [outer, MUTED])
    assert asked(desk, routes) == []


def test_every_sampling_is_said_and_what_does_not_run_is_not(desk: Desk, routes: Routes) -> None:
    links = [
        ("fast", 0, "second", "model"),
        ("text", 0, "second", "positive"),
        ("text", 0, "second", "negative"),
        ("sampler", 0, "larger", "samples"),
        ("larger", 0, "second", "latent_image"),
    ]
    values = {"larger": {"scale_by": 2.0}, "second": VALUES["sampler"]}
    ids = build(desk, [("larger", "LatentUpscaleBy"), ("second", "KSampler")], links, values)
    larger = SAMPLING | {"width": 1664, "height": 2432}
    assert asked(desk, routes) == [SAMPLING, larger]
    assert desk.open_panel().get_by_text("about ").count() == 2
    desk.run(MODE, [ids["second"], MUTED])
    assert asked(desk, routes) == [SAMPLING]
    desk.run(MODE, [ids["second"], 0])
    desk.run(MODE, [ids["larger"], BYPASSED])
    assert asked(desk, routes) == [SAMPLING, SAMPLING]
    desk.run(MODE, [ids["latent"], MUTED])
    assert asked(desk, routes) == []
