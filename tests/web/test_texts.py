"""Texts, help pages and workflows as files: complete in both languages, and used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "web").rglob("*.js"))
LANGUAGES = ("en", "zh")
NODES = (
    "SwitchyardAccelerate",
    "SwitchyardLoadCheckpoint",
    "SwitchyardLoadDiffusionModel",
    "SwitchyardAccelerateControlNet",
    "SwitchyardReport",
)


def read(language: str, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        (ROOT / "locales" / language / f"{name}.json").read_text("utf-8")
    )
    return data


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@pytest.mark.parametrize("name", ["main", "nodeDefs", "commands", "settings"])
def test_both_languages_have_the_same_texts_and_places(name: str) -> None:
    english, chinese = (flat(read(language, name)) for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert text and chinese[key], key
        places = [set(re.findall(r"\{\w+\}", value)) for value in (text, chinese[key])]
        assert places[0] == places[1], key


def test_every_text_that_a_script_asks_for_is_there_and_none_is_left_over() -> None:
    source = "\n".join(path.read_text("utf-8") for path in SCRIPTS)
    asked = set(re.findall(r'\bt\(\s*"([\w.]+)"', source))
    asked |= set(re.findall(r'"((?:accelerate|gpu|builds|run|engines)\.\w+)"', source))
    stems = set(re.findall(r"\bt\(`([\w.]+\.)\$\{", source)) | {"advice."}
    texts = flat(read("en", "main")["switchyard"])
    missing = {key for key in asked if key not in texts and f"{key}." not in stems}
    assert not missing
    # `section()` titles are put together from the section's name.
    stems |= {f"{name}.title" for name in ("builds", "run", "engines", "checkpoints")}
    unused = {key for key in texts if key not in asked and not key.startswith(tuple(stems))}
    assert not unused


def test_advice_has_a_text_for_each_rule() -> None:
    source = (ROOT / "web" / "js" / "advice.js").read_text("utf-8")
    rules = set(re.findall(r'/i, "(\w+)"\]', source)) | {"node", "other"}
    assert rules == read("en", "main")["switchyard"]["advice"].keys()


@pytest.mark.parametrize("node", NODES)
def test_every_node_has_help_and_definitions(node: str) -> None:
    docs = ROOT / "web" / "docs"
    for page in (docs / f"{node}.md", docs / node / "zh.md"):
        assert page.read_text("utf-8").startswith("# ")
    for language in LANGUAGES:
        definition = read(language, "nodeDefs")[node]
        assert definition["display_name"] and definition["description"]
    inputs = read("en", "nodeDefs")[node]["inputs"]
    for page in (docs / f"{node}.md", docs / node / "zh.md"):
        text = page.read_text("utf-8")
        assert [name for name in inputs if f"**{name}**" not in text] == []


@pytest.mark.parametrize("node", NODES)
def test_help_pages_say_as_much_in_both_languages(node: str) -> None:
    docs = ROOT / "web" / "docs"
    shapes = []
    for page in (docs / f"{node}.md", docs / node / "zh.md"):
        lines = page.read_text("utf-8").splitlines()
        kinds = [re.match(r"(#+|-|\| \*\*\w+\*\*|\|)?", line) for line in lines if line]
        shapes.append([kind[0] for kind in kinds if kind])
        # What the node says itself stands there in English, in both.
        shapes[-1] += [text for line in lines for text in re.findall(r"^- \*\*([^*]+)\*\*", line)]
    assert shapes[0] == shapes[1]


def test_scripts_never_parse_text_as_html_and_fetch_nothing_from_elsewhere() -> None:
    forbidden = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(")
    for path in [*SCRIPTS, *(ROOT / "web").rglob("*.css")]:
        text = path.read_text("utf-8")
        assert not forbidden.search(text), path
        assert not re.search(r"https?://", text), path
        assert max(len(line) for line in text.splitlines()) <= 100, path


def test_every_example_has_a_small_picture() -> None:
    examples = sorted((ROOT / "example_workflows").glob("*.json"))
    assert len(examples) >= 5
    for path in examples:
        picture = path.with_suffix(".jpg")
        assert picture.stat().st_size < 60 * 1024
        assert picture.read_bytes().startswith(b"\xff\xd8")
