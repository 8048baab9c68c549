"""Files of profiles: what is refused and on which line; whose measurements count for what."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from kernels.harness import chip

from accel.cache import DiskCache
from accel.compiler import SHIPPED as PLANS
from accel.errors import InvalidFile
from accel.hardware import Hardware
from accel.kernels import Call, Kernel, TensorSpec, load_triton, registry
from accel.plan.schema import Plan
from accel.runtime.alternatives import _time
from accel.runtime.calls import calls_at
from accel.tuning import profile as profiles
from accel.tuning import profile_file
from accel.tuning.calibration import Calibration
from accel.tuning.chips import KNOWN, chip_of
from accel.tuning.compiling import Compiler
from accel.tuning.cost import Fit, Ranked
from accel.tuning.forecast import MEASURED, PREDICTED, UNKNOWN, Forecast
from accel.tuning.keys import call_of
from accel.tuning.profile import SHIPPED, Entry, Profile
from accel.tuning.select import Choice, Selector, _cautious, model_of

GPU = chip()
H200 = next(chip for chip in KNOWN if chip.name == "NVIDIA H200")
GOOD = {"kernel": "library", "config": {"tile": 64, "wide": True, "kind": "a"}, "us": 3.5}


def document(entries: Any = None, hardware: Hardware = GPU, **changes: Any) -> dict[str, Any]:
    found = {"version": profile_file.VERSION, "meta": profiles.identity(hardware)}
    return {**found, "entries": {"call": GOOD} if entries is None else entries, **changes}


def lines(data: Any) -> str:
    """The file as `indent=1` makes it: a field a line."""
    return json.dumps(data, indent=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the profiles that come with the pack, and nothing said yet."""
    found = tmp_path / "tuning_profiles"
    found.mkdir()
    monkeypatch.setattr(profiles, "SHIPPED", found)
    monkeypatch.setattr(profiles, "_said", set())
    return found


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 1 << 20, "profile-test")


# The file.


def test_what_comes_with_the_pack_is_right() -> None:
    paths = sorted(SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        content = profile_file.read(path)
        assert not content.faults and (content.model_made or len(content.entries) > 100)


def test_what_is_written_is_read_alike_and_is_sorted() -> None:
    others = [["library", {}, 4], ["tiled", {"tile": 32}, 5.5]]
    data = document({"b": GOOD, "a": {**GOOD, "others": others}}, fit=FIT)
    content = profile_file.parsed(json.dumps(data))
    text = profile_file.written(content)
    assert profile_file.parsed(text) == content and json.loads(text) == data
    assert profile_file.written(profile_file.parsed(text)) == text
    assert text.index('"a": {"kernel') < text.index('"b": {"kernel')


META = profiles.identity(GPU)
FIT: dict[str, Any] = {
    "version": profile_file.FIT_VERSION,
    "constants": {"a": {"math": 1.5}},
    "tiles": {"b": 0.5},
}


def changed(**parts: Any) -> str:
    """A file whose fit has other parts; its entry is good."""
    return lines(document(fit=FIT | parts))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: Expecting value"),
        ('{\n"version": 2,\n"meta" {}}', "line 3: Expecting ':' delimiter"),
        ("\n[]", "line 1: it is no JSON object"),
        ("[" * 100000, "line 1: "),
        ('{"version": ' + "9" * 5000 + "}", "line 1: it holds more than JSON is read for here"),
        (lines({"version": 2, "meta": META}), "line 1: 'entries' is missing"),
        (lines({"meta": META, "entries": {}}), "line 1: 'version' is missing"),
        (lines({"entries": {}, "version": 99, "meta": {}}), "line 3: it has version 99, and 2 is"),
        (lines({"version": True, "meta": META, "entries": {}}), "line 2: it has version true"),
        (lines({"version": "2", "meta": META, "entries": {}}), 'line 2: it has version "2"'),
        (lines(document(entries=[])), "line 15: 'entries' is no JSON object"),
        (lines(document(extra=1)), "line 26: a profile has no field 'extra'"),
        (lines(document(fit=[])), "line 26: 'fit' is no JSON object"),
        (lines(document(meta=None)), "line 3: 'meta' is no JSON object"),
        (lines(document(meta={"gpu": "a"})), "line 3: 'meta' lacks 'capability'"),
        (lines(document(meta={**META, "gpu": ""})), "line 4: 'gpu' is \"\", and not a name"),
        (
            lines(document(meta={**META, "capability": "9.0"})),
            "line 5: 'capability' is \"9.0\", and not two numbers such as [9, 0]",
        ),
        (
            lines(document(meta={**META, "multiprocessors": 0})),
            "line 9: 'multiprocessors' is 0, and not a number of at least 1",
        ),
        (lines(document(meta={**META, "cudnn": 9.19})), "line 12: 'cudnn' is 9.19, and not a ver"),
        (
            lines(document(meta={**META, "memory_mib": "24 GiB"})),
            "line 14: 'memory_mib' is \"24 GiB\", and not a number of MiB",
        ),
        (
            lines(document()).replace('"tile"', '"wide"'),
            'line 20: "wide" stands there a second time',
        ),
        (
            '{"version": 2,\n"entries": {"a": 1,\n"b": [{"c": 1}, {"c": 1}],\n"a": 2}}',
            'line 4: "a" stands there a second time',
        ),
        (
            lines(document({}, meta={**META, "made_by": "model"}, fit=FIT | {"tiles": {"b": 99}})),
            "line 25: a fit's 'b' is 99, and not a factor between 0.02 and 50",
        ),
    ],
)
def test_a_fault_of_the_whole_refuses_the_file_and_names_the_line(
    text: str, complaint: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidFile) as error:
        profile_file.parsed(text)
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    (folder / "gpu.json").write_text(text)
    for _ in range(2):
        assert Profile(GPU, None).get("call") is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"the profile gpu.json is ignored: {error.value}"


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("entry", "place", "complaint"),
    [
        (None, '"bad"', "null is no JSON object"),
        (3, '"bad"', "3 is no JSON object"),
        (without("kernel"), '"bad"', "'kernel' is missing"),
        (without("us"), '"bad"', "'us' is missing"),
        ({**GOOD, "ms": 1}, '"ms"', "an entry has no field 'ms'"),
        ({**GOOD, "kernel": 3}, '"kernel"', "'kernel' is 3, and not a name"),
        ({**GOOD, "config": None}, '"config"', "'config' is null, and no JSON object"),
        (
            {**GOOD, "config": {"tile": [1]}},
            '"config"',
            "'tile' of 'config' is [1], and no whole number",
        ),
        (
            {**GOOD, "config": {"tile": 1.5}},
            '"config"',
            "'tile' of 'config' is 1.5, and no whole number",
        ),
        (
            {**GOOD, "us": math.nan},
            '"us"',
            "'us' is nan, and not microseconds between 0.01 and 10000000",
        ),
        ({**GOOD, "us": math.inf}, '"us"', "'us' is inf, and not microseconds"),
        ({**GOOD, "us": -1}, '"us"', "'us' is -1, and not microseconds"),
        ({**GOOD, "us": 0}, '"us"', "'us' is 0, and not microseconds"),
        ({**GOOD, "us": 1.1e7}, '"us"', "'us' is 11000000.0, and not microseconds"),
        ({**GOOD, "us": 1e-6}, '"us"', "'us' is 1e-06, and not microseconds between 0.01 and"),
        ({**GOOD, "us": "3.5"}, '"us"', "'us' is \"3.5\", and not a number"),
        ({**GOOD, "us": True}, '"us"', "'us' is true, and not a number"),
        ({**GOOD, "others": {}}, '"others"', "'others' is {}, and not a list"),
        (
            {**GOOD, "others": [["x", {}]]},
            '"others"',
            "one of 'others' is [\"x\", {}], and not [kernel, ",
        ),
        ({**GOOD, "others": [["x", {}, 0]]}, '"others"', "in one of 'others' 'us' is 0, and not"),
    ],
    ids=str,
)
def test_a_fault_of_an_entry_leaves_it_out_and_names_the_line(
    entry: Any, place: str, complaint: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fields around it have the same names, and so may a call."""
    text = lines(document({"us": GOOD, "bad": entry, "good": GOOD}))
    content = profile_file.parsed(text)
    (fault,) = content.faults
    rows = text.splitlines()
    start = next(number for number, row in enumerate(rows) if '"bad"' in row)
    line = next(n for n, row in enumerate(rows) if n >= start and row.strip().startswith(place))
    assert fault.startswith(f"line {line + 1}: bad: {complaint}")
    assert content.entries.keys() == {"us", "good"}
    (folder / "gpu.json").write_text(text)
    for _ in range(2):
        profile = Profile(GPU, None)
        assert profile.get("bad") is None
        assert profile.get("good") == Entry("library", GOOD["config"], 3.5)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"the profile gpu.json: an entry is left out: {fault}"


@pytest.mark.parametrize(
    ("parts", "place", "complaint"),
    [
        ({"version": 9}, '"version": 9', "it is no fit of version 1"),
        ({"constants": None}, '"constants"', "a fit's 'constants' is no JSON object"),
        ({"constants": {"a": 3}}, '"a"', "'a' of a fit is 3, and no JSON object"),
        ({"constants": {"a": {"math": -1}}}, '"math"', "a fit's 'math' is -1, and not a factor"),
        ({"tiles": {"b": math.nan}}, '"b"', "a fit's 'b' is nan, and not a factor between"),
    ],
)
def test_a_wrong_fit_is_left_out_and_what_was_measured_counts(
    parts: Any, place: str, complaint: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = changed(**parts)
    number = 1 + next(n for n, row in enumerate(text.splitlines()) if row.strip().startswith(place))
    (folder / "gpu.json").write_text(text)
    profile = Profile(GPU, None)
    assert profile.fit is None and profile.get("call") is not None
    (record,) = caplog.records
    assert f"an entry is left out: line {number}: {complaint}" in record.getMessage()


def test_many_faults_are_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "gpu.json").write_text(lines(document({f"call {n}": n for n in range(100)})))
    assert Profile(GPU, None).get("call 3") is None
    (record,) = caplog.records
    said = record.getMessage()
    assert "100 entries are left out: line " in said and said.endswith("; and 95 more")


def test_a_line_is_found_wherever_the_key_stands() -> None:
    text = '{"a": 1,\n"b": [{"c": 2,\n"d": "x, {y"}, [3, 4]], "e\\u0041":\n{"":\n5}}'
    assert profile_file.lines_of(text) == {
        ("a",): 1,
        ("b",): 2,
        ("b", "", "c"): 2,
        ("b", "", "d"): 3,
        ("eA",): 3,
        ("eA", ""): 4,
    }


def test_the_users_own_profile_is_checked_as_well(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile(GPU, cache)
    cache.put(profile._key, profiles.KIND, document({"good": GOOD, "bad": {**GOOD, "us": -1}}))
    again = Profile(GPU, cache)
    assert again.get("good") is not None and again.get("bad") is None
    assert "the profile in the cache: an entry is left out: bad: 'us' is -1" in caplog.text
    cache.put(profile._key, profiles.KIND, {"entries": 3})
    assert Profile(GPU, cache).own() == {}
    assert "the profile in the cache is ignored: 'version' is missing" in caplog.text


def test_text_that_is_none_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "gpu.json").write_bytes(b"\xff\xfe\x00")
    (folder / "good.json").write_text(lines(document()))
    assert Profile(GPU, None).get("call") is not None, "the others still count"
    assert "the profile gpu.json is ignored: it is not UTF-8 text" in caplog.text


# Of another GPU, or with other libraries.


def ship(folder: Path, name: str, entries: Any = None, **changes: Any) -> None:
    hardware = replace(GPU, name=name, **changes)
    file = folder / f"{name.replace(' ', '_')}.json"
    file.write_text(json.dumps(document(entries, hardware)))


def test_the_very_gpu_goes_before_any_that_is_like_it(folder: Path) -> None:
    ship(folder, "A GPU", {"call": {**GOOD, "us": 1.0}})
    ship(folder, "sm_90", {"call": {**GOOD, "us": 2.0}}, multiprocessors=50)
    assert profiles.shipped(GPU).gpu == "sm_90"


def test_the_nearest_of_the_same_capability_is_used_and_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ship(folder, "Far", multiprocessors=16)
    ship(folder, "Near", multiprocessors=114)
    ship(folder, "Other", capability=(8, 0))
    for _ in range(2):
        profile = Profile(GPU, None)
        entry = profile.get("call")
        assert entry is not None and entry.elsewhere == "Near" and entry.us == 3.5
        assert len(profile) == 0, "nothing was timed on such a GPU"
    (record,) = caplog.records
    assert record.getMessage().startswith("no profile of sm_90: that of Near is used; ")
    assert "python -m accel tune" in record.getMessage()


def test_no_gpu_is_like_one_of_another_capability(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ship(folder, "Other", capability=(8, 0))
    assert Profile(GPU, None).get("call") is None
    assert profiles.shipped(replace(GPU, kind="cpu", capability=None)).entries == {}
    assert not caplog.records


def test_other_versions_are_said_once_with_what_differs(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ship(folder, "sm_90", torch="2.0.0", cudnn=None)
    for _ in range(2):
        profile = Profile(GPU, None)
        entry = profile.get("call")
        assert entry is not None and entry.elsewhere == "sm_90 with torch 2.0.0, no cudnn"
        assert len(profile) == 1, "it was timed on such a GPU"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "the profile of sm_90 is used, though it was measured with "
        f"torch 2.0.0, no cudnn (here torch {torch.__version__}, cudnn 9.19.0); "
    )


@pytest.mark.parametrize(
    ("meta", "theirs", "ours"),
    [
        ({"multiprocessors": 68}, "68 multiprocessors", "132 multiprocessors"),
        ({"memory_mib": 10 << 10}, "10240 MiB of memory", "24576 MiB"),
        ({"memory_mib": 24 << 10}, None, None),
        ({"memory_mib": 23 << 10}, None, None),
    ],
)
def test_a_variant_of_the_same_name_is_another_gpu(
    meta: dict[str, Any],
    theirs: str | None,
    ours: str | None,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Makers sell one name with other multiprocessors, and other memory behind another bus."""
    (folder / "gpu.json").write_text(lines(document(meta=META | meta)))
    profile = Profile(GPU, None)
    entry = profile.get("call")
    assert entry is not None and profile.same_gpu is (theirs is None)
    assert entry.elsewhere == (None if theirs is None else f"sm_90 with {theirs}")
    assert len(profile) == (theirs is None)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (theirs is not None)
    if theirs:
        assert f"sm_90 is used, though it was measured with {theirs} (here {ours}); " in said[0]


def test_another_gpu_with_other_versions_is_said_together(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ship(folder, "Near", triton="3.4.0")
    assert profiles.shipped(GPU).elsewhere == "Near with triton 3.4.0"
    (record,) = caplog.records
    wanted = "that of Near is used, which was measured with triton 3.4.0 (here triton 3.6.0); "
    assert wanted in record.getMessage()


def test_of_several_of_this_gpu_that_with_the_same_libraries_is_used(folder: Path) -> None:
    for name, version in (("a", "1.0"), ("b", GPU.torch), ("c", "3.0")):
        data = document({"call": {**GOOD, "kernel": name}}, replace(GPU, torch=version))
        (folder / f"{name}.json").write_text(json.dumps(data))
    assert Profile(GPU, None).get("call") == Entry("b", GOOD["config"], 3.5)  # type: ignore[arg-type]


# What the selector makes of it.


def add_call(rows: int = 4) -> Call:
    spec = TensorSpec.of(torch.empty((rows, 8), device="meta"))
    return Call("add", spec, (spec, spec), {})


Make = Callable[..., None]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Registers kernels for `add` that exist only in this test, beside which there are none."""
    load_triton()  # not into this test's list
    monkeypatch.setattr(registry, "_KERNELS", [])

    def make(name: str, *configs: Any, **traits: Any) -> None:
        offered = (lambda call, hardware: configs) if configs else None
        registry.kernel("add", name=name, configs=offered, **traits)(lambda out, *rest: out)

    return make


def select(cache: DiskCache | None, *calls: Call, measuring: bool = True) -> list[Choice]:
    device = torch.device("cuda")
    profile = Profile(GPU, cache)
    return Selector(Compiler(GPU, device, cache), device, profile, measuring).select(calls)


def entry_of(kernel: str, config: Any = None, us: float = 3.5) -> dict[str, Any]:
    return {add_call().key: {"kernel": kernel, "config": config or {}, "us": us}}


def test_a_choice_of_another_gpu_is_used_and_its_time_is_not_this_ones(
    made: Make, folder: Path
) -> None:
    made("library")
    made("tiled", {"tile": 64}, {"tile": 32})
    ship(folder, "Near", entry_of("tiled", {"tile": 32}))
    exact, near = select(None, add_call(4), add_call(5))
    assert (exact.kernel.name, exact.config) == ("tiled", {"tile": 32})
    assert exact.us is None and exact.about == 3.5 and exact.reason == "measured on Near"
    assert near.us is None and near.about == pytest.approx(3.5 * 5 / 4)
    assert near.reason == f"measured on Near at a size near this, {add_call(4).key}"
    assert _time([exact, near]) == pytest.approx(3.5 * 9 / 4), "ways are compared among themselves"


def test_a_choice_with_other_libraries_is_used_as_one_of_another_gpu(
    made: Make, folder: Path
) -> None:
    made("library")
    made("tiled", {"tile": 64})
    ship(folder, "sm_90", entry_of("tiled", {"tile": 64}), torch="2.0.0")
    (choice,) = select(None, add_call())
    assert choice.kernel.name == "tiled" and choice.us is None and choice.about == 3.5
    assert choice.reason == "measured on sm_90 with torch 2.0.0"


@pytest.mark.parametrize(
    ("name", "number"), [("cublaslt.linear", "algorithm"), ("cudnn_frontend.conv2d", "plan")]
)
@pytest.mark.parametrize("rows", [4, 5], ids=["this size", "a size near by"])
def test_a_librarys_numbers_mean_nothing_on_another_gpu(
    name: str, number: str, rows: int, made: Make, folder: Path
) -> None:
    made("library")
    made(name, {number: 0}, {number: 1}, {number: 5})
    ship(folder, "Near", entry_of(name, {number: 5}))
    (choice,) = select(None, add_call(rows))
    assert (choice.kernel.name, choice.config) == (name, {number: 0})
    assert choice.us is None and choice.about is not None
    (folder / "Near.json").unlink()
    ship(folder, "sm_90", entry_of(name, {number: 5}))
    (choice,) = select(None, add_call(rows))
    assert choice.config == {number: 5}, "on this one they mean what they say"


def test_the_users_own_measurements_go_before_those_of_another_gpu(
    made: Make, folder: Path, cache: DiskCache
) -> None:
    made("library")
    made("tiled", {"tile": 64})
    ship(folder, "Near", entry_of("tiled", {"tile": 64}))
    Profile(GPU, cache).add({add_call(4).key: Entry("library", {}, 9.0)})
    (own,) = select(cache, add_call(4))
    assert (own.kernel.name, own.us) == ("library", 9.0)


def test_the_users_own_at_a_size_near_by_goes_before_this_size_of_another_gpu(
    made: Make, folder: Path, cache: DiskCache
) -> None:
    made("library")
    made("tiled", {"tile": 64})
    ship(folder, "Near", entry_of("tiled", {"tile": 64}))
    Profile(GPU, cache).add({add_call(5).key: Entry("library", {}, 10.0)})
    (own,) = select(cache, add_call(4))
    assert own.kernel.name == "library" and own.about == pytest.approx(8.0)
    assert add_call(5).key in own.reason and "Near" not in own.reason


def test_kernels_that_are_not_here_are_ignored_in_one_line(
    made: Make, folder: Path, cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    made("library")
    made("tiled", {"tile": 64})
    entries = {
        add_call(4).key: {"kernel": "gone", "config": {}, "us": 1.0},
        add_call(40).key: {"kernel": "lost", "config": {}, "us": 1.0},
        add_call(5).key: {"kernel": "tiled", "config": {"tile": 64}, "us": 2.0},
    }
    ship(folder, "sm_90", entries)
    with caplog.at_level(logging.INFO, logger="accel"):
        for _ in range(2):
            (choice,) = select(cache, add_call(4), measuring=False)
    assert choice.kernel.name == "tiled" and "near this" in choice.reason
    said = [r.getMessage() for r in caplog.records]
    assert said == ["2 entries of the profile are of kernels that are not here: gone, lost"]


# Made by the model.


def test_every_chip_that_nobody_measured_has_a_profile_that_says_so() -> None:
    from benchmarks.model_profiles import made

    contents = {path.stem: profile_file.read(path) for path in SHIPPED.glob("*.json")}
    found = {name: content for name, content in contents.items() if content.model_made}
    texts = made(SHIPPED)
    assert {f"{name}.json" for name in found} == texts.keys()
    for name, content in found.items():
        assert (SHIPPED / f"{name}.json").read_text() == texts[f"{name}.json"], "by the command"
        assert not content.entries and content.meta["constants_of"]
        Fit.from_json(content.fit)
    for part in ("t4", "a10", "a100", "l4", "l40s", "l20", "3060", "3090", "4070", "4090", "5090"):
        assert any(name.endswith(part) for name in found), part


@pytest.mark.parametrize(
    ("name", "capability", "origin"),
    [
        ("NVIDIA GeForce RTX 4070", (8, 9), "NVIDIA GeForce RTX 4070"),
        ("NVIDIA GeForce RTX 3080", (8, 6), "NVIDIA GeForce RTX 3090"),
        ("NVIDIA Something", (8, 7), "NVIDIA GeForce RTX 3090"),
        ("NVIDIA Something", (13, 0), "NVIDIA GeForce RTX 5090"),
        ("NVIDIA H100 PCIe", (9, 0), "NVIDIA H100 80GB HBM3"),
    ],
)
def test_a_chip_without_a_profile_takes_that_of_the_nearest_capability(
    name: str, capability: tuple[int, int], origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "SHIPPED", SHIPPED)
    gpu = replace(chip(), name=name, capability=capability, multiprocessors=82)
    found = Profile(gpu, None)
    assert found.origin == origin and found.fit is not None
    assert found.model_made is (capability != (9, 0))


def test_what_a_model_made_holds_no_entries(folder: Path) -> None:
    content = profile_file.read(SHIPPED / "tesla_t4.json")
    content.entries["add() -> 1:f16"] = {"kernel": "x", "config": {}, "us": 1.0}
    text = profile_file.written(content)
    with pytest.raises(InvalidFile, match=r"line \d+: what a model made has 'fit' and no entries"):
        profile_file.parsed(text)


def calls_of_a_unet() -> list[Call]:
    image = "2x64x64x640:f16"
    keys = (
        "linear(8192x640:f16 640x640:f16c 640:f16c -) -> 8192x640:f16 activation=none",
        "linear(8192x640:f16 5120x640:f16c 5120:f16c -) -> 8192x2560:f16 activation=geglu",
        f"conv2d({image} 640x3x3x640:f16c 640:f16c - -) -> {image} "
        "dilation=(1,1) groups=1 padding=(1,1) stride=(1,1)",
        "attention(2x4096x640:f16 2x4096x640:f16 2x4096x640:f16) -> 2x4096x640:f16 "
        "heads=10 scale=0.125",
        f"group_norm({image} 640:f16c 640:f16c) -> {image} activation=silu eps=1e-05 groups=32",
    )
    return [call_of(key) for key in keys]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)], ids=str)
def test_where_nobody_measured_libraries_do_what_they_do_best(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what only moves bytes, which ours do on every chip; and nothing is left out."""
    monkeypatch.setattr(profiles, "SHIPPED", SHIPPED)
    gpu = replace(chip(capability), name="NVIDIA Something")
    device = torch.device("cuda")
    selector = Selector(Compiler(gpu, device), device, Profile(gpu, None), measuring=False)
    choices = selector.select(calls_of_a_unet())
    for choice in choices[:4]:
        if choice.kernel.launches is not None:  # by far, says the model
            assert choice.reason.startswith("predicted") and capability != (7, 5)
    assert choices[4].kernel.name == "triton.group_norm"
    assert all(choice.us is None for choice in choices)
    selector.prepare("a plan", calls_of_a_unet)
    assert selector.settled, "nothing is compiled ahead on such a model's word"


def test_no_chip_is_promised_more_than_its_tensor_cores_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they are what is slow, as on a GeForce, no guess makes ours win by far."""
    monkeypatch.setattr(profiles, "SHIPPED", SHIPPED)
    one_each = {gpu.capability: gpu for gpu in profiles.profiled().values()}
    made = {gpu.name: (gpu, Profile(gpu, None)) for gpu in one_each.values()}
    assert sum(profile.model_made for _, profile in made.values()) >= 6
    for name, (gpu, profile) in made.items():
        if not profile.model_made:
            continue
        chip, model = chip_of(gpu), model_of(gpu, profile)
        assert chip is not None and model is not None
        for call in calls_of_a_unet()[:4]:
            offered = [(k.name, config) for k, config in registry.candidates(call, gpu)[:-1]]
            times = [p.us for p in model.predictions(call, offered) if p is not None]
            assert min(times) > call.flops / (chip.tensor_tflops * 1e6), (name, call.key)
        if "GeForce" in name:
            big = [calls_of_a_unet()[place] for place in (0, 2)]
            for choice in choices(big, gpu).values():
                assert choice.kernel.launches is None, (name, choice)


def test_a_library_that_is_nearly_as_fast_is_preferred_where_nobody_measured() -> None:
    ours = Kernel("triton.x", "linear", lambda *_: None, ("cuda",), launches=lambda *_: [])
    library = Kernel("cublas.linear", "linear", lambda *_: None, ("cuda",))
    call = calls_of_a_unet()[0]

    def first(us: float, op: str = "linear") -> str:
        ranked = sorted([Ranked(ours, {}, us), Ranked(library, {}, 13.0)], key=lambda r: r.us or 0)
        return _cautious(replace(call, op=op), ranked)[0].kernel.name

    assert first(9.9) == "triton.x" and first(10.1) == "cublas.linear"
    assert first(12.9, "group_norm") == "triton.x"


# Measured on another GPU.


def test_the_times_of_another_gpu_are_carried_over_and_ranked_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chip with half the multiprocessors: what was fastest there need not be here."""
    monkeypatch.setattr(profiles, "SHIPPED", SHIPPED)
    versions = profile_file.read(SHIPPED / "nvidia_h200.json").meta
    same = {name: versions[name] for name in profiles.VERSIONS}
    gpu = replace(chip((9, 0)), name="NVIDIA H200 half", multiprocessors=66, **same)
    device = torch.device("cuda")
    profile = Profile(gpu, None)
    assert profile.elsewhere() and not list(profile.items())
    selector = Selector(Compiler(gpu, device), device, profile, measuring=False)
    calls = [
        call_of(key)
        for key, entry in profile.elsewhere().items()
        if key.startswith("linear(8192x") and entry.kernel.startswith("triton.")
    ][:4]
    for call, choice in zip(calls, selector.select(calls), strict=True):
        there = profile.elsewhere()[call.key].us
        assert choice.reason.startswith("predicted") and choice.us is None
        assert choice.about is not None and 1.3 * there < choice.about < 2.6 * there
        assert choice.elsewhere is None, "one chip's times can be set against each other"


# What that comes to.


def h200() -> Hardware:
    return profiles.profiled()["NVIDIA H200"]


def choices(calls: Sequence[Call], gpu: Hardware) -> dict[str, Choice]:
    device = torch.device("cuda")
    selector = Selector(Compiler(gpu, device), device, Profile(gpu, None), measuring=False)
    found = selector.select(calls)
    assert selector._model is not None
    return {call.key: choice for call, choice in zip(calls, found, strict=True)}


def test_sdxl_runs_what_was_measured_and_another_process_chooses_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The digest is of the choices that a process made of the profile that was measured at c7e6dc4.

    Whoever measures the profile anew, or has other kernels, puts another one here.
    """
    monkeypatch.setattr(profiles, "SHIPPED", SHIPPED)
    plan = Plan.from_json(json.loads((PLANS / "sdxl.json").read_text(encoding="utf-8")))
    calls = calls_at(plan, 1024, 1024, 2)
    found = choices(calls, h200())
    entries = Profile(h200(), None)
    rows = []
    for call in calls:
        choice, entry = found[call.key], entries.get(call.key)
        if entry is not None and entry.kernel.startswith("triton."):  # libraries may be missing
            assert (choice.kernel.name, choice.config) == (entry.kernel, entry.config)
            assert choice.us == entry.us and not choice.provisional
            rows.append([call.key, choice.kernel.name, dict(choice.config)])
    text = json.dumps(sorted(rows, key=lambda row: str(row[0])), sort_keys=True)
    assert (len(rows), xxhash.xxh3_64_hexdigest(text.encode())) == (81, "0cccedb5e00c341f")
    # What is predicted depends on nothing but the tables either.
    some = [call for call in calls if found[call.key].us is None][::3]
    again = choices(some[::-1], h200())
    assert len(some) > 3 and again == {call.key: found[call.key] for call in some}


def damaged(entries: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """What is JSON, and right for the file's format, but nonsense."""
    values = [0, -1, 3, 10**30, "", "x", "0x0", "12x-4", "128", True]
    found = {}
    for call, entry in copy.deepcopy(entries).items():
        for config in (entry["config"], *(config for _, config, _ in entry.get("others", ()))):
            for name in config:
                if chance.random() < 0.2:
                    config[name] = chance.choice(values)
        if chance.random() < 0.1:
            entry["us"] = chance.choice([0.01, 1e7])
        odd = ["", "x", call[:40], call.replace("f16", "q8"), call.replace("8192", "0")]
        found[chance.choice(odd) if chance.random() < 0.2 else call] = entry
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_a_damaged_profile_costs_no_picture_and_not_the_model(
    seed: int, folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    whole = json.loads((SHIPPED / "nvidia_h200.json").read_text(encoding="utf-8"))
    chance = random.Random(seed)
    keys = chance.sample(sorted(key for key in whole["entries"] if "(8192x" in key), 25)
    entries = damaged({key: whole["entries"][key] for key in keys}, chance)
    (folder / "gpu.json").write_text(json.dumps(whole | {"entries": entries}))
    calls = [call_of(key.replace("8192x", f"{n}x")) for key in keys[:12] for n in (8192, 9000)]
    gpu = h200()
    for here in (gpu, replace(gpu, multiprocessors=100)):
        for call in calls:
            (choice,) = choices([call], here).values()
            assert choice.about is None or 0 < choice.about < math.inf
        forecast = Forecast(here, Profile(here, None)).select(calls)
        assert all(choice.reason in (MEASURED, PREDICTED, UNKNOWN) for choice in forecast)
    known = {key: entry.times() for key, entry in Profile(gpu, None).items()}
    calibration = Calibration(H200, known)
    calibration.in_full(calls)
    for call in calls[:3]:
        assert calibration.worth_timing(call, registry.candidates(call, gpu)[:-1])
    calibration.fitted()
    assert not recwarn.list, "of numbers that are none"
