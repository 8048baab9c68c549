"""Attention in CUDA C++: what it takes, what it refuses, and its results.

On a Hopper those of the GPU; everywhere those of the same source with simulated/hopper.cuh.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulator
import test_kernel_attention
import torch
from harness import CHIPS, DEVICE, check, chip, find, run
from test_kernel_attention import SIZES, call, crossed, merged, usual

from accel.kernels import Config, load_triton, nvrtc
from accel.kernels import attention_hopper as family
from accel.kernels.nvrtc import CudaLaunch
from accel.tuning.compiling import launches_of

assert load_triton()

NAME = "cuda.attention"
F16, BF16 = torch.float16, torch.bfloat16
FACTOR = 1.5
"""Where one key has nearly all of the weight, its rounding does not cancel: see the source."""

HERE = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="there is no NVRTC here")
on_hopper = pytest.mark.skipif(not HERE, reason="its products are those of Hopper alone")

VARIANTS = [(head, config) for head in family.HEADS for config in family._VARIANTS[head]]

SIMULATED = [
    (40, family.variant(4, 64, 3, 1), F16),
    (40, family.variant(3, 128, 3, 1), BF16),
    (64, family.variant(2, 64, 3, 2), F16),
    (64, family.variant(3, 96, 3, 1), F16),
    (80, family.variant(1, 64, 2, 3), F16),
    (80, family.variant(1, 64, 2, 3), BF16),
    (160, family.variant(1, 64, 2, 2), F16),
]
"""Some of each kind: stages that are waited for early or not, chunks of columns, blocks of keys."""


@needs_nvrtc
def test_only_hopper_and_known_heads() -> None:
    kernel, hopper = find(NAME), chip()
    assert kernel.supports(call(), hopper)
    for capability in CHIPS:
        assert kernel.supports(call(), chip(capability)) == (capability == (9, 0))
    for size in SIZES:
        assert size.tensors[1] is not None
        known = size.out.shape[2] // size.attrs["heads"] in family.HEADS
        many = size.tensors[1].shape[1] > 96
        assert kernel.supports(size, hopper) == (known and many), size.key
    query, key, value = call().tensors
    assert query is not None and key is not None and value is not None
    refused: list[tuple[Any, ...]] = [
        (replace(query, dtype=torch.float32), key, value),
        (query, replace(key, aligned=False), value),
        (query, key, replace(value, stride=(1, *value.stride[1:]))),
        (query, replace(key, shape=(1, *key.shape[1:])), value),
    ]
    for tensors in refused:
        assert not kernel.supports(replace(call(), tensors=tensors), hopper)


def test_nothing_is_offered_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    assert nvrtc.version() is None
    assert not find(NAME).supports(call(), chip())


@needs_nvrtc
def test_a_launch_is_data() -> None:
    """It can be looked at and compiled where there are neither tensors nor a GPU."""
    size = call(queries=3957, head=40)
    config = family.variant(4, 64, 3, 1)
    (launch,) = launches_of(find(NAME), config, size)
    assert isinstance(launch, CudaLaunch)
    assert launch.grid == (-(-3957 // 256), 16, 1) and launch.threads == 512
    (other,) = launches_of(find(NAME), config, call(queries=64 * 64, head=40))
    assert other.key() == launch.key()  # one code for all sizes
    (wider,) = launches_of(find(NAME), family._VARIANTS[64][0], call(heads=10, head=64))
    assert wider.key() != launch.key()


@needs_nvrtc
def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (launch,) = launches_of(find(NAME), family._VARIANTS[160][0], call(queries=256, head=160))
    assert isinstance(launch, CudaLaunch)
    made = launch.compile()
    assert made[:4] == b"\x7fELF"
    monkeypatch.setattr(nvrtc, "compiled", lambda *about: pytest.fail("compiled again"))
    assert launch.compile() == made


@needs_nvrtc
def test_what_is_damaged_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (launch,) = launches_of(find(NAME), family._VARIANTS[160][0], call(queries=256, head=160))
    assert isinstance(launch, CudaLaunch)
    launch.compile()
    (kept,) = tmp_path.rglob("*.cubin")
    for content in (kept.read_bytes()[:2000], b"", b"nonsense"):
        kept.write_bytes(content)
        made = launch.compile()
        assert made[:4] == b"\x7fELF" and launch.compile() == made
    assert sum("damaged" in record.getMessage() for record in caplog.records) == 2


@needs_nvrtc
def test_a_folder_that_cannot_be_had_costs_no_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "folder"))
    (launch,) = launches_of(find(NAME), family._VARIANTS[160][0], call(queries=256, head=160))
    assert isinstance(launch, CudaLaunch) and launch.compile()[:4] == b"\x7fELF"


def test_only_configurations_of_today_are_adopted() -> None:
    kernel, hopper = find(NAME), chip()
    assert kernel.fits(call(head=40), family._VARIANTS[40][-1], hopper)
    assert not kernel.fits(call(head=40), family._VARIANTS[160][0], hopper)
    assert not kernel.fits(call(head=40), {"groups": 9}, hopper)


@needs_nvrtc
def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match="undefined"):
        nvrtc.compiled("__global__ void f() { nothing(); }", "sm_90a", {})


def test_a_header_makes_another_code(monkeypatch: pytest.MonkeyPatch) -> None:
    (launch,) = launches_of(find(NAME), family._VARIANTS[40][0], call())
    assert isinstance(launch, CudaLaunch)
    assert list(nvrtc.headers(launch.source)) == ["hopper.cuh"]
    before = launch.key()
    monkeypatch.setattr(nvrtc, "headers", lambda source: {"hopper.cuh": "another"})
    assert replace(launch).key() != before


def rising_or_falling(
    head: int, order: str, sign: int, keys: int, dtype: torch.dtype = F16
) -> list[torch.Tensor]:
    """One image and head, whose highest logit comes last or first."""
    device = test_kernel_attention.DEVICE
    steps = torch.linspace(0.1, 60.0, keys)
    query = torch.full((1, 70, head), float(sign), dtype=dtype, device=device)
    key = (steps if order == "rising" else steps.flip(0))[None, :, None].expand(1, keys, head)
    key = key.contiguous().to(device, dtype)
    value = torch.randn(1, keys, head, generator=torch.Generator().manual_seed(2))
    return [query, key, value.to(device, dtype)]


def leaping(head: int, powers: float, dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
    """The logits of all keys behind the first blocks are alike, and so much higher than theirs."""
    device = test_kernel_attention.DEVICE
    query = torch.ones(1, 8, head, dtype=dtype, device=device)
    key = torch.zeros(1, 300, head, dtype=dtype, device=device)
    key[:, 150:] = 1.0
    value = torch.randn(1, 300, head, generator=torch.Generator().manual_seed(2))
    attrs = {"heads": 1, "scale": powers * math.log(2) / head}
    return [query, key, value.to(device, dtype)], attrs


LEAPS = [9.5, 12.5, 58.5, 62.5, 110.0, 124.0, 140.0]
"""Powers of two, about the limits of weights and the ends of fp32's range."""


# Without a GPU.

simulated = pytest.mark.skipif(
    simulator.COMPILER is None, reason="needs g++, on Linux, to run CUDA's C++ on the CPU"
)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> simulator.Simulator:
    """With all that the tests need, two at a time."""
    made = simulator.Simulator(tmp_path_factory.mktemp("simulated"))
    launches = []
    for head, config, dtype in SIMULATED:
        size = call(queries=256, head=head)
        tensors = tuple(spec and replace(spec, dtype=dtype) for spec in size.tensors)
        out = replace(size.out, dtype=dtype)
        launches += launches_of(find(NAME), config, replace(size, out=out, tensors=tensors))
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(made.build, launches))
    return made


@pytest.fixture
def on_cpu(built: simulator.Simulator, monkeypatch: pytest.MonkeyPatch) -> simulator.Simulator:
    """Launches are simulated, and tensors where they can be; few keys are taken too."""
    monkeypatch.setattr(CudaLaunch, "run", lambda launch: built.run(launch))
    monkeypatch.setattr(test_kernel_attention, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    monkeypatch.setattr(family, "SHORT", 0)
    return built


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("head", "config", "dtype"), SIMULATED, ids=str)
def test_simulated_ragged_ends(head: int, config: Config, dtype: torch.dtype) -> None:
    """Of queries and keys, with hostile neighbours; more blocks of keys than stages, and fewer."""
    for queries in (1, 97, 129):
        tensors = merged(2, max(queries, 97), 2, head, dtype)
        tensors[0] = tensors[0][:, :queries]
        check(NAME, tensors, usual(2, head), config, factor=FACTOR)
    block = int(config["keys"])
    for keys in (1, block - 1, block, block + 1, 2 * block, 3 * block - 1, 4 * block + 7):
        check(NAME, crossed(1, 33, keys, 1, head, dtype), usual(1, head), config, factor=FACTOR)


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("head", "config", "dtype"), SIMULATED, ids=str)
def test_simulated_flat_and_peaked_softmax(
    head: int, config: Config, dtype: torch.dtype, spread: float
) -> None:
    query, key, value = crossed(1, 70, 300, 1, head, dtype)
    check(NAME, [(query * spread).to(dtype), key, value], usual(1, head), config, factor=FACTOR)


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("head", "config", "dtype"), SIMULATED, ids=str)
def test_simulated_the_highest_logit_comes_last_or_first(
    head: int, config: Config, dtype: torch.dtype, order: str, sign: int
) -> None:
    """Up to the last block, of which most keys are there."""
    tensors = rising_or_falling(head, order, sign, 5 * int(config["keys"]) - 20, dtype)
    check(NAME, tensors, {"heads": 1, "scale": 4 / head}, config, factor=FACTOR)


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("head", "config", "dtype"), SIMULATED, ids=str)
def test_simulated_sums_of_large_weights(head: int, config: Config, dtype: torch.dtype) -> None:
    for powers in LEAPS:
        tensors, attrs = leaping(head, powers, dtype)
        check(NAME, tensors, attrs, config, factor=FACTOR)


@simulated
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("head", "config", "dtype"), SIMULATED, ids=str)
def test_simulated_results_are_the_same_alone(
    head: int, config: Config, dtype: torch.dtype
) -> None:
    tensors = merged(2, 150, 2, head, dtype)
    together = run(NAME, tensors, usual(2, head), config)
    alone = run(NAME, [t[1:2] for t in tensors], usual(2, head), config)
    assert torch.equal(together[1:2], alone)


FAULTS = {
    "a wrong parity": ("turn ^ (next == 0)", "turn"),
    "a wait too few": ("blocks.wait_values(stage, turn);", ""),
    "products not waited for": (
        "products_done<0>();\n        pin(rows.result)",
        "pin(rows.result)",
    ),
    "a tile left too early": ("blocks.leave(block - 1, stage", "blocks.leave(block, next"),
    "a key too many": ("i % 2 >= alive", "i % 2 > alive"),
    "totals of an old peak": ("total[r] *= fading;", ""),
}


@simulated
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(
    fault: str, on_cpu: simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = FAULTS[fault]
    text = nvrtc.text("attention_hopper.cu")
    assert text.count(old) == 1
    monkeypatch.setattr(on_cpu, "texts", {"attention_hopper.cu": text.replace(old, new)})
    head, config, _ = SIMULATED[0]
    tensors = rising_or_falling(head, "rising", 1, 450)
    with pytest.raises((AssertionError, RuntimeError), match=r"^(assert|block|$)"):
        check(NAME, tensors, {"heads": 1, "scale": 4 / head}, config, factor=FACTOR)
        check(NAME, merged(1, 150, 1, head), usual(1, head), config, factor=FACTOR)


# On a GPU.


@on_hopper
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("head", "config"), VARIANTS, ids=str)
def test_every_variant(head: int, config: Config, dtype: torch.dtype) -> None:
    """Ragged ends of queries and keys, and hostile neighbours."""
    for queries in (1, 97, 129, 500, 1024):
        tensors = merged(2, max(queries, 97), 3, head, dtype)
        tensors[0] = tensors[0][:, :queries]
        check(NAME, tensors, usual(3, head), config, factor=FACTOR)
    check(NAME, crossed(2, 33, 231, 2, head, dtype), usual(2, head), config, factor=FACTOR)


@on_hopper
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("head", "config"), VARIANTS, ids=str)
def test_flat_and_peaked_softmax(
    head: int, config: Config, spread: float, dtype: torch.dtype
) -> None:
    """From all keys alike to one key alone; peaks are left behind many times."""
    query, key, value = crossed(1, 300, 900, 2, head, dtype)
    check(NAME, [(query * spread).to(dtype), key, value], usual(2, head), config, factor=FACTOR)


@on_hopper
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("head", "config"), VARIANTS, ids=str)
def test_the_highest_logit_comes_last_or_first(
    head: int, config: Config, order: str, sign: int
) -> None:
    """Every block of keys leaves the peak behind by more than fp16 could hold, or none does."""
    tensors = rising_or_falling(head, order, sign, 450)
    check(NAME, tensors, {"heads": 1, "scale": 4 / head}, config, factor=FACTOR)


@on_hopper
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(("head", "config"), VARIANTS, ids=str)
def test_sums_of_large_weights(head: int, config: Config, dtype: torch.dtype) -> None:
    """As many as do not overflow fp32, whatever peak they are relative to."""
    for powers in LEAPS:
        tensors, attrs = leaping(head, powers, dtype)
        check(NAME, tensors, attrs, config, factor=FACTOR)


@on_hopper
@pytest.mark.parametrize(("head", "config"), VARIANTS, ids=str)
def test_results_are_the_same_again_and_alone(head: int, config: Config) -> None:
    tensors = merged(2, 700, 2, head)
    together = run(NAME, tensors, usual(2, head), config)
    assert torch.equal(run(NAME, tensors, usual(2, head), config), together)
    alone = run(NAME, [t[1:2] for t in tensors], usual(2, head), config)
    assert torch.equal(together[1:2], alone)
