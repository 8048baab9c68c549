"""Weights that wait: what the pool keeps within its budgets, and how they get to a device."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import make_lora, make_unet, two_levels

from accel import background
from accel.errors import InvalidFile, OutOfMemory, StructureMismatch
from accel.runtime.adapters import Near
from accel.runtime.executable import Executable
from accel.runtime.network import _ADAPTER, Network
from accel.runtime.pool import PATIENCE, PINNED, Pool
from accel.runtime.transfer import (
    PIECE_BYTES,
    READERS,
    SLOT_BYTES,
    SLOTS,
    HostBytes,
    HostCopy,
    Overlay,
    Slot,
    Transfer,
    _cross,
    _cut,
    transfer_for,
)
from accel.runtime.weights import Weights
from accel.session import Engine, Session
from accel.sources import FileSource, StateDictSource, mixture
from accel.tensorfile import TensorFile

CPU = torch.device("cpu")
State = Mapping[str, torch.Tensor]


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": 400,
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
    }


@pytest.fixture(scope="module")
def small_unet() -> torch.nn.Module:
    return make_unet(0, two_levels())


@pytest.fixture(scope="module")
def states() -> list[State]:
    return [make_unet(seed, two_levels()).state_dict() for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def files(states: list[State], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [folder / f"{index}.safetensors" for index in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file(dict(state), path)
    return paths


@pytest.fixture(scope="module")
def expected(small_plans: Path, small_unet: torch.nn.Module, states: list[State]) -> list[Any]:
    """What a fresh engine makes of each checkpoint, without any pool."""
    found = []
    for state in states:
        engine = engine_with(small_plans, small_unet, 0)
        engine.load_weights(state)
        found.append(engine(**inputs()))
    return found


def engine_with(
    plans: Path, module: torch.nn.Module, copies: float, ram: float = 0, **pool: Any
) -> Engine:
    """An engine whose pool has room for so many copies of the arena, and of the file in RAM."""
    budgets: dict[str, int] = {}
    found = Pool(budgets, **{"free": lambda tier: 1 << 40, **pool})
    engine = Session("cpu", "fp32", cache_dir=plans, pool=found).engine(module)
    size = engine._network.weights.bytes
    found.set_budget("cpu", int(copies * size))
    found.set_budget(PINNED, int(ram * size))
    return engine


# The pool itself.


def fill(pool: Pool, what: object, size: int, tier: str = "cpu", owner: object = None) -> Any:
    return pool.put(tier, owner, what, size, lambda: torch.zeros(size, dtype=torch.uint8))


def roomy(tier: str) -> int:
    return 1 << 40


def test_what_was_not_used_for_longest_goes_first() -> None:
    pool = Pool({"cpu": 30}, free=roomy)
    for what in "abc":
        assert fill(pool, what, 10) is not None
    assert pool.get("cpu", None, "a") is not None
    fill(pool, "d", 10)
    assert [pool.holds("cpu", None, what) for what in "abcd"] == [True, False, True, True]
    fill(pool, "e", 20)
    assert [pool.holds("cpu", None, what) for what in "acde"] == [False, False, True, True]
    assert pool.bytes("cpu") == 30


def test_tiers_do_not_take_from_each_other() -> None:
    pool = Pool({"cuda": 10, "pinned": 10}, free=roomy)
    for tier in ("cuda:0", "cuda:1", "pinned"):
        assert fill(pool, "a", 10, tier) is not None
    assert [pool.bytes(tier) for tier in ("cuda:0", "cuda:1", "pinned")] == [10, 10, 10]


def test_what_exceeds_the_budget_alone_takes_nothing_from_others() -> None:
    pool = Pool({"cpu": 30}, free=roomy)
    fill(pool, "a", 10)
    assert fill(pool, "b", 31) is None
    assert pool.holds("cpu", None, "a") and pool.report()["events"]["refused"] == 1


def test_other_programs_memory_is_left_to_them() -> None:
    """The pool gives way when the system runs short, with its budget far away."""
    others = 0

    def free(tier: str) -> int:
        return 100 - others - pool._bytes(tier)

    pool = Pool({"cpu": 1000}, free=free)
    for index in range(20):
        fill(pool, index, 10)
        assert pool.bytes("cpu") <= 100
    assert pool.trim("cpu") == 0
    others = 65
    assert pool.trim("cpu") == 70 and pool.bytes("cpu") == 30
    others = 95
    assert fill(pool, "too much", 10) is None
    assert pool.bytes("cpu") == 30, "it would have been in vain"
    assert pool.trim("cpu") == 30


def test_failed_allocations_shrink_the_pool_until_there_is_room() -> None:
    pool = Pool({"cpu": 100}, free=roomy)
    for index in range(6):
        fill(pool, index, 10)
    attempts = []

    def make() -> str:
        attempts.append(pool.bytes("cpu"))
        if len(attempts) < 4:
            raise torch.OutOfMemoryError("full")
        return "data"

    assert pool.put("cpu", None, "new", 10, make) == "data"
    assert attempts == [70, 60, 50, 40], "the new one counts, and three others have gone"

    def never() -> None:
        raise torch.OutOfMemoryError("full")

    assert pool.put("cpu", None, "hopeless", 10, never) is None
    assert pool.bytes("cpu") == 0


def test_only_what_may_goes_for_a_block() -> None:
    pool = Pool({"cpu": 30}, free=roomy)
    for what in "abc":
        fill(pool, what, 10)

    def put(what: str, make: Any) -> Any:
        return pool.put("cpu", None, what, 10, make, instead_of=lambda other: other in "bd")

    assert put("d", lambda: "data") == "data"
    assert [pool.holds("cpu", None, what) for what in "abcd"] == [True, False, True, True]
    attempts = []

    def never() -> None:
        attempts.append(pool.bytes("cpu"))
        raise torch.OutOfMemoryError("full")

    assert put("e", never) is None and attempts == [30]
    assert [pool.holds("cpu", None, what) for what in "acd"] == [True, True, False]
    fill(pool, "f", 10)
    assert put("g", lambda: "data") is None, "nothing is there that may go"


def ahead(pool: Pool, what: object, size: int) -> Any:
    return pool.put("cpu", None, what, size, lambda: what, ahead=True)


def test_what_is_fetched_ahead_takes_the_place_of_nothing_that_is_needed() -> None:
    owner, pool = object(), Pool({"cpu": 30}, free=roomy)
    for what in "abc":
        fill(pool, what, 10)
    pool.use(owner, {"a"})
    assert ahead(pool, "d", 10) is not None and not pool.holds("cpu", None, "b")
    assert ahead(pool, "e", 10) is not None and not pool.holds("cpu", None, "c")
    assert ahead(pool, "f", 10) is None, "a is in use, and the others have not been used yet"
    assert [pool.holds("cpu", None, what) for what in "ade"] == [True] * 3
    pool.get("cpu", None, "d")
    assert ahead(pool, "f", 10) is not None and not pool.holds("cpu", None, "d")
    assert fill(pool, "g", 10) is not None, "who is waited for takes the oldest, whatever it is"
    assert [pool.holds("cpu", None, what) for what in "aef"] == [False, True, True]
    pool.use(owner, ())
    fill(pool, "e", 10)  # is used, so that it may go
    assert ahead(pool, "h", 10) is not None


def test_what_is_expected_stays_though_it_was_there_before() -> None:
    pool = Pool({"cpu": 20}, free=roomy)
    for what in "ab":
        fill(pool, what, 10)
    assert pool.expect("cpu", None, "a") and not pool.expect("cpu", None, "c")
    assert ahead(pool, "c", 10) is not None
    assert [pool.holds("cpu", None, what) for what in "abc"] == [True, False, True]


def test_what_was_expected_in_vain_gives_way_at_last() -> None:
    pool = Pool({"cpu": 10}, free=roomy)
    assert ahead(pool, "a", 10) is not None
    for _ in range(PATIENCE - 1):
        assert ahead(pool, "b", 10) is None
    assert ahead(pool, "b", 10) is not None


def test_what_is_used_from_a_nearer_tier_is_not_expected_any_more() -> None:
    owner, pool = object(), Pool({"cpu": 20}, free=roomy)
    ahead(pool, "a", 10)
    ahead(pool, "b", 10)
    pool.use(owner, {"a"})
    pool.use(owner, {"c"})
    assert ahead(pool, "d", 10) is not None and pool.holds("cpu", None, "b")


def test_nothing_goes_in_vain_for_what_finds_no_room_nonetheless() -> None:
    limited, short = Pool({"cpu": 30}, free=roomy), Pool(free=lambda tier: 30 - short._bytes(tier))
    for pool in (limited, short):
        for what in "abc":
            fill(pool, what, 10)

        def put(size: int, pool: Pool = pool) -> Any:
            return pool.put("cpu", None, "d", size, lambda: "data", lambda other: other in "ab")

        assert put(25) is None and pool.bytes("cpu") == 30
        assert put(20) is not None and pool.holds("cpu", None, "c")


def test_nothing_goes_in_vain_for_what_is_fetched_ahead() -> None:
    limited, short = Pool({"cpu": 30}, free=roomy), Pool(free=lambda tier: 30 - short._bytes(tier))
    for pool in (limited, short):
        fill(pool, "a", 10)
        fill(pool, "b", 10)
        pool.use(None, {"a"})
        assert ahead(pool, "c", 25) is None
        assert pool.bytes("cpu") == 20
        assert ahead(pool, "c", 20) is not None and pool.holds("cpu", None, "a")


def test_memory_comes_free_while_others_may_use_the_pool() -> None:
    """To unpin memory takes a good part of a second."""
    pool, waited = Pool({"cpu": 10}, free=roomy), []

    class Data:
        def __del__(self) -> None:
            asks = threading.Thread(target=pool.bytes, args=("cpu",))
            asks.start()
            asks.join(timeout=5)
            waited.append(asks.is_alive())

    pool.put("cpu", None, "a", 10, Data)
    fill(pool, "b", 10)
    pool.put("cpu", owner := object(), "a", 10, Data)
    pool.drop(owner)
    pool.put("cpu", None, "a", 10, Data)
    pool.trim("cpu")
    pool.set_budget("cpu", 0)
    pool.set_budget("cpu", 10)
    pool.put("cpu", None, "a", 10, Data)
    pool.shrink("cpu")
    assert waited == [False] * 4


def test_whatever_else_fails_leaves_no_trace() -> None:
    pool = Pool({"cpu": 10}, free=roomy)

    def make() -> None:
        raise InvalidFile("cut")

    with pytest.raises(InvalidFile):
        pool.put("cpu", None, "a", 10, make)
    assert pool.bytes("cpu") == 0 and fill(pool, "a", 10) is not None


def test_an_owner_that_goes_takes_its_blocks_along() -> None:
    pool, mine, other = Pool(free=roomy), object(), object()
    fill(pool, "a", 10, owner=mine)
    fill(pool, "a", 10, owner=other)
    fill(pool, "b", 10, owner=other)
    with pool._turn():  # a finalizer may come at any moment, on this thread too
        pool.drop(mine)
        pool.drop(other, lambda what: what == "b")
    assert [key[1:] for key in pool._blocks] == [(other, "a")], "seen to without another call"
    assert pool.bytes("cpu") == 10 and pool.bytes("cpu", other) == 10


def test_what_an_owner_uses_is_known_for_as_long_as_it_lives() -> None:
    """Copies that it gives up can be made again of what others keep, and that is still in use."""
    owner, pool = object(), Pool({"cpu": 10}, free=roomy)
    fill(pool, "a", 10)
    pool.use(owner, {"a"})
    pool.drop(owner)
    assert ahead(pool, "b", 10) is None and pool.holds("cpu", None, "a")
    pool.forget(owner)
    assert ahead(pool, "b", 10) is not None and not pool.holds("cpu", None, "a")


def test_threads_never_exceed_a_budget() -> None:
    pool, seen = Pool({"cpu": 60}, free=roomy), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            what = rng.randrange(20)
            if pool.get("cpu", None, what) is None:
                fill(pool, what, 10)
            seen.append(pool.bytes("cpu"))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) == 60


def test_a_smaller_budget_holds_at_once() -> None:
    pool = Pool(free=roomy)
    for what in "abc":
        fill(pool, what, 10)
    pool.set_budget("cpu", 15)
    assert pool.bytes("cpu") == 10 and pool.holds("cpu", None, "c")


# Reading.


class Slow(StateDictSource):
    """Counts what it is asked for, and fails at one name."""

    def __init__(self, tensors: State, bad: str | None = None) -> None:
        super().__init__(tensors, two_levels())
        self.bad, self.threads = bad, set[str]()

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self.threads.add(threading.current_thread().name)
        if name == self.bad:
            raise OSError(f"{name} went away")
        super().read_into(name, out)


def test_an_overlay_changes_what_it_names(states: list[State], files: list[Path]) -> None:
    names = list(states[0])
    below = FileSource(TensorFile(files[0]), two_levels())
    chosen = {*names[:2], *names[9:40:3], names[-1]}
    source = Overlay(below, lambda name, value: value + states[1][name], chosen)
    values = Transfer(CPU, slot_bytes=2_000).values(names, source)
    for name, value in zip(names, values, strict=True):
        expected = states[0][name] + (states[1][name] if name in chosen else 0)
        assert torch.equal(value, expected) and torch.equal(source.read(name), expected)


@pytest.mark.parametrize("slot_bytes", [1, 100_000, 1 << 25])
def test_values_come_in_order_whatever_fits_a_slot(
    states: list[State], files: list[Path], slot_bytes: int
) -> None:
    """Each is right when it comes; a slot is written to again only after it was used."""
    transfer = Transfer(CPU, slot_bytes=slot_bytes)
    names = list(states[0])
    file = FileSource(TensorFile(files[0]), two_levels())
    copy = transfer.gather(names, file)
    some = names[5:200:7]
    for source in (file, StateDictSource(states[0], two_levels()), copy):
        for wanted in (names, some):
            found = transfer.values(wanted, source)
            for name, value in zip(wanted, found, strict=True):
                assert torch.equal(value, states[0][name]), name


def test_several_threads_read(states: list[State]) -> None:
    source = Slow(states[0])
    list(Transfer(CPU, slot_bytes=1000).values(list(states[0]), source))
    assert 1 < len(source.threads) <= READERS


def test_a_run_that_breaks_off_leaves_its_slots_to_the_readers_that_are_at_them(
    states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a disk is waited for: what comes late must not meet the next run."""
    transfer, names = Transfer(CPU, slot_bytes=1), list(states[0])
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    class Waits(Slow):
        def read_into(self, name: str, out: torch.Tensor) -> None:
            begun.set()
            assert go_on.wait(60)
            super().read_into(name, out)
            done.set()

    def interrupted(self: Future[Any], timeout: float | None = None) -> Any:
        assert begun.wait(60)
        raise KeyboardInterrupt

    list(transfer.values(names, Slow(states[2])))  # its slots are there to be used again
    assert len(transfer._idle) == 1 and len(transfer._idle[0]) == SLOTS
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Future, "result", interrupted)
        list(transfer.values(names[:1], Waits(states[1])))
    values = transfer.values(names, Slow(states[0]))
    value = next(values)
    go_on.set()
    assert done.wait(60)
    assert torch.equal(value, states[0][names[0]])
    values.close()


def test_a_reader_that_fails_ends_the_run(states: list[State]) -> None:
    transfer, names = Transfer(CPU, slot_bytes=1000), list(states[0])
    with pytest.raises(OSError, match="went away"):
        list(transfer.values(names, Slow(states[0], bad=names[200])))
    again = transfer.values(names, Slow(states[0]))
    assert all(torch.equal(v, states[0][n]) for n, v in zip(names, again, strict=True))


def test_slots_that_stay_can_be_had_back(states: list[State]) -> None:
    transfer = Transfer(CPU, slot_bytes=1000)
    list(transfer.values(list(states[0]), Slow(states[0])))
    held = [weakref.ref(slot.host) for slot in transfer._idle[0]]
    transfer.give_back()
    assert not transfer._idle and all(ref() is None for ref in held)


@pytest.mark.parametrize("size", [0, 1, 4096, 5000])
def test_what_can_be_pinned_shares_no_page(size: int) -> None:
    host = HostBytes(size)
    assert host.tensor.numel() == size and host.tensor.data_ptr() % PAGESIZE == 0
    room = host.tensor.untyped_storage()
    assert host.tensor.storage_offset() + -(-size // PAGESIZE) * PAGESIZE <= room.nbytes()


def test_sums_are_made_of_parts_that_are_read_side_by_side(states: list[State]) -> None:
    mix = mixture([(state, 0.25) for state in states], two_levels())
    transfer, names = Transfer(CPU, slot_bytes=50_000), list(states[0])
    for name, value in zip(names, transfer.values(names, mix), strict=True):
        first, second, third = (state[name] * 0.25 for state in states)
        assert torch.equal(value, first + second + third)
        assert torch.equal(value, mix.read(name))


def test_a_file_that_changed_is_not_read_from(states: list[State], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(dict(states[0]), path)
    source = FileSource(TensorFile(path), two_levels())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InvalidFile, match="changed"):
        list(Transfer(CPU).values(list(states[0]), source))


def test_a_copy_in_ram_has_the_size_that_was_counted(states: list[State]) -> None:
    source = StateDictSource(states[0], two_levels())
    copy = HostCopy(list(states[0]), source)
    assert copy.host.tensor.numel() == HostCopy.bytes_for(list(states[0]), source)


@pytest.mark.parametrize("pages", [1, 5, 1 << 12])
def test_a_copy_is_pinned_in_pieces_once_they_are_filled(
    states: list[State], monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """However large a value is. None shares a page with another."""
    piece_bytes = pages * PAGESIZE
    monkeypatch.setattr("accel.runtime.transfer.PIECE_BYTES", piece_bytes)
    pinned: list[tuple[int, int]] = []
    transfer, names = Transfer(CPU), list(states[0])
    source = StateDictSource(states[0], two_levels())

    def pin(self: HostBytes, start: int, end: int) -> None:
        pinned.append((start, end))
        for name, item in items.items():
            if start < item.start + item.bytes <= end:
                assert torch.equal(item.view(self.tensor), states[0][name]), "it is filled"

    items = HostCopy(names, source).items
    monkeypatch.setattr(HostBytes, "pin", pin)
    transfer.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    copy = transfer.gather(names, source)
    assert copy.items == items
    size, base = copy.host.tensor.numel(), copy.host.tensor.data_ptr()
    assert [start for start, _ in pinned] == [0, *(end for _, end in pinned[:-1])]
    assert pinned[-1][1] == size
    assert all((base + start) % PAGESIZE == 0 and a - start <= piece_bytes for start, a in pinned)
    largest = max(item.bytes for item in items.values())
    assert largest > 5 * PAGESIZE and len(pinned) >= size // piece_bytes


def test_what_is_lent_of_a_copy_in_ram_are_whole_values(
    states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.runtime.transfer.REGION_BYTES", 20_000)
    copy = Transfer(CPU).gather(list(states[0]), StateDictSource(states[0], two_levels()))
    regions = copy.regions()
    places = [(r.data_ptr(), r.data_ptr() + r.numel()) for r in regions]
    for name, value in states[0].items():
        begin = copy.read(name).data_ptr()
        assert sum(a <= begin and begin + value.nbytes <= b for a, b in places) == 1
    assert len(regions) > 20 and max(map(len, regions)) > 20_000, "one value may be larger"


@pytest.mark.parametrize("whole", [True, False])
def test_a_slots_own_half_crosses_in_one_copy(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy takes the host time, also that of the threads that render."""
    pinned: list[tuple[int, int]] = []
    monkeypatch.setattr(HostBytes, "pin", lambda self, *piece: pinned.append(piece))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    slot = Slot(SLOT_BYTES, CPU)
    slot.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    slot.used = slot.crossed = SimpleNamespace(record=lambda stream: None)  # type: ignore[assignment]
    slot.there = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    slot.host.fill_(7)
    assert pinned == [(0, SLOT_BYTES)]
    copied, own = list[int](), torch.Tensor.copy_

    def copy_(self: torch.Tensor, other: torch.Tensor, **rest: Any) -> torch.Tensor:
        copied.append(other.numel())
        return own(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    sent = slot.send(slot.host, stream, whole)
    assert torch.equal(sent, slot.host) and sum(copied) == SLOT_BYTES
    assert copied == [SLOT_BYTES] if whole else max(copied) <= PIECE_BYTES


@pytest.mark.parametrize("pages", [1, 3])
def test_no_copy_over_the_bus_crosses_two_pieces(
    states: list[State], monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """The driver takes two that were pinned apart for memory that is not pinned, or refuses."""
    monkeypatch.setattr("accel.runtime.transfer.PIECE_BYTES", pages * PAGESIZE)
    names = list(states[0])
    copy = Transfer(CPU).gather(names, StateDictSource(states[0], two_levels()))
    raw, copied = copy.host.tensor, list[tuple[int, int]]()
    apart, own = _cut(raw), torch.Tensor.copy_

    def copy_(self: torch.Tensor, other: torch.Tensor, **rest: Any) -> torch.Tensor:
        begin = other.data_ptr() - raw.data_ptr()
        copied.append((begin, begin + other.numel()))
        return own(self, other, **rest)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    rng = random.Random(0)
    for _ in range(20):
        begin, end = sorted(rng.sample(range(raw.numel()), 2))
        there = torch.zeros(end - begin + 7, dtype=torch.uint8)
        copied.clear()
        _cross(raw[begin:end], there)
        assert torch.equal(there[: end - begin], raw[begin:end]) and not there[end - begin :].any()
        assert all(any(a <= x and y <= b for a, b in apart) for x, y in copied)


def test_memory_that_cannot_be_pinned_ends_a_copy_in_ram(
    states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pin(self: HostBytes, start: int, end: int) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(HostBytes, "pin", pin)
    transfer = Transfer(CPU)
    transfer.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        transfer.gather(list(states[0]), StateDictSource(states[0], two_levels()))


def test_a_copy_of_the_arena_has_what_no_parameter_changes(
    small_plans: Path, small_unet: Any, files: list[Path]
) -> None:
    """The frequencies of the timestep, and what lies between constants, which kernels may read."""
    engine = engine_with(small_plans, small_unet, 0)
    weights = engine._network.weights
    copy = torch.full_like(weights.storage, 0xFF)
    source = engine.session._source(files[0], engine.config)
    engine.load_weights(files[0])
    weights.write_copy(copy, source, transfer_for(CPU))
    assert torch.equal(copy, weights.storage)


# Engines with a pool.


def test_a_checkpoint_that_comes_back_is_one_copy(
    small_plans: Path, small_unet: Any, files: list[Path], expected: list[Any]
) -> None:
    engine = engine_with(small_plans, small_unet, 4)
    for index in (0, 1, 2, 0, 1, 2):
        reads = count_reads(engine)
        engine.load_weights(files[index])
        assert torch.equal(engine(**inputs()), expected[index])
    assert reads == [], "the third came back without its file being read"
    assert engine.report()["pool"]["events"]["hits_cpu"] == 3


def count_reads(engine: Engine) -> list[int]:
    """Numbers of the parameters that are written from now on, a write each."""
    weights: Any = engine._network.weights
    write, found = type(weights)._write, []

    def counted(names: Any, *rest: Any) -> Any:
        found.append(len(names))
        return write(weights, names, *rest)

    weights._write = counted
    return found


def test_loras_come_and_go_from_a_parked_copy(
    small_plans: Path, small_unet: Any, files: list[Path], expected: list[Any], tmp_path: Path
) -> None:
    """With the bare checkpoint parked, its file is not read again: it may even be gone."""
    path = tmp_path / "gone.safetensors"
    path.write_bytes(files[0].read_bytes())
    engine, plain = (engine_with(small_plans, small_unet, copies) for copies in (1, 0))
    for one in (engine, plain):
        one.load_weights(path)
    reads: list[str] = []
    source: Any = engine.seat.source
    source.read_into = lambda name, out: reads.append(name)
    for strength in (0.7, -0.3):
        for one in (engine, plain):
            one.set_loras([(make_lora(3, two_levels()), strength)])
        assert torch.equal(engine(**inputs()), plain(**inputs()))
    engine.set_loras([])
    assert torch.equal(engine(**inputs()), expected[0]) and not reads


def test_prefetched_checkpoints_wait_on_the_device_or_in_ram(
    small_plans: Path, small_unet: Any, files: list[Path], expected: list[Any]
) -> None:
    for copies, ram, tier in ((2, 2, "cpu"), (0, 2, PINNED), (0, 0, None)):
        engine = engine_with(small_plans, small_unet, copies, ram)
        before = engine(**inputs())
        engine.prefetch(files[1]).result(timeout=60)
        tiers = engine.report()["pool"]["tiers"]
        assert [name for name, found in tiers.items() if found["blocks"]] == ([tier] * bool(tier))
        assert torch.equal(engine(**inputs()), before), "it only waits"
        engine.set_loras([(make_lora(3, two_levels()), 0.5)])
        engine.load_weights(files[1])
        engine.set_loras([])
        assert torch.equal(engine(**inputs()), expected[1])
        events = engine.report()["pool"]["events"]
        assert tier is None or events[f"hits_{tier}"] >= 1


def test_a_prefetch_leaves_what_is_in_use(
    small_plans: Path, small_unet: Any, files: list[Path], expected: list[Any]
) -> None:
    """LoRAs are taken off from the parked copy, whatever was fetched ahead meanwhile."""
    engine = engine_with(small_plans, small_unet, 1, 1.5)
    engine.load_weights(files[0])
    engine.set_loras([(make_lora(3, two_levels()), 0.5)])  # parks the bare checkpoint
    for path in files[1:]:
        engine.prefetch(path).result(timeout=60)
    tiers = engine.report()["pool"]["tiers"]
    assert (tiers["cpu"]["blocks"], tiers[PINNED]["blocks"]) == (1, 1)
    reads: list[str] = []
    source: Any = engine.seat.source
    source.read_into = lambda name, out: reads.append(name)
    engine.set_loras([])
    assert torch.equal(engine(**inputs()), expected[0]) and not reads
    engine.load_weights(files[1])
    assert engine.report()["pool"]["events"]["hits_pinned"] == 1, "the first of both waited"


@pytest.mark.parametrize("tier", ["cpu", PINNED])
def test_a_prefetch_leaves_what_the_caller_keeps(
    small_plans: Path, small_unet: Any, files: list[Path], tier: str
) -> None:
    engine = engine_with(small_plans, small_unet, *((2, 0) if tier == "cpu" else (0, 2.5)))
    first, second, third = (engine.session._source(path, engine.config) for path in files)
    network = engine._network
    for source in (first, second):
        network.prefetch(source).result(timeout=60)
    for path in files[:2]:  # both have been used, the first of them longest ago
        engine.load_weights(path)
    engine.load_weights(make_unet(9, two_levels()).state_dict())
    network.prefetch(third, keep=lambda stamp: stamp == first.stamp()).result(timeout=60)

    def waits(source: FileSource) -> bool:
        if tier == "cpu":
            return network.pool.holds("cpu", network._owner, (source.stamp(), ()))
        return network.pool.holds(PINNED, None, source.stamp())

    assert [waits(source) for source in (first, second, third)] == [True, False, True]


@pytest.mark.parametrize("given_up", [False, True])
def test_a_prefetch_leaves_what_a_swap_that_failed_goes_back_to(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    given_up: bool,
) -> None:
    """While the swap is under way and after it, and once the host has taken what waits."""
    engine = engine_with(small_plans, small_unet, 0, 1.5)
    pool, (first, second, _) = engine.session.pool, files
    engine.prefetch(first).result(timeout=60)
    engine.load_weights(first)
    stamp = engine.session._source(first, engine.config).stamp()

    def fails(self: Weights, *arguments: Any) -> Any:
        engine.prefetch(files[2]).result(timeout=60)
        assert pool.holds(PINNED, None, stamp)
        raise InvalidFile("cut")

    with monkeypatch.context() as patch, pytest.raises(InvalidFile):
        patch.setattr(Weights, "write", fails)
        engine.load_weights(second)
    if given_up:
        engine._network.free_parked()
    engine.prefetch(second).result(timeout=60)
    assert pool.holds(PINNED, None, stamp)
    hits = pool.report()["events"]["hits_pinned"]
    assert torch.equal(engine(**inputs()), expected[0])
    assert pool.report()["events"]["hits_pinned"] == hits + 1
    engine.load_weights(second)
    engine.prefetch(files[2]).result(timeout=60)
    assert not pool.holds(PINNED, None, stamp), "nobody goes back to it any more"


def test_what_leaves_the_arena_does_not_take_the_place_of_what_comes(
    small_plans: Path, small_unet: Any, files: list[Path], expected: list[Any]
) -> None:
    engine = engine_with(small_plans, small_unet, 1)
    engine.load_weights(files[0])
    engine.prefetch(files[1]).result(timeout=60)
    reads = count_reads(engine)
    engine.load_weights(files[1])
    assert torch.equal(engine(**inputs()), expected[1]) and not reads


def test_a_prefetch_may_be_for_ram_alone(
    small_plans: Path, small_unet: Any, files: list[Path]
) -> None:
    engine = engine_with(small_plans, small_unet, 6, 6)
    source = engine.session._source(files[1], engine.config)
    engine._network.prefetch(source, onto_device=False).result(timeout=60)
    tiers = engine.report()["pool"]["tiers"]
    assert (tiers["cpu"]["blocks"], tiers[PINNED]["blocks"]) == (0, 1)


class Layers:
    """A checkpoint of which some parameters are doubled, as a host's patches would."""

    label, lasting = "layers", False

    def __init__(self, bare: Any, changed: set[str]) -> None:
        self.bare, self.changed = bare, changed
        self.changes = list[str]()

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("it has a file")

    def change(self, name: str, bare: torch.Tensor) -> torch.Tensor:
        self.changes.append(name)
        return bare * 2

    def stamp(self) -> object:
        return object()


@pytest.mark.parametrize("tier", ["cpu", PINNED, None])
def test_what_is_not_changed_of_a_checkpoint_comes_from_where_its_file_waits(
    small_plans: Path, small_unet: Any, files: list[Path], states: list[State], tier: str | None
) -> None:
    engine = engine_with(small_plans, small_unet, 2 * (tier == "cpu"), 2 * (tier == PINNED))
    network, changed = engine._network, set(list(states[1])[3::50])
    bare = engine.session._source(files[1], engine.config)
    network.prefetch(bare).result(timeout=60)
    source = Layers(bare, changed)
    network.load(engine.seat, source)
    assert set(source.changes) == changed
    found = network.weights.storage.clone()
    plain = engine_with(small_plans, small_unet, 0)
    whole = {name: value * (2 if name in changed else 1) for name, value in states[1].items()}
    plain.load_weights(whole)
    assert torch.equal(found, plain._network.weights.storage)
    # One parameter goes back: it comes from there, too.
    (back, *rest) = sorted(changed)
    source = Layers(bare, set(rest))
    network.update(engine.seat, {back}, source)
    assert source.changes == []
    plain.load_weights({**whole, back: states[1][back]})
    assert torch.equal(network.weights.storage, plain._network.weights.storage)


def test_what_is_given_up_is_not_waited_for_to_arrive(
    small_plans: Path, small_unet: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host wants the memory back now, and not once a slow disk has been read."""
    engine = engine_with(small_plans, small_unet, 2)
    network, begun, names = engine._network, threading.Event(), list[str]()
    read = FileSource.read_into

    def slow(self: FileSource, name: str, out: torch.Tensor) -> None:
        names.append(name)
        begun.set()
        threading.Event().wait(0.05)
        read(self, name, out)

    monkeypatch.setattr(FileSource, "read_into", slow)
    job = engine.prefetch(files[1])
    assert begun.wait(60)
    held = weakref.ref(network)
    network.free_parked()
    assert len(names) <= 2 * READERS < len(network.weights.shapes)
    job.result(timeout=60)
    events = engine.report()["pool"]["events"]
    assert events["stopped_prefetches"] == 1 and "failed_prefetches" not in events
    assert engine.session.pool.bytes("cpu") == 0
    del engine, network
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("onto_device", [True, False])
def test_the_end_of_the_process_does_not_wait_for_what_comes_next(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    onto_device: bool,
) -> None:
    engine = engine_with(small_plans, small_unet, 2, 6)
    ends, names = threading.Event(), list[str]()
    monkeypatch.setattr(background.closing, "is_set", ends.is_set)
    read = FileSource.read_into

    def ending(self: FileSource, name: str, out: torch.Tensor) -> None:
        names.append(name)
        ends.set()
        read(self, name, out)

    monkeypatch.setattr(FileSource, "read_into", ending)
    source = engine.session._source(files[1], engine.config)
    engine._network.prefetch(source, onto_device).result(timeout=60)
    assert 1 <= len(names) <= READERS
    events = engine.report()["pool"]["events"]
    assert events["stopped_prefetches"] == 1 and "failed_prefetches" not in events
    tiers = engine.report()["pool"]["tiers"]
    assert (tiers["cpu"]["blocks"], tiers[PINNED]["blocks"]) == (0, 0)


def test_a_load_waits_for_the_prefetch_that_is_ahead_of_it(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_with(small_plans, small_unet, 2)
    begun, go_on, read = threading.Event(), threading.Event(), FileSource.read_into
    names: list[str] = []

    def waiting(self: FileSource, name: str, out: torch.Tensor) -> None:
        names.append(name)
        begun.set()
        assert go_on.wait(60)
        read(self, name, out)

    monkeypatch.setattr(FileSource, "read_into", waiting)
    engine.prefetch(files[1])
    assert begun.wait(60)
    threading.Timer(0.05, go_on.set).start()
    engine.load_weights(files[1])
    assert torch.equal(engine(**inputs()), expected[1])
    assert len(names) == len(engine._network.weights.shapes), "read once"


@pytest.mark.parametrize("way", ["load_weights", "hasten"])
def test_pinning_makes_no_more_pauses_once_somebody_waits(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The pauses are for others that render: here of some six seconds each."""
    engine = engine_with(small_plans, small_unet, 0, 6)
    begun, pinned = threading.Event(), list[int]()

    def pin(self: HostBytes, start: int, end: int) -> None:
        time.sleep(0.003)
        pinned.append(end - start)
        begun.set()

    monkeypatch.setattr("accel.runtime.transfer.PAUSE", 2_000)
    monkeypatch.setattr("accel.runtime.transfer.PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(HostBytes, "pin", pin)
    on_a_gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(transfer_for(CPU, background=True), "device", on_a_gpu)
    job = engine.prefetch(files[1])
    assert begun.wait(60)
    time.sleep(0.2)
    assert len(pinned) == 1 and not job.done()
    started = time.monotonic()
    if way == "hasten":
        stamp = engine.session._source(files[1], engine.config).stamp()
        assert engine._network.hasten(stamp) is job
        job.result(timeout=60)
    engine.load_weights(files[1])
    assert torch.equal(engine(**inputs()), expected[1])
    assert time.monotonic() - started < 20 and len(pinned) > 4
    assert engine.report()["pool"]["events"]["hits_pinned"] == 1


def test_a_prefetch_that_fails_says_so_and_harms_nothing(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_with(small_plans, small_unet, 2, 2)
    before = engine(**inputs())
    with pytest.raises(InvalidFile, match="absent"):
        engine.prefetch(tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(StructureMismatch, match=r"other\.safetensors"):
        engine.prefetch(other)

    def failing(self: FileSource, name: str, out: torch.Tensor) -> None:
        raise InvalidFile(f"{self.label} is on a disk that went away")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(FileSource, "read_into", failing)
        engine.prefetch(files[1]).result(timeout=60)
    assert "1.safetensors is on a disk that went away" in caplog.text
    report = engine.report()["pool"]
    assert report["events"]["failed_prefetches"] == 1
    assert all(tier["bytes"] == 0 for tier in report["tiers"].values())
    assert torch.equal(engine(**inputs()), before)


@pytest.fixture
def storages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Every copy of an arena that is made, as PyTorch has it and not as the pool counts it."""
    made: list[weakref.ref[torch.Tensor]] = []
    for name in ("copy", "blank"):
        original = getattr(Weights, name)

        def noted(self: Weights, original: Any = original) -> torch.Tensor:
            storage: torch.Tensor = original(self)
            made.append(weakref.ref(storage))
            return storage

        monkeypatch.setattr(Weights, name, noted)
    yield made


def test_fifty_checkpoints_in_a_pool_that_holds_six(
    small_plans: Path,
    small_unet: Any,
    states: list[State],
    tmp_path: Path,
    storages: list[weakref.ref[torch.Tensor]],
) -> None:
    """Budgets hold within 1 %, by what is really allocated, and every checkpoint is right."""
    engine = engine_with(small_plans, small_unet, 6)
    size = engine._network.weights.bytes
    bias, path = "conv_out.bias", tmp_path / "a.safetensors"
    base = {name: value.half() for name, value in states[0].items()}
    save_file(base, path)
    rest = path.read_bytes()
    paths = []
    for index in range(50):  # they differ by what they add to the output, and so can be told apart
        paths.append(tmp_path / f"{index}.safetensors")
        file = TensorFile(path)
        start = file._data + file._starts[bias]
        new = torch.full((4,), float(index)).half().numpy().tobytes()
        paths[-1].write_bytes(rest[:start] + new + rest[start + len(new) :])
    arguments, rng = inputs(), random.Random(0)
    engine.load_weights(paths[0])
    zero, held = engine(**arguments), []
    order = [*range(50), *(rng.choice((3, 4, 5, 6, 40)) for _ in range(12))]
    for step, index in enumerate(order):
        engine.load_weights(paths[index])
        if step % 6 == 0:
            engine.prefetch(paths[order[(step + 1) % len(order)]]).result(timeout=60)
        alive = [storage for ref in storages if (storage := ref()) is not None]
        held.append(sum(storage.numel() for storage in alive))
        del alive
        assert held[-1] <= 6 * size * 1.01
        assert held[-1] == engine.report()["pool"]["tiers"]["cpu"]["bytes"]
        if step % 10 == 0 or index == 49:
            assert torch.allclose(engine(**arguments) - zero, torch.tensor(float(index)), atol=1e-4)
    assert max(held) == 6 * size, "all of the budget is used"
    events = engine.report()["pool"]["events"]
    assert events["hits_cpu"] >= 12 and events["evictions"] > 30


def test_swaps_go_on_while_memory_runs_out(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program takes what was free: copies are given up, pictures stay right."""
    left = 1 << 40
    engine = engine_with(small_plans, small_unet, 6, free=lambda tier: left)
    for index in range(3):
        engine.load_weights(files[index])
    assert engine.report()["pool"]["tiers"]["cpu"]["blocks"] == 2
    left = -1
    engine.load_weights(files[0])
    assert engine.report()["pool"]["tiers"]["cpu"]["blocks"] == 0
    left, copy = 1 << 40, Weights.copy

    def full(self: Weights) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Weights, "copy", full)
    for index in (1, 2, 0):
        engine.load_weights(files[index])
        assert torch.equal(engine(**inputs()), expected[index])
    monkeypatch.setattr(Weights, "copy", copy)
    # Memory that is missing for the swap itself is taken from what waits.
    write, attempts = Weights.write, []

    def once(self: Weights, *arguments: Any) -> Any:
        attempts.append(engine.report()["pool"]["tiers"]["cpu"]["blocks"])
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("full")
        return write(self, *arguments)

    engine.prefetch(files[2]).result(timeout=60)
    monkeypatch.setattr(Weights, "write", once)
    engine.load_weights(files[1])
    assert attempts == [2, 0] and torch.equal(engine(**inputs()), expected[1])


@pytest.mark.parametrize("way", ["load", "set_loras", "update"])
def test_a_second_try_to_swap_has_the_memory_of_the_copies_that_were_given_up(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    storages: list[weakref.ref[torch.Tensor]],
    way: str,
) -> None:
    """Those that the first try read from, too, and the copies of LoRAs that it used."""
    engine = engine_with(small_plans, small_unet, 6)
    network, lora = engine._network, make_lora(3, two_levels())
    engine.load_weights(files[0])
    engine.set_loras([(lora, 0.5)])  # parks what it is put on
    engine.prefetch(files[1]).result(timeout=60)
    source, write = engine.session._source(files[1], engine.config), Weights.write
    copies: list[weakref.ref[Any]] = storages
    held: list[int] = []
    if way == "update":
        network.load(engine.seat, source)

    def full_once(self: Weights, names: Any, place: Any, adapters: Any) -> Any:
        copies.extend(weakref.ref(one) for one, _ in adapters if isinstance(one, Near))
        held.append(sum(ref() is not None for ref in copies))
        if len(held) == 1:
            raise torch.OutOfMemoryError("full")
        return write(self, names, place, adapters)

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "write", full_once)
        if way == "load":
            engine.load_weights(files[1])
        elif way == "set_loras":
            engine.set_loras([(lora, 0.7)])
        else:
            network.update(engine.seat, set(network.weights.shapes), source)
    assert held[0] >= 2 and held[1:] == [0]
    engine.set_loras([])
    assert torch.equal(engine(**inputs()), expected[0 if way == "set_loras" else 1])


def test_an_engine_is_made_where_only_copies_are_in_the_way(
    small_plans: Path, small_unet: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(small_plans, small_unet, 6)
    engine.load_weights(files[1])
    plan, pool, tries = engine._network.plan, engine.session.pool, []
    allocate = Weights.__init__

    def full_once(self: Weights, *arguments: Any) -> None:
        tries.append(pool.bytes("cpu"))
        if len(tries) == 1:
            raise OutOfMemory("full")
        allocate(self, *arguments)

    monkeypatch.setattr(Weights, "__init__", full_once)
    fill(pool, "a", 10)
    Network(plan, CPU, torch.float32, pool=pool)
    assert tries[0] > 0 and tries[1] == 0


def test_copies_go_with_their_network(
    small_plans: Path, small_unet: Any, files: list[Path]
) -> None:
    engine = engine_with(small_plans, small_unet, 6)
    pool = engine.session.pool
    engine.load_weights(files[0])
    engine.load_weights(files[1])
    assert pool.bytes("cpu") > 0
    del engine
    gc.collect()
    assert pool.bytes("cpu") == 0 and not pool._uses


def test_an_engine_may_be_collected_while_its_thread_is_in_the_pool(
    small_plans: Path, small_unet: Any, files: list[Path]
) -> None:
    """The collector runs finalizers wherever it likes."""
    engine = engine_with(small_plans, small_unet, 6)
    pool, network = engine.session.pool, engine._network
    fill(pool, "of the module", network.weights.bytes, owner=network._owner)
    engine.set_loras([(make_lora(3, two_levels()), 1.0)])
    assert pool.bytes("cpu", network._owner) > network.weights.bytes
    held = [engine]
    del engine

    def collect() -> None:
        with pool._turn():
            held.clear()
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits for itself"
    assert network.live is None and pool.bytes("cpu") == network.weights.bytes


@pytest.mark.parametrize("way", ["restore", "write"])
def test_an_interrupt_at_the_end_of_a_swap_leaves_the_engine_as_it_was(
    small_plans: Path,
    small_unet: Any,
    files: list[Path],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """Ctrl-C once the arena has the new weights, before the engine knows."""
    engine = engine_with(small_plans, small_unet, 4 if way == "restore" else 0)
    for index in (1, 0):
        engine.load_weights(files[index])
    original = getattr(Weights, way)

    def interrupted(self: Weights, *arguments: Any) -> Any:
        original(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Weights, way, interrupted)
        engine.load_weights(files[1])
    assert engine.report()["weights"] == str(files[0])
    assert torch.equal(engine(**inputs()), expected[0])


def test_swaps_do_not_depend_on_what_the_caller_has_set(
    small_plans: Path, small_unet: Any, files: list[Path]
) -> None:
    """Autocast would round what LoRAs add; a default device or dtype be taken for buffers."""
    plain, other = (engine_with(small_plans, small_unet, 0) for _ in range(2))
    for engine in (plain, other):
        engine.load_weights(files[0])
    lora = make_lora(3, two_levels())
    plain.set_loras([(lora, 0.7)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.set_loras([(lora, 0.7)])
    assert torch.equal(other(**inputs()), plain(**inputs()))
    source = Slow(make_unet(1, two_levels()).state_dict())
    with torch.device("meta"):
        other.load_weights(files[1])
        copy = Transfer(CPU).gather(["conv_in.bias"], source)
    assert copy.host.tensor.device == CPU
    plain.load_weights(files[1])
    assert torch.equal(other(**inputs()), plain(**inputs()))


def test_a_second_try_has_the_memory_of_the_first(
    small_plans: Path, small_unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(small_plans, small_unet, 0)
    network, held = engine._network, list[weakref.ref[torch.Tensor]]()
    engine.load_weights(small_unet.state_dict())
    engine(**inputs())
    assert transfer_for(CPU)._idle, "the weights came through slots"

    def make() -> list[bool]:
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        if len(held) < 3:
            raise torch.OutOfMemoryError("full")
        return [ref() is None for ref in held[:-1]]

    assert network._room_for(make) == [True, True]
    assert not network._executables, "the sizes that were ready went for it"
    assert not transfer_for(CPU)._idle
    engine.load_weights(small_unet.state_dict())
    network.free_parked()
    assert not transfer_for(CPU)._idle

    def full(self: Executable, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Executable, "run", full)
    with pytest.raises(OutOfMemory, match="no memory is left on cpu"):
        engine(**inputs())


def test_what_cannot_be_found_again_is_not_fetched_ahead(
    small_plans: Path, small_unet: Any, states: list[State]
) -> None:
    """Each load of a state dict vouches for itself alone."""
    engine = engine_with(small_plans, small_unet, 6, 6)
    engine.prefetch(states[1]).result(timeout=60)
    assert all(tier["blocks"] == 0 for tier in engine.report()["pool"]["tiers"].values())


def test_state_dicts_that_nobody_can_ask_for_again_are_not_kept(
    small_plans: Path, small_unet: Any, states: list[State]
) -> None:
    engine = engine_with(small_plans, small_unet, 6)
    for state in states:
        engine.load_weights(state)
        engine.set_loras([(make_lora(3, two_levels()), 1.0)])
        kept = [key[2][0] for key in engine.session.pool._blocks]
        assert len(kept) == 2 and _ADAPTER in kept, "for its LoRA alone, and this"
