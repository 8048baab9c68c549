"""Engine against PyTorch on a GPU: time, memory and fidelity, every variant of a row from one run.

    python -m benchmarks.engine --out results.json [--only sd15:512x512] [--variants eager,graph,…]

Real architectures with random fp16 weights. Each variant runs in a process of its own, alone on the
card, so that its memory is the driver's own figure. Errors are relative L2 distances from a float32
run of the same weights (TF32 off), the worst over seeds, plain PyTorch's beside the engine's.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from accel import hardware
from accel.models import FAMILIES, UNetConfig, diffusers_kwargs

ROOT = Path(__file__).resolve().parents[1]
ROWS = [("sd15", 512, 512), ("sdxl", 1024, 1024), ("sd15", 768, 768), ("sdxl", 896, 1152)]
VARIANTS = ("float32", "eager", "graph", "compile", "engine")
SEEDS = (0, 1, 2)
BATCH = 2
ITERATIONS = 30
STEPS = 20
"""Steps of the run over which the prompt's part is amortised, where the caller vouches for it."""


def main() -> None:
    """Run every row's variants one after another and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help="model:WxH")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "WIDTH", "HEIGHT", "VARIANT"))
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        model, width, height, variant = arguments.child
        result = measure(model, int(width), int(height), variant, arguments.scratch)
        arguments.out.write_text(json.dumps(result))
        return
    chosen = [
        row for row in ROWS if arguments.only is None or "{}:{}x{}".format(*row) in arguments.only
    ]
    results: dict[str, Any] = {"meta": meta(arguments.commit), "ceilings": ceilings(), "rows": []}
    torch.cuda.empty_cache()
    for model, width, height in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            for variant in arguments.variants.split(","):
                row = run_child(model, width, height, variant, Path(scratch))
                results["rows"].append(row)
                print({k: v for k, v in row.items() if k not in ("kernels_by_name",)}, flush=True)
                arguments.out.write_text(json.dumps(results, indent=1))


def run_child(model: str, width: int, height: int, variant: str, scratch: Path) -> dict[str, Any]:
    """One variant in a fresh process; a failure becomes a row that says so."""
    out = scratch / "row.json"
    out.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.engine",
        "--out",
        str(out),
        "--scratch",
        str(scratch),
    ]
    command += ["--child", model, str(width), str(height), variant]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    if done.returncode == 0:
        return dict(json.loads(out.read_text()))
    row = {"model": model, "width": width, "height": height, "variant": variant}
    return {**row, "failed": (done.stderr.strip().splitlines() or ["?"])[-12:]}


def config_of(model: str) -> UNetConfig:
    """The architecture of a family."""
    return next(family.config for family in FAMILIES if family.name == model)


def make_unet(model: str) -> torch.nn.Module:
    """A UNet with seeded random weights, made on the GPU in float32 and rounded to fp16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1234)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**diffusers_kwargs(config_of(model))).eval()
    unet = torch.nn.Module.to(unet, torch.float16).requires_grad_(False)
    forget_making()
    return unet


def forget_making() -> None:
    """Give back the float32 weights that were rounded, so that no variant's memory counts them."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def make_inputs(model: str, width: int, height: int, seed: int, tokens: int = 77) -> dict[str, Any]:
    """Arguments of diffusers' forward, fp16 on the GPU."""
    config = config_of(model)
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").half()

    inputs: dict[str, Any] = {
        "sample": normal(BATCH, config.in_channels, height // 8, width // 8),
        "timestep": torch.tensor(981 - 300 * seed, device="cuda"),
        "encoder_hidden_states": normal(BATCH, tokens, config.context_dim),
    }
    if config.pooled_dim is not None:
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * BATCH, device="cuda")
        text = config.pooled_dim - 6 * (config.addition_time_embed_dim or 256)
        inputs["added_cond_kwargs"] = {"text_embeds": normal(BATCH, text), "time_ids": sizes.half()}
    return inputs


def measure(model: str, width: int, height: int, variant: str, scratch: Path) -> dict[str, Any]:
    """Outputs for every seed (kept in `scratch` for the errors), then times and memory."""
    row: dict[str, Any] = {
        "model": model,
        "width": width,
        "height": height,
        "batch": BATCH,
        "controlnets": 0,
        "loras": 0,
        "precision": "fp32" if variant == "float32" else "fp16",
        "variant": variant,
    }
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    unet = make_unet(model)
    used_before = driver_mib()
    started = time.perf_counter()
    call, extra = prepare(variant, unet, model)
    first = call(**make_inputs(model, width, height, 0))
    torch.cuda.synchronize()
    row["cold_s"] = time.perf_counter() - started
    del first
    outputs = []
    for seed in SEEDS:
        result = call(**make_inputs(model, width, height, seed))
        outputs.append(result.float().cpu())
    torch.save(outputs, scratch / f"{variant}.pt")
    row |= errors(variant, outputs, scratch)
    if variant != "float32":
        inputs = make_inputs(model, width, height, 0)
        row |= timed(lambda: call(**inputs))
        row["vram_mib"] = driver_mib()
        row["peak_reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
        row["mib_with_module_only"] = used_before
    if extra is not None:
        row |= extra(model, width, height)
    return row


def prepare(variant: str, unet: Any, model: str) -> tuple[Any, Any]:
    """The callable under test, and for the engine what else it has to show."""
    if variant == "float32":
        torch.nn.Module.to(unet, torch.float32)

        def exact(**inputs: Any) -> torch.Tensor:
            with torch.no_grad():
                return unet(**_cast(inputs, torch.float32), return_dict=False)[0]

        return exact, None
    if variant == "engine":
        return prepare_engine(unet, model)
    if variant != "eager":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True

    def eager(**inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return unet(**inputs, return_dict=False)[0]

    if variant == "eager":
        return eager, None
    if variant == "graph":
        return graphed(eager), None
    compiled = torch.compile(unet, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def fast(**inputs: Any) -> torch.Tensor:
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(**inputs, return_dict=False)[0].clone()

    def warm(**inputs: Any) -> torch.Tensor:
        for _ in range(2):  # the second call records the graph
            fast(**inputs)
        return fast(**inputs)

    return warm_once(warm, fast), None


def warm_once(first: Any, later: Any) -> Any:
    """Calls `first` the first time and `later` from then on."""
    state = {"call": first}

    def call(**inputs: Any) -> torch.Tensor:
        run, state["call"] = state["call"], later
        return run(**inputs)

    return call


def graphed(eager: Any) -> Any:
    """Eager channels-last PyTorch in one CUDA graph, inputs copied in, the output copied out."""
    state: dict[str, Any] = {}

    def call(**inputs: Any) -> torch.Tensor:
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
        if not state:
            state["inputs"] = _map(inputs, torch.Tensor.clone)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    eager(**state["inputs"])
            torch.cuda.current_stream().wait_stream(side)
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                state["output"] = eager(**state["inputs"])
        for kept, new in zip(_tensors(state["inputs"]), _tensors(inputs), strict=True):
            kept.copy_(new)
        state["graph"].replay()
        return state["output"].clone()

    return call


def prepare_engine(unet: Any, model: str) -> tuple[Any, Any]:
    """The engine, its swaps and its odd sizes."""
    import accel

    torch.nn.Module.to(unet, "cpu")
    forget_making()
    session = accel.Session(device="cuda", precision="fp16")
    started = time.perf_counter()
    engine = session.engine(unet)
    ready = time.perf_counter() - started

    def more(model: str, width: int, height: int) -> dict[str, Any]:
        report = engine.report()
        row: dict[str, Any] = {
            "engine_ready_s": ready,
            "plan_source": report["source"],
            "captures": report["captures"],
            "graphs": report["graphs"],
            "module_device": str(next(unet.parameters()).device),
            "weights_mib": report["weights_bytes"] >> 20,
            "activation_mib": report["activation_bytes"] >> 20,
            "kernels": sum(report["shapes"][0]["kernels"].values()),
            "kernels_by_name": report["shapes"][0]["kernels"],
            "bind_s": report["shapes"][0]["bind_seconds"],
        }
        inputs = make_inputs(model, width, height, 0)
        key = object()
        samples = []
        for run in range(6):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(STEPS):
                engine.call((), inputs, key=(key, run))
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / STEPS)
        row["ms_hoisted"] = statistics.median(samples)
        row["python_ms"] = python_ms(lambda: engine.call((), inputs, key=key))
        executable = next(iter(engine._network._executables.values()))
        row["graph_launch_ms"] = python_ms(executable._graphs[1].replay)
        row |= {"parity_other_sizes": other_sizes(engine, unet, model)}
        row["graphs_after_other_sizes"] = engine.report()["graphs"]
        row["captures_after_other_sizes"] = engine.report()["captures"]
        other = {name: p * 0.5 for name, p in unet.state_dict().items()}
        row["swap_checkpoint"] = vars(engine.load_weights(other))
        row["swap_back"] = vars(engine.load_weights(unet.state_dict()))
        again = engine(**inputs)
        expected = torch.load(Path(sys.argv[sys.argv.index("--scratch") + 1]) / "engine.pt")[0]
        row["swap_back_equal"] = bool(torch.equal(again.float().cpu(), expected))
        row |= loras(engine, unet, inputs)
        return row

    return engine, more


def loras(engine: Any, unet: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A rank-32 LoRA over every attention and feed-forward projection: exact on, exact off."""
    generator = torch.Generator().manual_seed(5)
    lora: dict[str, torch.Tensor] = {}
    for name, parameter in unet.named_parameters():
        if not name.endswith(".weight") or parameter.dim() != 2 or "transformer_blocks" not in name:
            continue
        base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        rows, columns = parameter.shape
        lora[f"{base}.lora_up.weight"] = torch.randn(rows, 32, generator=generator) * 0.02
        lora[f"{base}.lora_down.weight"] = torch.randn(32, columns, generator=generator) * 0.02
        lora[f"{base}.alpha"] = torch.tensor(16.0)
    before = engine(**inputs)
    on = vars(engine.set_loras([(lora, 0.8)]))
    with_lora = engine(**inputs)
    strength = vars(engine.set_loras([(lora, 0.3)]))
    off = vars(engine.set_loras([]))
    after = engine(**inputs)
    # The yardstick: weights merged in float32 without rounding; plain PyTorch merges and rounds.
    exact = torch.nn.Module.to(make_unet_like(unet), torch.float32)
    plain = make_unet_like(unet)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            if f"{base}.lora_up.weight" in lora:
                up, down = (lora[f"{base}.lora_{k}.weight"].cuda() for k in ("up", "down"))
                parameter += 0.8 * 0.5 * (up @ down)
        for (_, rounded), (_, merged) in zip(
            plain.named_parameters(), exact.named_parameters(), strict=True
        ):
            rounded.copy_(merged)
        truth = exact(**_cast(inputs, torch.float32), return_dict=False)[0].float()
        eager = plain(**inputs, return_dict=False)[0].float()
    return {
        "lora_on": on,
        "lora_strength": strength,
        "lora_off": off,
        "lora_changes_output": relative(with_lora.float(), before.float()),
        "lora_rel_err": relative(with_lora.float(), truth),
        "lora_rel_err_eager": relative(eager, truth),
        "lora_off_equal": bool(torch.equal(before, after)),
    }


def make_unet_like(unet: Any) -> Any:
    """A copy on the GPU, fp16."""
    from diffusers import UNet2DConditionModel

    with torch.device("cuda"):
        twin = UNet2DConditionModel(**unet.config).eval()
    twin = torch.nn.Module.to(twin, torch.float16).requires_grad_(False)
    twin.load_state_dict(unet.state_dict())
    return twin


def other_sizes(engine: Any, unet: Any, model: str) -> list[dict[str, Any]]:
    """Odd sizes, other prompt lengths, ControlNet residuals: engine and eager against float32."""
    cases = [
        (520, 264, 77, False),
        (640, 512, 154, False),
        (512, 512, 77, True),
        (712, 600, 231, True),
    ]
    results = []
    exact = torch.nn.Module.to(make_unet_like(unet), torch.float32)
    plain = make_unet_like(unet)
    for width, height, tokens, controlled in cases:
        inputs = make_inputs(model, width, height, 7, tokens)
        if controlled:
            inputs |= residuals(model, width, height)
        got = engine(**inputs).float()
        with torch.no_grad():
            truth = exact(**_cast(inputs, torch.float32), return_dict=False)[0].float()
            eager = plain(**inputs, return_dict=False)[0].float()
        results.append(
            {
                "width": width,
                "height": height,
                "tokens": tokens,
                "controlnets": int(controlled),
                "rel_err": relative(got, truth),
                "rel_err_eager": relative(eager, truth),
            }
        )
    del exact, plain
    return results


def residuals(model: str, width: int, height: int) -> dict[str, Any]:
    """Random ControlNet residuals in the shapes that the UNet's skips have."""
    config = config_of(model)
    generator = torch.Generator("cuda").manual_seed(11)
    h, w = height // 8, width // 8
    shapes = [(config.block_out_channels[0], h, w)]
    last = len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        shapes += [(channels, h, w)] * config.layers_per_block[level]
        if level < last:
            h, w = (h - 1) // 2 + 1, (w - 1) // 2 + 1
            shapes.append((channels, h, w))
    shapes.append((config.block_out_channels[-1], h, w))
    tensors = [
        torch.randn((BATCH, *shape), generator=generator, device="cuda").half() for shape in shapes
    ]
    return {
        "down_block_additional_residuals": tuple(tensors[:-1]),
        "mid_block_additional_residual": tensors[-1],
    }


def errors(variant: str, outputs: list[torch.Tensor], scratch: Path) -> dict[str, Any]:
    """Worst relative error over the seeds, this variant's and eager PyTorch's."""
    result: dict[str, Any] = {}
    truth = torch.load(scratch / "float32.pt")
    compared = {"rel_err": outputs}
    if (scratch / "eager.pt").exists():
        compared["rel_err_eager"] = torch.load(scratch / "eager.pt")
    for key, tensors in compared.items():
        by_seed = [relative(a, b) for a, b in zip(tensors, truth, strict=True)]
        result |= {key: max(by_seed), f"{key}_by_seed": by_seed}
    return result


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of `a` from `b`."""
    return float((a - b).double().norm() / b.double().norm())


def timed(call: Any) -> dict[str, Any]:
    """Median, fastest and slowest of single forwards by CUDA events, milliseconds."""
    for _ in range(5):
        call()
    samples = []
    for _ in range(ITERATIONS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}


def python_ms(call: Any) -> float:
    """Host time of a call until it returns, with the GPU idle: what Python costs per forward."""
    samples = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e3)
    return statistics.median(samples)


def ceilings() -> dict[str, float]:
    """What the card does at best: fp16 matrix product, copy on the card, copy to it."""
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    ms = timed(lambda: a @ b)["ms"]
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = timed(lambda: target.copy_(source))["ms"]
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    h2d_ms = timed(lambda: target[: 1 << 30].copy_(host, non_blocking=True))["ms"]
    return {
        "matmul_tflops": 2 * 8192**3 / ms / 1e9,
        "copy_tbps": 2 * (2 << 30) / copy_ms / 1e9,
        "h2d_gbps": (1 << 30) / h2d_ms / 1e6,
    }


def meta(commit: str) -> dict[str, Any]:
    """The machine and the versions of this run."""
    described = hardware.describe("cuda")
    facts = {name: getattr(described, name) for name in described.__dataclass_fields__}
    import diffusers

    return {
        "gpu": torch.cuda.get_device_name(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.engine",
        "diffusers": diffusers.__version__,
        "cuda": torch.version.cuda,
        "note": "batch 2, random weights; ms: median of single calls, CUDA events; ms_hoisted: "
        "mean step of a 20-step run with the caller's key, prompt phase included",
        **{name: str(value) for name, value in facts.items()},
    }


def driver_mib() -> int:
    """Memory in use on the card, as the driver has it, MiB."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return type(value)(_map(item, change) for item in value) if isinstance(value, tuple) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return _map(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(value, found.append)
    return found


if __name__ == "__main__":
    main()
