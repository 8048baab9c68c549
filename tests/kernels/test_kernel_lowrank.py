"""Low-rank changes of weights: the kernel, and an arena that is written by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import DEVICE
from safetensors.torch import save_file
from support import make_lora, make_unet, two_levels
from torch import Tensor

from accel.kernels import lowrank as kernel
from accel.lora.hadamard import Hadamard
from accel.lora.lowrank import LowRank
from accel.runtime import lowrank
from accel.runtime.adapters import InRam, tensors_of
from accel.runtime.lowrank import Change, Place, place_of
from accel.runtime.pool import Pool
from accel.runtime.transfer import Transfer
from accel.runtime.weights import Weights
from accel.session import Engine, Session

on_the_cpu = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="its engine is on the CPU, which only the interpreter reaches"
)

ARENAS = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}


class Arena:
    """Parameters side by side, with poison between them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, spare: int) -> None:
        """spare: columns that a row has beyond those of its parameter."""
        generator = torch.Generator().manual_seed(len(shapes))
        sizes = [shape[0] * (torch.Size(shape[1:]).numel() + spare) + 64 for shape in shapes]
        self.values = torch.full((sum(sizes),), torch.nan, dtype=dtype, device=DEVICE)
        self.views, start = [], 64
        for shape, size in zip(shapes, sizes, strict=True):
            rows, inputs, *taps = shape
            stride = size // rows if rows == 1 else (size - 64) // rows
            area = self.values.as_strided(
                (rows, *taps, inputs), _strides(stride, taps, inputs), start
            )
            area.copy_(torch.randn(area.shape, generator=generator))
            self.views.append(area.movedim(-1, 1))
            start += size


def _strides(stride: int, taps: Sequence[int], inputs: int) -> tuple[int, ...]:
    strides = [1]
    for size in (inputs, *reversed(taps)):
        strides.insert(0, strides[0] * size)
    return (stride, *strides[1:])


def change(
    shape: tuple[int, ...], rank: int, kind: torch.dtype, pairs: int = 1, scale: float = 0.7
) -> Change:
    generator = torch.Generator().manual_seed(rank)
    columns = torch.Size(shape[1:]).numel()

    def factor(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * rank**-0.25).to(kind).to(DEVICE)

    return Change([(factor(shape[0], rank), factor(rank, columns)) for _ in range(pairs)], scale)


def expected(view: Tensor, changes: Sequence[Change]) -> Tensor:
    total = view.double()
    for one in changes:
        product = torch.ones((), dtype=torch.float64, device=view.device)
        for left, right in one.pairs:
            product = product * (left.double() @ right.double())
        total = total + (product * one.scale).reshape(view.shape)
    return total


def close(have: Tensor, want: Tensor) -> None:
    """Rounded once, after sums in float32."""
    bound = ROUNDING[have.dtype] * want.abs() + 4e-6 * want.abs().max()
    assert bool(((have.double() - want).abs() <= bound).all())


SHAPES = (
    *((64, 128), (1, 8), (65, 136), (130, 320), (4, 40, 3, 3), (70, 24, 3, 3), (8, 16, 1, 1)),
    (33, 8, 5, 3),
)


@pytest.mark.parametrize("dtype", ARENAS, ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["in place", "from a copy"])
def test_every_place_gets_its_changes(dtype: torch.dtype, apart: bool) -> None:
    arena = Arena(SHAPES, dtype, spare=8)
    f16, bf16, f32 = ARENAS
    sets: list[list[Change]] = [
        [change(SHAPES[0], 4, f32)],
        [change(SHAPES[1], 1, f16)],
        [change(SHAPES[2], 17, bf16), change(SHAPES[2], 3, f16, scale=-0.2)],
        [],
        [change(SHAPES[4], 16, f32, pairs=2)],
        [change(SHAPES[5], 5, f16, pairs=2), change(SHAPES[5], 33, f32), change(SHAPES[5], 2, f32)],
        [change(SHAPES[6], 64, f32), change(SHAPES[6], 130, f16)],
        [change(SHAPES[7], 8, bf16, pairs=2)],
    ]
    places = [place_of(view) for view in arena.views]
    assert None not in places
    wanted = [expected(view, own) for view, own in zip(arena.views, sets, strict=True)]
    before = arena.values.clone()
    out = arena.values.clone().fill_(torch.nan) if apart else arena.values
    lowrank.add(arena.values, out, list(zip(places, sets, strict=True)))  # type: ignore[arg-type]
    for view, want, own in zip(arena.views, wanted, sets, strict=True):
        have = out.as_strided(view.shape, view.stride(), view.storage_offset())
        close(have, want)
        if not own:
            assert torch.equal(have.double(), want), "a copy"
    untouched = before.isnan()
    assert bool(out[untouched].isnan().all()) and bool(out[~untouched].isfinite().all())
    assert not apart or torch.equal(arena.values[~untouched], before[~untouched])


def test_one_place_at_a_time_gives_the_same_bits() -> None:
    arena = Arena(SHAPES, torch.float16, spare=0)
    rows = []
    for view in arena.views:
        place = place_of(view)
        assert place is not None
        rows.append((place, [change(tuple(view.shape), 6, torch.float32)]))
    alone, together = arena.values.clone(), arena.values.clone()
    for row in rows:
        lowrank.add(arena.values, alone, [row])
    lowrank.add(arena.values, together, rows)
    assert torch.equal(alone.nan_to_num(), together.nan_to_num())


def test_a_copy_keeps_the_sign_of_zeros() -> None:
    """As taking a LoRA off must, where what else is launched is changed."""
    values = torch.tensor([0.0, -0.0], dtype=torch.float16, device=DEVICE).repeat(2 * 64 * 32)
    first, second = (values[4096 * index :][:4096].view(64, 64) for index in range(2))
    places = [place_of(view) for view in (first, second)]
    out = torch.ones_like(values)
    changes: list[list[Change]] = [[], [change((64, 64), 4, torch.float32)]]
    lowrank.add(values, out, list(zip(places, changes, strict=True)))  # type: ignore[arg-type]
    assert torch.equal(out[:4096].view(torch.int16), values[:4096].view(torch.int16))
    assert bool((out[4096:] != 0).all())


def test_it_is_launched_on_the_gpu_of_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may be current where LoRAs are put on."""
    current: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    ran: list[Tensor] = []
    stand_in = SimpleNamespace(run=lambda: ran.extend(current))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel, "add_products", lambda *_: stand_in)
    out = torch.zeros(64, device=DEVICE)
    lowrank.add(out, out, [(Place(0, 8, 8, 8, 1), [])])
    assert len(ran) == 1 and ran[0] is out


def test_places_that_the_kernel_cannot_write_are_left_to_others() -> None:
    memory = torch.zeros(4096)
    assert place_of(memory[:64]) is None, "a vector"
    assert place_of(memory[:4096].view(64, 64).T) is None, "transposed"
    assert place_of(memory[: 8 * 12].view(8, 12)) is None, "columns that are no multiple of 8"
    assert place_of(memory[4 : 4 + 64].view(8, 8)) is None, "an offset that is none"
    assert place_of(memory.view(8, 8, 8, 8).movedim(1, 2)) is None, "another order"
    assert place_of(memory[8:72].view(8, 8)) == Place(8, 8, 8, 8, 1)
    assert place_of(memory[: 8 * 72].view(8, 8, 3, 3)) == Place(0, 8, 72, 72, 1)
    last = memory[: 8 * 72].view(8, 3, 3, 8).movedim(-1, 1)
    assert place_of(last) == Place(0, 8, 72, 72, 9)


def test_changes_that_the_kernel_cannot_make_are_left_to_others() -> None:
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    cpu = torch.device("cpu")

    def of(patch: Any) -> Change | None:
        return lowrank.change_of(patch, 0.5, cpu)

    plain = of(LowRank("x", up, down, None, 4.0))
    assert plain is not None and plain.scale == 1.0 and len(plain.pairs) == 1
    hadamard = of(Hadamard("x", (up, up), (down, down), None, 3.0))
    assert hadamard is not None and hadamard.scale == 1.5 and len(hadamard.pairs) == 2
    assert of(LowRank("x", up, down, torch.randn(2, 2, 3, 3), None)) is None
    cores = (torch.randn(2, 2, 3, 3),) * 2
    assert of(Hadamard("x", (up, up), (down, down), cores, 3.0)) is None
    assert of(LowRank("x", up.half(), down, None, None)) is None, "of two kinds"
    assert of(LowRank("x", up.double(), down.double(), None, None)) is None
    assert of(LowRank("x", up, torch.randn(8, 2).T, None, None)) is None, "not in one piece"
    assert of(SimpleNamespace(delta=None)) is None


# An arena.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel writes on this device; how many parameters each time."""
    found: list[int] = []
    add = lowrank.add

    def spy(base: Tensor, out: Tensor, parameters: Any, *rest: Any) -> None:
        found.append(len(parameters))
        add(base, out, parameters, *rest)

    monkeypatch.setattr(lowrank, "available", lambda *_: True)
    monkeypatch.setattr(lowrank, "add", spy)
    return found


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return make_unet(1, two_levels())


@pytest.fixture(params=[0, 1 << 30], ids=["no room", "parked"])
def engine(
    request: pytest.FixtureRequest, small_plans: Path, module: Any, tmp_path: Path
) -> Engine:
    """With its bare weights parked or not."""
    pool = Pool({"cpu": request.param, "pinned": 0}, free=lambda tier: 1 << 40)
    path = tmp_path / "checkpoint.safetensors"
    save_file(module.state_dict(), path)
    engine = Session("cpu", "fp32", cache_dir=small_plans, pool=pool).engine(module)
    engine.load_weights(path)
    return engine


def values(engine: Engine) -> Tensor:
    return engine._network.weights.storage.clone().view(torch.float32)


@on_the_cpu
def test_an_arena_equals_one_that_is_written_parameter_by_parameter(
    engine: Engine, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = values(engine)
    config = two_levels()
    stack: list[Any] = [
        (make_lora(3, config), 0.7),
        (make_lora(4, config, rank=3), -0.4),
        ({key: value.half() for key, value in make_lora(6, config).items()}, 0.3),
        (make_lora(5, config), 0.0),
    ]
    engine.set_loras(stack)
    together = values(engine)
    assert len(launched) == 1 and launched[0] > 10
    engine.set_loras([])
    assert torch.equal(values(engine), bare)
    monkeypatch.setattr(lowrank, "available", lambda *_: False)
    engine.set_loras(stack)
    alone = values(engine)
    assert float((alone - bare).norm()) > 1
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@on_the_cpu
def test_some_are_changed_while_others_are_still_to_come(
    engine: Engine, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack: list[Any] = [(make_lora(3, two_levels()), 0.7)]
    engine.set_loras(stack)
    whole, launches = values(engine), len(launched)
    engine.set_loras([(make_lora(4, two_levels()), 0.7)])
    launched.clear()
    monkeypatch.setattr("accel.runtime.weights.LAUNCH_BYTES", 20 << 10)
    engine.set_loras(stack)
    parked = engine.report()["pool"]["tiers"]["cpu"]["bytes"] > 0
    assert launches == 1 and (len(launched) == 1 if parked else len(launched) > 3)
    assert torch.equal(values(engine), whole)


@on_the_cpu
def test_factors_cross_from_pinned_ram_in_one_piece_for_each_launch(
    small_plans: Path,
    module: Any,
    tmp_path: Path,
    launched: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy is what the kernel reads: what is in RAM is made useless once it is asked for."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in (3, 4)]
    for seed, path in zip((3, 4), paths, strict=True):
        save_file(make_lora(seed, two_levels()), path)
    chosen = [(paths[0], 0.7), (paths[1], -0.4)]
    pools = [Pool({"cpu": 0, "pinned": room}, free=lambda tier: 1 << 40) for room in (0, 1 << 30)]
    plain, engine = (
        Session("cpu", "fp32", cache_dir=small_plans, pool=pool).engine(module) for pool in pools
    )
    lent: list[int] = []

    def lend(self: Transfer, raw: Tensor) -> Tensor:
        lent.append(raw.numel())
        copy = raw.clone()
        raw.fill_(255)
        return copy

    for one in (plain, engine):
        one.set_loras(chosen)
    monkeypatch.setattr(Transfer, "lend", lend)
    for one in (plain, engine):
        one.set_loras([])
        one.set_loras(chosen)
    assert torch.equal(values(engine), values(plain))
    sizes = [InRam(tensors_of(engine.session._lora(p, engine.config))).bytes for p in paths]
    pairs = zip(sorted(lent), sorted(sizes), strict=True)  # they are lent by address
    assert all(size / 2 < one <= size for one, size in pairs)


@on_the_cpu
def test_memory_that_runs_out_half_way_leaves_nothing_changed_twice(
    engine: Engine, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On bare weights the arena is read from and written to."""
    lora = make_lora(3, two_levels())
    engine.set_loras([(lora, 0.7)])
    whole = values(engine)
    engine.set_loras([])
    launched.clear()
    add = lowrank.add

    def one_by_one(self: Weights, together: Any) -> Any:
        return ({name: entry} for name, entry in together.items())

    def full(*arguments: Any) -> None:
        if len(launched) == 2:
            launched.append(0)
            raise torch.OutOfMemoryError("full")
        add(*arguments)

    monkeypatch.setattr(Weights, "_portions", one_by_one)
    monkeypatch.setattr(lowrank, "add", full)
    engine.set_loras([(lora, 0.7)])
    assert 0 in launched and len(launched) > 3
    assert torch.equal(values(engine), whole)


@on_the_cpu
def test_a_parameter_does_not_depend_on_what_is_launched_with_it(
    engine: Engine, launched: list[int], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file(make_lora(3, two_levels()), first)
    save_file(make_lora(4, two_levels()), second)
    engine.set_loras([(first, 0.7), (second, 0.5)])
    whole = values(engine)
    engine.set_loras([(first, 0.7)])
    engine.set_loras([(first, 0.7), (second, 0.25)])
    engine.set_loras([(first, 0.7), (second, 0.5)])
    assert len(launched) >= 4 and len(set(launched)) > 1
    assert torch.equal(values(engine), whole)


@pytest.mark.parametrize("dtype", ARENAS, ids=str)
def test_it_is_tried_before_it_is_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowrank.is_right(DEVICE, dtype)
    whole = kernel.add_products

    def wrong(tiles: Any, places: Any, changes: Any, scales: Any, *others: Any) -> Any:
        scales[2] = 0.0  # the last change is lost
        return whole(tiles, places, changes, scales, *others)

    monkeypatch.setattr(kernel, "add_products", wrong)
    assert not lowrank.is_right(DEVICE, dtype)


def test_without_a_gpu_there_is_no_kernel() -> None:
    assert not lowrank.available(torch.device("cpu"), torch.float32)
    assert kernel.KINDS == ARENAS
