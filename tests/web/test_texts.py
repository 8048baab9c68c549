"""Texts, help pages and workflows as files: complete in both languages, and used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .templates import collect, split

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "web").rglob("*.js"))
LANGUAGES = ("en", "zh")
SAID = "switchyard.said."
NODES = (
    "SwitchyardAccelerate",
    "SwitchyardLoadCheckpoint",
    "SwitchyardLoadDiffusionModel",
    "SwitchyardLoadLoraByBlock",
    "SwitchyardAccelerateControlNet",
    "SwitchyardAuditionCheckpoints",
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
    # The server's own texts: English needs no table of them.
    chinese = {key: text for key, text in chinese.items() if not key.startswith(SAID)}
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


NEVER_SHOWN = {
    "calls of diffusers' networks alone": {
        "ControlNet residuals come together: down_block_additional_residuals and "
        "mid_block_additional_residual",
        "added_cond_kwargs must have the tensors text_embeds and time_ids",
        "down_block_additional_residuals for T2I-Adapters",
        "down_block_additional_residuals must be {} tensors, not {}",
        "down_intrablock_additional_residuals does not fit the network: {} where it has {}",
        "down_intrablock_additional_residuals must be a list of tensors",
        "text_embeds {} and time_ids {} must give {} channels, {} of them for each time id",
        "time_ids must have the batch of text_embeds, {}, not {}",
    },
    "building a network of diffusers": {
        "diffusers has no ControlNet of this architecture",
        "diffusers has no UNet whose middle is {} and last level {} deep",
        "diffusers has no block with attention in some layers only: {}",
        "the number of attention heads is unknown: give the module itself",
    },
    "requests that only another program would send": {
        "the body is no JSON",
        "the body is no JSON object",
        "the body is too long",
        "the body must be application/json",
        'the body must be {"id": …} with 32 hexadecimal digits',
        "{} is missing, or no such thing",
    },
    "for users of the package alone": {
        "the state dict is of no known family, and names and shapes alone do not fix the network: "
        "a module is needed",
        "a mix is a list of (path or state dict, weight)",
        "a mix is a list of at least one (path or state dict, weight)",
        "this engine has no weights: load_weights first",
        "weights are given as a .safetensors path or a dict of tensors",
        "{} is a finite number, not {}",
        "{} is a {} tensor without plain values",
        "{} is of no known family, and names and shapes alone do not fix the network: "
        "a module is needed",
    },
    "logged for developers, and the file's weights stay a copy": {
        "the checkpoint {}; needed is {}",
    },
    "drawn on a sheet of pictures": {"{}; {} steps, seed {}"},
    "faults of the pack": {"the graph has no output"},
    "the same in every language": {"{}x"},
    "no texts": {
        "allow_fp16_accumulation",
        "build",
        "host",
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "runpy.run_module('accel.hosts.comfyui.build_process', run_name='__main__')",
    },
}


def said() -> dict[str, str]:
    """The server's texts in Chinese, under their templates."""
    table: dict[str, str] = read("zh", "main")["switchyard"]["said"]
    return table


def bare(template: str) -> str:
    """Without the names of its places."""
    return re.sub(r"\{\w+\}", "{}", template)


def test_every_text_of_the_server_is_translated_and_none_is_left_over() -> None:
    texts = collect()
    shown = {template: at for one in texts for template, at in one.shown.items()}
    never = set().union(*NEVER_SHOWN.values())
    assert len(shown) > 200  # the reading itself works
    translated = {bare(template) for template in said()}
    missing = {t: at for t, at in shown.items() if t not in translated | never}
    assert missing == {}
    assert translated - set().union(*(one.all for one in texts)) == set()
    assert never - shown.keys() == set()
    assert never & translated == set()


def test_collecting_finds_texts_of_every_form() -> None:
    shown = {template for one in collect() for template in one.shown}
    for expected in (
        "{} changes {}",  # an f-string in Reason(…)
        "another pack",  # what stands in for a name in it
        "the up blocks",  # in a table
        "building {} %",  # from a variable, before a dot
        "host's path meanwhile",
        "{} LoRAs",
        "the device has no room for its engine beside the model's",  # an error
        "{} MiB for this image size do not fit on {}",
        "has its method {} replaced",  # returned as a reason
        "tracing the network",  # told as progress
    ):
        assert expected in shown, expected


def test_translations_of_the_servers_texts_fit_into_each_other() -> None:
    numbers = {"count", "db", "ms", "percent", "ratio"}  # as in said.js
    script = (ROOT / "web" / "js" / "said.js").read_text("utf-8")
    assert set(re.findall(r'"(\w+)"', script.split("NUMBERS = ")[1].split(";")[0])) == numbers
    for english, chinese in said().items():
        places = [re.findall(r"\{(\w+)\}", text) for text in (english, chinese)]
        assert sorted(places[0]) == sorted(places[1]), english
        assert len(set(places[0])) == len(places[0]), english
        assert split(english) == [english]
        # Something may stand before what a text begins with, as in "host's path: …".
        first = re.match(r"\{(\w+)\}", english)
        if first and first[1] not in numbers:
            assert chinese.startswith(first[0]), english


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
