"""Sessions and engines: builds, swaps, seats, and what they refuse."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import (
    family_config,
    make_lora,
    make_unet,
    residuals_for,
    tiny_config,
    two_levels,
)

import accel
from accel import compiler
from accel.compiler import SHIPPED, plan_for, shipped_plan
from accel.errors import (
    DeviceUnavailable,
    InvalidFile,
    InvalidInput,
    InvalidLora,
    OutOfMemory,
    StructureMismatch,
    SwitchyardError,
    UnsupportedModel,
)
from accel.models import FAMILIES, UNetConfig, parameters
from accel.plan.schema import Plan
from accel.runtime.arena import Arena
from accel.session import Engine, Session
from accel.sources import StateDictSource
from accel.structure import Structure, structure_of
from accel.tuning import Choice, Selector

ROOT = Path(__file__).parents[1]


def arguments(config: UNetConfig | None = None, seed: int = 0) -> dict[str, Any]:
    """One call's arguments in diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    config = config or tiny_config()
    return {
        "sample": torch.randn(2, 4, 17, 12, generator=generator),
        "timestep": 400,
        "encoder_hidden_states": torch.randn(2, 77, config.context_dim, generator=generator),
    }


@pytest.fixture
def module() -> torch.nn.Module:
    return make_unet(1)


@pytest.fixture
def engine(plan_cache: Path, module: torch.nn.Module) -> Engine:
    return Session("cpu", "fp32", cache_dir=plan_cache).engine(module)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def merged(module: torch.nn.Module, *loras: tuple[dict[str, torch.Tensor], float]) -> Any:
    """The module with LoRAs added to its weights by hand, in float64."""
    for name, parameter in module.named_parameters():
        base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        for lora, strength in loras:
            if f"{base}.lora_up.weight" not in lora:
                continue
            up, down = (lora[f"{base}.lora_{k}.weight"].double().flatten(1) for k in ("up", "down"))
            scale = strength * float(lora[f"{base}.alpha"]) / down.shape[0]
            delta = (up @ down).view(parameter.shape) * scale
            parameter.copy_(parameter.double() + delta)
    return module


# Results.


def test_equals_the_module(engine: Engine, module: Any) -> None:
    assert relative(engine(**arguments()), module(**arguments())[0]) < 1e-5


def test_positional_call_and_call_by_name_agree(engine: Engine) -> None:
    named = arguments()
    assert torch.equal(engine(**named), engine(*named.values()))


def test_loras_equal_merged_weights_and_leave_no_trace(engine: Engine) -> None:
    before = engine(**arguments())
    first, second = make_lora(3), make_lora(4)
    engine.set_loras([(first, 0.7), (second, -0.4)])
    expected = merged(make_unet(1), (first, 0.7), (second, -0.4))(**arguments())[0]
    assert relative(before, expected) > 1e-2, "the LoRAs must matter"
    assert relative(engine(**arguments()), expected) < 1e-5
    engine.set_loras([])
    assert torch.equal(engine(**arguments()), before)


def test_changing_one_strength_touches_only_its_keys(engine: Engine) -> None:
    first, second = make_lora(3), {k: v for k, v in make_lora(4).items() if "mid_block" in k}
    files = {name: lora for name, lora in (("first", first), ("second", second))}
    assert second, "the second LoRA must have keys"
    everything = engine.set_loras([(files["first"], 1.0)])
    engine.set_loras([])
    assert everything.constants > 50
    untouched = engine.set_loras([])
    assert (untouched.constants, untouched.bytes) == (0, 0)


def test_lora_from_a_file_is_read_once(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(make_lora(3), path)
    other = {k: v for k, v in make_lora(4).items() if "mid_block" in k}
    save_file(other, tmp_path / "other.safetensors")
    full = engine.set_loras([(path, 1.0), (tmp_path / "other.safetensors", 1.0)])
    change = engine.set_loras([(path, 1.0), (tmp_path / "other.safetensors", 0.5)])
    assert 0 < change.constants < full.constants
    expected = {k.removeprefix("lora_unet_").split(".")[0] for k in other}
    assert change.constants <= len(expected)


def test_checkpoint_swap_keeps_the_lora_set(engine: Engine) -> None:
    lora = make_lora(3)
    engine.set_loras([(lora, 0.7)])
    engine.load_weights(make_unet(2).state_dict())
    expected = merged(make_unet(2), (lora, 0.7))(**arguments())[0]
    assert relative(engine(**arguments()), expected) < 1e-5


def test_single_file_checkpoint_in_ldm_names(engine: Engine, tmp_path: Path) -> None:
    """Half-precision file with a VAE and EMA keys around the UNet."""
    config, other = tiny_config(), make_unet(2).half()
    state = other.state_dict()
    file = {
        f"model.diffusion_model.{p.ldm_name}": state[name].contiguous()
        for name, p in parameters(config).items()
    }
    file["first_stage_model.encoder.conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    file["model_ema.decay"] = torch.zeros(())
    path = tmp_path / "checkpoint.safetensors"
    save_file(file, path)
    report = engine.load_weights(path)
    assert report.bytes > 0 and report.constants > 100
    assert relative(engine(**arguments()), other.float()(**arguments())[0]) < 1e-5


def test_two_modules_share_one_network_and_keep_their_own_weights(plan_cache: Path) -> None:
    session = Session("cpu", "fp32", cache_dir=plan_cache)
    a, b = session.engine(make_unet(1)), session.engine(make_unet(2))
    assert a._network is b._network
    b.set_loras([(make_lora(3), 1.0)])
    for _ in range(2):
        assert relative(a(**arguments()), make_unet(1)(**arguments())[0]) < 1e-5
        expected = merged(make_unet(2), (make_lora(3), 1.0))(**arguments())[0]
        assert relative(b(**arguments()), expected) < 1e-5
    assert b.report()["binds"] == 1, "one shape, one executable for both"
    assert b.report()["source"] == "memory"


def test_parameters_replaced_by_the_host_are_read_at_the_next_load(
    engine: Engine, module: Any
) -> None:
    """Hosts put new Parameter objects in place; pointers kept from before would be stale."""
    module.conv_in.weight = torch.nn.Parameter(-module.conv_in.weight)
    engine.load_weights(module.state_dict())
    assert relative(engine(**arguments()), module(**arguments())[0].detach()) < 1e-5


def test_prompt_key_skips_exactly_the_prompt(engine: Engine) -> None:
    inputs = arguments()
    plain = engine(**inputs)
    assert torch.equal(engine.call((), inputs, key="k"), plain)
    assert torch.equal(engine.call((), inputs, key="k"), plain)
    assert engine.report()["prompt_hits"] == 1
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * 2}
    assert torch.equal(engine.call((), changed, key="k"), plain), "the key vouches"
    assert torch.equal(engine.call((), changed, key="other"), engine(**changed))


class Provisional:
    """A selector whose choices are provisional until it is settled."""

    def __init__(self, selector: Selector) -> None:
        self._selector, self.settled, self.renewed = selector, False, 0

    def select(self, calls: Any) -> list[Choice]:
        found = self._selector.select(calls)
        return [dataclasses.replace(choice, provisional=not self.settled) for choice in found]

    def prepare(self, *arguments: Any) -> None:
        """Nothing is compiled ahead."""

    def ran(self) -> None:
        """So nothing waits."""

    def renew(self) -> None:
        """Its choices follow `settled` as it is."""
        self.renewed += 1


def test_kernels_change_when_a_host_says_so(engine: Engine) -> None:
    """What was compiled meanwhile is bound between samplings, once, for every size; bits stay."""
    network = engine._network
    assert network._selector is not None
    selector: Any = Provisional(network._selector)
    network._selector = selector
    sizes = [arguments(), {**arguments(), "sample": torch.randn(2, 4, 5, 9)}]
    expected = [engine.call((), size, "a") for size in sizes]
    assert selector.renewed == 1, "by the first size of all"
    network.refresh()
    assert selector.renewed == 2
    assert [torch.equal(engine.call((), s, "a"), e) for s, e in zip(sizes, expected, strict=True)]
    assert engine.report()["binds"] == 2 and network.provisional, "it is not settled yet"
    selector.settled = True
    for key in ("a", "b", None):  # cond and uncond may come by turns, so that no key tells
        engine.call((), sizes[0], key)
    assert engine.report()["binds"] == 2, "in the midst of a sampling nothing changes"
    for _ in range(2):
        network.refresh()
        for size, before in zip(sizes, expected, strict=True):
            assert torch.equal(engine.call((), size, "c"), before)
    report = engine.report()
    assert (report["binds"], report["renewed"]) == (4, 2) and not network.provisional
    assert not any(shape["provisional"] for shape in report["shapes"])


def test_who_waits_does_not_stay_with_what_is_provisional(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is told to wait gets its kernels when it begins, whatever is under way."""
    network = engine._network
    assert network._selector is not None
    hurried, patient = (Provisional(network._selector) for _ in range(2))
    patient.settled = True
    network._selector = None
    found = {False: hurried, True: patient}
    monkeypatch.setattr(
        "accel.runtime.network.selector_for", lambda device, waiting: found[waiting]
    )
    expected = engine.call((), arguments(), "a")
    network.refresh()
    assert torch.equal(engine.call((), arguments(), "a"), expected) and network.provisional
    network.waiting = True
    network.refresh()
    assert torch.equal(engine.call((), arguments(), "b"), expected) and not network.provisional
    network.waiting = False
    network.refresh()
    assert torch.equal(engine.call((), arguments(), "c"), expected)
    assert engine.report()["binds"] == 2, "what has its kernels keeps them"


def test_an_engine_says_what_a_size_will_take(engine: Engine) -> None:
    found = engine.predict(width=96, height=136)
    assert found.step_ms is None and found.unknown > 50, "nobody times a CPU"
    engine(**arguments())
    report = engine.report()
    assert found.activation_bytes == report["activation_bytes"]
    assert found.weights_bytes == pytest.approx(report["weights_bytes"], rel=0.1)  # aligned
    engine.predict(256, 256, batch=1, tokens=154)
    assert engine.report()["binds"] == 1, "predicting binds nothing"
    with pytest.raises(InvalidInput, match="multiples of 8"):
        engine.predict(100, 64)


def test_weights_void_the_prompt_key(engine: Engine) -> None:
    inputs = arguments()
    engine.call((), inputs, key="k")
    engine.load_weights(make_unet(2).state_dict())
    assert torch.equal(engine.call((), inputs, key="k"), engine(**inputs))
    engine.set_loras([(make_lora(3), 1.0)])
    assert torch.equal(engine.call((), inputs, key="k"), engine(**inputs))


def test_controlnets_and_t2i_adapters_toggle_without_capture(engine: Engine, module: Any) -> None:
    inputs = arguments()
    skips = residuals_for(tiny_config(), 2, 17, 12, torch.Generator().manual_seed(0))
    controlled = {
        "down_block_additional_residuals": tuple(skips[:-1]),
        "mid_block_additional_residual": skips[-1],
    }
    plain = engine(**inputs)
    for added in ({}, controlled, {}, controlled):
        for states in ([], [skips[place] for place in (2, 5, 8, 11)]):
            adapted = {"down_intrablock_additional_residuals": states} if states else {}
            case = {**inputs, **added, **adapted}
            found = engine(**case)
            assert relative(found, module(**case)[0]) < 1e-5  # which takes the states off the list
            assert torch.equal(found, plain) == (not added and not adapted)
    assert engine.report()["captures"] == 0
    assert engine.report()["binds"] == 4


def test_threads_share_an_engine(engine: Engine) -> None:
    expected = {seed: engine(**arguments(seed=seed)) for seed in range(4)}
    wrong = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not torch.equal(engine(**arguments(seed=seed)), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_runs_under_inference_mode(engine: Engine) -> None:
    """Hosts sample in inference mode; buffers made there must work outside it and the reverse."""
    inputs = arguments()
    with torch.inference_mode():
        inside = engine(**arguments())
    engine.load_weights(make_unet(1).state_dict())
    assert torch.equal(inside, engine(**inputs))


# Checkpoint arithmetic.


Weights = dict[str, torch.Tensor]


def summed(parts: list[tuple[Weights, float]]) -> Weights:
    """A weighted sum in float32, merged beforehand, one operation after the other."""
    (first, weight), *rest = parts
    total = {name: value.float() * weight for name, value in first.items()}
    for state, weight in rest:
        total = {name: total[name] + state[name].float() * weight for name in total}
    return total


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_mix_equals_weights_merged_beforehand(
    plan_cache: Path, tmp_path: Path, precision: str
) -> None:
    """Bit for bit in the arena, from files and state dicts of any precision, LoRAs on top."""
    states = [make_unet(seed).state_dict() for seed in (1, 2, 3)]
    states[1] = {name: value.half() for name, value in states[1].items()}
    path = tmp_path / "b.safetensors"
    save_file(states[1], path)
    session = Session("cpu", precision, cache_dir=plan_cache)
    engine, plain = session.engine(make_unet(4)), session.engine(make_unet(5))
    arena = engine._network.weights.storage
    parts: list[Any] = [(states[0], 0.6), (path, 0.7), (states[2], -0.3)]
    merge = summed([(state, weight) for state, (_, weight) in zip(states, parts, strict=True)])
    difference = {
        name: value + (states[1][name].float() - states[2][name]) * 0.8
        for name, value in states[0].items()
    }
    for mix, expected in (
        (lambda: engine.mix(parts), merge),
        (lambda: engine.add_difference(states[0], path, states[2], 0.8), difference),
    ):
        for loras in ([], [(make_lora(3), 0.7)]):
            engine.set_loras(loras)
            report = mix()
            assert report.constants > 100 and report.bytes > 0
            found = arena.clone()
            plain.set_loras(loras)
            plain.load_weights(expected)
            plain._network.activate(plain.seat)
            assert torch.equal(found, arena)
            # Put on afterwards, a LoRA comes to the same.
            engine.set_loras([])
            engine.set_loras(loras)
            assert torch.equal(found, arena)


def test_a_difference_of_nothing_is_the_base_itself(engine: Engine) -> None:
    state, other = make_unet(2).state_dict(), make_unet(3).state_dict()
    engine.load_weights(state)
    before = engine(**arguments())
    engine.add_difference(state, other, other, 3.0)
    assert torch.equal(engine(**arguments()), before)
    assert engine.report()["swaps"][-1]["operation"] == "add_difference"


def test_what_cannot_be_mixed_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    before = engine(**arguments())
    state = make_unet(2).state_dict()
    other = {name: torch.empty(p.shape, device="meta") for name, p in _sdxl().items()}
    path, cut = tmp_path / "other.safetensors", tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    save_file(state, cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    bad: Any
    for bad in ([], state, [state], [(state, 0.5, 1)], [(state, float("inf"))], [(state, "x")]):
        refused(InvalidInput, lambda bad=bad: engine.mix(bad))  # type: ignore[misc]
    assert "SDXL" in refused(StructureMismatch, lambda: engine.mix([(state, 0.5), (other, 0.5)]))
    assert "other.safetensors" in refused(
        StructureMismatch, lambda: engine.mix([(state, 0.5), (path, 0.5)])
    )
    assert "cut" in refused(InvalidFile, lambda: engine.add_difference(state, state, cut))
    refused(InvalidInput, lambda: engine.add_difference(state, state, state, float("nan")))
    assert torch.equal(engine(**arguments()), before)


# Schedules.


def test_scheduled_loras_come_and_go_between_steps(engine: Engine) -> None:
    first, second = make_lora(3), make_lora(4)
    sets: dict[int, list[Any]] = {
        0: [(first, 0.5)],
        1: [(first, 0.5), (second, 1.0)],
        2: [(second, 1.0)],
        3: [],
    }
    expected = []
    for chosen in sets.values():
        engine.set_loras(chosen)
        expected.append(engine(**arguments()))
    engine.schedule_loras([(first, 0.5, 0.0, 0.5), (second, 1.0, 0.25, 0.75)])
    for _ in range(2):  # a second sampling begins with the first step's again
        for step in range(8):
            report = engine.at_step(step, 8)
            assert (report.bytes > 0) == (step % 2 == 0), "only where the set changes"
            output = engine.call((), arguments(), key="prompt")
            assert torch.equal(output, expected[step // 2])
    assert engine.report()["lora_schedule"][1]["start"] == 0.25
    engine.set_loras([(first, 0.5)])
    assert engine.at_step(7, 8).bytes == 0, "the schedule has gone"
    assert torch.equal(engine(**arguments()), expected[0])


@pytest.mark.parametrize(
    ("start", "end"), [(0.5, 0.5), (-0.1, 1), (0, 1.5), (float("nan"), 1), ("0", 1)]
)
def test_parts_of_a_sampling_that_are_none(engine: Engine, start: Any, end: Any) -> None:
    lora = make_lora(3)
    engine.schedule_loras([(lora, 1.0, 0.0, 1.0)])
    refused(InvalidInput, lambda: engine.schedule_loras([(lora, 1.0, start, end)]))
    refused(InvalidInput, lambda: engine.at_step(3, 3))
    assert len(engine.report()["lora_schedule"]) == 1


# Builds.


def test_an_engine_of_a_collected_handle_frees_its_seat(plan_cache: Path) -> None:
    session = Session("cpu", "fp32", cache_dir=plan_cache)
    kept = session.engine(make_unet(1))
    dropped = session.engine(make_unet(2))
    seat, network = dropped.seat, dropped._network
    del dropped
    assert seat.source is None and not network.parked(seat)
    assert relative(kept(**arguments()), make_unet(1)(**arguments())[0]) < 1e-5


def test_memory_goes_with_the_last_engine(plan_cache: Path) -> None:
    session = Session("cpu", "fp32", cache_dir=plan_cache)
    first, second = session.engine(make_unet(1)), session.engine(make_unet(2))
    del first
    assert len(session._networks) == 1
    storage = weakref.ref(second._network.weights.storage)
    del second
    gc.collect()
    assert not session._networks and storage() is None


def test_two_threads_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []
    original = compiler.compile_network

    def counted(*args: Any) -> Plan:
        builds.append(args)
        return original(*args)

    monkeypatch.setattr(compiler, "compile_network", counted)
    config = two_levels()
    modules = [make_unet(seed, config) for seed in (1, 2)]
    sessions = [Session("cpu", "fp32", cache_dir=tmp_path) for _ in modules]
    engines: list[Engine] = []
    threads = [
        threading.Thread(target=lambda s=s, m=m: engines.append(s.engine(m)))  # type: ignore[misc]
        for s, m in zip(sessions, modules, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines) == 2 and len(builds) == 1
    assert sorted(session.captures for session in sessions) == [0, 1]


def test_a_second_process_fetches(plan_cache: Path) -> None:
    code = (
        "import sys, json; sys.path[:0] = sys.argv[1:3]\n"
        "from support import make_unet\n"
        "from accel.session import Session\n"
        "r = Session('cpu', 'fp32', cache_dir=sys.argv[3]).engine(make_unet(1)).report()\n"
        "print(json.dumps([r['source'], r['captures']]))\n"
    )
    paths = [str(ROOT), str(ROOT / "tests"), str(plan_cache)]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["cache", 0]


def test_damaged_cached_plan_is_rebuilt(small_plans: Path, tmp_path: Path) -> None:
    config = two_levels()
    shutil.copytree(small_plans, tmp_path, dirs_exist_ok=True)
    (stored,) = tmp_path.rglob("*.json")
    text = stored.read_text()
    stored.write_text(text[: len(text) // 2])
    again = Session("cpu", "fp32", cache_dir=tmp_path)
    engine = again.engine(make_unet(1, config))
    assert again.captures == 1
    assert relative(engine(**arguments()), make_unet(1, config)(**arguments())[0]) < 1e-5


def test_unwritable_cache_costs_only_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    session = Session("cpu", "fp32", cache_dir=blocker / "cache")
    engine = session.engine(make_unet(1, two_levels()))
    problem = engine.report()["cache_problem"]
    assert problem and "\n" not in problem
    assert sum(problem in record.getMessage() for record in caplog.records) == 1
    assert engine(**arguments()).isfinite().all()


def test_full_memory_costs_parked_seats_and_other_shapes_first(
    plan_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that does not fit at first does once all that can be had again is given up."""
    session = Session("cpu", "fp32", cache_dir=plan_cache)
    waiting, engine = session.engine(make_unet(2)), session.engine(make_unet(1))
    before = waiting(**arguments()), engine(**arguments())
    assert waiting.report()["parked"]
    acquire, calls = Arena.acquire, []

    def full_twice(self: Arena, intervals: Any) -> Any:
        calls.append(len(engine._network._executables))
        if len(calls) < 3:
            raise OutOfMemory("the card is full")
        return acquire(self, intervals)

    monkeypatch.setattr(Arena, "acquire", full_twice)
    larger = {**arguments(), "sample": torch.randn(2, 4, 24, 24)}
    assert relative(engine(**larger), make_unet(1)(**larger)[0]) < 1e-5
    assert calls == [1, 1, 0]
    assert not waiting.report()["parked"]
    assert torch.equal(waiting(**arguments()), before[0])
    assert torch.equal(engine(**arguments()), before[1])


def test_memory_that_stays_full_is_one_clear_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine(**arguments())

    def full(self: Arena, intervals: Any) -> Any:
        raise OutOfMemory("the card is full")

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "acquire", full)
        larger = {**arguments(), "sample": torch.randn(2, 4, 24, 24)}
        refused(OutOfMemory, lambda: engine(**larger))
    assert torch.equal(engine(**arguments()), before)


# Shipped plans.


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_shipped_plan_reads_just_the_familys_parameters(family: Any) -> None:
    plan = Plan.from_json(json.loads((SHIPPED / f"{family.name}.json").read_text()))
    expected = {name: p.shape for name, p in parameters(family.config).items()}
    assert plan.parameters == expected
    assert plan.structure["config"] == family.config.to_json()


def structure_of_family(name: str) -> Structure:
    shapes = {key: torch.Size(p.shape) for key, p in parameters(family_config(name)).items()}
    return structure_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def test_shipped_plans_are_found_by_structure() -> None:
    for family in FAMILIES:
        plan = shipped_plan(structure_of_family(family.name))
        assert plan is not None and plan.structure["family"] == family.name


def test_sdxl_is_ready_to_bind_within_a_second(tmp_path: Path) -> None:
    structure = structure_of_family("sdxl")
    compiler._shipped.cache_clear()
    started = time.perf_counter()
    plan, source = plan_for(structure, torch.nn.Module, compiler.open_cache(tmp_path, None))
    controlled = plan.without([entry.name for entry in plan.inputs if entry.optional])
    seconds = time.perf_counter() - started
    assert source == "shipped" and len(controlled.steps) > 1000
    assert seconds < 1.0


# Refusals: one clear line each, and what worked before still works.


def refused(error: type[SwitchyardError], call: Any) -> str:
    """The one-line message with which `call` is refused."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_truncated_checkpoint(engine: Engine, tmp_path: Path) -> None:
    before = engine(**arguments())
    path = tmp_path / "cut.safetensors"
    save_file(make_unet(2).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut.safetensors" in refused(InvalidFile, lambda: engine.load_weights(path))
    assert torch.equal(engine(**arguments()), before)


def test_checkpoint_of_another_structure(engine: Engine) -> None:
    before = engine(**arguments())
    other = {name: torch.empty(p.shape, device="meta") for name, p in _sdxl().items()}
    assert "SDXL" in refused(StructureMismatch, lambda: engine.load_weights(other))
    assert torch.equal(engine(**arguments()), before)


def _sdxl() -> Any:
    return parameters(family_config("sdxl"))


def test_lora_of_another_family_names_what_fits(plan_cache: Path, tmp_path: Path) -> None:
    engine = Session("cpu", "fp32", cache_dir=plan_cache).engine(make_unet(1))
    before = engine(**arguments())
    base = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    lora = {
        f"{base}.lora_down.weight": torch.zeros(4, 640),
        f"{base}.lora_up.weight": torch.zeros(640, 4),
    }
    message = refused(InvalidLora, lambda: engine.set_loras([(lora, 1.0)]))
    assert "Stable Diffusion XL" in message or "SDXL" in message
    path = tmp_path / "wrong.safetensors"
    save_file(lora, path)
    assert "wrong" in refused(InvalidLora, lambda: engine.set_loras([(path, 1.0)]))
    assert torch.equal(engine(**arguments()), before)


def test_a_load_that_fails_half_way_changes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.set_loras([(make_lora(3), 0.5)])
    before = engine(**arguments())
    original, reads = StateDictSource.read, []

    def failing(self: StateDictSource, name: str) -> torch.Tensor:
        reads.append(name)
        if len(reads) == 300:
            raise OSError("the disk went away")
        return original(self, name)

    monkeypatch.setattr(StateDictSource, "read", failing)
    with pytest.raises(OSError, match="went away"):
        engine.load_weights(make_unet(2).state_dict())
    assert len(reads) >= 300
    assert torch.equal(engine(**arguments()), before)


def test_a_file_changed_under_the_engine_is_refused(engine: Engine, tmp_path: Path) -> None:
    """Rereading the touched keys from it would mix two checkpoints."""
    path = tmp_path / "a.safetensors"
    save_file(make_unet(2).state_dict(), path)
    engine.load_weights(path)
    before = engine(**arguments())
    save_file(make_unet(3).state_dict(), tmp_path / "b.safetensors")
    path.write_bytes((tmp_path / "b.safetensors").read_bytes())
    message = refused(InvalidFile, lambda: engine.set_loras([(make_lora(3), 1.0)]))
    assert "changed" in message
    assert torch.equal(engine(**arguments()), before)


def test_a_lora_file_may_change_once_it_is_read(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(make_lora(3), path)
    engine.set_loras([(path, 1.0)])
    save_file({k: v * 3 for k, v in make_lora(3).items()}, tmp_path / "other.safetensors")
    path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    engine.load_weights(make_unet(2).state_dict())
    expected = merged(make_unet(2), (make_lora(3), 1.0))(**arguments())[0]
    assert relative(engine(**arguments()), expected) < 1e-5


def test_a_state_dict_changed_in_place_is_read_anew_as_a_whole(engine: Engine) -> None:
    state = make_unet(2).state_dict()
    engine.load_weights(state)
    for tensor in state.values():
        tensor.mul_(0.9)
    lora = make_lora(3)
    engine.set_loras([(lora, 0.5)])
    changed = make_unet(2)
    changed.load_state_dict(state)
    expected = merged(changed, (lora, 0.5))(**arguments())[0]
    assert relative(engine(**arguments()), expected) < 1e-5


@pytest.mark.parametrize("setting", ["fp32_precision", "matmul"])
def test_hosts_with_pytorchs_newer_precision_settings(setting: str, plan_cache: Path) -> None:
    """Reading the older setting raises then; and the host's choice must stand afterwards."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import torch\n"
        "matmul = torch.backends.cuda.matmul\n"
        "owner = matmul if sys.argv[4] == 'matmul' else torch.backends\n"
        "owner.fp32_precision = 'tf32'\n"
        "from support import make_lora, make_unet\n"
        "from accel.session import Session\n"
        "engine = Session('cpu', 'fp32', cache_dir=sys.argv[3]).engine(make_unet(1))\n"
        "engine.set_loras([(make_lora(3), 1.0)])\n"
        "weights = engine._network.weights\n"
        "weights.device = torch.device('cuda')\n"
        "with weights._exact_matmul():\n"
        "    print(matmul.fp32_precision)\n"
        "print(matmul.fp32_precision)\n"
    )
    paths = [str(ROOT), str(ROOT / "tests"), str(plan_cache)]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths, setting], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ieee", "tf32"]


@pytest.mark.parametrize(
    "bad",
    [
        {"a": 1},
        None,
        {n: t.to(torch.int8) for n, t in make_unet(2).state_dict().items()},
        {n: t.to("meta") for n, t in make_unet(2).state_dict().items()},
    ],
    ids=["numbers", "none", "int8", "meta"],
)
def test_what_is_no_checkpoint(engine: Engine, bad: Any) -> None:
    before = engine(**arguments())
    refused(InvalidInput, lambda: engine.load_weights(bad))
    assert torch.equal(engine(**arguments()), before)


def test_an_integer_checkpoint_file(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    save_file({n: t.to(torch.int8) for n, t in make_unet(2).state_dict().items()}, path)
    assert "int8" in refused(InvalidFile, lambda: engine.load_weights(path))


@pytest.mark.parametrize("bad", [[{}], [({}, "x")], [(None, 1.0)], [({}, float("nan"))]])
def test_what_is_no_lora_set(engine: Engine, bad: Any) -> None:
    refused(InvalidInput, lambda: engine.set_loras(bad))


@pytest.mark.parametrize("key", [[1], torch.zeros(2)], ids=["list", "tensor"])
def test_keys_that_cannot_vouch(engine: Engine, key: Any) -> None:
    refused(InvalidInput, lambda: engine.call((), arguments(), key=key))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample": torch.zeros(4, 17, 12)}, "4 dimensions"),
        ({"encoder_hidden_states": torch.zeros(2, 77, 33)}, "32"),
        ({"sample": torch.zeros(2, 9, 17, 12)}, "latent"),
        ({"encoder_hidden_states": torch.zeros(3, 77, 32)}, "context"),
    ],
)
def test_inputs_that_do_not_fit(engine: Engine, change: dict[str, Any], says: str) -> None:
    before = engine(**arguments())
    message = refused(InvalidInput, lambda: engine(**{**arguments(), **change}))
    assert says in message
    assert torch.equal(engine(**arguments()), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_cuda() -> None:
    assert "cpu" in refused(DeviceUnavailable, accel.Session)


def test_unknown_precision() -> None:
    refused(InvalidInput, lambda: Session("cpu", "int8"))


def test_unsupported_state_is_refused_before_anything(plan_cache: Path) -> None:
    module: Any = make_unet(1)
    module.register_forward_hook(lambda *a: None)
    session = Session("cpu", "fp32", cache_dir=plan_cache)
    refused(UnsupportedModel, lambda: session.engine(module))
    assert session.captures == 0 and not session._networks


def test_evicted_shapes_take_their_prompts_along(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many prompt lengths a day brings, memory holds those of the shapes that are ready."""
    monkeypatch.setattr("accel.runtime.network.MAX_EXECUTABLES", 2)
    sizes = []
    for tokens in (77, 154, 231, 308):
        inputs = arguments()
        inputs["encoder_hidden_states"] = torch.randn(2, tokens, 32)
        engine(**inputs)
        sizes.append(len(engine._network._prompts))
    assert sizes == [1, 2, 2, 2]
    report = engine.report()
    assert report["evictions"] == 2 and len(report["shapes"]) == 2
