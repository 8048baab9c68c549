"""The benchmark on tiny networks on the CPU: rows, errors, tables, files, pictures, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_config
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from accel import hardware
from accel.bench import (
    machine,
    measure,
    networks,
    op_times,
    ops_table,
    plot,
    process,
    results,
    timing,
)
from accel.bench import run as bench
from accel.bench.engines import tuning_clock
from accel.bench.networks import Case, Inputs, Networks
from accel.bench.op_times import OpTimer, Times
from accel.bench.run import Options
from accel.bench.variants import eager
from accel.cli import main
from accel.errors import InvalidFile, InvalidInput, SwitchyardError
from accel.kernels import Call, TensorSpec, reference
from accel.models import Family, UNetConfig
from accel.ops.pointwise import ADD, GELU, SCALE, SPLIT
from accel.tuning import Choice
from accel.tuning.measure import Operands

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


# Sizes at random.


def test_sizes_at_random_say_how_soon_and_how_fast(document: Any, plans: Path) -> None:
    from benchmarks.random_sizes import LIMITS_MS, drawn, rows_of

    sizes = [(64, 72), (96, 64)]
    found = rows_of(PLAIN, sizes, "cpu", plans, 1.0, isolated=False, anchors=[(72, 64), (96, 96)])
    by_name: dict[str, list[Any]] = {}
    for row in found:
        by_name.setdefault(row["operation"], []).append(row)
        assert row["model"] == "tiny" and row.get("limit_ms") == LIMITS_MS.get(row["operation"])
    assert {name: len(rows) for name, rows in by_name.items()} == {
        **{"engine_build": 1, "engine_fetch": 1, "new_size": 2},
        **{"random_size_mfu": 2, "random_size_gain": 2},
    }
    assert [(row["width"], row["height"]) for row in by_name["new_size"]] == sizes
    for row in by_name["random_size_mfu"]:
        assert row["value"] > 0 and row["mfu"] > 0 and row["of"] == "72x64"
    assert {row["over"] for row in by_name["random_size_gain"]} == {
        "libraries",
        "tuned at one size",
    }
    assert drawn(12, 5) == drawn(12, 5) != drawn(12, 6)
    assert all(512 <= side <= 1536 and side % 8 == 0 for size in drawn(50, 1) for side in size)


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
    assert 0 < toggle["step_calls_with"] == toggle["step_calls_without"] < engine["calls"]
    assert toggle["added_calls"] == 0 and toggle["added_kernels"] is None


def test_kernels_that_residuals_add_are_counted_in_the_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bound:
        dims = (2, 8, 9)

        def __init__(self, name: str, graphs: dict[str, int] | None) -> None:
            self.name, self.graphs = name, graphs

        def kernels(self) -> dict[str, int]:
            return {"x": 3}

        def calls(self) -> list[tuple[str, None, None]]:
            return [("prompt", None, None), *[("step", None, None)] * 2]

    class Variant:
        def executables(self) -> Any:
            return [("controlnet", 1, Bound("other", None)), ("unet", 1, plain), ("unet", 1, fed)]

    monkeypatch.setattr(measure, "graph_launches", lambda bound, device: bound.graphs)
    variant: Any = Variant()
    fed = Bound("fed", {"prompt": 2, "step": 45})
    plain = Bound("plain", {"prompt": 5, "step": 40})
    assert measure._toggle(variant, fed, CPU) == {
        **{"calls_without": 3, "kernels_without": 45, "calls_with": 3, "kernels_with": 47},
        **{"step_calls_without": 2, "step_kernels_without": 40},
        **{"step_calls_with": 2, "step_kernels_with": 45},
        **{"added_calls": 0, "added_kernels": 5},
    }
    plain = Bound("plain", None)
    assert measure._toggle(variant, fed, CPU)["added_kernels"] is None


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
    found = measure.errors([torch.ones(4), torch.ones(4) * math.nan], job)
    assert found["rel_err_by_seed"][0] == 0.0 and math.isnan(found["rel_err"])


def test_the_engines_memory_is_compared_to_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, int | None] = {"engine": 3000, "eager": 4000}

    def row(job: measure.Job) -> dict[str, Any]:
        return {**row_for(job.variant, ms=2.0, ms_run=2.0, cold_s=1.0),
                "vram_mib": used[job.variant], **job.case.facts}  # fmt: skip

    monkeypatch.setattr(bench, "measure", row)
    monkeypatch.setattr(bench, "keep_truth", lambda job: None)
    kept: list[Any] = []
    options = Options((PLAIN,), isolated=False, **FEW)
    bench.run_bench(options, keep=lambda d: kept.append([dict(r) for r in d["rows"]]))
    (first,), (engine, plain) = kept
    assert "vram_over_eager" not in first, "as yet nothing to compare to"
    assert engine["vram_over_eager"] == 0.75 and "vram_over_eager" not in plain
    used["eager"] = None
    assert "vram_over_eager" not in bench.run_bench(options)["rows"][0]


# What torch.compile keeps.


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The baseline `compile` on the CPU, its compiler one that only leaves a file: the modes."""
    modes: list[dict[str, Any]] = []

    def fake(network: Any, **mode: Any) -> Any:
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "code").write_text("x")
        modes.append({**mode, "tf32": torch.backends.cudnn.allow_tf32})
        return network

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(bench, "NEED_GPU", ())
    return modes


def test_a_warm_cache_is_no_cold_start(compiling: Any, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    folder = tmp_path / "kept"
    few: dict[str, Any] = {"steps": 1, "iterations": 1, "seeds": 1}
    job = measure.Job(PLAIN, "compile", "cpu", tmp_path / "one", compile_cache=folder, **few)
    first = measure.measure(job)
    assert first["compile_cache"] == "cold" and first["cold_s"] > 0
    again = measure.measure(dataclasses.replace(job, scratch=tmp_path / "two"))
    assert again["compile_cache"] == "warm" and again["cold_s"] is None and again["ms"] > 0
    assert {"compile_cache_hits", "compile_cache_misses"} <= again.keys()
    assert "compiled before" in bench._summary({**again, "rel_err": None})
    for place in ("one", "two"):  # without a folder each case has a fresh one
        fresh = measure.measure(
            dataclasses.replace(job, scratch=tmp_path / place, compile_cache=None)
        )
        assert fresh["compile_cache"] == "cold" and fresh["cold_s"] > 0
    assert job.compiled("operators") != job.compiled("networks"), "neither warms the other"


def test_what_is_prepared_is_what_will_be_measured(compiling: Any, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    options = Options((PLAIN,), isolated=False, compile_cache=tmp_path, **FEW)
    (done,) = bench.prepare_bench(options, jobs=1)
    assert done["model"] == "tiny" and done["width"] == 72 and done["seconds"] > 0
    assert {"compile_cache_hits", "compile_cache_misses"} <= done.keys()
    few: dict[str, Any] = {"steps": 1, "iterations": 1, "seeds": 1}
    job = measure.Job(PLAIN, "compile", "cpu", tmp_path / "s", compile_cache=tmp_path, **few)
    assert measure.measure(job)["compile_cache"] == "warm"
    prepared, measured = compiling
    assert prepared == measured, "what is compiled depends on the settings"
    assert not prepared["tf32"] and prepared["mode"] == "reduce-overhead"


def test_as_many_are_prepared_at_once_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def isolated(function: Any, job: measure.Job, **how: Any) -> dict[str, Any]:
        nonlocal running, most
        assert function is measure.precompile and job.compile_cache == tmp_path
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        if job.case.width == 72:
            raise process.ProcessFailed("Traceback\nRuntimeError: no memory")
        return {"seconds": 1.0, "compile_cache_hits": 0, "compile_cache_misses": 1}

    monkeypatch.setattr(bench, "run_isolated", isolated)
    cases = tuple(PLAIN.resized(width, 64) for width in (64, 72, 80, 88, 96))
    options = Options(cases, compile_cache=tmp_path, **FEW)
    done = bench.prepare_bench(options, jobs=2)
    assert most == 2
    assert [case["width"] for case in done] == [64, 72, 80, 88, 96]
    assert [case["width"] for case in done if case.get("failed")] == [72]
    assert done[1]["failed"][-1] == "RuntimeError: no memory"
    with pytest.raises(InvalidInput, match="--compile-cache"):
        bench.prepare_bench(dataclasses.replace(options, compile_cache=None))


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


def conv(stride: int = 1, upsample: tuple[int, int] | None = None) -> Call:
    tensors = (spec(2, 8, 8, 32), spec(64, 3, 3, 32), None, spec(2, 64), None)
    attrs: dict[str, Any] = {"stride": (stride,) * 2, "padding": (1, 1), "dilation": (1, 1)}
    side = (8 if upsample is None else upsample[0]) // stride
    attrs |= {"groups": 1, "upsample": upsample}
    return Call("conv2d", spec(2, side, side, 64), tensors, attrs)


def attention() -> Call:
    qkv = (spec(2, 4096, 320), spec(2, 77, 320), spec(2, 77, 320))
    return Call("attention", spec(2, 4096, 320), qkv, {"heads": 8, "scale": 0.1})


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
    times = {
        small.key: Times(5.0, "cublas.linear", 4.0),
        other.key: Times(4.5),
        pointwise.key: Times(21.0, "torch.silu", 42.0, 10.5),
        unknown.key: Times(None, "torch.silu", 1.0, 1.0),
    }
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
    assert lines[1]["library"] == "cublas.linear" and lines[1]["library_us"] == 4.0
    assert lines[0]["compiled_us"] == 10.5 and lines[1]["compiled_us"] is None
    total = 21 + 6 * 5.0 + 4.5
    assert table["sum_us"] == total and table["unmeasured"] == 1
    assert lines[0]["share"] == 21 / total and lines[5]["share"] is None
    linears, silus = table["operators"]
    assert linears["op"] == "linear" and linears["count"] == 7 and linears["us"] == 34.5
    assert linears["floor_us"] == 16.0 and linears["gap_us"] == 18.5
    assert linears["tflops"] == pytest.approx(16e6 / 34.5e-6 / 1e12)
    assert silus["count"] == 1 and silus["tflops"] == 0.0
    assert linears["share"] + silus["share"] == pytest.approx(1.0)
    # By time, and only over the runs that have both: the large linear layer has none.
    assert linears["library_us"] == 24.0 and linears["over_library"] == 0.8
    assert linears["compiled_us"] is None is linears["over_compiled"]
    assert silus["library_us"] == 42.0 and silus["over_library"] == 2.0
    assert silus["compiled_us"] == 10.5 and silus["over_compiled"] == 0.5
    assert [r["slower_than_library"] for r in lines] == [False, True, True, True, False, False]
    assert table["slower_than_library"] == 3


def test_products_and_convolutions_have_a_sum_of_their_own() -> None:
    times = iter([Times(30.0, "cudnn.conv2d", 20.0), Times(10.0, "cublas.linear", 30.0), Times(7)])
    calls = [entry(conv()), *[entry(linear(64, 64, 64))] * 3, entry(silu(4, 4))]
    table = ops_table.table(calls, CEILINGS, lambda call, choice: next(times))
    products = table["products"]
    assert products["op"] == "linear + conv2d" and products["count"] == 4
    assert products["us"] == 60.0 and products["library_us"] == 110.0
    assert products["over_library"] == 110 / 60 and products["share"] == 60 / 67
    assert {group["op"] for group in table["operators"]} == {"linear", "conv2d", "silu"}


@pytest.mark.parametrize(
    ("us", "library_us", "slow"),
    [
        (103.0, 100.0, False),
        (103.5, 100.0, True),
        (5.25, 5.0, False),  # 5 %, but less than can be measured
        (5.35, 5.0, True),
        (10.31, 10.02, False),
        (4.0, 5.0, False),
        (None, 5.0, False),
        (5.0, None, False),
    ],
)
def test_slower_is_by_more_than_measuring_explains(us: Any, library_us: Any, slow: bool) -> None:
    assert ops_table.slower(us, library_us) is slow


def test_every_call_of_a_forward_is_in_its_table(document: Any) -> None:
    for case, table in zip((PLAIN, WHOLE), document["ops"], strict=True):
        assert {name: table[name] for name in case.facts} == case.facts
        engine = rows_of(document, case)["engine"]
        assert sum(line["count"] for line in table["calls"]) == engine["calls"]
        flops = sum(line["count"] * line["flops"] for line in table["calls"])
        assert flops == pytest.approx(engine["tflop"] * 1e12)
        assert table["unmeasured"] == 0 and all(line["us"] > 0 for line in table["calls"])
        for line in table["calls"]:  # a CPU has references alone, and nothing is compiled there
            assert line["library"] == f"eager.{line['op']}" and line["library_us"] > 0
            assert line["compiled_us"] is None is line["profile_us"]
        slow = [line for line in table["calls"] if line["slower_than_library"]]
        assert table["slower_than_library"] == len(slow)
        groups = {group["op"]: group for group in table["operators"]}
        products = table["products"]
        assert products["library_us"] == pytest.approx(
            sum(groups[op]["library_us"] for op in ("linear", "conv2d"))
        )
        assert products["over_library"] == pytest.approx(products["library_us"] / products["us"])
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
    assert ops_table.shape_text(conv(2)) == "2x8x8x32 → 64, 3x3 /2 + embedding"
    assert ops_table.shape_text(attention()) == "2x4096 over 77, 8 heads of 40"
    assert ops_table.shape_text(silu(2, 64)) == "2x64"


def test_a_call_that_cannot_be_timed_costs_only_itself() -> None:
    def broken(*arguments: Any, **rest: Any) -> torch.Tensor:
        raise RuntimeError("no such\nvariant")

    call = silu(4, 4)
    kernel = dataclasses.replace(reference("silu"), run=broken)
    timer = OpTimer(CPU)
    bad = timer(call, Choice(kernel, {}, "by hand"))
    assert bad.us is None and bad.way == "eager.silu" and (bad.way_us or 0) > 0
    good = timer(call, choice(call))
    assert good.us is not None and good.us > 0 and good.compiled_us is None


def test_a_call_is_timed_once_and_beside_what_its_profile_says() -> None:
    timed: list[str] = []

    def timer(call: Call, choice: Choice) -> Times:
        timed.append(call.key)
        return Times(float(len(timed)), "torch.silu", 9.0)

    known, unknown = silu(4, 4), silu(8, 8)
    entries = [("unet", "step", known, Choice(reference("silu"), {}, "measured", 7.5))]
    entries += [entry(unknown), entry(unknown, "prompt")]
    table = ops_table.measured(entries, CEILINGS, CPU, timer)
    assert timed == [known.key, unknown.key], "once for both parts"
    lines = {line["part"] + line["call"]: line for line in table["calls"]}
    first = lines["step" + known.key]
    assert first["us"] == 1.0 and first["profile_us"] == 7.5, "the ratio is of one process"
    assert lines["step" + unknown.key]["us"] == lines["prompt" + unknown.key]["us"] == 2.0


H100 = dataclasses.replace(
    hardware.describe("cpu"), kind="cuda", name="H100", capability=(9, 0), cudnn="9.10"
)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (linear(64, 32, 16), ["cublas.linear"]),
        (linear(64, 32, 16, residual=True), ["cublas.linear", "cublas.linear_onto"]),
        (linear(64, 32, 32, activation="geglu"), ["cublas.linear"]),
        (conv(), ["cudnn.conv2d"]),
        (conv(upsample=(16, 16)), ["cudnn.conv2d"]),
        (attention(), ["torch.sdpa", "cudnn.attention", "flash.attention"]),
        (silu(4, 4), ["torch.silu"]),
        (
            Call("pointwise", spec(4, 4), (spec(4, 4),), {"program": (4, 0, 0, 0)}),
            ["eager.pointwise"],
        ),
    ],
    ids=lambda value: getattr(value, "op", ""),
)
def test_pytorchs_own_ways_have_none_of_our_kernels(call: Call, names: list[str]) -> None:
    found = op_times.pytorch_ways(call, H100)
    assert sorted({kernel.name for kernel, _ in found}) == sorted(names)


def test_the_fastest_of_pytorchs_ways_counts_and_a_chosen_one_is_not_timed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, fast, broken, ours = (
        dataclasses.replace(reference("silu"), name=name)
        for name in ("torch.slow", "torch.fast", "torch.broken", "triton.silu")
    )
    us = {"torch.slow": 9.0, "torch.fast": 4.0, "torch.broken": None, "triton.silu": 3.0}
    timed: list[str] = []

    def time_it(self: Any, operands: Any, kernel: Any, config: Any) -> float | None:
        timed.append(kernel.name)
        return us[kernel.name]

    ways = [(slow, {}), (fast, {"n": 1}), (broken, {})]
    monkeypatch.setattr(op_times, "pytorch_ways", lambda call, hardware: ways)
    monkeypatch.setattr(OpTimer, "_us", time_it)
    call = silu(4, 4)
    assert OpTimer(CPU)(call, Choice(ours, {}, "x")) == Times(3.0, "torch.fast", 4.0)
    assert timed == ["triton.silu", "torch.slow", "torch.fast", "torch.broken"]
    timed.clear()
    assert OpTimer(CPU)(call, Choice(fast, {"n": 1}, "x")) == Times(4.0, "torch.fast", 4.0)
    assert timed == ["torch.fast", "torch.slow", "torch.broken"]


def moving() -> list[Call]:
    """A call of every operator that only moves bytes, in float32."""

    def f32(*shape: int) -> TensorSpec:
        return TensorSpec.of(torch.empty(shape, device="meta"))

    image, vector = f32(2, 4, 6, 32), f32(32)
    norm = {"groups": 4, "eps": 1e-5, "activation": "silu"}
    chain = (*(ADD, 0, 1, 0.0), *(GELU, 2, 0, 0.0), *(SCALE, 3, 0, 0.5), *(SPLIT, 4, 0, 16.0))
    return [
        Call("group_norm", image, (image, vector, vector, f32(2, 32), vector), norm),
        Call("group_norm", image, (image, vector, vector, None, None), norm),
        Call("layer_norm", image, (image, vector, vector), {"eps": 1e-5}),
        Call("add_layer_norm", f32(2, 2, 4, 6, 32), (image, image, vector, vector), {"eps": 1e-5}),
        Call(
            "concat_group_norm",
            f32(2, 2, 4, 6, 64),
            (image, None, image, image, f32(64), f32(64)),
            norm,
        ),
        Call("concat", f32(2, 4, 6, 64), (image, None, image, image), {}),
        Call("upsample_nearest", f32(2, 8, 12, 32), (image,), {"size": (8, 12)}),
        Call("pointwise", image, (image, vector), {"program": chain, "dtype": torch.float32}),
        Call("residual_add", image, (image, image), {}),
        Call("aten.exp.default", image, (image,), {"args": ({"tensor": 0},)}),
        # More sizes of one operator than torch.compile takes for one function.
        *(Call("silu", f32(2, n), (f32(2, n),), {}) for n in range(8, 18)),
    ]


def test_every_operator_that_moves_bytes_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced whole, by a backend that takes no compiler; run as it is timed."""
    made: list[Any] = []
    compiled = op_times.compiled

    def kept(call: Call, backend: str) -> Any:
        made.append(compiled(call, backend))
        operands = Operands(call, hardware.describe("cpu"), CPU)
        result = operands.bind(made[-1], {})(0)
        torch.testing.assert_close(result, operands.expected())
        return made[-1]

    monkeypatch.setattr(op_times, "compiled", kept)
    timer = OpTimer(CPU, backend="eager")
    for call in moving():
        times = timer(call, choice(call))
        assert times.compiled_us is not None and times.compiled_us > 0, call.key
        assert timer._compiled(Operands(linear(4, 8, 8), hardware.describe("cpu"), CPU)) is None
    assert len(made) == len(moving())
    assert OpTimer(CPU, backend="no such")(silu(4, 4), choice(silu(4, 4))).compiled_us is None


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


def test_processes_import_ahead_and_wait_for_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pid(one: process.Fresh | None) -> int:
        return int(process.run_isolated(os.getpid, timeout=60, process=one))

    modules = ("no_such_module", "broken_at_import", "colorsys")
    (tmp_path / "broken_at_import.py").write_text(
        "raise RuntimeError('an installation that fails')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with process.fresh_processes(3, modules) as processes:
        first, second, third = processes
        assert pid(first) != pid(second)
        imported = "import sys; assert 'colorsys' in sys.modules"
        process.run_isolated(exec, imported, timeout=60, process=third)
        with pytest.raises(process.ProcessFailed):  # only what was imported is there
            process.run_isolated(exec, imported, timeout=60)
    with process.fresh_processes(1, ()) as processes:
        (unused,) = processes
    assert unused._process.exitcode == 0


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
    # One seed is enough, also where another hides it among the worst.
    by_seed = {"rel_err_by_seed": [0.001, 0.0016], "rel_err_eager_by_seed": [0.002, 0.0013]}
    engine |= {"rel_err": 0.0016, "rel_err_eager": 0.002, **by_seed}
    assert bench.unfaithful_seeds(engine) == [1] and not bench.faithful(engine)
    engine["rel_err_by_seed"] = [0.001, 0.0014]
    assert bench.faithful(engine)
    engine["rel_err_by_seed"] = [math.nan, 0.0014]
    assert bench.unfaithful_seeds(engine) == [0]


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
        ("--model sd15 --size 64x64 --prepare", "--prepare needs the folder: --compile-cache"),
        ("--prepare --compile-cache c --out r.json", "--prepare measures nothing: leave --out out"),
        ("--prepare --compile-cache c --from r.json", "measures nothing: leave --from out"),
        ("--model sd15 --size 64x64 --compile-cache pyproject.toml", "pyproject.toml is a file"),
        ("--model sd15 --size 64x64 --device cpu --prepare --compile-cache c", "needs a GPU"),
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
    monkeypatch.setattr(bench, "fresh_processes", lambda count, modules: nullcontext(iter(())))
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


def test_preparing_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def isolated(function: Any, job: measure.Job, **how: Any) -> dict[str, Any]:
        assert job.variant == "compile" and job.compile_cache == tmp_path / "c"
        assert job.case.controlnets == 1 and job.case.loras == 1
        if job.case.width == 72:
            raise process.ProcessFailed("no memory")
        return {"seconds": 61.25, "compile_cache_hits": 3, "compile_cache_misses": 2}

    monkeypatch.setattr(bench, "run_isolated", isolated)
    monkeypatch.setattr(bench, "NEED_GPU", ())
    monkeypatch.chdir(tmp_path)
    arguments = ["--prepare", "--compile-cache", "c", "--model", "sd15", "--device", "cpu"]
    arguments += ["--controlnet", 1, "--lora", "--jobs", 2, "--size"]
    code, out, err = call(capsys, *arguments, "64x64,80x64")
    assert code == 0 and out.count("61.2") == 2 and "sd15 80x64" in out
    assert "sd15 64x64 + 1 ControlNet + LoRA: compiled in 61 s" in err
    code, out, err = call(capsys, *arguments, "64x64,72x64", "--json")
    good, bad = json.loads(out)["prepared"]
    assert code == 1 and good["compile_cache_hits"] == 3 and bad["failed"] == ["no memory"]
    code, out, _ = call(capsys, *arguments, "72x64")
    assert code == 1 and "FAILED" in out


def test_what_is_wrong_with_a_row_is_shown(
    document: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_seed = {"rel_err_by_seed": [0.001, 0.002, 0.003], "rel_err_eager_by_seed": [0.001] * 3}
    errors = {"rel_err": 0.003, "rel_err_eager": 0.001, **by_seed}
    toggle = {"added_kernels": 3, "step_kernels_without": 400, "added_calls": 0}
    engine = row_for("engine", vram_mib=3000, vram_over_eager=0.75, controlnet_toggle=toggle)
    rows = [engine | errors, row_for("compile", compile_cache="warm")]
    path = tmp_path / "r.json"
    results.save({**document, "rows": rows}, path)
    _, out, _ = call(capsys, "--from", path)
    assert "0.003 TOO LARGE (seeds 1, 2)" in out and "compile, warm cache" in out
    assert "3000" in out and "0.75" in out
    assert "its residuals add 3 kernels to the 400 of a step of the UNet" in out
    errors = {"rel_err": 0.002, "rel_err_eager": 0.001}
    results.save({**document, "rows": [row_for("engine", **errors)]}, path)
    _, out, _ = call(capsys, "--from", path)
    assert "0.002 TOO LARGE" in out and "seed" not in out


def test_the_table_shows_what_is_slower_than_the_library(
    document: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([Times(30.0, "cudnn.conv2d", 20.0), Times(12.0, "torch.silu", 24.0, 16.0)])
    made = ops_table.table(
        [entry(conv()), entry(silu(4, 4))], CEILINGS, lambda call, choice: next(times)
    )
    path = tmp_path / "r.json"
    table = {"run": 0, **PLAIN.facts, **made}
    results.save({**document, "ops": [table]}, path)
    _, out, _ = call(capsys, "--from", path, "--ops")
    assert "; 1 calls slower than the library's" in out and "30.0 SLOWER" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["0.020", "0.67", "–", "–"] in [line[-4:] for line in lines if line[:1] == ["conv2d"]]
    assert ["0.024", "2.00", "0.016", "1.33"] in [ln[-4:] for ln in lines if ln[:1] == ["silu"]]
    assert ["0.020", "0.67", "–", "–"] in [ln[-4:] for ln in lines if ln[:2] == ["linear", "+"]]
    # A file from before there were such columns.
    new = ("library", "library_us", "compiled_us", "slower_than_library", "over_library")
    new += ("over_compiled", "products")
    for part in (table, *table["calls"], *table["operators"]):
        for name in new:
            part.pop(name, None)
    results.save({**document, "ops": [table]}, path)
    code, out, _ = call(capsys, "--from", path, "--ops")
    assert code == 0 and "kernels one by one" in out and "slower" not in out.lower()


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
    assert toggle["added_kernels"] == toggle["step_kernels_with"] - toggle["step_kernels_without"]
    assert engine["vram_over_eager"] == engine["vram_mib"] / rows["eager"]["vram_mib"]
    assert document["ceilings"]["h2d_gbps"] > 0
    assert document["ops"][0]["unmeasured"] == 0
    for line in document["ops"][0]["calls"]:
        assert line["us"] > 0 and line["library_us"] > 0, line
        assert (line["compiled_us"] is None) == (line["op"] in op_times.ARITHMETIC), line


@pytest.mark.gpu
def test_on_a_gpu_what_is_prepared_is_found(plans: Path, tmp_path: Path) -> None:
    case = tiny_case(precision="fp16")
    options = Options((case,), compile_cache=tmp_path / "kept", timeout=400)
    (done,) = bench.prepare_bench(options)
    assert not done.get("failed") and done["compile_cache_misses"] > 0
    job = measure.Job(case, "compile", "cuda", tmp_path, 3, 3, 1, compile_cache=tmp_path / "kept")
    row = process.run_isolated(measure.measure, job, timeout=400)
    assert row["compile_cache"] == "warm" and row["cold_s"] is None
    assert row["compile_cache_hits"] > 0 and row["compile_cache_misses"] == 0
