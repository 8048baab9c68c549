"""On a GPU: captures per shape, fidelity in half precision, memory. Skipped where there is none."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import make_lora, make_unet, residuals_for, tiny_config

from accel.cache import DiskCache
from accel.hardware import describe
from accel.runtime.pool import Pool
from accel.session import Engine, Session
from accel.tuning import Selector
from accel.tuning.compiling import Compiler
from accel.tuning.profile import Profile

pytestmark = pytest.mark.gpu

SIZES = [(16, 16), (24, 16), (17, 9), (33, 12)]


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has many sizes; timing kernels for all of them would take minutes."""
    monkeypatch.setenv("SWITCHYARD_TUNE", "off")


def half(seed: int) -> Any:
    """The tiny module with weights that fp16 holds exactly."""
    return make_unet(seed).half()


@pytest.fixture
def engine(plan_cache: Path) -> Engine:
    return Session("cuda", "fp16", cache_dir=plan_cache).engine(half(1))


def arguments(size: tuple[int, int], batch: int, controlled: bool, seed: int) -> dict[str, Any]:
    """One call's arguments, fp16 on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, *size, generator=generator).half().cuda(),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).cuda(),
        "encoder_hidden_states": torch.randn(batch, 77, 32, generator=generator).half().cuda(),
    }
    if controlled:
        tensors = residuals_for(tiny_config(), batch, *size, generator)
        *skips, middle = (tensor.half().cuda() for tensor in tensors)
        inputs |= {"down_block_additional_residuals": tuple(skips)}
        inputs |= {"mid_block_additional_residual": middle}
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(one(item) for item in value)
        return value.to(dtype) if value.is_floating_point() else value

    return {name: one(value) for name, value in inputs.items()}


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def test_one_graph_per_shape_and_right_results_under_random_swaps(engine: Engine) -> None:
    """Captures are the distinct (shape, ControlNet on or off), whatever is swapped in between."""
    rng = random.Random(0)
    states = [half(seed).state_dict() for seed in (1, 2, 3)]
    sets: list[Any] = [[], [(make_lora(11), 0.8)], [(make_lora(12), -0.5), (make_lora(11), 0.2)]]
    shapes, worst = set(), 0.0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    outputs: dict[Any, torch.Tensor] = {}
    for step in range(60):
        checkpoint, lora = rng.randrange(3), rng.randrange(3)
        engine.load_weights(states[checkpoint])
        engine.set_loras(sets[lora])
        case = (rng.choice(SIZES), rng.randint(1, 4), rng.random() < 0.5)
        shapes.add(case)
        inputs = arguments(*case, seed=step % 7)
        output = engine(**inputs)
        known = outputs.setdefault((checkpoint, lora, case, step % 7), output)
        assert torch.equal(output, known), "the same state gave another result"
        if lora == 0:
            module = half(checkpoint + 1).cuda()
            with torch.no_grad():
                plain = module(**inputs)[0]
                truth = module.float()(**cast(inputs, torch.float32))[0]
            worst = max(worst, error(output, truth) / error(plain, truth))
    assert worst < 1.1
    report = engine.report()
    assert report["captures"] == 0
    assert report["graphs"] == report["binds"] == len(shapes)


def test_a_parameters_lora_does_not_depend_on_what_is_launched_with_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, path in enumerate(paths, 11):
        save_file(make_lora(seed), path)
    weights = engine._network.weights
    bare = weights.storage.clone()
    engine.set_loras([(paths[0], 0.7), (paths[1], 0.5, "ALL")])
    whole = weights.storage.clone()
    for block in (5, 13, 20):  # ever other launches, back to where they were
        numbers = [1.0] * 26
        numbers[block] = 0.25
        engine.set_loras([(paths[0], 0.7), (paths[1], 0.5, numbers)])
    engine.set_loras([(paths[0], 0.7), (paths[1], 0.5, "ALL")])
    assert torch.equal(weights.storage, whole) and not torch.equal(whole, bare)
    together = {name: constant.clone() for name, constant in weights.constants.items()}
    engine.set_loras([])
    assert torch.equal(weights.storage, bare)
    monkeypatch.setattr("accel.runtime.lowrank.available", lambda *_: False)
    engine.set_loras([(paths[0], 0.7), (paths[1], 0.5)])
    for name, alone in weights.constants.items():  # but for a last bit that is rounded otherwise
        torch.testing.assert_close(together[name], alone, rtol=1e-3, atol=1e-6)


def test_a_loras_copy_on_the_device_or_in_pinned_ram_changes_no_bit(
    plan_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.runtime.weights.LAUNCH_BYTES", 40 << 10)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, path in enumerate(paths, 11):
        lora = {name: value.half() for name, value in make_lora(seed).items()}
        save_file(lora if seed == 11 else make_lora(seed), path)
    rooms = [(1 << 30, 0), (0, 1 << 30), (0, 0)]
    pools = [Pool({"cuda": device, "pinned": pinned}) for device, pinned in rooms]
    engines = [
        Session("cuda", "fp16", cache_dir=plan_cache, pool=pool).engine(half(1)) for pool in pools
    ]
    sets: list[Any] = [[(paths[0], 0.8)], [(paths[0], 0.3)], [], [(paths[1], 0.5), (paths[0], 1)]]
    for chosen in sets * 3:
        for engine in engines:
            engine.set_loras(chosen)
        first, *others = (engine._network.weights.storage for engine in engines)
        assert all(torch.equal(first, other) for other in others)
    events = [engine.report()["pool"]["events"] for engine in engines]
    assert events[0]["loras_brought"] == events[1]["loras_pinned"] == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_loras_are_put_on_on_a_gpu_that_is_not_current(plan_cache: Path) -> None:
    pool = Pool({"cuda": 0, "pinned": 0})
    first, second = (
        Session(device, "fp16", cache_dir=plan_cache, pool=pool).engine(half(1))
        for device in ("cuda:0", "cuda:1")
    )
    with torch.cuda.device(0):
        for engine in (first, second):
            engine.set_loras([(make_lora(11), 0.8)])
    storages = [engine._network.weights.storage.cpu() for engine in (first, second)]
    assert torch.equal(*storages)


def test_t2i_adapters_toggle_and_are_as_right_as_plain_half_precision(engine: Engine) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module, worst = half(1).cuda(), 0.0
    exact = half(1).float().cuda()
    cases = [(size, controlled) for size in SIZES[:3] for controlled in (False, True)]
    for step, (size, controlled) in enumerate(cases * 2):
        inputs = arguments(size, 2, controlled, step)
        if step < len(cases):  # the second time without
            made = residuals_for(tiny_config(), 2, *size, torch.Generator().manual_seed(step))
            states = [made[place].half().cuda() for place in (2, 5, 8, 11)]
            inputs["down_intrablock_additional_residuals"] = states
        output = engine(**inputs)
        single = cast(inputs, torch.float32)  # before the module takes the states off the list
        with torch.no_grad():
            plain, truth = module(**inputs)[0], exact(**single)[0]
        worst = max(worst, error(output, truth) / error(plain, truth))
    assert worst < 1.1
    assert engine.report()["captures"] == 0
    assert engine.report()["graphs"] == 2 * len(cases)


def test_hoisting_is_exact(engine: Engine) -> None:
    inputs = arguments((24, 16), 2, False, 0)
    plain = engine(**inputs)
    other = arguments((24, 16), 2, False, 1)
    assert torch.equal(engine.call((), inputs, key=1), plain)
    assert torch.equal(engine.call((), inputs, key=1), plain)
    engine.call((), other, key=2)
    assert torch.equal(engine.call((), inputs, key=1), plain)
    assert engine.report()["prompt_hits"] == 1


def test_host_module_leaves_the_card(plan_cache: Path) -> None:
    module = half(1).cuda()
    engine = Session("cuda", "fp16", cache_dir=plan_cache).engine(module)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert engine(**arguments((16, 16), 1, False, 0)).device.type == "cuda"


def test_seats_wait_on_the_card_and_come_back_exactly(plan_cache: Path) -> None:
    session = Session("cuda", "fp16", cache_dir=plan_cache)
    a, b = session.engine(half(1)), session.engine(half(2))
    inputs = arguments((16, 16), 2, False, 0)
    first, second = a(**inputs), b(**inputs)
    assert not torch.equal(first, second)
    for _ in range(3):
        assert torch.equal(a(**inputs), first)
        assert torch.equal(b(**inputs), second)
    assert a.report()["graphs"] == 1


def test_a_larger_shape_leaves_smaller_graphs_valid(engine: Engine) -> None:
    small = arguments((16, 16), 1, False, 0)
    first = engine(**small)
    engine(**arguments((64, 72), 4, True, 1))
    assert torch.equal(engine(**small), first)
    assert engine.report()["graphs"] == 2


def test_clearing_executables_gives_the_memory_back(engine: Engine) -> None:
    inputs = arguments((64, 64), 2, False, 0)
    first = engine(**inputs)
    engine._network.clear_executables()
    assert engine.report()["activation_bytes"] == 0
    assert torch.equal(engine(**inputs), first)  # bound again to the same kernels


def test_libraries_run_until_kernels_are_compiled_and_then_those(
    engine: Engine, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing compiled yet: the first call waits for no compiler, and both are right."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    device, hardware = torch.device("cuda", 0), describe("cuda")
    cache = DiskCache(cache_folder, 1 << 24, "test")

    def selector() -> Selector:
        compiler = Compiler(hardware, device, cache)
        return Selector(compiler, device, Profile(hardware, cache), False, waiting=False)

    def kernels_now() -> list[str]:
        return [name for shape in network.shapes() for name in shape["kernels"]]

    network, inputs = engine._network, arguments((24, 16), 2, False, seed=3)
    chooser = network._selector = selector()
    first = engine(**inputs)
    assert network.provisional and "triton.group_norm" not in kernels_now()
    deadline = time.monotonic() + 120
    while not chooser.settled:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    network.refresh()
    second = engine(**inputs)
    assert not network.provisional and "triton.group_norm" in kernels_now()
    module = half(1).cuda()
    with torch.no_grad():
        plain = module(**inputs)[0]
        truth = module.float()(**cast(inputs, torch.float32))[0]
    for result in (first, second):
        assert error(result, truth) <= 1.1 * error(plain, truth)
    # Another process, as it were, has them from the start.
    network._selector = selector()
    network.clear_executables()
    assert torch.equal(engine(**inputs), second) and not network.provisional
