"""The benchmark on tiny networks on the CPU: rows, errors, tables, files, pictures, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_config
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from accel import hardware
from accel.bench import machine, measure, networks, ops_table, plot, process, results, timing
from accel.bench import run as bench
from accel.bench.engines import tuning_clock
from accel.bench.networks import Case, Inputs, Networks
from accel.bench.run import Options
from accel.bench.variants import eager
from accel.cli import main
from accel.errors import InvalidFile, InvalidInput, SwitchyardError
from accel.kernels import Call, TensorSpec, reference
from accel.models import Family, UNetConfig
from accel.tuning import Choice

CPU = torch.device("cpu")
CEILINGS = {"matmul_tflops": 700.0, "copy_tbps": 3.0, "h2d_gbps": None}
MACHINE = {
    "meta": {
        **{"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "cudnn": "9", "commit": "abc"},
        **{"date": "2026-01-02", "command": "first"},
    },
    "ceilings": CEILINGS,
}


def tiny(family: str) -> UNetConfig:
    """One level with attention in the middle alone: a capture of seconds."""
    config = tiny_config(family)
    levels = {"block_out_channels": (32,), "layers_per_block": (1,), "heads": (4,)}
    depths = {"down_depths": ((0,),), "up_depths": ((0, 0),), "mid_depth": 1}
    if config.kind == "controlnet":
        depths["up_depths"] = ()
    return dataclasses.replace(config, **levels, **depths)


def tiny_case(**changes: Any) -> Case:
    control = tiny("sd15-controlnet")
    case = Case("tiny", tiny("sd15"), 72, 64, precision="fp32", controlnet_config=control)
    return dataclasses.replace(case, **changes)


PLAIN = tiny_case()
WHOLE = tiny_case(controlnets=2, loras=1)
FEW: dict[str, Any] = {"device": "cpu", "baselines": ("eager",), "steps": 2, "iterations": 2}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the tiny plans are after the first run."""
    pytest.importorskip("diffusers")
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def recorded(plans: Path) -> tuple[Any, list[str], list[int]]:
    """A run of both cases in this process, what was said, and the rows kept each time."""
    said: list[str] = []
    kept: list[int] = []
    options = Options((PLAIN, WHOLE), seeds=2, ops=True, isolated=False, cache_dir=plans, **FEW)
    found = bench.run_bench(options, said.append, lambda d: kept.append(len(d["rows"])))
    return json.loads(json.dumps(found)), said, kept


@pytest.fixture(scope="module")
def document(recorded: Any) -> Any:
    """What that run found, as JSON gives it back."""
    return recorded[0]


def rows_of(document: Any, case: Case) -> dict[str, Any]:
    found = {r["variant"]: r for r in document["rows"] if r["loras"] == case.loras}
    assert list(found) == ["engine", "eager"]
    return found


# A whole run.


def test_the_document_is_as_the_design_has_it(document: Any) -> None:
    assert list(document) == ["meta", "ceilings", "rows", "ops"]
    wanted = {"gpu", "driver", "torch", "triton", "cudnn", "commit", "date", "command"}
    assert wanted <= document["meta"].keys()
    assert document["meta"]["torch"] == torch.__version__
    assert document["ceilings"].keys() == {"matmul_tflops", "copy_tbps", "h2d_gbps"}
    assert document["ceilings"]["matmul_tflops"] > 0 and document["ceilings"]["copy_tbps"] > 0
    assert len(document["rows"]) == 4
    for row in document["rows"]:
        assert set(measure.ROW) <= row.keys()
        assert row["width"] == 72 and row["height"] == 64 and row["batch"] == 2
        assert row["precision"] == "fp32" and row["vram_mib"] is None is row["kernels"]
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ms_run"] > 0 and row["cold_s"] > 0
        assert "failed" not in row


@pytest.mark.parametrize("case", [PLAIN, WHOLE], ids=["plain", "controlnets-and-lora"])
def test_the_engine_is_as_exact_as_float32_is(document: Any, case: Case) -> None:
    rows = rows_of(document, case)
    engine = rows["engine"]
    assert engine["controlnets"] == case.controlnets and engine["loras"] == case.loras
    assert len(engine["rel_err_by_seed"]) == 2
    assert 0 < engine["rel_err"] == max(engine["rel_err_by_seed"]) < 1e-5
    # Plain PyTorch in float32 is what all are compared to.
    assert rows["eager"]["rel_err"] == engine["rel_err_eager"] == 0.0
    assert bench.faithful(engine)


def test_the_engine_shows_what_it_alone_has(document: Any) -> None:
    engine = rows_of(document, PLAIN)["engine"]
    assert engine["ms_hoisted"] > 0 and engine["engine_ready_s"] > 0
    assert engine["new_size"] == "136x64" and engine["new_size_s"] > 0
    assert engine["tuning_s"] == 0.0, "a CPU measures nothing"
    assert engine["plan_source"] == "built" and engine["captures"] == 1
    assert sum(engine["kernels_by_name"].values()) == engine["calls"] > 30
    assert "controlnet_toggle" not in engine
    toggle = rows_of(document, WHOLE)["engine"]["controlnet_toggle"]
    assert toggle["calls_with"] == toggle["calls_without"] == engine["calls"]


@pytest.mark.parametrize("case", [PLAIN, WHOLE], ids=["plain", "controlnets-and-lora"])
def test_the_arithmetic_is_that_of_the_plain_forward(document: Any, case: Case) -> None:
    """Counted by torch, on diffusers' own modules."""
    plain = eager(networks.make_networks(case, CPU))
    inputs = networks.make_inputs(case, 0, CPU)

    def attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # The CPU's own kernel is not among those that torch counts.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        plain(inputs)
    rows = rows_of(document, case)
    for row in rows.values():
        assert row["tflop"] * 1e12 == pytest.approx(counter.get_total_flops(), rel=1e-6)
        rate = row["tflop"] / (row["ms"] / 1e3)
        assert row["mfu"] == pytest.approx(rate / document["ceilings"]["matmul_tflops"])


def test_every_row_is_announced_told_and_kept(recorded: Any) -> None:
    _, said, kept = recorded
    assert kept == [1, 2, 3, 4]
    assert said[0] == "measuring what this machine can do at best"
    whole = [text.partition(": ")[2] for text in said if "2 ControlNets + LoRA" in text]
    assert [text.split()[0] for text in whole] == ["float32,", *["engine"] * 2, *["eager"] * 2]
    assert "ms a step, first after" in whole[-1] and whole[-1].endswith("error 0")


def test_a_variant_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: measure.Job) -> dict[str, Any]:
        if job.variant == "engine":
            raise process.ProcessFailed("Traceback\nRuntimeError: no such kernel")
        return {**dict.fromkeys(measure.ROW), **job.case.facts, "variant": "eager", "cold_s": 1.0,
                "ms": 2.0, "ms_run": 2.0}  # fmt: skip

    def no_truth(job: measure.Job) -> None:
        raise SwitchyardError("no memory")

    monkeypatch.setattr(bench, "measure", broken)
    monkeypatch.setattr(bench, "keep_truth", no_truth)
    said: list[str] = []
    document = bench.run_bench(Options((PLAIN,), isolated=False, **FEW), said.append)
    engine, plain = document["rows"]
    assert engine["failed"][-1] == "RuntimeError: no such kernel" and engine["ms"] is None
    assert set(measure.ROW) <= engine.keys() and engine["model"] == "tiny"
    assert plain["ms"] == 2.0 and plain["mfu"] is None, "nobody knows the arithmetic"
    assert any("no float32 result, so no errors: no memory" in text for text in said)
    assert any("engine failed: RuntimeError: no such kernel" in text for text in said)


def test_without_a_truth_there_are_no_errors(tmp_path: Path) -> None:
    job = measure.Job(PLAIN, "eager", "cpu", tmp_path)
    assert measure.errors([torch.ones(2)], job) == {}
    kept = {"float32": [torch.ones(4), torch.ones(4)], "eager": [torch.ones(4) * 1.5] * 2}
    torch.save(kept, tmp_path / measure.TRUTH)
    found = measure.errors([torch.ones(4) * 1.25, torch.ones(4)], job)
    assert found["rel_err_by_seed"] == [0.25, 0.0] and found["rel_err"] == 0.25
    assert found["rel_err_eager"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ("eager", "graph")}, "the baseline 'graph' needs a GPU"),
        ({"baselines": ("compile",)}, "the baseline 'compile' needs a GPU"),
        ({"baselines": ("tensorrt",)}, "'tensorrt' is no baseline: use eager, graph, compile"),
        ({"device": "tpu"}, "'tpu' is unknown"),
    ],
)
def test_what_cannot_run_is_refused_first(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SwitchyardError, match=message):
        bench.check(Options((PLAIN,), **{**FEW, **changes}))


# Networks and inputs.


def test_networks_are_seeded_and_every_path_of_them_matters() -> None:
    pytest.importorskip("diffusers")
    first, again = networks.make_networks(WHOLE, CPU), networks.make_networks(WHOLE, CPU)
    for one, other in zip(first.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(one, other) and one.any()
    left, right = first.controlnets
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        assert not torch.equal(one, other), "each ControlNet is another"
    inputs = networks.make_inputs(WHOLE, 0, CPU)
    whole, alone = Networks(first.unet, first.controlnets), Networks(first.unet, ())
    with_control = eager(whole)(inputs)
    without = eager(alone)(Inputs(inputs.arguments))
    assert measure.relative(with_control, without) > 0.01
    exact = first.in_float32()
    assert exact.unet is not first.unet and exact.unet.dtype == torch.float32


def test_residuals_of_all_controlnets_are_summed() -> None:
    def controlnet(factor: float) -> Callable[..., Any]:
        def call(sample: Any, controlnet_cond: Any, return_dict: bool) -> Any:
            value = sample + controlnet_cond * factor
            return [value, value * 2], value * 3

        return call

    def unet(sample: Any, return_dict: bool, **residuals: Any) -> Any:
        *skips, middle = residuals.values()
        assert list(residuals) == [
            "down_block_additional_residuals",
            "mid_block_additional_residual",
        ]
        return (torch.stack([*skips[0], middle]),)

    inputs = Inputs({"sample": torch.tensor(1.0)}, (torch.tensor(10.0), torch.tensor(100.0)))
    result = networks.forward(unet, [controlnet(1), controlnet(2)], inputs)
    assert result.tolist() == [212.0, 424.0, 636.0]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_inputs_fit_and_follow_the_seed(family: str) -> None:
    pytest.importorskip("diffusers")
    case = Case("tiny", tiny(family), 72, 64, precision="fp32")
    first, again, other = (networks.make_inputs(case, seed, CPU, tokens=9) for seed in (0, 0, 1))
    for one, two, three in zip(first.tensors(), again.tensors(), other.tensors(), strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three) or one.shape == (2, 6), "but for the size"
    result = eager(networks.make_networks(case, CPU))(first)
    assert result.shape == (2, 4, 8, 9) and result.isfinite().all()
    half = first.cast(torch.float16)
    assert half.arguments["sample"].dtype == torch.float16
    assert half.arguments["timestep"].dtype == torch.int64


def test_a_lora_is_merged_in_float32_and_rounded_once() -> None:
    pytest.importorskip("diffusers")
    unet = networks.make_networks(dataclasses.replace(PLAIN, precision="fp16"), CPU).unet
    before = {name: p.clone() for name, p in unet.named_parameters()}
    lora = networks.random_lora(PLAIN.config)
    networks.merge_lora(unet, lora, 0.5)
    changed = {n for n, p in unet.named_parameters() if not torch.equal(p, before[n])}
    assert changed and len(lora) == 3 * len(changed)
    assert all("transformer_blocks" in n and ("attn" in n or "ff" in n) for n in changed)
    name = min(changed)
    layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    up, down = (lora[f"{layer}.lora_{part}.weight"].double() for part in ("up", "down"))
    exact = before[name].double() + 0.5 * 0.5 * (up @ down)
    assert down.shape[0] == 32
    merged = dict(unet.named_parameters())[name]
    assert merged.dtype == torch.float16
    assert (merged.double() - exact).abs().max() <= 2**-11 * exact.abs().max() * 1.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sd16", (512, 512)), "'sd16' is no model: use one of sd15, "),
        (("sd15-controlnet", (512, 512)), "is no model"),
        (("sd15", (500, 512)), "500x512 is no size: sides are multiples of 8"),
        (("sdxl-refiner", (512, 512), 2, 1), "sdxl-refiner has no ControlNets: use one of sd15, "),
    ],
)
def test_cases_that_do_not_exist(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        networks.case_of(*arguments)


def test_a_published_family_is_a_case() -> None:
    case = networks.case_of("sdxl", (1024, 768), batch=1, controlnets=2, lora=True)
    assert case.facts == {
        **{"model": "sdxl", "width": 1024, "height": 768, "batch": 1},
        **{"controlnets": 2, "loras": 1, "precision": "fp16"},
    }
    assert case.controlnet_config is not None and case.controlnet_config.kind == "controlnet"
    assert bench.title(case) == "sdxl 1024x768 + 2 ControlNets + LoRA"


# The table of operators.


def spec(*shape: int) -> TensorSpec:
    return TensorSpec.of(torch.empty(shape, dtype=torch.float16, device="meta"))


def linear(rows: int, k: int, n: int, residual: bool = False, activation: str = "none") -> Call:
    columns = n // 2 if activation == "geglu" else n
    extra = spec(rows, columns) if residual else None
    tensors = (spec(rows, k), spec(n, k), None, extra)
    return Call("linear", spec(rows, columns), tensors, {"activation": activation})


def silu(*shape: int) -> Call:
    return Call("silu", spec(*shape), (spec(*shape),), {})


def choice(call: Call) -> Choice:
    return Choice(reference(call.op), {"BLOCK": 64}, "by hand")


def entry(call: Call, part: str = "step", network: str = "unet") -> Any:
    return network, part, call, choice(call)


def test_the_floor_is_arithmetic_or_memory() -> None:
    ceilings = {"matmul_tflops": 500.0, "copy_tbps": 2.0}
    large = linear(8192, 8192, 8192)
    assert ops_table.floor_us(large, ceilings) == pytest.approx(2 * 8192**3 / 500e12 * 1e6)
    moving = silu(1000, 1000)
    assert ops_table.floor_us(moving, ceilings) == pytest.approx(2 * 2e6 / 2e12 * 1e6)


def test_the_table_adds_up() -> None:
    ceilings = {"matmul_tflops": 1.0, "copy_tbps": 1.0}
    small, other = linear(100, 100, 100), linear(200, 100, 100)  # floors: 2 us, 4 us
    pointwise, unknown = silu(500, 500), silu(10, 10)  # floor: 1 us
    times = {small.key: 5.0, other.key: 4.5, pointwise.key: 21.0, unknown.key: None}
    calls = [entry(small)] * 4 + [entry(other), entry(pointwise), entry(unknown)]
    calls += [entry(small, "prompt"), entry(small, network="controlnet")]
    table = ops_table.table(calls, ceilings, lambda call, choice: times[call.key])
    lines = table["calls"]
    assert [(r["op"], r["network"], r["part"], r["count"]) for r in lines] == [
        ("silu", "unet", "step", 1),
        ("linear", "unet", "step", 4),
        ("linear", "unet", "prompt", 1),
        ("linear", "controlnet", "step", 1),
        ("linear", "unet", "step", 1),
        ("silu", "unet", "step", 1),
    ]
    assert [r["gap_us"] for r in lines] == [20.0, 12.0, 3.0, 3.0, 0.5, None]
    assert lines[1]["us"] == 5.0 and lines[1]["floor_us"] == 2.0 and lines[1]["flops"] == 2e6
    assert lines[1]["kernel"] == "reference.linear" and lines[1]["config"] == {"BLOCK": 64}
    total = 21 + 6 * 5.0 + 4.5
    assert table["sum_us"] == total and table["unmeasured"] == 1
    assert lines[0]["share"] == 21 / total and lines[5]["share"] is None
    linears, silus = table["operators"]
    assert linears["op"] == "linear" and linears["count"] == 7 and linears["us"] == 34.5
    assert linears["floor_us"] == 16.0 and linears["gap_us"] == 18.5
    assert linears["tflops"] == pytest.approx(16e6 / 34.5e-6 / 1e12)
    assert silus["count"] == 1 and silus["tflops"] == 0.0
    assert linears["share"] + silus["share"] == pytest.approx(1.0)


def test_every_call_of_a_forward_is_in_its_table(document: Any) -> None:
    for case, table in zip((PLAIN, WHOLE), document["ops"], strict=True):
        assert {name: table[name] for name in case.facts} == case.facts
        engine = rows_of(document, case)["engine"]
        assert sum(line["count"] for line in table["calls"]) == engine["calls"]
        flops = sum(line["count"] * line["flops"] for line in table["calls"])
        assert flops == pytest.approx(engine["tflop"] * 1e12)
        assert table["unmeasured"] == 0 and all(line["us"] > 0 for line in table["calls"])
        gaps = [line["gap_us"] for line in table["calls"]]
        assert gaps == sorted(gaps, reverse=True)
        assert math.isclose(sum(line["share"] for line in table["calls"]), 1.0)
        assert {line["part"] for line in table["calls"]} == {"prompt", "step"}
    names = {line["network"] for line in document["ops"][1]["calls"]}
    assert names == {"unet", "controlnet"}


def test_shapes_are_written_as_people_do() -> None:
    assert ops_table.shape_text(linear(8192, 320, 2560, activation="geglu")) == (
        "8192x320 → 2560 geglu"
    )
    assert ops_table.shape_text(linear(64, 32, 16, residual=True)) == "64x32 → 16 + residual"
    tensors = (spec(2, 8, 8, 32), spec(64, 3, 3, 32), None, spec(2, 64), None)
    attrs = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    conv = Call("conv2d", spec(2, 4, 4, 64), tensors, attrs)
    assert ops_table.shape_text(conv) == "2x8x8x32 → 64, 3x3 /2 + embedding"
    qkv = (spec(2, 4096, 320), spec(2, 77, 320), spec(2, 77, 320))
    attention = Call("attention", spec(2, 4096, 320), qkv, {"heads": 8, "scale": 0.1})
    assert ops_table.shape_text(attention) == "2x4096 over 77, 8 heads of 40"
    assert ops_table.shape_text(silu(2, 64)) == "2x64"


def test_a_call_that_cannot_be_timed_costs_only_itself() -> None:
    def broken(*arguments: Any, **rest: Any) -> torch.Tensor:
        raise RuntimeError("no such\nvariant")

    call = silu(4, 4)
    kernel = dataclasses.replace(reference("silu"), run=broken)
    bad = Choice(kernel, {}, "by hand")
    here = hardware.describe("cpu")
    assert ops_table.isolated_us(call, bad, here, CPU) is None
    good = ops_table.isolated_us(call, choice(call), here, CPU)
    assert good is not None and good > 0


def test_a_time_that_the_choice_has_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(
        ops_table, "isolated_us", lambda call, *rest: float(len(timed.append(call.key) or "abc"))
    )
    known, unknown = silu(4, 4), silu(8, 8)
    entries = [("unet", "step", known, Choice(reference("silu"), {}, "measured", 7.5))]
    entries += [entry(unknown), entry(unknown, "prompt")]
    table = ops_table.measured(entries, CEILINGS, CPU)
    assert sorted(line["us"] for line in table["calls"]) == [3.0, 3.0, 7.5]
    assert timed == [unknown.key], "once for both parts"


# Timing.


def test_the_tuning_clock_counts_what_is_measured() -> None:
    class Selector:
        def _measure(self, calls: Any) -> None:
            time.sleep(0.01)

    class Session:
        _selector = Selector()

    session: Any = Session()
    with tuning_clock(session) as clock:
        session._selector._measure([1, 2])
        session._selector._measure([3])
    session._selector._measure([4])
    assert clock.calls == 3 and clock.seconds >= 0.02
    from accel.tuning import Selector as Real

    assert callable(Real._measure), "what the clock is put around"


def test_runs_have_an_object_of_their_own() -> None:
    seen: list[object] = []
    assert timing.mean_step(seen.append, CPU, 4) >= 0
    assert len(seen) == 4 and len(set(map(id, seen))) == 1
    timing.mean_step(seen.append, CPU, 1)
    assert seen[-1] is not seen[0]


def test_float32_is_exact_only_inside() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        with timing.exact_float32():
            assert not matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


# Processes.


def test_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert process.run_isolated(os.getpid, timeout=60) != os.getpid()
    process.run_isolated(print, "hello", timeout=60)
    out, err = capfd.readouterr()
    assert out == "" and "hello" in err, "the caller's output is its own"


@pytest.mark.parametrize(
    ("function", "arguments", "timeout", "error", "message"),
    [
        (operator.truediv, (1, 0), 60, process.ProcessFailed, "ZeroDivisionError"),
        (os._exit, (7,), 60, process.ProcessFailed, "it ended with code 7 and said nothing"),
        (time.sleep, (60,), 0.5, process.ProcessFailed, "stopped after 0 s"),
        (networks.case_of, ("sd16", (64, 64)), 60, InvalidInput, "'sd16' is no model"),
    ],
)
def test_faults_of_a_process_stay_its_own(
    function: Any, arguments: Any, timeout: float, error: Any, message: str
) -> None:
    waited: list[float] = []
    started = time.monotonic()
    with pytest.raises(error, match=message):
        process.run_isolated(function, *arguments, timeout=timeout, waiting=waited.append, tick=0.2)
    assert time.monotonic() - started < 40
    assert waited == sorted(waited) and (function is not time.sleep or waited)


# Files.


def row_for(variant: str, run: int = 0, **values: Any) -> dict[str, Any]:
    row = {**dict.fromkeys(measure.ROW), **PLAIN.facts, "precision": "fp16", "variant": variant}
    return {"run": run, **row, **values}


def test_rows_are_added_to_a_file_of_the_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    document = results.new_document(MACHINE, "note")
    document["rows"].append(row_for("engine"))
    results.save(document, path)
    second = {"meta": {**MACHINE["meta"], "command": "second"}, "ceilings": {"matmul_tflops": 1.0}}
    merged = results.appended(results.load(path), second, path)
    assert merged["rows"] == document["rows"]
    assert merged["meta"]["command"] == "first" and merged["ceilings"] == CEILINGS
    assert [run["command"] for run in merged["meta"]["runs"]] == ["first", "second"]
    assert merged["meta"]["runs"][1]["ceilings"] == {"matmul_tflops": 1.0}
    assert not list(tmp_path.glob("*.part"))


def test_rows_from_before_runs_were_told_apart(tmp_path: Path) -> None:
    old = {"meta": dict(MACHINE["meta"]), "ceilings": CEILINGS, "rows": [{"variant": "eager"}]}
    merged = results.appended(old, MACHINE, tmp_path)
    assert len(merged["meta"]["runs"]) == 2 and merged["rows"][0]["run"] == 0


@pytest.mark.parametrize("name", ["gpu", "commit", "torch", "driver"])
def test_rows_of_another_machine_are_not_added(name: str, tmp_path: Path) -> None:
    document = results.new_document(MACHINE, "note")
    other = {**MACHINE, "meta": {**MACHINE["meta"], name: "other"}}
    with pytest.raises(InvalidInput, match=f"is of {name} .*, this run of other: leave --append"):
        results.appended(document, other, tmp_path / "r.json")


def test_an_unknown_commit_is_equal_to_none(tmp_path: Path) -> None:
    unknown = {**MACHINE, "meta": {**MACHINE["meta"], "commit": machine.UNKNOWN}}
    document = results.new_document(unknown, "note")
    with pytest.raises(InvalidInput, match="give --commit"):
        results.appended(document, unknown, tmp_path / "r.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"meta": {}, "rows": []}', None])
def test_what_is_no_file_of_the_benchmark(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidFile, match=r"r\.json (does not exist|is no)"):
        results.load(path)


def test_a_speed_up_needs_fidelity_and_the_same_run() -> None:
    engine = row_for("engine", ms_hoisted=5.0, ms_run=6.0, rel_err=0.0011, rel_err_eager=0.001)
    plain = row_for("eager", ms_run=10.0, rel_err=0.001, rel_err_eager=0.001)
    later = row_for("eager", run=1, ms_run=10.0)
    rows = [engine, plain, later]
    assert bench.speedup(plain, rows) == 2.0, "of the steps with the caller's key"
    assert bench.speedup(engine, rows) is None and bench.speedup(later, rows) is None
    engine["rel_err"] = 0.00111
    assert not bench.faithful(engine) and bench.speedup(plain, rows) is None
    engine["rel_err"] = None
    assert bench.speedup(plain, rows) is None


def test_the_commit_is_that_of_this_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.commit()
    assert found and " " not in found
    monkeypatch.setattr(machine, "ROOT", Path(sys.prefix))
    assert machine.commit() == "unknown"


# Pictures.


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_picture_of_every_table(document: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    path = tmp_path / "ops.png"
    plot.plot(document, path)
    width, height = png_size(path)
    assert width == 1600 and height == 2 * round(plot.ROW_INCHES * plot.DPI)


def test_a_picture_needs_a_table() -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    with pytest.raises(InvalidFile, match="no table of operators to draw: measure with --ops"):
        plot.plot(results.new_document(MACHINE, "note"), Path("none.png"))


# The command.


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main(["bench", *map(str, arguments)])
    except SystemExit as exit_:
        code = int(str(exit_.code))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "--model is missing"),
        ("--model sd15", "--size is missing"),
        ("--model sd16 --size 512x512 --device cpu", "'sd16' is no model: use one of sd15, "),
        ("--model sd15 --size 500x512", "'500x512' is no size: give WIDTHxHEIGHT in multiples"),
        ("--model sd15 --size 512x512,big", "'big' is no size"),
        ("--model sd15 --size 512x512 --batch 0", "0 is no number from 1 to 64"),
        ("--model sd15 --size 64x64 --steps x", "argument --steps: invalid number value: 'x'"),
        ("--model sd15 --size 64x64 --device cpu --baselines graph", "'graph' needs a GPU"),
        ("--model sd15 --size 64x64 --device cpu --baselines fast", "'fast' is no baseline"),
        ("--model sd15 --size 64x64 --device tpu", "'tpu' is unknown"),
        ("--model sdxl-refiner --size 64x64 --device cpu --controlnet 1", "has no ControlNets"),
        ("--model sd15 --size 64x64 --append", "--append needs the file: --out"),
        ("--model sd15 --size 64x64 --out no/such/folder/r.json", "there is no such folder"),
        ("--from none.json", "none.json does not exist"),
        ("--from a.json --out b.json", "--from measures nothing"),
        ("--model sd15 --size 64x64 --precision fp8", "invalid choice: 'fp8'"),
    ],
)
def test_bad_input_is_one_line_and_2(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *arguments.split())
    assert code == 2 and out == ""
    assert complaint in err and err.count("\n") == 1


def test_without_a_gpu_the_default_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(capsys, "--model", "sd15", "--size", "512x512")
    assert code == 2 and "is not available" in err and err.count("\n") == 1


def test_a_picture_without_matplotlib_is_refused_before_the_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ("--model", "sd15", "--size", "64x64", "--plot", tmp_path / "a.png")
    code, _, err = call(capsys, *arguments)
    assert code == 2 and err == "accel: a picture needs matplotlib: pip install matplotlib\n"


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "usage: python -m accel bench" in out and "--controlnet" in out


def test_from_end_to_end(
    plans: Path,
    document: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command with a tiny family; the processes are functions here, since those take long."""
    families = (Family("tiny", "Tiny", tiny("sd15")),)
    monkeypatch.setattr(networks, "FAMILIES", families)
    monkeypatch.setattr(bench, "run_isolated", lambda function, *rest, **how: function(*rest))
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(plans))
    path = tmp_path / "r.json"
    arguments = ["--model", "tiny", "--size", "64x64,72x64", "--device", "cpu", "--steps", 1]
    arguments += ["--iterations", 1, "--seeds", 1, "--out", path, "--commit", "abc"]
    code, out, err = call(capsys, *arguments, "--baselines", "none", "--json")
    assert code == 0 and json.loads(out) == json.loads(path.read_text("utf-8"))
    first = json.loads(out)
    assert [row["width"] for row in first["rows"]] == [64, 72] and "ops" not in first
    assert first["meta"]["commit"] == "abc"
    assert "tiny 72x64: engine" in err

    code, out, err = call(capsys, *arguments[:2], "--size", "64x64", *arguments[4:], "--append")
    assert code == 0
    merged = json.loads(path.read_text("utf-8"))
    assert merged["rows"][:2] == first["rows"]
    assert [(r["run"], r["variant"]) for r in merged["rows"][2:]] == [(1, "engine"), (1, "eager")]
    assert "eager" in out and "eager's" in out and out.count("tiny 64x64") == 3

    code, _, err = call(capsys, *arguments[:-1], "def", "--append")
    assert code == 2 and "is of commit abc, this run of def" in err


def test_tables_and_pictures_from_a_file(
    document: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    results.save(document, path)
    code, out, err = call(capsys, "--from", path, "--ops")
    assert code == 0 and err == ""
    assert "tiny 72x64" in out and "2 ControlNets + LoRA" in out
    assert out.count("kernels one by one") == 2 and "reference.conv2d" in out
    assert "controlnet step" in out and " more with " in out
    failed = {**document, "rows": [*document["rows"], row_for("graph", failed=["x", "no memory"])]}
    results.save(failed, path)
    code, out, _ = call(capsys, "--from", path)
    assert code == 1 and "graph FAILED" in out and "graph of tiny: no memory" in out
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    code, _, err = call(capsys, "--from", path, "--plot", tmp_path / "a.png")
    assert code == 1 and "drawn: " in err
    assert png_size(tmp_path / "a.png")[0] == 1600


# On a GPU.


@pytest.mark.gpu
def test_on_a_gpu_memory_and_launches_are_counted(plans: Path) -> None:
    case = tiny_case(controlnets=1, precision="fp16")
    options = Options(
        (case,),
        baselines=("eager", "graph"),
        steps=3,
        iterations=3,
        seeds=2,
        ops=True,
        cache_dir=plans,
    )
    document = bench.run_bench(options)
    rows = {row["variant"]: row for row in document["rows"]}
    assert list(rows) == ["engine", "eager", "graph"]
    for row in rows.values():
        assert not row.get("failed"), row
        assert row["vram_mib"] > 0 and row["kernels"] > 0 and row["python_ms"] > 0
        assert 0 < row["rel_err"] < 0.05 and row["rel_err_eager"] > 0
    engine = rows["engine"]
    assert engine["graph_kernels"]["step"] > engine["graph_kernels"]["prompt"] >= 0
    toggle = engine["controlnet_toggle"]
    assert toggle["kernels_with"] > 0 and toggle["kernels_without"] > 0
    assert document["ceilings"]["h2d_gbps"] > 0
    assert document["ops"][0]["unmeasured"] == 0
