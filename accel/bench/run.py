"""A whole run: every variant of every case, each in a process of its own, in one document."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from ..errors import InvalidInput, SwitchyardError
from . import results
from .machine import commit
from .measure import ROW, Job, describe_machine, keep_truth, measure, precompile
from .networks import Case
from .process import Fresh, ProcessFailed, fresh_processes, run_isolated
from .results import Document
from .variants import BASELINES, NEED_GPU

NOTE = (
    "random weights; one process a variant. ms: median of single calls; ms_run: mean step of a run "
    "of calls without a pause; ms_hoisted: the same with the caller's key, prompt phase included: "
    "compare it with the ms_run of others. cold_s: from networks in memory to the first result, "
    "with the caches of plans and tuning as they were (tuning_s of it measuring). vram_mib: in use "
    "on the whole card (vram_over_eager: that over eager's). kernels: launches of one call on the "
    "GPU, copies not counted. controlnet_toggle: of the UNet alone, in its captured graphs; "
    "added_kernels: what residuals add to a step. mfu: tflop / (ms x matmul_tflops). "
    "compile_cache: warm where torch.compile found a filled folder, which is no cold start. "
    "Errors: relative L2 from float32, the worst over seeds. Operators: us, library_us (the "
    "fastest of PyTorch's own ways) and compiled_us (torch.compile of the operator alone) were "
    "measured one after the other"
)

ENGINE, EAGER, COMPILE = "engine", "eager", "compile"

IMPORTS = (f"{__package__}.measure", "diffusers.models.unets.unet_2d_condition")
"""What takes a measuring process long to import."""

Say = Callable[[str], None]
Keep = Callable[[Document], None]


@dataclass(frozen=True)
class Options:
    """What is measured and how.

    steps: of the run whose mean step is measured. timeout: seconds for one variant. commit: None
    for that of this copy. cache_dir: the engine's, the user's own by default. compile_cache: where
    torch.compile keeps what it makes; None for a fresh folder each time. isolated: each variant in
    a process of its own; without that, memory is not the variant's own.
    """

    cases: tuple[Case, ...]
    baselines: tuple[str, ...] = BASELINES
    device: str = "cuda"
    steps: int = 20
    iterations: int = 30
    seeds: int = 3
    ops: bool = False
    timeout: float = 900.0
    command: str = ""
    commit: str | None = None
    cache_dir: Path | None = None
    compile_cache: Path | None = None
    isolated: bool = True


def run_bench(
    options: Options,
    say: Say = lambda text: None,
    keep: Keep = lambda document: None,
    append_to: tuple[Document, Path] | None = None,
) -> Document:
    """Measure every case.

    say: hears what is being done. keep: is given the document after every row, so that nothing
    measured is lost. append_to: a document that gets the rows, and where it is from. A variant that
    fails becomes a row that says so. Raises `DeviceUnavailable` or `InvalidInput` before anything
    is measured.
    """
    check(options)
    say("measuring what this machine can do at best")
    known = options.commit or commit()
    machine = _run(options, say, describe_machine, options.device, known, options.command)
    if append_to is None:
        document = results.new_document(machine, NOTE)
    else:
        document = results.appended(append_to[0], machine, append_to[1])
    run = len(document["meta"]["runs"]) - 1
    for case in options.cases:
        _measure_case(options, case, run, machine["ceilings"], document, say, keep)
    return document


def prepare_bench(
    options: Options, jobs: int = 4, say: Say = lambda text: None
) -> list[dict[str, Any]]:
    """Fill `options.compile_cache` for the baseline `compile` of every case; nothing is measured.

    jobs: how many cases are compiled at once, each in a process of its own. Returns what each took,
    in the order of the cases; one that fails says so. Raises as `run_bench` does.
    """
    if options.compile_cache is None:
        raise InvalidInput("what is compiled needs a folder to be kept in: --compile-cache")
    check(options)
    folder = options.compile_cache

    def compile_case(case: Case) -> dict[str, Any]:
        job = Job(case, COMPILE, options.device, scratch=folder, compile_cache=folder)
        say(f"{title(case)}: compiling, for minutes")
        try:
            done = {**case.facts, **_run(options, lambda text: None, precompile, job)}
        except (ProcessFailed, SwitchyardError) as error:
            say(f"{title(case)}: failed: {_last_line(error)}")
            return {**case.facts, "failed": str(error).splitlines()}
        say(f"{title(case)}: compiled in {done['seconds']:.0f} s")
        return done

    pool = ThreadPoolExecutor(jobs)
    try:
        return list(pool.map(compile_case, options.cases))
    finally:
        pool.shutdown(cancel_futures=True)  # those under way come to their end


def check(options: Options) -> None:
    """Raise for a device that is not here, and for baselines that cannot run on it."""
    device = options.device
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        hardware.require(device)  # which, on a GPU, would take memory that no variant has asked for
    for name in options.baselines:
        if name not in BASELINES:
            raise InvalidInput(f"{name!r} is no baseline: use {', '.join(BASELINES)} or none")
        if name in NEED_GPU and not device.startswith("cuda"):
            raise InvalidInput(f"the baseline {name!r} needs a GPU: use --baselines eager")


def _measure_case(
    options: Options,
    case: Case,
    run: int,
    ceilings: dict[str, float],
    document: Document,
    say: Say,
    keep: Keep,
) -> None:
    """All rows of a case, the engine's first, since it knows the arithmetic of a forward."""
    variants = [ENGINE, *(name for name in BASELINES if name in options.baselines)]
    tflop: float | None = None
    measured: dict[str, dict[str, Any]] = {}
    isolated = options.isolated
    with (
        tempfile.TemporaryDirectory(
            prefix="switchyard-bench-", ignore_cleanup_errors=True
        ) as scratch,
        # They import while the float32 result is made, which nothing times.
        fresh_processes(len(variants) + 1 if isolated else 0, IMPORTS) as processes,
    ):

        def job(variant: str) -> Job:
            return Job(
                case=case,
                variant=variant,
                device=options.device,
                scratch=Path(scratch),
                steps=options.steps,
                iterations=options.iterations,
                seeds=options.seeds,
                ops=options.ops,
                ceilings=ceilings,
                cache_dir=options.cache_dir,
                compile_cache=options.compile_cache,
            )

        say(f"{title(case)}: float32, to which all are compared")
        try:
            _run(options, say, keep_truth, job("float32"), process=next(processes, None))
        except (ProcessFailed, SwitchyardError) as error:
            say(f"{title(case)}: there is no float32 result, so no errors: {_last_line(error)}")
        for variant in variants:
            say(f"{title(case)}: {variant}" + ("" if variant != COMPILE else ", for minutes"))
            row = _row(options, say, job(variant), next(processes, None))
            tflop = row.pop("tflop", tflop)
            if tflop is not None:
                row["tflop"] = tflop
                row["mfu"] = mfu(tflop, row["ms"], ceilings["matmul_tflops"])
            row = {"run": run, **row}
            table = row.pop("ops", None)
            if table is not None:
                document.setdefault("ops", []).append({"run": run, **case.facts, **table})
            document["rows"].append(row)
            measured[variant] = row
            if EAGER in measured:
                _compare_memory(measured[ENGINE], measured[EAGER])
            say(f"{title(case)}: {_summary(row)}")
            keep(document)


def _compare_memory(engine: dict[str, Any], eager: Mapping[str, Any]) -> None:
    ours, theirs = engine["vram_mib"], eager["vram_mib"]
    if ours is not None and theirs:
        engine["vram_over_eager"] = ours / theirs


def _row(options: Options, say: Say, job: Job, process: Fresh | None) -> dict[str, Any]:
    try:
        row: dict[str, Any] = _run(options, say, measure, job, process=process)
    except (ProcessFailed, SwitchyardError) as error:
        failed = str(error).splitlines()
        return {**empty_row(job), "failed": failed}
    return row


def empty_row(job: Job) -> dict[str, Any]:
    """A row of which nothing is known but what it is about."""
    return {**dict.fromkeys(ROW), **job.case.facts, "variant": job.variant}


def _run(
    options: Options,
    say: Say,
    function: Callable[..., Any],
    *arguments: Any,
    process: Fresh | None = None,
) -> Any:
    if not options.isolated:
        return function(*arguments)
    return run_isolated(
        function,
        *arguments,
        timeout=options.timeout,
        waiting=lambda elapsed: say(f"  … {elapsed:.0f} s"),
        process=process,
    )


def mfu(tflop: float, ms: float | None, matmul_tflops: float) -> float | None:
    """The part of a large matrix product's rate that a forward of `tflop` in `ms` reaches."""
    return None if not ms else tflop / (ms / 1e3) / matmul_tflops


def step_ms(row: Mapping[str, Any]) -> float | None:
    """Milliseconds of a step as they are compared: with the caller's key, where there is one."""
    value = row.get("ms_hoisted") or row.get("ms_run")
    return None if value is None else float(value)


def speedup(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """How many times faster the engine of the same comparison takes a step than `row`.

    None for the engine itself, and wherever the engine's error is unknown or too large: a speed-up
    without fidelity is none.
    """
    engine = next(
        (
            other
            for other in rows
            if other["variant"] == ENGINE and results.case_key(other) == results.case_key(row)
        ),
        None,
    )
    if engine is None or engine is row or not faithful(engine):
        return None
    ours, theirs = step_ms(engine), step_ms(row)
    return None if ours is None or theirs is None else theirs / ours


def faithful(row: Mapping[str, Any]) -> bool:
    """Whether a row's error is at most 1.1 times plain PyTorch's in the same precision.

    That of every seed, where they are known.
    """
    own, plain = row.get("rel_err"), row.get("rel_err_eager")
    if own is None or plain is None:
        return False
    return _close(own, plain, row) and not unfaithful_seeds(row)


def unfaithful_seeds(row: Mapping[str, Any]) -> list[int]:
    """The seeds at which a row's error is too large."""
    own, plain = row.get("rel_err_by_seed"), row.get("rel_err_eager_by_seed")
    pairs = enumerate(zip(own or (), plain or (), strict=False))
    return [seed for seed, (mine, theirs) in pairs if not _close(mine, theirs, row)]


def _close(own: float, plain: float, row: Mapping[str, Any]) -> bool:
    # In float32 both are rounding alone, where a ratio of the two says nothing.
    return bool(own <= max(1.1 * plain, 1e-5 if row.get("precision") == "fp32" else 0.0))


def title(case: Case) -> str:
    """The case in words."""
    return results.title(case.facts)


def _summary(row: Mapping[str, Any]) -> str:
    if row.get("failed"):
        return f"{row['variant']} failed: {row['failed'][-1]}"
    step, cold = step_ms(row), row["cold_s"]
    error = "unknown" if row["rel_err"] is None else f"{row['rel_err']:.2g}"
    first = "compiled before" if cold is None else f"first after {cold:.1f} s"
    return f"{row['variant']} {step:.2f} ms a step, {first}, error {error}"


def _last_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[-1]
