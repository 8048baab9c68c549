"""The audition: every checkpoint of a folder paints, each as if it had been alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sparse import ldm_shapes, sparse_file
from support import make_lora, make_unet, tiny_config, two_levels

from accel.cli import main
from accel.demo import audition, world
from accel.demo.audition import Options, find, run_audition
from accel.errors import InvalidFile, InvalidInput, OutOfMemory
from accel.sheet import Cell, contact_sheet
from accel.sources import FileSource
from benchmarks import swaps

SMALL = dataclasses.replace(two_levels(), context_dim=world.TEXT_WIDTH)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny world's plan is kept once a test has built it."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(autouse=True)
def shared_plans(plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(plans))


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny world's network is captured in a third of the time with two levels of its three."""
    monkeypatch.setattr(world, "UNET", SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints among what cannot paint."""
    folder = tmp_path / "world"
    folder.mkdir()
    for seed, name in enumerate(("tiny-neon", "z-flat")):
        save_file(make_unet(seed, SMALL).state_dict(), folder / f"{name}.safetensors")
    save_file(make_lora(0, SMALL), folder / "lora.safetensors")
    controlnet = make_unet(0, tiny_config("sd15-controlnet")).state_dict()
    save_file(controlnet, folder / "controlnet.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "cut.safetensors").write_bytes(b"")
    return folder


def test_a_folder_is_painted_with_one_engine(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheets" / "sheet.png"
    arguments = ["--checkpoints", folder, "--out", out, "--steps", 2, "--images", 2, "--json"]
    assert main(["audition", *map(str, arguments), "--size", "64x128", "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    painted = [(row["checkpoint"], row["seed"]) for row in found["rows"]]
    assert painted == [("tiny-neon", 0), ("tiny-neon", 1), ("z-flat", 0), ("z-flat", 1)]
    assert all(row["steps_ms"] > 0 and row["idle_ms"] >= 0 for row in found["rows"])
    assert [row["swap_ms"] > 0 for row in found["rows"]] == [True, False, True, False]
    assert 0 <= found["idle"] < 1
    engine = found["engine"]
    assert engine["captures"] <= 1 and engine["binds"] == 1
    assert engine["pool"]["events"]["prefetches"] >= 1
    for name in ("other", "cut", "lora", "controlnet"):
        assert any(f"{name}.safetensors" in remark for remark in found["remarks"]), name
    with Image.open(out) as image:
        assert image.width > 2 * 256 and image.height > 2 * 256
        assert len(image.getcolors(1 << 20) or ()) > 100, "something is painted"


def test_pictures_do_not_depend_on_who_came_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: dict[str, list[torch.Tensor]] = {}

    def noted(heading: str, cells: list[Cell], columns: int) -> Image.Image:
        for cell in cells:
            pictures.setdefault(cell.title, []).append(cell.picture)
        return contact_sheet(heading, cells, columns)

    monkeypatch.setattr(audition, "contact_sheet", noted)
    options = Options(folder, tmp_path / "a.png", steps=2, size=(64, 64), device="cpu")
    run_audition(options)
    (folder / "tiny-neon.safetensors").unlink()
    run_audition(options)
    (with_other, alone), (other,) = pictures["z-flat"], pictures["tiny-neon"]
    assert torch.equal(with_other, alone) and not torch.equal(other, alone)


def test_an_audition_is_a_row_of_the_benchmark(folder: Path) -> None:
    row = swaps.audition_row(folder, (64, 64), "cpu", steps=1)
    assert row["pictures"] == 4 and row["ms"] > 0 and 0 <= row["idle"] < 1
    assert row["held"] == (row["idle"] <= row["must_idle"])


def test_a_checkpoint_that_breaks_is_left_out_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FileSource.read_into

    def failing(self: FileSource, name: str, out: torch.Tensor) -> None:
        if "neon" in self.label:
            raise InvalidFile(f"{self.label} ended early")
        read(self, name, out)

    monkeypatch.setattr(FileSource, "read_into", failing)
    options = Options(folder, tmp_path / "a.png", steps=1, size=(64, 64), device="cpu")
    result = run_audition(options)
    assert [row.checkpoint for row in result.rows] == ["z-flat"]
    assert any("tiny-neon.safetensors ended early" in remark for remark in result.remarks)


def test_what_fails_late_costs_its_own_pictures_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VAE that cannot be decoded with, an encoder that no library reads, a size too large."""
    files = {
        name: shutil.copy(folder / "z-flat.safetensors", folder / f"{name}.safetensors")
        for name in ("no-encoder", "no-vae", "too-large")
    }
    prepare, paint = audition._Stage._prepare, audition._Stage._paint
    ready: dict[int, str] = {}

    def prepared(self: Any, candidate: audition.Candidate) -> Any:
        if candidate.path.stem == "no-encoder":
            raise KeyError("text_model")
        stuff = prepare(self, candidate)
        if candidate.path.stem == "no-vae":
            stuff = dataclasses.replace(stuff, decode=None)
        ready[id(stuff)] = candidate.path.stem
        return stuff

    def painted(self: Any, stuff: Any, seed: int) -> torch.Tensor:
        if ready[id(stuff)] == "too-large":
            raise OutOfMemory("no memory is left on cpu to run in")
        return paint(self, stuff, seed)

    monkeypatch.setattr(audition._Stage, "_prepare", prepared)
    monkeypatch.setattr(audition._Stage, "_paint", painted)
    options = Options(folder, tmp_path / "a.png", steps=1, size=(64, 64), device="cpu")
    result = run_audition(options)
    assert [row.checkpoint for row in result.rows] == ["tiny-neon", "z-flat"]
    for path, says in zip(files.values(), ("KeyError", "TypeError", "no memory"), strict=True):
        assert any(str(path) in remark and says in remark for remark in result.remarks), says


def test_an_engine_goes_before_that_of_another_structure_comes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two networks at a time would not fit where each alone does. The last here is not painted."""
    candidates, _ = find(folder)
    several = [
        dataclasses.replace(candidates[index], structure=f"structure {number}")
        for number, index in enumerate((0, 1, 0))
    ]
    engine, held = audition.Session.engine, []

    def made(self: audition.Session, module: torch.nn.Module) -> Any:
        held.append(len(self._networks))
        if len(held) == 3:
            raise OutOfMemory("its weights do not fit")
        return engine(self, module)

    monkeypatch.setattr(audition, "find", lambda folder: (several, []))
    monkeypatch.setattr(audition.Session, "engine", made)
    options = Options(folder, tmp_path / "a.png", steps=1, size=(64, 64), device="cpu")
    result = run_audition(options)
    assert held == [0, 0, 0] and result.report["forwards"] > 0
    assert [row.checkpoint for row in result.rows] == ["tiny-neon", "z-flat"]
    assert any("do not fit" in remark for remark in result.remarks)


def test_structures_stand_together_and_headers_alone_are_read(tmp_path: Path) -> None:
    for name, family in (("a", "sdxl"), ("b", "sd15"), ("c", "sdxl")):
        sparse_file(tmp_path / f"{name}.safetensors", ldm_shapes(family))
    candidates, remarks = find(tmp_path)
    assert [one.path.stem for one in candidates] == ["a", "c", "b"] and not remarks


@pytest.mark.parametrize(("prepare", "says"), [(None, "no folder"), ("", "no .safetensors")])
def test_folders_without_a_checkpoint(tmp_path: Path, prepare: str | None, says: str) -> None:
    folder = tmp_path / "folder"
    if prepare is not None:
        folder.mkdir()
    with pytest.raises(InvalidFile, match=says):
        find(folder)


def test_what_no_checkpoint_can_paint(folder: Path, tmp_path: Path) -> None:
    options = Options(folder, tmp_path / "a.png", prompt="a lighthouse", steps=1, device="cpu")
    with pytest.raises((InvalidFile, InvalidInput)) as caught:
        run_audition(options)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.png").exists()


def test_names_that_are_too_long_are_cut() -> None:
    cells = [Cell("name " * 40, "note", torch.zeros(3, 8, 16))] * 3
    image = contact_sheet("heading " * 100, cells, 2)
    assert image.size == (12 + 2 * (256 + 12), 40 + 2 * (256 + 80) + 12)
