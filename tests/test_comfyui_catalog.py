"""Files of the models folder, engines on disk, and reading ahead: with fakes for the host."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sparse import ldm_shapes, sparse_file
from support import family_config, tiny_config

from accel.cache import DiskCache
from accel.compiler import open_cache
from accel.hosts.comfyui import catalog as module
from accel.hosts.comfyui.builder import Builder, versions
from accel.hosts.comfyui.catalog import (
    Catalog,
    EngineRefused,
    Engines,
    Prefetcher,
    facts_of,
    model_files,
)
from accel.models import FAMILIES, parameters
from accel.structure import structure_of

GIB = 1 << 30


def write_network(path: Path, family: str, prefix: str = "model.diffusion_model.") -> Path:
    """A file of a family's names and shapes."""
    return sparse_file(path, ldm_shapes(family, prefix))


class Models:
    """A models folder as the host shows it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in module.FOLDERS:
            (root / folder).mkdir(parents=True)

    def names(self, folder: str) -> Iterable[str]:
        base = self.root / folder
        found = [path.relative_to(base) for path in base.rglob("*") if not path.is_dir()]
        return sorted(str(path) for path in found)

    def locate(self, folder: str, name: str) -> str | None:
        path = self.root / folder / name
        return str(path) if path.is_file() else None


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models")


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return open_cache(tmp_path / "cache", GIB)


@pytest.fixture
def builder(cache: DiskCache) -> Builder:
    return Builder(cache, lambda data: None)


@pytest.fixture
def catalog(models: Models, builder: Builder) -> Catalog:
    return Catalog(models.names, models.locate, builder)


def badges(catalog: Catalog) -> dict[str, tuple[str, str | None]]:
    """Badge and family of each file, once all headers are read."""
    entries, scanning = catalog.listing(30.0)
    assert not scanning
    return {entry["name"]: (entry["badge"], entry["family"]) for entry in entries}


def why(catalog: Catalog, name: str) -> str:
    return next(str(e["why"]) for e in catalog.listing(30.0)[0] if e["name"] == name)


# Badges.


def test_files_are_known_by_their_headers(models: Models, catalog: Catalog) -> None:
    folder = models.root / "checkpoints"
    (folder / "動物").mkdir()
    write_network(folder / "one.safetensors", "sd15")
    write_network(folder / "動物" / "zwei ü.safetensors", "sdxl")
    write_network(models.root / "diffusion_models" / "inpaint.safetensors", "sdxl-inpaint", "")
    write_network(models.root / "controlnet" / "canny.safetensors", "sd15-controlnet", "")
    assert badges(catalog) == {
        "one.safetensors": ("ready", "sd15"),
        "動物/zwei ü.safetensors": ("ready", "sdxl"),
        "inpaint.safetensors": ("ready", "sdxl-inpaint"),
        "canny.safetensors": ("ready", "sd15-controlnet"),
    }
    entry = catalog.listing()[0][0]
    assert entry == {
        "name": "one.safetensors",
        "folder": "checkpoints",
        "family": "sd15",
        "title": next(family.title for family in FAMILIES if family.name == "sd15"),
        "badge": "ready",
        "why": None,
    }


def test_a_network_of_no_family_is_built_when_it_is_used(models: Models, catalog: Catalog) -> None:
    path = models.root / "checkpoints" / "tiny.safetensors"
    tiny = parameters(tiny_config()).values()
    sparse_file(path, {f"model.diffusion_model.{p.ldm_name}": p.shape for p in tiny})
    assert badges(catalog) == {"tiny.safetensors": ("build", None)}
    assert "first use" in why(catalog, "tiny.safetensors")


@pytest.mark.parametrize(("kind", "badge"), [("plan", "ready"), ("failure", "unsupported")])
def test_a_network_of_no_family_is_known_again_by_its_shapes(
    models: Models, catalog: Catalog, builder: Builder, cache: DiskCache, kind: str, badge: str
) -> None:
    tiny = parameters(tiny_config()).values()
    path = models.root / "checkpoints" / "tiny.safetensors"
    sparse_file(path, {f"model.diffusion_model.{p.ldm_name}": p.shape for p in tiny})
    config = tiny_config().to_json()
    for key, shape_key in (("c" * 32, "d" * 32), ("a" * 32, structure_of(path).shape_key)):
        structure = {"config": config, "family": None, "shape_key": shape_key}
        failure = {"error": "no", "title": "t", "shape_key": shape_key, "versions": versions()}
        cache.put(key, kind, {"structure": structure} if kind == "plan" else failure)
    used = [entry.used for entry in cache.entries()]
    assert badges(catalog) == {"tiny.safetensors": (badge, None)}
    if kind == "plan":
        assert [entry.used for entry in cache.entries()] == used  # looking is not using
        titles = {engine["id"]: engine["title"] for engine in Engines(builder).listing()}
        assert catalog.listing()[0][0]["title"] == titles["a" * 32] != titles["c" * 32]


def test_what_an_engine_cannot_serve_says_why(models: Models, catalog: Catalog) -> None:
    folder = models.root / "diffusion_models"
    sparse_file(folder / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": (64, 64)})
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert badges(catalog) == {
        "flux.safetensors": ("unsupported", None),
        "model.gguf": ("unsupported", None),
    }
    assert "Stable Diffusion" in why(catalog, "flux.safetensors")
    assert "GGUF" in why(catalog, "model.gguf")


def test_a_build_that_failed_shows_on_its_files(
    models: Models, catalog: Catalog, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_network(models.root / "checkpoints" / "a.safetensors", "sd15")
    states = {"failed": "unsupported", "building": "build", "cancelled": "build"}
    for state, badge in states.items():
        status = {"state": state, "error": "it is random"}
        monkeypatch.setattr(builder, "status", lambda key, status=status: status)
        assert badges(catalog)["a.safetensors"][0] == badge
        assert ("it is random" in why(catalog, "a.safetensors")) == (state == "failed")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.safetensors", b"", "the file is empty"),
        ("cut.safetensors", struct.pack("<Q", 500) + b"{", "truncated"),
        ("noise.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("old.ckpt", b"\x80\x02", "convert it to .safetensors"),
        ("json.safetensors", struct.pack("<Q", 8) + b"[1,2,3] ", "safetensors"),
    ],
)
def test_unreadable_files_do_not_hide_the_others(
    models: Models, catalog: Catalog, name: str, content: bytes, reason: str
) -> None:
    write_network(models.root / "checkpoints" / "good.safetensors", "sd15")
    (models.root / "checkpoints" / name).write_bytes(content)
    assert badges(catalog) == {"good.safetensors": ("ready", "sd15"), name: ("unreadable", None)}
    text = why(catalog, name)
    assert reason in text and "\n" not in text
    assert str(models.root) not in text


def test_links_are_followed_and_dangling_ones_named(models: Models, catalog: Catalog) -> None:
    target = write_network(models.root / "elsewhere.safetensors", "sd15")
    folder = models.root / "checkpoints"
    (folder / "link.safetensors").symlink_to(target)
    (folder / "dangling.safetensors").symlink_to(models.root / "gone")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    assert badges(catalog) == {
        "link.safetensors": ("ready", "sd15"),
        "dangling.safetensors": ("unreadable", None),
        "loop.safetensors": ("unreadable", None),
    }
    assert "link to nothing" in why(catalog, "dangling.safetensors")


def test_names_that_are_no_utf8_reach_the_panel(models: Models, catalog: Catalog) -> None:
    name = os.fsdecode(b"caf\xe9.safetensors")
    write_network(models.root / "checkpoints" / name, "sd15")
    entries, _ = catalog.listing(30.0)
    assert json.loads(json.dumps(entries))[0]["name"] == name


def test_a_file_that_may_not_be_read_is_named(
    models: Models, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_network(models.root / "checkpoints" / "secret.safetensors", "sd15")

    def refuse(source: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "structure_of", refuse)
    assert badges(catalog) == {"secret.safetensors": ("unreadable", None)}
    assert why(catalog, "secret.safetensors") == "the file cannot be read: Permission denied"


def test_whatever_a_file_does_the_others_are_listed(
    models: Models, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_network(models.root / "checkpoints" / f"{name}.safetensors", "sd15")
    real = module.structure_of

    def sometimes(path: str) -> Any:
        if path.endswith("a.safetensors"):
            raise ZeroDivisionError
        return real(path)

    monkeypatch.setattr(module, "structure_of", sometimes)
    assert badges(catalog) == {
        "a.safetensors": ("unreadable", None),
        "b.safetensors": ("ready", "sd15"),
    }


def test_without_models_or_folders_the_list_is_empty(builder: Builder) -> None:
    def none(folder: str) -> list[str]:
        raise KeyError(folder)

    def gone(folder: str) -> list[str]:
        raise FileNotFoundError(folder)

    for names in (none, gone, lambda folder: []):
        catalog = Catalog(names, lambda folder, name: None, builder)  # type: ignore[arg-type]
        assert catalog.listing() == ([], False)


def test_a_header_is_read_once_until_the_file_changes(
    models: Models, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_network(models.root / "checkpoints" / "a.safetensors", "sd15")
    read: list[str] = []

    def counted(path: str) -> Any:
        read.append(path)
        return facts_of(path)

    monkeypatch.setattr(module, "facts_of", counted)
    for _ in range(3):
        assert badges(catalog) == {"a.safetensors": ("ready", "sd15")}
    assert len(read) == 1
    path.unlink()
    assert badges(catalog) == {}
    write_network(path, "sdxl")
    assert badges(catalog) == {"a.safetensors": ("ready", "sdxl")}
    assert len(read) == 2
    os.utime(path, ns=(0, 0))  # a clock that jumped back
    assert badges(catalog) == {"a.safetensors": ("ready", "sdxl")}
    assert len(read) == 3


def test_a_slow_disk_gives_what_is_known_so_far(
    models: Models, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_network(models.root / "checkpoints" / f"{name}.safetensors", "sd15")
    go = threading.Semaphore(0)

    def slow(path: str) -> Any:
        assert go.acquire(timeout=20)
        return facts_of(path)

    monkeypatch.setattr(module, "facts_of", slow)
    assert catalog.listing(0.01) == ([], True)
    go.release()
    deadline = time.monotonic() + 20
    while len(catalog.listing(0.01)[0]) < 1:
        assert time.monotonic() < deadline
    entries, scanning = catalog.listing(0.01)
    assert ([entry["name"] for entry in entries], scanning) == (["a.safetensors"], True)
    go.release(2)
    assert len(badges(catalog)) == 3


def test_many_requests_at_once_read_each_header_once(
    models: Models, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        write_network(models.root / "checkpoints" / f"{name}.safetensors", "sd15")
    read: list[str] = []

    def counted(path: str) -> Any:
        read.append(path)
        return facts_of(path)

    monkeypatch.setattr(module, "facts_of", counted)
    threads = [threading.Thread(target=catalog.listing, args=(30.0,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(set(read)) and len(read) == 4


# Engines.


@pytest.fixture
def built(cache: DiskCache) -> str:
    """The key of a plan in the cache; of it, the panel reads the structure alone."""
    config = family_config("sd15").to_json() | {"in_channels": 5}
    structure = {"config": config, "family": None, "shape_key": "b" * 32}
    cache.put("a" * 32, "plan", {"structure": structure})
    return "a" * 32


def test_engines_that_came_with_the_pack_are_listed(builder: Builder) -> None:
    engines = Engines(builder).listing()
    assert len(engines) == len(module.shipped_families()) > 5
    sd15 = next(engine for engine in engines if engine["family"] == "sd15")
    assert sd15["source"] == "shipped" and not sd15["deletable"] and not sd15["loaded"]
    assert sd15["bytes"] > 10_000
    assert (sd15["sizes"], sd15["last_used"], sd15["vram_mib"]) == ([], None, 0)


def test_built_engines_come_first_with_a_name(
    builder: Builder, cache: DiskCache, built: str
) -> None:
    used = cache.entries()[0].used
    engine = Engines(builder).listing()[0]
    assert engine["id"] == engine["structure"] == built
    assert (engine["source"], engine["deletable"]) == ("built", True)
    assert engine["title"] == "UNet of no published family (bbbbbb)"
    assert engine["bytes"] == cache.entries()[0].bytes
    assert engine["last_used"] == used == cache.entries()[0].used  # looking is not using


def test_an_engine_in_memory_shows_its_sizes(builder: Builder, built: str) -> None:
    shape = {"dims": {"batch": 2, "height": 64, "width": 96, "tokens": 77}, "controlnet": False}
    network = {
        "graph_key": built,
        "loaded": True,
        "weights_bytes": 3 << 20,
        "activation_bytes": 1 << 20,
        "shapes": [shape, {**shape, "dims": {**shape["dims"], "tokens": 154}}],
        "last_used": 4e9,
    }
    other = {**network, "loaded": False, "shapes": [], "last_used": None, "weights_bytes": 0}
    engine = Engines(builder, lambda: [network, other]).listing()[0]
    assert engine["sizes"] == [{"width": 768, "height": 512, "batch": 2, "controlnet": False}]
    assert (engine["loaded"], engine["vram_mib"], engine["last_used"]) == (True, 5, 4e9)


def test_a_damaged_plan_is_listed_and_can_be_deleted(
    builder: Builder, cache: DiskCache, built: str
) -> None:
    cache.entries()[0].path.write_bytes(b"\x00")
    (cache.folder / "plan" / "no-key.json").write_text("{}")
    engines = Engines(builder)
    assert engines.listing()[0]["title"] == "a damaged file (aaaaaa)"
    assert engines.delete(built) == 1
    assert not [engine for engine in engines.listing() if engine["source"] == "built"]


def test_deleting_frees_the_file_and_forgets_the_plan(
    builder: Builder, cache: DiskCache, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(builder, "forget", forgotten.append)
    size = cache.entries()[0].bytes
    assert Engines(builder).delete(built) == size
    assert not cache.entries() and forgotten == [built]
    with pytest.raises(EngineRefused, match="no such engine") as raised:
        Engines(builder).delete(built)
    assert raised.value.missing


def test_shipped_engines_are_not_deleted(builder: Builder) -> None:
    key = next(iter(module.shipped_families()))
    with pytest.raises(EngineRefused, match="comes with the pack") as raised:
        Engines(builder).delete(key)
    assert not raised.value.missing


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "A" * 32, "a" * 31])
def test_only_what_is_listed_can_be_deleted(builder: Builder, built: str, key: str) -> None:
    with pytest.raises(EngineRefused, match="no such engine"):
        Engines(builder).delete(key)


def test_an_engine_that_is_being_built_is_not_deleted(
    builder: Builder, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "status", lambda key: {"state": "building"})
    with pytest.raises(EngineRefused, match="cancel that first"):
        Engines(builder).delete(built)


def test_nothing_outside_the_cache_folder_is_deleted(
    builder: Builder, cache: DiskCache, built: str, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (cache.folder / "plan").rename(outside)
    (cache.folder / "plan").symlink_to(outside)
    with pytest.raises(EngineRefused, match="outside"):
        Engines(builder).delete(built)
    assert (outside / f"{built}.json").exists()


def test_a_file_that_cannot_be_removed_is_said(
    builder: Builder, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(EngineRefused, match="writable"):
        Engines(builder).delete(built)


def test_two_deletes_at_once_free_once(builder: Builder, cache: DiskCache, built: str) -> None:
    size, engines = cache.entries()[0].bytes, Engines(builder)
    freed: list[int] = []

    def delete() -> None:
        try:
            freed.append(engines.delete(built))
        except EngineRefused as error:
            assert error.missing

    threads = [threading.Thread(target=delete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert freed == [size]


# Reading ahead.


def node(kind: str = "Anything", **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def queue_of(running: list[Any], waiting: list[Any]) -> Any:
    """The host's queue, as far as it is looked at."""
    return SimpleNamespace(
        mutex=threading.RLock(),
        currently_running={i: (0, f"run{i}", prompt, {}, []) for i, prompt in enumerate(running)},
        queue=[(i, f"id{i}", prompt, {}, []) for i, prompt in enumerate(waiting)],
    )


@pytest.mark.parametrize(
    ("prompt", "files"),
    [
        ({}, []),
        (None, []),
        ({"1": None, "2": {"inputs": None}, "3": {}}, []),
        ({"1": node(ckpt_name=["4", 0], text="x")}, []),  # a link to another node
        (
            {
                "1": node(ckpt_name="a"),
                "2": node(unet_name="b", ckpt_name="a"),
                "3": node(control_net_name="c"),
            },
            [("checkpoints", "a"), ("diffusion_models", "b"), ("controlnet", "c")],
        ),
    ],
)
def test_the_model_files_of_a_prompt(prompt: Any, files: list[tuple[str, str]]) -> None:
    assert model_files(prompt) == files


def read_ahead(prefetcher: Prefetcher) -> list[tuple[str, int]]:
    prefetcher.look()
    assert prefetcher.wait(20)
    return [(os.path.basename(path), count) for path, count in prefetcher.done]


@pytest.fixture
def files(models: Models) -> Models:
    for name in "abc":
        (models.root / "checkpoints" / name).write_bytes(b"x" * 1000)
    return models


def test_the_next_prompts_file_is_read_and_no_other(files: Models) -> None:
    running = {"1": node(ckpt_name="a")}
    following = {"1": node(ckpt_name="a"), "2": node(ckpt_name="b"), "3": node(ckpt_name="gone")}
    last = {"1": node(ckpt_name="c")}
    queue = queue_of([running], [following, last])
    prefetcher = Prefetcher(queue, files.locate)
    assert read_ahead(prefetcher) == [("b", 1000)]
    assert read_ahead(prefetcher) == [("b", 1000)]  # not again for the same prompt
    queue.queue.pop(0)
    assert read_ahead(prefetcher) == [("b", 1000), ("c", 1000)]
    queue.queue.pop(0)
    assert len(read_ahead(prefetcher)) == 2


def test_what_the_running_and_the_next_prompt_need_is_to_stay(files: Models) -> None:
    told = []

    def bring(path: str, stop: threading.Event, keep: Collection[str]) -> None:
        told.append((Path(path).name, [Path(other).name for other in keep]))

    queue = queue_of([{"1": node(ckpt_name="a")}], [{"1": node(ckpt_name="b")}])
    read_ahead(Prefetcher(queue, files.locate, bring))
    assert told == [("b", ["a", "b"])]


def test_nothing_is_read_where_memory_is_short(
    files: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=module.SPARE_BYTES + 999, total=1)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)
    prompt = {"1": node(ckpt_name="a")}
    assert read_ahead(Prefetcher(queue_of([], [prompt]), files.locate)) == []
    memory.available += 1
    assert read_ahead(Prefetcher(queue_of([], [prompt]), files.locate)) == [("a", 1000)]
    memory.total = 100 * GIB  # a tenth of it is spared
    assert read_ahead(Prefetcher(queue_of([], [prompt]), files.locate)) == []


def test_files_are_read_one_at_a_time_and_can_be_stopped(
    files: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 8)
    prefetcher = Prefetcher(queue_of([], [{"1": node(ckpt_name="a")}]), files.locate)
    entered, go = threading.Event(), threading.Event()

    def hold(size: int) -> bool:
        entered.set()
        return go.wait(20)

    monkeypatch.setattr(module, "has_room_for", hold)
    prefetcher.look()
    assert entered.wait(20)
    thread = prefetcher._thread
    prefetcher.look()
    assert prefetcher._thread is thread and not prefetcher.wait(0.01)
    prefetcher._stop.set()
    go.set()
    prefetcher.stop()
    assert [count for _, count in prefetcher.done] == [0]


@pytest.mark.parametrize(
    "queue",
    [
        None,
        SimpleNamespace(),
        queue_of([None], [None]),
        queue_of([], [{"1": node(ckpt_name="a\0b")}]),
    ],
)
def test_a_queue_of_another_make_is_nothing_to_worry_about(
    files: Models, queue: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_ahead(Prefetcher(queue, files.locate)) == []
    assert not caplog.records
