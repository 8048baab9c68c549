"""The next prompt's checkpoint waits in the engine's own pool, and is taken from there."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.utils
import comfyui_version
import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.hosts.comfyui import ahead, weights
from accel.hosts.comfyui.ahead import bring_nearer
from accel.hosts.comfyui.catalog import Prefetcher
from accel.hosts.comfyui.loaders import load_checkpoint
from accel.hosts.comfyui.patcher import accelerate
from accel.hosts.comfyui.pool import NetworkPatcher, pool
from accel.hosts.comfyui.run import Options, structure_of_model
from accel.hosts.comfyui.weights import PREFIX, PatchedSource, _holds, contents, file_source
from accel.runtime.pool import PINNED, process_pool
from accel.runtime.transfer import HostBytes, transfer_for
from accel.sources import FileSource
from accel.tensorfile import TensorInfo, fingerprint_of

from .checkpoints import ensure
from .host import conditioning, sample
from .workflows import Graph

KIND = "tiny-sd15"


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch):
    """A pool with budgets of its own, and nothing loaded before or after."""
    found = process_pool()
    monkeypatch.setattr(found, "_budgets", {"cpu": 1 << 40, PINNED: 1 << 40})
    monkeypatch.setattr(found, "_free", lambda tier: 1 << 40)
    monkeypatch.setattr(ahead, "has_room_for", lambda size: True)

    def clear():
        management.unload_all_models()
        gc.collect()
        for tier in ("cpu", PINNED):
            found.shrink(tier)

    clear()
    yield
    clear()


@pytest.fixture
def files(models_folder, tmp_path):
    """Two checkpoints of one structure, the second a copy that a test may change."""
    names = [f"checkpoints/{KIND}-{letter}.safetensors" for letter in "ab"]
    first, second = ensure(models_folder, *names)
    return [str(first), str(shutil.copy(second, tmp_path / "next.safetensors"))]


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Parameters that are read of a file or a model for a sampling, from now on; and patched."""
    found: list[str] = []
    original = FileSource.read_into, PatchedSource.read, PatchedSource._patched

    def read_into(self: FileSource, name: str, out: torch.Tensor) -> None:
        found.append(name)
        original[0](self, name, out)

    def read(self: PatchedSource, name: str) -> torch.Tensor:
        found.append(name)
        return original[1](self, name)

    def patched(self: PatchedSource, name: str, value: torch.Tensor) -> torch.Tensor:
        found.append(f"patched {name}")
        return original[2](self, name, value)

    monkeypatch.setattr(FileSource, "read_into", read_into)
    monkeypatch.setattr(PatchedSource, "read", read)
    monkeypatch.setattr(PatchedSource, "_patched", patched)
    return found


def load(path: str, lora: Any = None) -> Any:
    model = load_checkpoint(path, Options(wait=True))[0]
    return model if lora is None else with_lora(model, lora)


def with_lora(model: Any, lora: Any) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]


@pytest.fixture
def lora(models_folder):
    (path,) = ensure(models_folder, f"loras/{KIND}-1.safetensors")
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def paint(model: Any) -> torch.Tensor:
    return sample(model, conditioning(KIND, 1), conditioning(KIND, 2), steps=2)


def engine() -> NetworkPatcher:
    (found,) = [one for one in pool()._patchers.values() if one.network is not None]
    return found


def waiting(tier: str) -> int:
    return process_pool().report()["tiers"].get(tier, {"blocks": 0})["blocks"]


def bring(path: str) -> None:
    bring_nearer(path, threading.Event())


@pytest.fixture(params=["cpu", PINNED])
def tier(request, monkeypatch):
    """Where there is room."""
    if request.param == PINNED:
        monkeypatch.setattr(ahead, "_device_has_room", lambda patcher, network: False)
    return request.param


def test_the_next_sampling_takes_it_from_where_it_waits(files, tier, reads):
    expected = paint(load(files[1]))
    management.unload_all_models()
    process_pool().shrink("cpu")
    current = load(files[0])
    paint(current)
    before = {name: waiting(name) for name in ("cpu", PINNED)}
    bring(files[1])
    assert {name: waiting(name) - before[name] for name in before} == {
        "cpu": int(tier == "cpu"),
        PINNED: int(tier == PINNED),
    }
    reads.clear()
    assert torch.equal(paint(load(files[1])), expected)
    assert reads == []
    assert not torch.equal(paint(current), expected)


def test_a_lora_is_put_on_what_waits(files, tier, reads, lora):
    expected = paint(load(files[1], lora))
    management.unload_all_models()
    process_pool().shrink("cpu")
    paint(load(files[0]))
    bring(files[1])
    reads.clear()
    model = load(files[1])
    assert torch.equal(paint(with_lora(model, lora)), expected)
    assert reads and all(name.startswith("patched ") for name in reads)
    reads.clear()
    bare = paint(model)  # off again: from the same place
    assert reads == [] and not torch.equal(bare, expected)


def test_without_a_prefetch_several_threads_read_the_file(files, reads):
    """The weights of an accelerated loader's MODEL are the mapped file's."""
    expected = paint(accelerate(comfy.sd.load_checkpoint_guess_config(files[1])[0], Options(True)))
    management.unload_all_models()
    process_pool().shrink("cpu")
    reads.clear()
    assert torch.equal(paint(load(files[1])), expected)
    assert len(reads) == len(set(reads)) > 500


def test_a_file_of_the_host_own_loader_is_known_too(files, tier, reads):
    paint(load(files[0]))
    bring(files[1])
    reads.clear()
    loaded = comfy.sd.load_checkpoint_guess_config(files[1])[0]
    found = paint(accelerate(loaded, Options(wait=True)))
    # Older hosts do not say which file a MODEL is of: its own weights are as good.
    told = hasattr(loaded, "cached_patcher_init")
    version = tuple(map(int, comfyui_version.__version__.split(".")[:2]))
    assert told or version < (0, 33)
    assert (reads == []) == told
    assert torch.equal(found, paint(load(files[1])))


def test_weights_that_are_not_the_files_any_more_are_the_models_own(files, tier):
    paint(load(files[0]))
    bring(files[1])
    model = accelerate(comfy.sd.load_checkpoint_guess_config(files[1])[0], Options(wait=True))
    with torch.no_grad():
        for parameter in model.model.diffusion_model.parameters():
            parameter.mul_(1.01)
    changed = paint(model)
    assert not torch.equal(changed, paint(load(files[1])))


def of_the_host(path: str) -> Any:
    return accelerate(comfy.sd.load_checkpoint_guess_config(path)[0], Options(wait=True))


def change_a_row(model: Any, factor: float) -> None:
    """Where no sample of its bytes is taken, and so that PyTorch counts no write."""
    with torch.inference_mode():
        weight = model.model.diffusion_model.input_blocks[1][1].proj_in.weight
        weight.data.view(-1)[weight.numel() // 4 :][:32] *= factor


@pytest.mark.parametrize("loaded", [load, of_the_host])
@pytest.mark.parametrize("waits", [False, True])
def test_a_few_numbers_written_in_place_make_other_weights(files, tier, loaded, waits):
    """Before its first sampling, between two, and put back."""
    model = loaded(files[1])
    right = paint(model)
    management.unload_all_models()
    process_pool().shrink("cpu")
    paint(load(files[0]))
    if waits:
        bring(files[1])
    model = loaded(files[1])
    config = structure_of_model(model).config
    source = PatchedSource(model, config, PREFIX, torch.device("cpu"), "it")
    before = source.sample()
    change_a_row(model, 8)
    assert source.sample() == before, "the test is of what it does not see"
    changed = paint(model)
    assert not torch.equal(changed, right)
    assert torch.equal(paint(model), changed)
    assert torch.equal(paint(loaded(files[1])), right), "nobody else has what was written"
    assert torch.equal(paint(model), changed)
    if not (loaded is load or hasattr(model, "cached_patcher_init")):
        return  # of a model whose file is not known, what is written later has to show in a sample
    change_a_row(model, 4)
    again = paint(model)
    assert not torch.equal(again, changed) and not torch.equal(again, right)
    change_a_row(model, 1 / 32)
    assert torch.equal(paint(model), right)


def test_large_copies_are_compared_with_the_file_once(files, monkeypatch):
    model, compared = of_the_host(files[1]), []
    if not hasattr(model, "cached_patcher_init"):
        pytest.skip("this host does not tell which file it is")
    monkeypatch.setattr(weights, "SMALL_BYTES", 0)
    original = weights.equal

    def equal(file, parts):
        compared.append(sum(part.end - part.begin for part in parts))
        return original(file, parts)

    monkeypatch.setattr(weights, "equal", equal)
    right = paint(model)
    assert torch.equal(paint(model), right)
    assert len(compared) == 1 and compared[0] > 1 << 20
    changed = of_the_host(files[1])
    change_a_row(changed, 8)
    assert not torch.equal(paint(changed), right) and len(compared) == 2
    assert torch.equal(paint(model), right) and len(compared) == 2


def test_a_file_that_was_replaced_is_another(files, tier):
    paint(load(files[0]))
    bring(files[1])
    old = paint(load(files[1]))
    replaced = Path(files[1]).with_suffix(".part")
    shutil.copy(files[0], replaced)
    os.replace(replaced, files[1])
    assert torch.equal(paint(load(files[1])), paint(load(files[0])))
    assert not torch.equal(paint(load(files[1])), old)


def test_the_host_sees_what_waits_on_the_device_and_takes_it(files):
    paint(load(files[0]))
    network = engine()
    before = network.loaded_size()
    bring(files[1])
    size = network.network.weights.bytes
    assert network.loaded_size() == before + size
    freed = network.partially_unload(torch.device("cpu"), size)
    assert freed >= size and waiting("cpu") == 0
    assert network.network is not None, "the engine stays"
    paint(load(files[1]))


def test_nothing_is_brought_where_memory_is_short(files, monkeypatch):
    paint(load(files[0]))
    before = waiting("cpu")
    monkeypatch.setattr(ahead, "has_room_for", lambda size: False)
    bring(files[1])
    assert (waiting("cpu"), waiting(PINNED)) == (before, 0)
    monkeypatch.setattr(ahead, "has_room_for", lambda size: size < 1 << 40)
    monkeypatch.setattr(process_pool(), "_budgets", {"cpu": 0, PINNED: 100})
    process_pool().shrink("cpu")
    bring(files[1])
    assert (waiting("cpu"), waiting(PINNED)) == (0, 0)
    paint(load(files[1]))


def test_pinned_memory_is_given_back_when_others_need_it(files, monkeypatch):
    paint(load(files[0]))
    monkeypatch.setattr(ahead, "_device_has_room", lambda patcher, network: False)
    bring(files[1])
    assert waiting(PINNED) == 1
    monkeypatch.setattr(process_pool(), "_free", lambda tier: -1 if tier == PINNED else 1 << 40)
    paint(load(files[0]))
    assert waiting(PINNED) == 0


@pytest.fixture
def half(files):
    """The second checkpoint in half precision, which the host casts to what a CPU computes in."""
    state = {name: value.half() for name, value in load_file(files[1]).items()}
    save_file(state, files[1])
    return files[1]


def test_a_file_that_the_host_casts_is_known_too(files, half, tier, reads):
    model = load(half)
    assert model.model.get_dtype() == torch.float32
    expected = paint(model)
    management.unload_all_models()
    process_pool().shrink("cpu")
    paint(load(files[0]))
    bring(half)
    reads.clear()
    assert torch.equal(paint(load(half)), expected)
    assert reads == []


def test_a_lora_on_a_file_that_the_host_casts(files, half, tier, lora):
    expected = paint(load(half, lora))
    management.unload_all_models()
    process_pool().shrink("cpu")
    paint(load(files[0]))
    bring(half)
    assert torch.equal(paint(load(half, lora)), expected)


def test_which_precision_holds_another():
    double, single, short, half = torch.float64, torch.float32, torch.bfloat16, torch.float16
    eight = torch.float8_e4m3fn, torch.float8_e5m2
    for wide in (single, short, half):
        assert _holds(single, wide) and _holds(wide, wide) and _holds(double, wide)
        assert all(not _holds(one, wide) for one in eight)
    assert all(_holds(one, narrow) for one in (half, short, single) for narrow in eight)
    assert not _holds(short, half) and not _holds(half, short) and not _holds(half, single)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (3,), (31,), (32,), (33,), (5, 7, 3), (1000,)])
def test_what_a_tensor_is_known_by_once_it_is_cast(shape, dtype):
    value = torch.randn(shape)
    assert contents(value, dtype) == contents(value.to(dtype))
    assert contents(value.half(), dtype) == contents(value.half().to(dtype))


def test_other_structures_other_precisions_and_engines_that_are_gone(
    files, models_folder, tmp_path, monkeypatch
):
    (other,) = ensure(models_folder, "checkpoints/tiny-sdxl-a.safetensors")
    bring(files[1])  # nothing has run yet
    paint(load(files[0]))
    before = waiting("cpu")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(files[1]).read_bytes()[:-50])
    for path in (str(other), str(cut), str(tmp_path / "absent.safetensors")):
        bring(path)
    with monkeypatch.context() as patch:  # of an engine in half precision that is no float32 file
        patch.setattr(engine(), "dtype", torch.float16)
        patch.setattr(FileSource, "stored", lambda self, name: TensorInfo((), torch.bfloat16))
        bring(files[1])
    assert (waiting("cpu"), waiting(PINNED)) == (before, 0)
    management.unload_all_models()
    bring(files[1])
    assert (waiting("cpu"), waiting(PINNED)) == (0, 0)


def test_an_interrupt_while_it_arrives_stops_the_sampling_and_not_the_file(files, monkeypatch):
    paint(load(files[0]))
    begun, go_on = threading.Event(), threading.Event()
    read = FileSource.read_into

    def slow(self: FileSource, name: str, out: torch.Tensor) -> None:
        begun.set()
        assert go_on.wait(60)
        read(self, name, out)

    monkeypatch.setattr(FileSource, "read_into", slow)
    thread = threading.Thread(target=bring, args=(files[1],))
    thread.start()
    assert begun.wait(60)
    threading.Timer(0.3, management.interrupt_current_processing).start()
    with pytest.raises(management.InterruptProcessingException):
        paint(load(files[1]))
    go_on.set()
    thread.join(60)
    assert not management.interrupt_processing
    assert process_pool().report()["events"]["prefetches"] >= 1
    paint(load(files[1]))


def test_who_waits_for_it_ends_the_pauses_of_pinning(files, monkeypatch):
    """They are for others that render: here of some six seconds each."""
    right = paint(load(files[1]))
    paint(load(files[0]))
    process_pool().shrink("cpu")
    begun = threading.Event()

    def pin(self, start, end):
        time.sleep(0.003)
        begun.set()

    monkeypatch.setattr("accel.runtime.transfer.PAUSE", 2_000)
    monkeypatch.setattr("accel.runtime.transfer.PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(HostBytes, "pin", pin)
    monkeypatch.setattr(ahead, "_device_has_room", lambda patcher, network: False)
    transfer = transfer_for(torch.device("cpu"), background=True)
    monkeypatch.setattr(transfer, "device", SimpleNamespace(type="cuda"))
    thread = threading.Thread(target=bring, args=(files[1],))
    thread.start()
    assert begun.wait(60)
    started = time.monotonic()
    assert torch.equal(paint(load(files[1])), right)
    assert time.monotonic() - started < 20
    thread.join(60)
    assert waiting(PINNED) == 1


def test_the_queue_leads_to_it(files, monkeypatch, tier):
    queue = SimpleNamespace(mutex=threading.RLock(), currently_running={}, queue=[])
    for number, name in enumerate(("now", "next")):
        graph = Graph()
        graph.add("AnyLoader", ckpt_name=name)
        item = (number, name, graph.workflow, {}, [], {})
        if name == "now":
            queue.currently_running[0] = item
        else:
            queue.queue.append(item)
    paint(load(files[0]))
    before = waiting(tier)
    prefetcher = Prefetcher(queue, lambda folder, name: files[name == "next"], bring_nearer)
    prefetcher.look()
    assert prefetcher.wait(60) and waiting(tier) == before + 1
    assert [path for path, _ in prefetcher.done] == [files[1]]


def test_a_prefetch_leaves_what_the_running_prompt_needs(files, monkeypatch, tmp_path, tier):
    """Though it has not been used for longest: its sampling begins when the prefetch does."""
    running, following = files
    process_pool().shrink(tier)
    paint(load(running))
    other = str(shutil.copy(files[1], tmp_path / "other.safetensors"))
    bring(running)
    bring(other)
    paint(load(other))
    found = process_pool()
    monkeypatch.setattr(found, "_budgets", {PINNED: 0, tier: found.bytes(tier)})
    stamp = file_source(fingerprint_of(running), engine().structure.config).stamp()

    def waits():
        if tier == PINNED:
            return found.holds(PINNED, None, stamp)
        return found.holds("cpu", engine().network._owner, (stamp, ()))

    assert waits()
    bring_nearer(following, threading.Event(), [running, following])
    assert waits()
    paint(load(running))
    paint(load(other))
    bring_nearer(following, threading.Event(), [])
    assert not waits(), "without a word it goes"
