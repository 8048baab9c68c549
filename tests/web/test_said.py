"""The server's texts in Chinese, wherever the front end shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from .browser import Desk
from .test_graph import NODE, badges, example, vue
from .test_run import LINE
from .test_texts import ROOT, said

__all__ = ["vue"]  # the fixture

pytestmark = pytest.mark.comfyui

SAID = """async (texts) => {
    const { said } = await import("/extensions/switchyard/js/said.js");
    return texts.map(said);
}"""

# As the server sends it: first its own event, then the host's.
SAY = """({ node_id, state, text }) => {
    const send = (name, detail) => app.api.dispatchEvent(new CustomEvent(name, { detail }));
    send("switchyard.status", { node_id, state, text });
    send("progress_text", { nodeId: node_id, text });
}"""

REPORT = """\
dreamshaper_8.safetensors: engine for 14 of 20 calls · 1 LoRA · host's path: FreeU changes the up \
blocks (FreeU_V2)
structure sd15 on NVIDIA H200, 512x512 batch 2, 768x768 batch 1
engine: 14 calls, 42.1 ms each
host's path: 1 call
host's path: FreeU changes the up blocks (FreeU_V2)

VRAM in use 512 of 1024 MiB"""

REPORT_IN_CHINESE = """dreamshaper_8.safetensors: 20 次调用中有 14 次使用引擎 · 1 个 LoRA · \
原有路径：FreeU 更改了上采样块 (FreeU_V2)
结构 sd15，设备 NVIDIA H200，512x512 批次 2, 768x768 批次 1
引擎：14 次调用，每次 42.1 毫秒
原有路径：1 次调用
原有路径：FreeU 更改了上采样块 (FreeU_V2)

已用显存 512 / 1024 MiB"""


@pytest.fixture
def chinese(desk: Desk) -> Iterator[Desk]:
    desk.set("Comfy.Locale", "zh")
    yield desk
    desk.set("Comfy.Locale", "en")


def test_every_template_finds_its_own_translation(chinese: Desk) -> None:
    numbers = {"count", "db", "ms", "percent", "ratio"}
    texts, expected = [], []
    for english, translation in said().items():
        values = {
            name: str(40 + index) if name in numbers else f"Value{index}"
            for index, name in enumerate(re.findall(r"\{(\w+)\}", english))
        }
        texts.append(english.format_map(values))
        expected.append(translation.format_map(values))
    found = chinese.run(SAID, texts)
    wrong = [one for one in zip(texts, found, expected, strict=True) if one[1] != one[2]]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("building 41 % · host's path meanwhile", "构建中 41 % · 期间使用原有路径"),
        ("engine · 3.1x · 2 LoRAs", "引擎 · 3.1x · 2 个 LoRA"),
        ("engine · 51 ms/step · 1 ControlNet", "引擎 · 51 毫秒/步 · 1 个 ControlNet"),
        (
            "host's path: FreeU changes the up blocks (FreeU_V2); "
            "a LoRA is loaded in bypass mode (Load LoRA (Bypass))",
            "原有路径：FreeU 更改了上采样块 (FreeU_V2); 有 LoRA 以绕过模式加载 (加载 LoRA（绕过）)",
        ),
        (
            "host's path: another pack changes how blocks run",
            "原有路径：其他扩展更改了各模块的运行方式",
        ),
        (
            "host's path: X replaces a part of the network (input_blocks.1) (X)",
            "原有路径：X 替换了网络的一部分（input_blocks.1） (X)",
        ),
        (
            "host's path: input_blocks.0.0 (Conv2d) has its method forward replaced",
            "原有路径：input_blocks.0.0 (Conv2d)的方法 forward 被替换",
        ),
        (
            "not accelerated: Flux is not supported: Stable Diffusion 1, 2 and XL are",
            "未加速：Flux 不受支持：支持的是 Stable Diffusion 1、2 和 XL",
        ),
        (
            "host's path: its engine could not be built: the build's process fell silent",
            "原有路径：无法构建其引擎：构建进程失去响应",
        ),
        ("the engine failed: ValueError: Load LoRA; b", "引擎出错：ValueError: Load LoRA; b"),
        ("Load LoRA", "Load LoRA"),
        ("something nobody has translated (yet)", "something nobody has translated (yet)"),
        ("", ""),
        (REPORT, REPORT_IN_CHINESE),
    ],
)
def test_texts_are_translated_part_by_part(chinese: Desk, text: str, expected: str) -> None:
    assert chinese.run(SAID, [text]) == [expected]


def test_english_stays_as_the_server_says_it(desk: Desk) -> None:
    assert desk.run(SAID, [REPORT, "engine · 3.1x"]) == [REPORT, "engine · 3.1x"]


def test_the_help_pages_show_lines_as_nodes_do(chinese: Desk) -> None:
    docs = ROOT / "web" / "docs"
    for page in sorted(docs.glob("*.md")):
        pages = (page, docs / page.stem / "zh.md")
        lines = [re.findall(r"^- \*\*([^*]+)\*\*", one.read_text("utf-8"), re.M) for one in pages]
        assert chinese.run(SAID, lines[0]) == lines[1]


def test_lines_on_nodes_follow_the_language(desk: Desk, vue: bool) -> None:
    desk.load(example("sd15"))
    node = desk.node(NODE)
    lines = [
        ("build", "building 41 % · host's path meanwhile", "构建中 41 % · 期间使用原有路径"),
        ("engine", "engine · 3.1x · 2 LoRAs", "引擎 · 3.1x · 2 个 LoRA"),
        (
            "host",
            "host's path: FreeU changes the up blocks (FreeU_V2)",
            "原有路径：FreeU 更改了上采样块 (FreeU_V2)",
        ),
    ]

    def say(state: str, text: str) -> None:
        desk.run(SAY, {"node_id": str(node), "state": state, "text": text})

    def shows(text: str, badge: str) -> None:
        desk.until(lambda: desk.run(LINE, node) == text)
        assert badges(desk, node)[0].startswith(badge)

    for state, english, _ in lines:
        say(state, english)
        shows(english, re.split(" 4| ·|:", english)[0])
    desk.set("Comfy.Locale", "zh")
    try:
        shows(lines[-1][2], "原有路径")  # of before, although the nodes were made anew
        for state, english, chinese in lines:
            say(state, english)
            shows(chinese, re.split(" 4| ·|：", chinese)[0])
            desk.page.get_by_text(chinese).first.wait_for()
    finally:
        desk.set("Comfy.Locale", "en")
    shows(lines[-1][1], "host's path")
    desk.page.get_by_text(lines[-1][1]).first.wait_for()


def test_lines_of_other_nodes_are_left_alone(chinese: Desk) -> None:
    chinese.load(example("sd15"))
    other = chinese.node("KSampler")
    chinese.run(SAY, {"node_id": str(other), "state": "engine", "text": "engine"})
    assert chinese.run(LINE, other) == "engine"


def test_the_report_is_shown_in_chinese(chinese: Desk) -> None:
    shown: Any = chinese.run(
        """(text) => {
            const node = LiteGraph.createNode("SwitchyardReport");
            app.graph.add(node);
            node.onExecuted({ text: [text] });
            return node.widgets.find(({ name }) => name === "text").value;
        }""",
        REPORT,
    )
    assert shown == REPORT_IN_CHINESE
