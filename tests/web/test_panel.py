"""The sidebar panel, with the server's answers given by the test."""

from __future__ import annotations

from typing import Any

import pytest

from .browser import Desk
from .samples import BUILDING, BUILT, FAILED, RUN, SHIPPED, Routes

pytestmark = pytest.mark.comfyui

EMIT = """([name, detail]) => {
    app.api.dispatchEvent(new CustomEvent(name, { detail }));
}"""


@pytest.fixture
def routes(desk: Desk) -> Routes:
    return Routes(desk.page)


def texts(panel: Any, selector: str) -> list[str]:
    return [text.strip() for text in panel.locator(selector).all_inner_texts()]


def test_shows_gpu_engines_checkpoints_builds_and_time_saved(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    panel.get_by_text("NVIDIA GeForce RTX 4090").wait_for()
    said = panel.inner_text()
    for expected in (
        "24 GiB · compute 8.9 · kernels timed for this GPU: 1,431 calls",
        "1 h 23 min",
        "runs: 212 · steps on the engine: 4,240",
        "building 41 %",
        "tracing the network",
        "a block calls .item()",
        "14 of 20 steps on the engine · 42 ms a step",
        "FreeU changes the up blocks",
        "Bypass “FreeU_V2” if you do not need it",
        "Free VRAM",
        "sdxl · 1.2 MiB · comes with the pack · 5.9 GiB VRAM · used 3 minutes ago",
        "used 3 days ago",
        "used never",
        "1216 × 832 · batch 2 · ControlNet",
        "a GGUF file: its weights are quantised",
        "5 of 8 ready",
    ):
        assert expected in said, expected
    badges = texts(panel, "[data-checkpoint] .sy-pill")
    assert badges.count("engine ready") == 5
    assert {"will build", "not supported", "unreadable"} <= set(badges)
    assert float(panel.locator("progress").get_attribute("value")) == pytest.approx(0.41)


def test_text_of_the_server_stays_text(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    panel.get_by_text("Stable Diffusion 1.5, <b>pruned</b>").wait_for()
    assert panel.locator("b").count() == 0


def test_light_theme(desk: Desk, routes: Routes) -> None:
    desk.set("Comfy.ColorPalette", "light")
    try:
        panel = desk.open_panel()
        panel.get_by_text("FreeU_V2", exact=True).wait_for()
        unreadable = desk.run(_LOW_CONTRAST)
    finally:
        desk.set("Comfy.ColorPalette", "dark")
    assert unreadable == []
    assert desk.run(_LOW_CONTRAST) == []


# Texts of the panel with a contrast below 4.5 (WCAG AA) to what they stand on.
_LOW_CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.canvas.width = canvas.canvas.height = 1;
    const rgba = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
        }
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((v) => {
            v /= 255;
            return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const found = [];
    for (const element of document.querySelectorAll(".sy-panel *")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || element.closest(".sy-live, [hidden]")) continue;
        const below = [];
        for (let one = element; one; one = one.parentElement) {
            below.unshift(getComputedStyle(one).backgroundColor);
        }
        const back = luminance(rgba(below));
        const front = luminance(rgba([...below, getComputedStyle(element).color]));
        const contrast = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
        if (contrast < 4.5) found.push(`${element.textContent}: ${contrast.toFixed(1)}`);
    }
    return found;
}"""


def test_deleting_an_engine_asks_first(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    assert panel.locator(f'[data-engine="{SHIPPED}"] .sy-danger').count() == 0
    bin_button = panel.locator(f'[data-engine="{BUILT}"] .sy-danger')
    bin_button.click()
    dialog = desk.page.get_by_role("dialog")
    dialog.get_by_text("Delete this engine?").wait_for()
    dialog.get_by_role("button", name="Cancel").click()
    dialog.wait_for(state="hidden")
    assert routes.posts == []
    bin_button.click()
    dialog.get_by_role("button", name="Delete").click()
    panel.locator(f'[data-engine="{BUILT}"]').wait_for(state="detached")
    assert routes.posts == [("engines/delete", {"id": BUILT})]
    assert "820 KiB are free" in panel.locator(".sy-live").inner_text()


def test_a_refusal_is_shown_in_the_servers_words(desk: Desk, routes: Routes) -> None:
    routes.refusal = "the engine is in use"
    panel = desk.open_panel()
    panel.locator(f'[data-build="{BUILDING}"] button').click()
    desk.page.locator(".p-toast").get_by_text("the engine is in use").wait_for()
    assert routes.posts == [("builds/cancel", {"id": BUILDING})]
    desk.errors.clear()  # the 409 itself


def test_builds_are_followed_cancelled_and_tried_again(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    row = panel.locator(f'[data-build="{BUILDING}"]')
    row.get_by_text("building 41 %").wait_for()
    build = dict(routes.state["builds"][0])
    desk.run(EMIT, ["switchyard.build", build | {"fraction": 0.875, "text": "lowering"}])
    row.get_by_text("building 87 %").wait_for()
    row.get_by_text("lowering").wait_for()
    icon = desk.page.locator(".switchyard-tab-button .sidebar-icon-badge")
    assert icon.inner_text() == "87%"
    row.get_by_role("button", name="Cancel").click()
    panel.locator(f'[data-build="{FAILED}"]').get_by_role("button", name="Retry").click()
    desk.until(lambda: len(routes.posts) == 2)
    assert routes.posts[1] == ("builds/retry", {"id": FAILED})
    routes.state["builds"] = []
    reads = routes.reads
    desk.run(EMIT, ["switchyard.build", build | {"state": "ready", "fraction": 1.0}])
    panel.locator('[data-section="builds"]').wait_for(state="hidden")
    desk.until(lambda: routes.reads > reads)
    desk.page.locator(".p-toast").get_by_text("SDXL inpainting is ready").wait_for()
    assert icon.count() == 0


def test_a_run_arrives_while_the_panel_is_open(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    panel.get_by_text("FreeU_V2", exact=True).wait_for()
    engine = RUN | {"mode": "engine", "reasons": [], "engine_calls": 20, "host_calls": 0, "id": 8}
    fine = engine | {"graphs": 0, "captures": 0, "swaps_ms": 0.02}
    routes.state["last_run"] = fine
    desk.run(EMIT, ["switchyard.run", fine])
    panel.get_by_text("Nothing slowed it down").wait_for()
    assert panel.get_by_text("FreeU_V2", exact=True).count() == 0


@pytest.mark.parametrize(
    ("happened", "said"),
    [
        ({"compiling": True}, "Kernels for this GPU are being compiled"),
        ({"swaps_ms": 840.0}, "weights brought in: 840 ms"),
        ({"graphs": 2}, "CUDA graphs captured: 2"),
        ({"captures": 1}, "networks traced: 1"),
        ({"error": "the server went away"}, "It ended early: the server went away"),
    ],
)
def test_what_slows_a_run_on_the_engine_is_said(
    desk: Desk, routes: Routes, happened: dict[str, Any], said: str
) -> None:
    engine = RUN | {"mode": "engine", "reasons": [], "engine_calls": 20, "host_calls": 0}
    fine = {"graphs": 0, "captures": 0, "swaps_ms": 0.02}
    routes.state["last_run"] = engine | fine | happened | {"compared_db": 71.4}
    panel = desk.open_panel()
    panel.get_by_text(said).wait_for()
    assert "71 dB from the host's own" in panel.inner_text()
    assert "Nothing slowed it down" not in panel.inner_text()


def test_render_may_repeat_and_closing_leaves_nothing_behind(desk: Desk, routes: Routes) -> None:
    desk.run(
        """() => {
            window.listening = new Map();
            const count = (type, by) => listening.set(type, (listening.get(type) ?? 0) + by);
            for (const [name, by] of [["addEventListener", 1], ["removeEventListener", -1]]) {
                const original = app.api[name];
                app.api[name] = function (type, ...rest) {
                    count(type, by);
                    return original.call(this, type, ...rest);
                };
            }
        }"""
    )
    for _ in range(3):
        panel = desk.open_panel()
        panel.get_by_text("FreeU_V2", exact=True).wait_for()
        desk.run(
            """() => {
                const tab = app.extensionManager.sidebarTab.sidebarTabs.find(
                    ({ id }) => id === "switchyard");
                const container = document.querySelector(".sy-panel").parentElement;
                tab.render(container);
                tab.render(container);
            }"""
        )
        assert panel.count() == 1
        desk.page.locator(".switchyard-tab-button").click()
        panel.wait_for(state="detached")
        assert set(desk.run("() => [...listening.values()]")) == {0}
    reads = routes.reads
    desk.run(EMIT, ["switchyard.run", RUN])
    desk.page.wait_for_timeout(300)
    assert routes.reads == reads


def test_a_scan_is_looked_at_again_until_it_is_done(desk: Desk, routes: Routes) -> None:
    everything, routes.checkpoints = routes.checkpoints, []
    routes.scanning = True
    panel = desk.open_panel()
    panel.get_by_text("reading…").wait_for()
    routes.checkpoints, routes.scanning = everything, False
    panel.get_by_text("5 of 8 ready").wait_for()
    reads = routes.reads
    desk.page.wait_for_timeout(2000)
    assert routes.reads == reads


def test_filter_and_keyboard(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    box = panel.get_by_role("searchbox")
    box.fill("DREAM")
    names = texts(panel, "[data-checkpoint] .sy-name")
    assert names == ["dreamshaperXL_v21.safetensors", "dreamshaper_8.safetensors"]
    box.press("End")
    desk.run(EMIT, ["switchyard.run", RUN])  # new data while somebody types
    desk.page.wait_for_timeout(400)
    box.press_sequentially("shaper_")
    assert texts(panel, "[data-checkpoint] .sy-name") == ["dreamshaper_8.safetensors"]
    panel.get_by_role("button", name="Refresh").focus()
    reached = set()
    for _ in range(12):
        desk.page.keyboard.press("Tab")
        reached.add(desk.run("() => document.activeElement?.dataset?.key"))
    assert {"accelerate", f"cancel-{BUILDING}", f"retry-{FAILED}", f"delete-{BUILT}"} <= reached
    panel.locator('[data-key="section-engines"]').focus()
    desk.page.keyboard.press("Enter")
    assert not panel.locator(f'[data-engine="{SHIPPED}"]').is_visible()
    desk.run(EMIT, ["switchyard.run", RUN])
    desk.page.wait_for_timeout(400)
    assert not panel.locator(f'[data-engine="{SHIPPED}"]').is_visible()
    assert desk.run("() => document.activeElement.dataset.key") == "section-engines"


def test_a_server_that_fails_is_an_error_in_words(desk: Desk, routes: Routes) -> None:
    desk.page.unroute("**/switchyard/*")
    desk.page.route(
        "**/switchyard/state",
        lambda route: route.fulfill(status=500, json={"error": "the cache folder is gone"}),
    )
    panel = desk.open_panel()
    panel.get_by_role("alert").get_by_text("the cache folder is gone").wait_for()
    desk.errors.clear()  # the 500 itself
    desk.page.unroute("**/switchyard/state")
    Routes(desk.page)
    panel.get_by_role("button", name="Refresh").click()
    panel.get_by_text("NVIDIA GeForce RTX 4090").wait_for()
    assert panel.get_by_role("alert").count() == 0


def test_chinese(desk: Desk, routes: Routes) -> None:
    panel = desk.open_panel()
    panel.get_by_text("Time saved so far").wait_for()
    desk.set("Comfy.Locale", "zh")
    try:
        panel = desk.open_panel()
        panel.get_by_text("累计节省的时间").wait_for()
        panel.get_by_text("引擎就绪").first.wait_for()
        said = panel.inner_text()
        for expected in (
            "1 小时 23 分",
            "FreeU 更改了上采样块",
            "引擎需要 6.1 GiB 显存，只有 4.0 GiB",
            "如果不需要，请绕过“FreeU_V2”",
            "正在追踪网络",
            "a block calls .item()",  # an error of another program
            "GGUF 文件：其权重经过量化",
            "该文件为空：请重新获取该文件",
        ):
            assert expected in said, expected
        assert "Engines" not in said
        # A key without a text would stand there as it is.
        assert not any(f"{name}." in said for name in ("panel", "run", "engines", "checkpoints"))
    finally:
        desk.set("Comfy.Locale", "en")
    panel = desk.open_panel()
    panel.get_by_text("Time saved so far").wait_for()
    assert "FreeU changes the up blocks" in panel.inner_text()


def test_without_a_gpu_and_before_the_first_run(desk: Desk, routes: Routes) -> None:
    routes.state |= {"gpu": None, "engines": [], "builds": [], "last_run": None}
    routes.state["totals"] = {"saved_seconds": 0, "runs": 0, "engine_calls": 0}
    routes.checkpoints = []
    panel = desk.open_panel()
    panel.get_by_text("No supported GPU").wait_for()
    said = panel.inner_text()
    for expected in ("No engine yet", "No run yet", "No checkpoints", "0.0 s"):
        assert expected in said
    assert not panel.locator('[data-section="builds"]').is_visible()
