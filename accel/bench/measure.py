"""One row: a variant of a case in this process, its results kept for the errors, then its times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OutOfMemory
from . import machine, ops_table
from .engines import EngineVariant, entries, graph_launches, tuning_clock
from .networks import (
    LORA_STRENGTH,
    Case,
    Inputs,
    Networks,
    make_inputs,
    make_networks,
    merge_lora,
    random_lora,
    release_memory,
)
from .timing import (
    driver_mib,
    enter,
    exact_float32,
    launches,
    mean_step,
    python_ms,
    seconds,
    synchronize,
    timed,
)
from .variants import cache_counts, eager, keep_compiled_in, prepare

ROW: tuple[str, ...] = (
    *("model", "width", "height", "batch", "controlnets", "loras", "precision", "variant"),
    *("ms", "ms_min", "ms_max", "ms_run", "cold_s", "vram_mib", "mfu", "kernels"),
    *("rel_err", "rel_err_by_seed", "rel_err_eager", "rel_err_eager_by_seed"),
)
"""What every row has; None where it could not be measured."""

TRUTH = "truth.pt"
NEW_SIZE_STEP = 64
"""Pixels by which the size is wider whose first image is timed."""


@dataclass(frozen=True)
class Job:
    """What a process is told. `scratch`: a folder that the variants of one case share.

    ceilings: of this machine, for the table of operators, which is made if `ops`. compile_cache:
    where torch.compile keeps what it makes from run to run; None for a fresh folder.
    """

    case: Case
    variant: str
    device: str
    scratch: Path
    steps: int = 20
    iterations: int = 30
    seeds: int = 3
    ops: bool = False
    ceilings: dict[str, float] | None = None
    cache_dir: Path | None = None
    compile_cache: Path | None = None

    def compiled(self, what: str) -> Path:
        """The folder for what torch.compile makes of "networks" or "operators".

        They have one each, so that neither warms the other's.
        """
        return (self.compile_cache or self.scratch / "compiled") / what


def describe_machine(device: str, commit: str, command: str) -> dict[str, Any]:
    """The `meta` and `ceilings` of a run."""
    return {
        "meta": machine.meta(commit, command, device),
        "ceilings": machine.ceilings(device),
    }


def keep_truth(job: Job) -> None:
    """Results for every seed in float32, and as plain PyTorch has them, kept in `scratch`."""
    device = enter(job.device)
    networks = make_networks(job.case, device)
    lora = random_lora(job.case.config) if job.case.loras else None
    with exact_float32():
        # The same rounded weights; a LoRA is added without rounding to the one, and to the other
        # with it.
        exact = networks.in_float32()
        if lora is not None:
            merge_lora(networks.unet, lora, LORA_STRENGTH)
            merge_lora(exact.unet, lora, LORA_STRENGTH)
        plain, truth = eager(networks), eager(exact)
        kept: dict[str, list[Tensor]] = {"eager": [], "float32": []}
        for seed in range(job.seeds):
            inputs = make_inputs(job.case, seed, device)
            kept["eager"].append(plain(inputs).float().cpu())
            kept["float32"].append(truth(inputs.cast(torch.float32)).cpu())
    torch.save(kept, job.scratch / TRUTH)


def measure(job: Job) -> dict[str, Any]:
    """The row of one variant; of the engine also `tflop` and, if asked for, `ops`."""
    device = enter(job.device)
    networks = make_networks(job.case, device)
    row: dict[str, Any] = dict.fromkeys(ROW)
    row |= {**job.case.facts, "variant": job.variant}
    with exact_float32():
        row |= (_engine if job.variant == "engine" else _baseline)(job, networks, device)
    return row


def precompile(job: Job) -> dict[str, Any]:
    """Fill the job's compile cache for its networks: the seconds it took, and what was there."""
    device = enter(job.device)
    networks = make_networks(job.case, device)
    with exact_float32():  # as `measure` has it: what is compiled depends on it
        call = prepare("compile", networks, job.compiled("networks"))
        inputs = make_inputs(job.case, 0, device)
        # Twice, since the second call, which records graphs, may compile something too.
        took = sum(seconds(lambda: call(inputs), device) for _ in range(2))
    return {"seconds": took, **cache_counts()}


def _baseline(job: Job, networks: Networks, device: torch.device) -> dict[str, Any]:
    if job.case.loras:
        merge_lora(networks.unet, random_lora(job.case.config), LORA_STRENGTH)
    release_memory(device)
    warm = job.variant == "compile" and _filled(job.compiled("networks"))
    call = prepare(job.variant, networks, job.compiled("networks"))
    inputs = make_inputs(job.case, 0, device)
    row: dict[str, Any] = {"cold_s": seconds(lambda: call(inputs), device)}
    if warm:  # what was compiled before is no cold start
        row["cold_s"] = None
    row |= _times(job, call, device)
    if job.variant == "compile":
        row |= {"compile_cache": "warm" if warm else "cold", **cache_counts()}
    counted = launches(lambda: call(inputs), device)
    row["kernels"] = None if counted is None else sum(counted.values())
    return row


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _times(job: Job, call: Callable[[Inputs], Tensor], device: torch.device) -> dict[str, Any]:
    """Errors, times and memory, the same for every variant."""
    row = errors([call(make_inputs(job.case, seed, device)) for seed in range(job.seeds)], job)
    inputs = make_inputs(job.case, 0, device)
    row |= timed(lambda: call(inputs), device, job.iterations)
    row["ms_run"] = mean_step(lambda own: call(inputs), device, job.steps)
    row["python_ms"] = python_ms(lambda: call(inputs), device)
    row["vram_mib"] = driver_mib(device)
    return row


def _engine(job: Job, networks: Networks, device: torch.device) -> dict[str, Any]:
    networks.each(lambda network: nn.Module.to(network, "cpu"))
    release_memory(device)
    inputs = make_inputs(job.case, 0, device)
    started = time.perf_counter()
    variant = EngineVariant(job.case, networks, device, job.cache_dir)
    with tuning_clock(variant.session) as clock:
        variant(inputs)
    synchronize(device)
    row: dict[str, Any] = {"cold_s": time.perf_counter() - started}
    row |= {"tuning_s": clock.seconds, "tuned_calls": clock.calls}
    row |= variant.facts()
    bound = variant.executables()
    calls = entries(bound)
    row["tflop"] = sum(call.flops for _, _, call, _ in calls) / 1e12

    variant.session.settle()  # other sizes' kernels are being compiled, beside what is timed
    row |= _times(job, variant, device)
    row["ms_hoisted"] = mean_step(lambda own: variant(inputs, own), device, job.steps)
    if job.case.controlnets:
        variant.without_control(inputs)
        variant.session.settle()
    row |= _new_size(job.case, variant, device)
    if job.ops:
        assert job.ceilings is not None
        if device.type == "cuda":  # elsewhere nothing is compiled
            keep_compiled_in(job.compiled("operators"))
        row["ops"] = ops_table.measured(calls, job.ceilings, device)

    # The profiler last of all: it may slow down what comes after it.
    counted = launches(lambda: variant(inputs), device)
    row["kernels"] = None if counted is None else sum(counted.values())
    row["graph_kernels"] = graph_launches(bound[0][2], device)
    if job.case.controlnets:
        row["controlnet_toggle"] = _toggle(variant, bound[0][2], device)
    return row


def _new_size(case: Case, variant: EngineVariant, device: torch.device) -> dict[str, Any]:
    """Seconds to the first result at a size that this process has not seen.

    `new_size_compiled`: the pieces of code that were compiled for it.
    """
    compiler = variant.session._selector.compiler
    before = compiler.waited_for
    other = case.resized(case.width + NEW_SIZE_STEP, case.height)
    row: dict[str, Any] = {"new_size": f"{other.width}x{other.height}"}
    try:
        inputs = make_inputs(other, 0, device)
        with tuning_clock(variant.session) as clock:
            row["new_size_s"] = seconds(lambda: variant(inputs), device)
    except (OutOfMemory, torch.OutOfMemoryError) as error:
        return {**row, "new_size_s": None, "new_size_failed": str(error)}
    row |= {"new_size_tuning_s": clock.seconds, "new_size_tuned_calls": clock.calls}
    return {**row, "new_size_compiled": compiler.waited_for - before}


def _toggle(variant: EngineVariant, with_control: Any, device: torch.device) -> dict[str, Any]:
    """The UNet alone, without residuals and with them: calls, and kernels in its captured graphs.

    `step_…`: those of a step, the prompt's part left out. `added_…`: what residuals add to a step.
    """
    pair = {"without": _without_control(variant, with_control), "with": with_control}
    found: dict[str, Any] = {}
    for name, executable in pair.items():
        graphs = graph_launches(executable, device)
        found[f"calls_{name}"] = sum(executable.kernels().values())
        found[f"kernels_{name}"] = None if graphs is None else sum(graphs.values())
        steps = [part for part, _, _ in executable.calls() if part == "step"]
        found[f"step_calls_{name}"] = len(steps)
        found[f"step_kernels_{name}"] = None if graphs is None else graphs["step"]
    for what in ("calls", "kernels"):
        more, less = found[f"step_{what}_with"], found[f"step_{what}_without"]
        found[f"added_{what}"] = None if more is None or less is None else more - less
    return found


def _without_control(variant: EngineVariant, with_control: Any) -> Any:
    """The UNet's executable of the same size that takes no residuals."""
    return next(
        one
        for name, _, one in variant.executables()
        if name == "unet" and one.dims == with_control.dims and one is not with_control
    )


def errors(outputs: Sequence[Tensor], job: Job) -> dict[str, Any]:
    """Relative L2 distances from float32, the worst over the seeds: this variant's, eager's.

    Nothing for a case without a truth.
    """
    path = job.scratch / TRUTH
    if not path.is_file():
        return {}
    kept = torch.load(path)
    row: dict[str, Any] = {}
    for name, tensors in (("rel_err", outputs), ("rel_err_eager", kept["eager"])):
        by_seed = [
            relative(one.float().cpu(), true)
            for one, true in zip(tensors, kept["float32"], strict=True)
        ]
        row |= {name: worst(by_seed), f"{name}_by_seed": by_seed}
    return row


def worst(distances: Sequence[float]) -> float:
    """The largest, what is not a number above all: `max` would pass over it."""
    return max(distances, key=lambda distance: math.inf if math.isnan(distance) else distance)


def relative(result: Tensor, truth: Tensor) -> float:
    """Relative L2 distance of `result` from `truth`."""
    return float((result - truth).double().norm() / truth.double().norm())
