"""LoRAs that wait on the device: what the pool keeps of them, and that it changes no result."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import make_lora, make_unet, two_levels

from accel.lora.lowrank import LowRank
from accel.runtime.adapters import InRam, Near, tensors_of
from accel.runtime.network import _ADAPTER
from accel.runtime.pool import Pool
from accel.runtime.transfer import Transfer
from accel.session import Engine, Session
from accel.sources import FileSource

ENOUGH = 1 << 30


@pytest.fixture(scope="module")
def small_unet() -> torch.nn.Module:
    return make_unet(0, two_levels())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "a.safetensors"
    save_file(make_unet(1, two_levels()).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs of the same size."""
    folder, lora = tmp_path_factory.mktemp("loras"), make_lora(3, two_levels())
    paths = [folder / f"{index}.safetensors" for index in range(3)]
    for index, path in enumerate(paths):
        factor = 1 + 0.5 * index
        save_file({k: v if "alpha" in k else v * factor for k, v in lora.items()}, path)
    return paths


@pytest.fixture
def engine(small_plans: Path, small_unet: Any, checkpoint: Path) -> Engine:
    """With room for whatever may wait."""
    return engine_with(small_plans, small_unet, checkpoint, ENOUGH)


def engine_with(plans: Path, module: Any, checkpoint: Path, room: int, pinned: int = 0) -> Engine:
    pool = Pool({"cpu": room, "pinned": pinned}, free=lambda tier: 1 << 40)
    engine = Session("cpu", "fp32", cache_dir=plans, pool=pool).engine(module)
    engine.load_weights(checkpoint)
    return engine


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of the tensors that LoRAs bring to the device, a number each time."""
    found: list[int] = []
    bring = Transfer.bring

    def noted(self: Transfer, names: Any, source: Any) -> Any:
        found.append(sum(source.stored(name).bytes for name in names))
        return bring(self, names, source)

    monkeypatch.setattr(Transfer, "bring", noted)
    yield found


def weights(engine: Engine) -> torch.Tensor:
    return engine._network.weights.storage.clone()


def waiting(engine: Engine) -> list[Any]:
    """What waits in the pool: copies of weights and of LoRAs, the oldest first."""
    pool = engine.session.pool
    return ["LoRA" if key[2][0] is _ADAPTER else "weights" for key in pool._blocks]


def size_of(path: Path, engine: Engine) -> int:
    return InRam(tensors_of(engine.session._lora(path, engine.config))).bytes


def test_a_lora_that_is_used_again_crosses_once(
    engine: Engine,
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    crossings: list[int],
) -> None:
    """Off and on, another strength, beside another: each as with nothing kept, bit for bit."""
    plain = engine_with(small_plans, small_unet, checkpoint, 0)
    before = weights(engine)
    sets: list[Any] = [
        *([(files[0], 0.8)], [(files[0], -0.3)], [], [(files[0], 0.8)]),
        *([(files[0], 0.8), (files[1], 0.5)], [(files[1], 0.5), (files[0], 0.1)], []),
    ]
    for chosen in sets:
        engine.set_loras(chosen)
        plain.set_loras(chosen)
        assert torch.equal(weights(engine), weights(plain))
        assert torch.equal(weights(engine), before) == (not chosen)
    assert len(crossings) == 2 and min(crossings) > 0, "each of the two, once"
    report = engine.report()["pool"]
    assert report["events"]["loras_brought"] == 2
    copies = 2 * size_of(files[0], engine)
    assert report["tiers"]["cpu"]["bytes"] == engine._network.weights.bytes + copies
    assert sorted(waiting(engine)) == ["LoRA", "LoRA", "weights"]
    assert plain.report()["pool"]["tiers"]["cpu"]["bytes"] == 0


def test_without_room_on_the_device_a_lora_that_is_used_again_waits_in_pinned_ram(
    small_plans: Path, small_unet: Any, checkpoint: Path, files: list[Path]
) -> None:
    """The same bit for bit. Pinning takes longer than a LoRA's one use."""
    engine = engine_with(small_plans, small_unet, checkpoint, 0, ENOUGH)
    plain = engine_with(small_plans, small_unet, checkpoint, 0)
    one, two = (files[0], 0.8), (files[1], 0.5)
    for chosen, pinned in (
        ([one], 0),
        ([], 0),
        ([one], 1),
        ([(files[0], 0.3), two], 1),
        ([two], 2),
    ):
        for each in (engine, plain):
            each.set_loras(chosen)
        assert torch.equal(weights(engine), weights(plain))
        report = engine.report()["pool"]
        assert report["events"].get("loras_pinned", 0) == pinned
        assert report["tiers"]["pinned"]["bytes"] == pinned * size_of(files[0], engine)
    engine.session.pool.set_budget("pinned", size_of(files[0], engine))
    assert waiting(engine) == ["LoRA"]
    engine._network.free_parked()
    assert waiting(engine) == []


def test_a_lora_in_pinned_ram_comes_onto_the_device_once_there_is_room(
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    crossings: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From there, and not in place of another, which would have to come again."""
    engine = engine_with(small_plans, small_unet, checkpoint, 0, ENOUGH)
    plain = engine_with(small_plans, small_unet, checkpoint, 0)
    size, pool = size_of(files[0], engine), engine.session.pool

    def wear(index: int, strength: float) -> list[int]:
        """Blocks on the device and in pinned RAM after that."""
        for each in (engine, plain):
            each.set_loras([(files[index], strength)])
        assert torch.equal(weights(engine), weights(plain))
        tiers = pool.report()["tiers"]
        return [tiers[tier]["blocks"] for tier in ("cpu", "pinned")]

    for strength in (0.8, 0.7):
        assert wear(0, strength)[0] == 0
    crossings.clear()
    pool.set_budget("cpu", size)
    assert wear(1, 0.5) == [1, 1] and len(crossings) == 1
    assert wear(0, 0.6) == [1, 1] and len(crossings) == 1, "there is no room beside the other"
    pool.set_budget("cpu", 2 * size)

    def never(self: InRam, name: str, out: torch.Tensor) -> None:
        raise AssertionError("it is in pinned RAM")

    with monkeypatch.context() as patch:
        patch.setattr(InRam, "read_into", never)
        assert wear(0, 0.5)[0] == 2 and len(crossings) == 2
        assert wear(0, 0.4)[0] == 2 and len(crossings) == 2


def test_a_lora_whose_strength_is_zero_or_that_changes_nothing_stays_where_it_is(
    engine: Engine, files: list[Path], crossings: list[int]
) -> None:
    engine.set_loras([(files[0], 0.0)])
    assert crossings == []
    engine.set_loras([(files[0], 0.5)])
    engine.set_loras([(files[0], 0.5), (files[1], 0.0)])
    assert len(crossings) == 1


def test_onto_bare_weights_nothing_is_read(
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They stand in the arena, also where no copy of them finds room."""
    engine = engine_with(small_plans, small_unet, checkpoint, 0)
    bare, asked = weights(engine), list[str]()
    for method in ("read", "read_into"):
        own = getattr(FileSource, method)

        def spy(self: Any, name: str, *rest: Any, own: Any = own) -> Any:
            asked.append(name)
            return own(self, name, *rest)

        monkeypatch.setattr(FileSource, method, spy)
    engine.set_loras([(files[0], 0.8), (files[1], -0.4)])
    assert not asked and not torch.equal(weights(engine), bare)
    first = weights(engine)
    engine.set_loras([(files[0], 0.8), (files[1], 0.4)])
    assert asked, "what the LoRAs stand on"
    engine.set_loras([(files[0], 0.8), (files[1], -0.4)])
    assert torch.equal(weights(engine), first)
    engine.set_loras([])
    assert torch.equal(weights(engine), bare)


def test_other_blocks_strengths_cross_no_bus(
    engine: Engine, files: list[Path], crossings: list[int]
) -> None:
    """A LoRA by block is a part for each block, which are kept too."""
    engine.set_loras([(files[0], 0.5, "INALL")])
    first = sum(crossings)
    engine.set_loras([(files[0], 0.7, "INALL")])
    assert sum(crossings) == first > 0
    engine.set_loras([(files[0], 0.7, "ALL")])
    assert sum(crossings) > first


def test_copies_of_weights_do_not_go_for_loras(
    engine: Engine, files: list[Path], crossings: list[int]
) -> None:
    """They would take longer to have again. Among LoRAs what was not used for longest goes."""
    size = size_of(files[0], engine)
    arena = engine._network.weights.bytes
    pool = engine.session.pool
    pool.set_budget("cpu", arena + size - 1)
    engine.set_loras([(files[0], 0.5)])
    assert waiting(engine) == ["weights"] and pool.report()["events"]["refused"] == 1
    pool.set_budget("cpu", arena + 2 * size)
    crossings.clear()
    for index in (0, 1, 0, 2, 0):
        engine.set_loras([(files[index], 0.5)])
    assert len(crossings) == 3, "0 was used when 2 came, and 1 went"
    engine.set_loras([(files[1], 0.5)])
    assert len(crossings) == 4
    assert sorted(waiting(engine)) == ["LoRA", "LoRA", "weights"]
    assert pool.bytes("cpu") == arena + 2 * size


def test_where_memory_runs_out_a_lora_is_read_from_ram(
    engine: Engine,
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = engine_with(small_plans, small_unet, checkpoint, 0)
    tries = []

    def full(self: Near, *arguments: Any) -> None:
        tries.append(waiting(engine))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Near, "__init__", full)
    for one in (engine, plain):
        one.set_loras([(files[0], 0.5)])
    assert torch.equal(weights(engine), weights(plain))
    assert len(tries) == 1 and waiting(engine) == ["weights"], "which did not go for it"


@pytest.mark.parametrize("room", [0, ENOUGH], ids=["no room", "parked"])
def test_where_memory_runs_out_half_way_no_lora_is_put_on_twice(
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:
    """Onto bare weights they are put where these stand: what was written must not be read again."""
    engine, plain = (
        engine_with(small_plans, small_unet, checkpoint, size) for size in (room, room)
    )
    delta, calls = LowRank.delta, 0

    def fails_once(self: LowRank, base: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("full")
        return delta(self, base, strength)

    plain.set_loras([(files[0], 0.5)])
    monkeypatch.setattr(LowRank, "delta", fails_once)
    engine.set_loras([(files[0], 0.5)])
    assert calls > 10 and torch.equal(weights(engine), weights(plain))


def test_a_lora_that_fails_on_its_way_leaves_what_was(
    engine: Engine, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.set_loras([(files[0], 0.5)])
    before = weights(engine)

    def failing(self: InRam, name: str, out: torch.Tensor) -> None:
        if name == "3":
            raise OSError("half-way")
        out.copy_(self.tensors[name])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="half-way"):
        patch.setattr(InRam, "read_into", failing)
        engine.set_loras([(files[1], 0.5)])
    assert engine.report()["loras"][0]["name"] == "0" and engine.report()["live"]
    assert torch.equal(weights(engine), before) and sorted(waiting(engine)) == ["LoRA", "weights"]
    engine.set_loras([(files[1], 0.5)])
    assert not torch.equal(weights(engine), before)


def test_copies_go_with_their_loras_and_networks(
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody could ask for them, and a LoRA made later may come to lie where one lay."""
    engine = engine_with(small_plans, small_unet, checkpoint, ENOUGH)
    monkeypatch.setattr("accel.session.RECENT_LORA_BYTES", 0)
    network, pool = engine._network, engine.session.pool
    for source in (make_lora(4, two_levels()), files[0]):
        engine.set_loras([(source, 0.5)])
        assert sorted(waiting(engine)) == ["LoRA", "weights"]
        engine.set_loras([])
        gc.collect()
        assert waiting(engine) == ["weights"] and not network._watched
    engine.set_loras([(files[0], 0.5)])
    assert network.bytes > 2 * network.weights.bytes
    network.free_parked()
    assert waiting(engine) == [] and network.bytes < 2 * network.weights.bytes
    engine.set_loras([(files[0], 0.6)])
    assert waiting(engine) == ["LoRA"], "on a seat with a LoRA nothing bare is there to park"
    del engine, network
    gc.collect()
    assert pool.bytes("cpu") == 0


def test_scheduled_loras_of_state_dicts_cross_once(engine: Engine, crossings: list[int]) -> None:
    first, second = (make_lora(seed, two_levels()) for seed in (4, 5))
    engine.schedule_loras([(first, 0.8, 0.0, 0.5), (second, 0.6, 0.25, 1.0)])
    seen = []
    for _ in range(2):
        for step in range(4):
            engine.at_step(step, 4)
            seen.append(weights(engine))
    assert all(torch.equal(one, other) for one, other in zip(seen[:4], seen[4:], strict=True))
    assert len(crossings) == 2


def test_changes_of_one_kind_go_together_from_their_copies(
    engine: Engine,
    small_plans: Path,
    small_unet: Any,
    checkpoint: Path,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where one launch writes all parameters; in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr("accel.runtime.lowrank.available", lambda *_: True)
    plain = engine_with(small_plans, small_unet, checkpoint, 0)
    halves = {k: v.half() for k, v in make_lora(6, two_levels()).items()}
    for chosen in ([(files[0], 0.8)], [(files[0], 0.3), (halves, -0.5)], [(files[0], 0.8)]):
        for one in (engine, plain):
            one.set_loras(chosen)
        assert torch.equal(weights(engine), weights(plain))
    assert "LoRA" in waiting(engine)


def test_factors_that_lie_otherwise_are_used_as_they_lie(engine: Engine) -> None:
    """A product's last bit may depend on it, and a copy would lie as others do."""
    lora = make_lora(4, two_levels())
    turned = {
        name: value.t().contiguous().t() if value.dim() == 2 else value
        for name, value in lora.items()
    }
    parsed = engine.session._lora(turned, engine.config)
    in_ram, whole = (
        InRam(tensors_of(one)) for one in (parsed, engine.session._lora(lora, engine.config))
    )
    assert 0 < len(in_ram.tensors) < len(whole.tensors)
    engine.set_loras([(turned, 0.5)])
    kept = engine._network._copy_of(engine.seat.adapters[0][0])
    assert isinstance(kept, Near)
    for name, patch in parsed.patches.items():
        base = torch.ones(engine._network.weights.shapes[name])
        assert torch.equal(kept.patches[name].delta(base, 0.5), patch.delta(base, 0.5))
