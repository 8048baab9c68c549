"""One prompt by many checkpoints: pictures as the host's own nodes make them, and what goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import comfy.model_management as management
import pytest
import torch

from accel.errors import InvalidFile, InvalidInput
from accel.hosts.comfyui import audition as module
from accel.hosts.comfyui.audition import Request, audition, blank, names_of, state_of
from accel.hosts.comfyui.catalog import Reader
from accel.hosts.comfyui.journal import STATUS_EVENT, journal
from accel.hosts.comfyui.run import Options

from .checkpoints import ensure
from .host import call, relative_error
from .workflows import Graph

OPTIONS = Options(wait=True, node_id="7")


def request(**changes: Any) -> Request:
    given = Request("a castle", "fog", 5, 2, 4.0, "euler", "normal", blank(128, 128))
    return replace(given, **changes)


@pytest.fixture
def folder(tmp_path, models_folder, monkeypatch):
    """Two SD1.5 checkpoints around an SDXL one, and a folder of its own in the host's list."""
    import folder_paths

    kinds = {"set/a": "tiny-sd15-a", "set/b": "tiny-sdxl-a", "set/c": "tiny-sd15-b"}
    root = tmp_path / "checkpoints"
    for name, kind in kinds.items():
        (path,) = ensure(models_folder, f"checkpoints/{kind}.safetensors")
        target = root / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    known = dict(folder_paths.folder_names_and_paths)
    known["checkpoints"] = ([str(root)], {".safetensors", ".ckpt"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return root


def pictures_of(name: str, asked: Request) -> torch.Tensor:
    """What a user's own workflow gives, without any engine."""
    model, clip, vae = call("nodes", "CheckpointLoaderSimple", ckpt_name=name)[:3]
    conds = [call("nodes", "CLIPTextEncode", clip=clip, text=text)[0]
             for text in (asked.positive, asked.negative)]  # fmt: skip
    (latent,) = call("nodes", "KSampler", model=model, seed=asked.seed, steps=asked.steps,
                     cfg=asked.cfg, sampler_name=asked.sampler, scheduler=asked.scheduler,
                     positive=conds[0], negative=conds[1], latent_image=dict(asked.latent),
                     denoise=1.0)  # fmt: skip
    return call("nodes", "VAEDecode", vae=vae, samples=latent)[0]


def test_each_picture_is_what_the_hosts_own_nodes_make(folder):
    asked = request()
    result = audition("set", asked, OPTIONS)
    lines = result.text.splitlines()
    order = ["set/a.safetensors", "set/c.safetensors", "set/b.safetensors"]
    assert [line.partition(": ")[0] for line in lines] == order, "those of one structure together"
    assert all(" · engine" in line and ", swap " in line for line in lines)
    assert result.pictures.shape == (3, 128, 128, 3)
    for picture, name in zip(result.pictures, order, strict=True):
        assert relative_error(picture, pictures_of(name, asked)[0]) < 1e-3
    assert relative_error(result.pictures[0], result.pictures[1]) > 0.01
    assert result.sheet.shape[0] == 1 and result.sheet.shape[-1] == 3
    assert 0 <= result.sheet.min() < 0.5 and result.sheet.max() == 1
    assert {run.model for run in journal().runs} >= set(order)


def test_a_batch_and_its_order_in_the_sheet(folder):
    latent = {"samples": torch.zeros(2, 4, 16, 24)}
    result = audition("set/[ac]*", request(latent=latent, steps=1), OPTIONS)
    assert result.pictures.shape == (4, 128, 192, 3)
    assert result.sheet.shape[2] < result.sheet.shape[1], "a row for each checkpoint"


def test_what_cannot_be_used_is_left_out_and_named(folder, models_folder):
    data = (folder / "set/a.safetensors").read_bytes()
    (folder / "set/cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "set/none.safetensors").write_bytes(b"no header at all")
    (folder / "set/other.ckpt").write_bytes(b"no pickle either")
    (lora,) = ensure(models_folder, "loras/tiny-sd15-1.safetensors")
    shutil.copy(lora, folder / "set/lora.safetensors")
    (alone,) = ensure(models_folder, "checkpoints/wide-sd15-a.safetensors")
    shutil.copy(alone, folder / "set/alone.safetensors")
    link = folder / "set/link.safetensors"
    link.symlink_to(folder / "on-a-disk-that-is-not-there.safetensors")
    assert state_of("set") == state_of("set")
    said: list[str] = []
    stop = journal().subscribe(
        lambda event, data: said.append(data["text"]) if event == STATUS_EVENT else None
    )
    result = audition("set", request(steps=1), OPTIONS)
    stop()
    assert len(result.pictures) == 3
    lines = [line for line in result.text.splitlines() if line.startswith("left out: ")]
    words = {line.removeprefix("left out: ").partition(": ")[0]: line for line in lines}
    assert set(words) == {
        f"set/{name}" for name in ("cut.safetensors", "none.safetensors", "other.ckpt",
                                   "lora.safetensors", "alone.safetensors", "link.safetensors")
    }  # fmt: skip
    assert "a link to nothing" in words["set/link.safetensors"]
    assert "text encoder" in words["set/alone.safetensors"]
    assert all("\n" not in line for line in lines)
    assert said[-1].startswith("3 checkpoints painted · left out: ")


def test_nothing_that_can_be_used(folder):
    with pytest.raises(InvalidInput, match="no checkpoint is named by 'elsewhere'"):
        audition("elsewhere", request(), OPTIONS)
    (folder / "bad").mkdir()
    (folder / "bad/x.safetensors").write_bytes(b"no header at all")
    with pytest.raises(InvalidFile, match="left out: bad/x"):
        audition("bad", request(), OPTIONS)


def test_an_interrupt_keeps_what_is_finished(folder, monkeypatch):
    before = state_of("set")
    sample = module._Stage._sample
    begun = []

    def interrupted(self: Any, *arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == 2:
            management.interrupt_current_processing()
        return sample(self, *arguments)

    monkeypatch.setattr(module._Stage, "_sample", interrupted)
    result = audition("set", request(), OPTIONS)
    assert len(result.pictures) == 1 and len(begun) == 2
    assert result.text.splitlines()[-1] == "stopped after 1 of 3 checkpoints"
    assert not management.interrupt_processing, "what comes after it runs"
    assert state_of("set") != before, "it is not taken for the whole of it"
    begun[:] = [1]
    with pytest.raises(management.InterruptProcessingException):
        audition("set", request(), OPTIONS)


def test_the_next_file_is_read_while_one_paints(folder, monkeypatch):
    asked: list[str] = []
    begin = Reader.begin

    def noted(self: Reader, paths: Any) -> None:
        asked.append("+".join(path.rpartition("/")[2] for path in paths()))
        begin(self, paths)

    monkeypatch.setattr(Reader, "begin", noted)
    sample = module._Stage._sample

    def sampled(self: Any, *arguments: Any) -> Any:
        asked.append("paint")
        return sample(self, *arguments)

    monkeypatch.setattr(module._Stage, "_sample", sampled)
    audition("set", request(steps=1), OPTIONS)
    assert asked == ["c.safetensors", "paint", "b.safetensors", "paint", "", "paint"]


def test_progress_runs_over_all_of_it(folder, monkeypatch):
    import comfy.utils

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)

    class Bar(comfy.utils.ProgressBar):
        def update_absolute(self, value: int, *rest: Any) -> None:
            seen.append((value, self.total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    audition("set", request(steps=3), OPTIONS)
    values = [value for value, _ in seen]
    assert values == sorted(values) and set(values) == set(range(1, 10))
    assert {total for _, total in seen} == {9}


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        ("*", "abc"),
        ("set", "abc"),
        ("SET/", "abc"),
        ("set\\b*", "b"),
        ("set/a.safetensors, set/c.safetensors", "ac"),
        ("set/a*\nset/b*", "ab"),
        ("*/[bc].*", "bc"),
    ],
)
def test_what_a_pattern_names(folder, pattern, letters):
    assert names_of(pattern) == [f"set/{letter}.safetensors" for letter in letters]


def test_files_that_come_and_go_are_seen(folder):
    before = state_of("set")
    assert state_of("set") == before
    shutil.copy(folder / "set/a.safetensors", folder / "set/d.safetensors")
    assert state_of("set") != before


def test_files_are_seen_where_another_node_gives_the_pattern(folder):
    """The host asks with None then; an error would have it painted anew each time."""
    before = state_of(None)
    assert state_of(None) == before == state_of("*")
    (folder / "set" / "a.safetensors").unlink()
    assert state_of(None) != before


def test_the_memory_is_the_hosts_to_take_back(folder):
    audition("set/[ac]*", request(steps=1), OPTIONS)
    management.unload_all_models()
    management.cleanup_models()
    assert management.current_loaded_models == []


def test_the_node_in_a_workflow(server):
    for letter in "ab":
        server.ensure(f"checkpoints/tiny-sd15-{letter}.safetensors")
    graph = Graph()
    node = graph.add(
        "SwitchyardAuditionCheckpoints",
        checkpoints="tiny-sd15-[ab].safetensors",
        positive="a castle",
        steps=2,
        width=128,
        height=128,
        first_run="wait",
    )
    graph.add("SaveImage", images=[node[0], 0], filename_prefix="painted")
    graph.add("PreviewAny", source=[node[0], 2])
    result = server.run(graph.workflow)
    (shown,) = result.outputs[node[0]]["images"]
    assert shown["type"] == "temp"
    (text,) = result.outputs["3"]["text"]
    assert text.count("engine") == 2, text
    assert len(result.outputs["2"]["images"]) == 2
