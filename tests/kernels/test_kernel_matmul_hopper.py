"""Linear layers in CUDA C++: what they take, what they refuse, and their results.

On a Hopper those of the GPU; everywhere those of the same source with simulated/hopper.cuh.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import offline
import pytest
import simulator
import test_kernel_matmul
import torch
from harness import CHIPS, DEVICE, call_of, check, chip, error, exact, find, run
from test_kernel_matmul import REFUSED, layer, layers, operands

from accel.kernels import Call, Config, load_triton, matmul, nvrtc
from accel.kernels import matmul_hopper as family
from accel.kernels.nvrtc import CudaLaunch
from accel.tuning.compiling import launches_of

assert load_triton()

NAME = "cuda.matmul"
SOURCE = "matmul_hopper.cu"
F16, BF16 = torch.float16, torch.bfloat16

HERE = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="there is no NVRTC here")
on_hopper = pytest.mark.skipif(not HERE, reason="its products are those of Hopper alone")


@dataclass(frozen=True)
class Case:
    """One piece of code: what it is compiled with."""

    activation: str
    width: int
    cluster: int
    riders: str
    dtype: torch.dtype = F16

    @property
    def tile(self) -> family.Tile:
        return family.Tile(self.width, self.activation)

    def config(self, programs: int) -> Config:
        """For so many blocks, or the few more that make whole clusters."""
        programs = -(-programs // self.cluster) * self.cluster
        return family.variant(self.width, self.cluster, self.tile.stages, programs)

    def operands(self, rows: int, columns: int, depth: int) -> Any:
        """Tensors of a layer, and its attributes."""
        return operands(rows, columns, depth, self.riders, self.activation, self.dtype)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.activation}-{self.width}-{self.cluster}-{self.riders}-{name}"


SIMULATED = [
    Case("geglu", 256, 2, "bias"),
    Case("geglu", 256, 1, "bias residual", BF16),
    Case("geglu", 256, 1, ""),
    Case("geglu", 160, 1, "bias"),
    Case("none", 160, 1, "bias residual"),
    Case("none", 160, 1, "bias", BF16),
    Case("none", 192, 1, "residual", BF16),
    Case("none", 192, 1, ""),
]
"""Every variant; boxes of each kind."""


def every_case() -> list[Case]:
    return [
        Case(activation, width, cluster, riders, dtype)
        for activation, variants in family.VARIANTS.items()
        for width, cluster in variants
        for riders in ("", "bias", "residual", "bias residual")
        for dtype in (F16, BF16)
    ]


def test_every_variant_is_simulated() -> None:
    simulated = {(case.activation, case.width, case.cluster) for case in SIMULATED}
    assert simulated == {(case.activation, case.width, case.cluster) for case in every_case()}


@needs_nvrtc
def test_only_hopper_and_what_triton_takes_too() -> None:
    kernel = find(NAME)
    for capability in CHIPS:
        assert kernel.supports(layer(2048, 640, 640), chip(capability)) == (capability == (9, 0))
    for refused in REFUSED.values():
        assert not kernel.supports(refused, chip())


def test_nothing_is_offered_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    assert not find(NAME).supports(layer(2048, 640, 640), chip())


def test_configurations_fit_and_differ() -> None:
    kernel, hopper = find(NAME), chip()
    for shape in layers():
        found = kernel.configs(layer(*shape), hopper) if kernel.configs else ()
        assert len(found) >= 2
        assert len({str(config) for config in found}) == len(found)
        for config in found:
            assert kernel.fits(layer(*shape), config, hopper)
            (launch,) = launches_of(kernel, config, layer(*shape))
            assert isinstance(launch, CudaLaunch)
            assert launch.shared <= 227 << 10 and launch.grid[0] <= hopper.multiprocessors
            assert launch.grid[0] % launch.cluster == 0


def constant(call: Call) -> Call:
    """The same with a weight that no launch writes."""
    x, weight, *rest = call.tensors
    assert weight is not None
    return replace(call, tensors=(x, replace(weight, constant=True), *rest))


def test_only_configurations_of_today_are_adopted() -> None:
    kernel, hopper, wanted = find(NAME), chip(), constant(layer(2048, 640, 640))
    good = family.variant(160, 1, 5, 132)
    assert kernel.fits(wanted, good, hopper)
    # A weight that the launch before may still be writing is not read ahead of its end.
    assert not kernel.fits(layer(2048, 640, 640), good, hopper)
    assert kernel.fits(layer(2048, 640, 640), {**good, "pdl": False}, hopper)
    for change in ({"width": 256}, {"cluster": 2}, {"stages": 4}, {"lag": 2}, {"programs": 131}):
        assert not kernel.fits(wanted, {**good, **change}, hopper)
    assert not kernel.fits(wanted, {"block_m": 128}, hopper)


@needs_nvrtc
def test_a_launch_is_data() -> None:
    """It can be looked at and compiled where there are neither tensors nor a GPU."""
    config = family.variant(256, 2, 4, 132)
    (launch,) = launches_of(find(NAME), config, layer(2048, 5120, 1280, "geglu"))
    assert isinstance(launch, CudaLaunch)
    assert (launch.grid, launch.threads, launch.cluster) == ((132, 1, 1), 384, 2)
    (other,) = launches_of(find(NAME), config, layer(300, 2560, 640, "geglu"))
    assert other.key() == launch.key()  # one code for all sizes
    assert isinstance(other, CudaLaunch) and other.grid == (2 * 2 * 20, 1, 1)
    (plain,) = launches_of(find(NAME), config, layer(2048, 5120, 1280))
    assert plain.key() != launch.key()


@needs_nvrtc
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_accumulators_stay_in_registers(case: Case) -> None:
    """And products run into each other: a compiler that fears for them has each waited for."""
    tensors, attrs = case.operands(16, 16, 16)
    (launch,) = launches_of(find(NAME), case.config(4), call_of("linear", tensors, attrs)[0])
    assert isinstance(launch, CudaLaunch)
    code = launch.compile()
    found = offline.usage(code)
    assert found["LOCAL"] == found["STACK"] == 0
    assert found["REG"] * launch.threads <= 64 << 10
    instructions = offline.tool("-sass", code)
    products = len(re.findall(r"HGMMA\.64x\d+x16", instructions))
    assert 0 < len(re.findall(r"WARPGROUP\.DEPBAR", instructions)) < products


# Without a GPU.

simulated = pytest.mark.skipif(
    simulator.COMPILER is None, reason="needs g++, on Linux, to run CUDA's C++ on the CPU"
)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> simulator.Simulator:
    """With all that the tests need, two at a time."""
    made = simulator.Simulator(tmp_path_factory.mktemp("simulated"))
    launches = []
    for case in SIMULATED:
        tensors, attrs = case.operands(16, 16, 16)
        call, _ = call_of("linear", tensors, attrs)
        launches += launches_of(find(NAME), case.config(1), call)
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(made.build, launches))
    return made


@pytest.fixture
def on_cpu(built: simulator.Simulator, monkeypatch: pytest.MonkeyPatch) -> simulator.Simulator:
    """Launches are simulated, and tensors where they can be; few rows are taken too."""
    monkeypatch.setattr(CudaLaunch, "run", lambda launch: built.run(launch))
    monkeypatch.setattr(test_kernel_matmul, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    monkeypatch.setattr(matmul, "_GEMV_ROWS", 0)
    return built


def sizes(case: Case) -> Sequence[tuple[int, int, int]]:
    """Rows, columns and depth: ends within a tile, a step, and at them; stages used over again."""
    width, ring = case.tile.columns, case.tile.stages * family.STEP
    return [
        (1, 16, 16),
        (127, width + 8, 64),
        (128, width, ring),
        (129, width - 8, 72),
        (300, 2 * width + 24, 2 * ring + 40),
    ]


PAIR, ADDED = SIMULATED[0], SIMULATED[4]


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_simulated_awkward_sizes(case: Case) -> None:
    for rows, columns, depth in sizes(case):
        tensors, attrs = case.operands(rows, columns, depth)
        check(NAME, tensors, attrs, case.config(2))


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_simulated_tiles_come_each_once(case: Case) -> None:
    """Whichever block makes them: more groups of rows than one, and the last one lower."""
    rows, columns = 128 * family.GROUP + 130, 2 * case.tile.columns - 8
    tensors, attrs = case.operands(rows, columns, 24)
    results = [run(NAME, tensors, attrs, case.config(programs)) for programs in (2, 10, 64)]
    check(NAME, tensors, attrs, case.config(6))
    for other in results[1:]:
        assert torch.equal(other, results[0])


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", [PAIR, ADDED], ids=str)
def test_simulated_rows_that_lie_apart(case: Case) -> None:
    """Operands and results among numbers that are none: not read, nor written over."""
    tensors, attrs = case.operands(70, 40, 72)

    def among(x: torch.Tensor) -> torch.Tensor:
        room = x.new_full((x.shape[0] + 2, x.shape[1] + 16), float("nan"))
        return room[1:-1, 8:-8].copy_(x)

    apart = [t if t is None or i in (1, 2) else among(t) for i, t in enumerate(tensors)]
    _, out = call_of("linear", tensors, attrs)
    room = torch.full((72, 56), 3.0, dtype=out.dtype)
    launches = family.matmul(
        room[1:-1, 8:-8], *apart, **attrs, config=case.config(2), workspace=None
    )
    for launch in launches:
        launch.run()
    truth = exact("linear", tensors, attrs)
    assert error(room[1:-1, 8:-8], truth) < 1e-3
    room[1:-1, 8:-8] = 3.0
    assert (room == 3.0).all()


@simulated
@pytest.mark.usefixtures("on_cpu")
def test_simulated_what_is_not_finite_stays_in_its_place() -> None:
    case = ADDED
    tensors, attrs = case.operands(130, 264, 72)
    tensors[0][3] = float("inf")
    tensors[1][7] = float("nan")
    result = run(NAME, tensors, attrs, case.config(2))
    assert result[:, 7].isnan().all() and not result[3].isfinite().any()
    result[:, 7] = result[3] = 0.0
    assert result.isfinite().all()


FAULTS: dict[str, tuple[Case, str, str]] = {
    "a wrong parity": (
        PAIR,
        "memory.full(ring.stage), ring.turn)",
        "memory.full(ring.stage), ring.turn ^ 1)",
    ),
    "operands not waited for": (
        PAIR,
        "barrier_wait(memory.full(ring.stage), ring.turn);",
        "",
    ),
    "a stage filled while it is read": (
        PAIR,
        "barrier_wait(sender.memory.empty(ring.stage), ring.turn ^ 1);",
        "",
    ),
    "a stage freed a step too early": (
        PAIR,
        "products_done<1>();\n        free_stage(memory, before",
        "products_done<1>();\n        free_stage(memory, ring.stage",
    ),
    "a stage freed before its products are done": (
        PAIR,
        "products_done<0>();\n    pin(result.sums);\n    free_stage(memory, before, lane);",
        "free_stage(memory, before, lane);\n    products_done<0>();\n    pin(result.sums);",
    ),
    "a stage freed in one block alone": (
        PAIR,
        "barrier_arrive(memory.empty(stage), lane)",
        "barrier_arrive(memory.empty(stage), cluster_rank())",
    ),
    "an arrival too few": (PAIR, "if (lane < CLUSTER)", "if (lane < 1)"),
    "bytes too few": (PAIR, "barrier_expect(full, STAGE_BYTES)", "barrier_expect(full, X_BYTES)"),
    "a half for its own block alone": (
        PAIR,
        "copy_box_to(3, to,",
        "copy_box(to,",
    ),
    "a block that starts before the other": (
        PAIR,
        "  if (CLUSTER > 1)\n    cluster_meet();\n  else\n    __syncthreads();",
        "  __syncthreads();",
    ),
    "a block that ends before the other": (PAIR, "if (CLUSTER > 1) cluster_meet();\n}", "}"),
    "barriers that are not ready": (PAIR, "barriers_ready();", ""),
    "products without a fence": (PAIR, "products_follow();", ""),
    "products not waited for": (PAIR, "products_done<0>();", ""),
    "a step too few": (PAIR, "(depth + STEP - 1) / STEP", "depth / STEP"),
    "sums of the tile before": (PAIR, "step > 0);", "true);"),
    "another row of the operands": (PAIR, "group * 64 * ROW_BYTES", "group * 32 * ROW_BYTES"),
    "a wrong swizzle": (PAIR, "(BOX_ROW / 16 - 1)) << 4", "(BOX_ROW / 16 - 1)) << 5"),
    "no swizzle": (PAIR, "(byte ^ ((row * BOX_ROW >> 7 & (BOX_ROW / 16 - 1)) << 4))", "byte"),
    "results stored without a fence": (PAIR, "stores_follow();\n", ""),
    "results stored before all lanes wrote": (
        PAIR,
        "stores_follow();\n      __syncwarp();",
        "stores_follow();",
    ),
    "a slot written while it is stored": (
        PAIR,
        "stores_read<BOXES - 1>();",
        "stores_read<BOXES>();",
    ),
    "a store under way at the end": (PAIR, "if (lane == 0) stores_read<0>();\n}", "}"),
    "gates in place of values": (
        PAIR,
        "columns(PART / 8 + eight, gates)",
        "columns(eight, gates)",
    ),
    "a residual not waited for": (
        ADDED,
        "barrier_wait(memory.added(warp, box), turn);",
        "",
    ),
    "a residual of the tile before": (
        ADDED,
        "barrier_wait(memory.added(warp, box), turn);",
        "barrier_wait(memory.added(warp, box), turn ^ 1);",
    ),
    "a residual over the results before": (
        ADDED,
        "stores_read<0>();\n#pragma unroll\n      for (int box = 0; box < BOXES",
        "\n#pragma unroll\n      for (int box = 0; box < BOXES",
    ),
}


# Each is compiled anew: a third of them are enough, but for who has changed the kernel.
TRIED = sorted(FAULTS) if os.environ.get("SWITCHYARD_EVERY_FAULT") else sorted(FAULTS)[::3]


@simulated
@pytest.mark.parametrize("fault", TRIED)
def test_a_planted_fault_is_caught(
    fault: str, on_cpu: simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, old, new = FAULTS[fault]
    text = nvrtc.text(SOURCE)
    assert text.count(old) == 1
    monkeypatch.setattr(on_cpu, "texts", {SOURCE: text.replace(old, new)})
    tensors, attrs = case.operands(300, case.tile.columns + 24, 600)
    with pytest.raises((AssertionError, RuntimeError), match=r"^(assert|block|$)"):
        check(NAME, tensors, attrs, case.config(2))


# On a GPU.


@on_hopper
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_every_variant(case: Case) -> None:
    for rows, columns, depth in (*sizes(case), (1000, 1288, 1288)):
        tensors, attrs = case.operands(max(rows, 9), columns, depth)
        check(NAME, tensors, attrs, case.config(132))


@on_hopper
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_results_are_the_same_again_and_by_other_blocks(case: Case) -> None:
    tensors, attrs = case.operands(4000, 2568, 648)
    first = run(NAME, tensors, attrs, case.config(132))
    for programs in (132, 2, 64, 130):
        assert torch.equal(run(NAME, tensors, attrs, case.config(programs)), first)


@on_hopper
def test_launches_that_overlap() -> None:
    """Each reads what the one before it wrote, many times over."""
    case = ADDED
    tensors, attrs = case.operands(1024, 1024, 1024)
    x, weight, bias, residual = tensors
    config = case.config(132)
    expected = x
    for _ in range(4):
        expected = run(NAME, [expected, weight, bias, residual], attrs, config)
        torch.cuda.synchronize()
    out = [torch.empty_like(x) for _ in range(4)]
    for _ in range(20):
        found = x
        for place in out:
            for launch in family.matmul(
                place, found, weight, bias, residual, **attrs, config=config, workspace=None
            ):
                launch.run()
            found = place
        assert torch.equal(found, expected)
