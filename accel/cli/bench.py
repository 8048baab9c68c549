"""`bench`: the engine against PyTorch on this machine, and where its time goes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput
from . import output
from .arguments import size as _size

if TYPE_CHECKING:
    from ..bench.run import Options

BASELINES = "eager,graph,compile"
SHOWN_CALLS = 40
"""Lines of a table of operators on a terminal; the JSON has them all."""


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "bench",
        help="measure the engine against PyTorch on this machine",
        description="Time, memory and error of the engine and of PyTorch's own ways to run a "
        "network, with random weights at full size: each variant in a process of its own. With "
        "--ops also where the engine's time goes, the largest gap first. Exit code 1 if a variant "
        "failed. The first run at a size measures kernels, which counts in the engine's cold time: "
        "SWITCHYARD_CACHE_DIR=<an empty folder> makes every run such a first one.",
    )
    command.add_argument("--model", metavar="FAMILY", help="sd15, sdxl, sd21, …")
    command.add_argument("--size", type=_sizes, metavar="WxH[,WxH…]", help="pixels, multiples of 8")
    command.add_argument(
        "--batch", type=_number(1, 64), default=2, metavar="N", help="default: %(default)s"
    )
    command.add_argument(
        "--controlnet", type=_number(0, 8), default=0, metavar="N", help="this many ControlNets"
    )
    command.add_argument(
        "--lora", action="store_true", help="a LoRA of rank 32 on attention and feed-forward layers"
    )
    command.add_argument(
        "--baselines",
        type=_names,
        metavar="NAMES",
        help=f"some of {BASELINES}, or none (default: all of them; on the CPU: eager)",
    )
    command.add_argument(
        "--steps",
        type=_number(1, 1000),
        default=20,
        metavar="N",
        help="of a run whose mean step is measured (default: %(default)s)",
    )
    command.add_argument(
        "--iterations",
        type=_number(1, 10000),
        default=30,
        metavar="N",
        help="single calls of which the median is taken (default: %(default)s)",
    )
    command.add_argument(
        "--seeds",
        type=_number(1, 100),
        default=3,
        metavar="N",
        help="random inputs whose errors are measured (default: %(default)s)",
    )
    command.add_argument(
        "--precision", choices=("fp16", "bf16", "fp32"), help="default: fp16; on the CPU: fp32"
    )
    command.add_argument("--device", default="cuda", help="cuda, cuda:1, … or cpu")
    command.add_argument(
        "--ops", action="store_true", help="the engine's operators beside what they could take"
    )
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="a picture of that; needs matplotlib"
    )
    command.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE.json",
        help="measure nothing: show, or --plot, what an earlier run wrote",
    )
    command.add_argument("--out", type=Path, metavar="FILE.json", help="write the JSON object here")
    command.add_argument(
        "--append",
        action="store_true",
        help="add the rows to --out, if it is of the same machine, software and commit",
    )
    command.add_argument(
        "--compile-cache",
        type=Path,
        metavar="FOLDER",
        help="where torch.compile keeps what it makes, for later runs: its first call is then no "
        "cold start, and not reported as one (default: a fresh folder each time)",
    )
    command.add_argument(
        "--prepare",
        action="store_true",
        help="measure nothing: fill --compile-cache for these cases, several at once",
    )
    command.add_argument(
        "--jobs",
        type=_number(1, 64),
        default=4,
        metavar="N",
        help="of --prepare: cases at once, each in a process of its own (default: %(default)s)",
    )
    command.add_argument("--commit", help="for a copy without git: what is measured")
    command.add_argument(
        "--timeout",
        type=_number(10, 100000),
        default=900,
        metavar="S",
        help="seconds after which a variant is given up (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print the JSON object instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, write, draw, print."""
    from ..bench import results

    _check_files(options)
    if options.prepare:
        return _prepare(options)
    if options.source is not None:
        document = results.load(options.source)
    else:
        document = _measure(options)
    if options.plot is not None:
        from ..bench.plot import plot

        plot(document, options.plot)
        output.stderr().print(f"drawn: {options.plot}", markup=False)
    if options.json:
        output.print_json(document)
    else:
        _print_rows(document["rows"])
        for table in document.get("ops", ()) if options.ops else ():
            _print_table(table)
    return 1 if any(row.get("failed") for row in document["rows"]) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _prepare(options: argparse.Namespace) -> int:
    """Fill torch.compile's folder, and say what that took."""
    from dataclasses import replace

    from ..bench.results import extras
    from ..bench.run import COMPILE, prepare_bench

    wanted = replace(_options(options), baselines=(COMPILE,))
    done = prepare_bench(wanted, options.jobs, _say)
    if options.json:
        output.print_json({"prepared": done})
    else:
        numbers = ("seconds", "found", "compiled")
        output.print_table(
            ("network", "with", *numbers),
            [
                (
                    f"{case['model']} {case['width']}x{case['height']}",
                    " + ".join(extras(case)),
                    "FAILED" if case.get("failed") else _shown(case["seconds"], ".1f"),
                    _shown(case.get("compile_cache_hits"), "d"),
                    _shown(case.get("compile_cache_misses"), "d"),
                )
                for case in done
            ],
            right=numbers,
        )
    return 1 if any(case.get("failed") for case in done) else 0


def _measure(options: argparse.Namespace) -> Any:
    from ..bench import results
    from ..bench.run import run_bench

    def keep(document: Any) -> None:
        if options.out is not None:
            results.save(document, options.out)

    append_to = None
    if options.append and options.out.exists():
        append_to = (results.load(options.out), options.out)
    return run_bench(_options(options), _say, keep, append_to)


def _options(options: argparse.Namespace) -> Options:
    """What the command line asks for. Raises `InvalidInput`."""
    from ..bench.networks import case_of
    from ..bench.run import Options

    for name in ("model", "size"):
        if getattr(options, name) is None:
            raise InvalidInput(f"--{name} is missing: nothing to measure")
    cpu = options.device == "cpu"
    cases = tuple(
        case_of(
            options.model,
            size,
            options.batch,
            options.controlnet,
            options.lora,
            options.precision or ("fp32" if cpu else "fp16"),
        )
        for size in options.size
    )
    default = ("eager",) if cpu else tuple(BASELINES.split(","))
    return Options(
        cases=cases,
        baselines=default if options.baselines is None else options.baselines,
        device=options.device,
        steps=options.steps,
        iterations=options.iterations,
        seeds=options.seeds,
        ops=options.ops or options.plot is not None,
        timeout=options.timeout,
        command=" ".join(["python -m accel", *sys.argv[1:]]),
        commit=options.commit,
        compile_cache=options.compile_cache and options.compile_cache.absolute(),
    )


def _check_files(options: argparse.Namespace) -> None:
    """Raise `InvalidInput` for files that cannot be: before anything is measured."""
    if options.append and options.out is None:
        raise InvalidInput("--append needs the file: --out")
    if options.source is not None and options.out is not None:
        raise InvalidInput("--from measures nothing that --out could hold")
    if options.prepare:
        for name in ("source", "out", "plot", "ops"):
            if getattr(options, name):
                flag = "from" if name == "source" else name
                raise InvalidInput(f"--prepare measures nothing: leave --{flag} out")
        if options.compile_cache is None:
            raise InvalidInput("--prepare needs the folder: --compile-cache")
    if options.compile_cache is not None and options.compile_cache.is_file():
        raise InvalidInput(f"{options.compile_cache} is a file: --compile-cache is a folder")
    for path in (options.out, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidInput(f"{path}: there is no such folder")
    if options.plot is not None:
        from ..bench.plot import require_matplotlib

        require_matplotlib()


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from ..bench.results import extras
    from ..bench.run import speedup, step_ms

    table = []
    for row in rows:
        gain = speedup(row, rows)
        table.append(
            (
                f"{row['model']} {row['width']}x{row['height']}",
                " + ".join(extras(row)),
                row["variant"]
                + (" FAILED" if row.get("failed") else "")
                + (", warm cache" if row.get("compile_cache") == "warm" else ""),
                _shown(row.get("ms"), ".2f"),
                _shown(step_ms(row), ".2f"),
                _shown(gain, ".2f") + ("x" if gain is not None else ""),
                _shown(row.get("cold_s"), ".1f"),
                _shown(row.get("vram_mib"), "d"),
                _shown(row.get("vram_over_eager"), ".2f"),
                _shown(None if row.get("mfu") is None else 100 * row["mfu"], ".0f"),
                _shown(row.get("kernels"), "d"),
                _error(row),
                _shown(row.get("rel_err_eager"), ".2g"),
            )
        )
    numbers = ("ms", "ms a step", "engine is", "cold s", "MiB", "of eager's", "MFU %", "kernels")
    columns = ("network", "with", "variant", *numbers, "error", "eager's")
    output.print_table(columns, table, right=(*numbers, "error", "eager's"))
    for row in rows:
        if row.get("failed"):
            print(f"{row['variant']} of {row['model']}: {row['failed'][-1]}")
        if "added_calls" in row.get("controlnet_toggle", ()):  # older files do not know
            print(_toggled(row))


def _error(row: Mapping[str, Any]) -> str:
    """The worst seed's error, and at which seeds it is too large."""
    from ..bench.run import faithful, unfaithful_seeds

    text = _shown(row.get("rel_err"), ".2g")
    if row.get("rel_err") is None or row.get("rel_err_eager") is None or faithful(row):
        return text
    seeds = unfaithful_seeds(row)
    which = f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if seeds else ""
    return f"{text} TOO LARGE{which}"


def _toggled(row: Mapping[str, Any]) -> str:
    """What a ControlNet adds to the UNet: kernels where they were counted, or else calls."""
    from ..bench.results import title

    toggle = row["controlnet_toggle"]
    what = "calls" if toggle.get("added_kernels") is None else "kernels"
    added, plain = (toggle.get(name) for name in (f"added_{what}", f"step_{what}_without"))
    return f"{title(row)}: its residuals add {added} {what} to the {plain} of a step of the UNet"


def _print_table(table: Mapping[str, Any]) -> None:
    """Sums by operator, then the calls with the largest gap."""
    from ..bench.results import title

    console = output.stdout()
    slower = table.get("slower_than_library")  # older files do not know
    console.print(
        f"{title(table)}: kernels one by one "
        f"{table['sum_us'] / 1e3:.2f} ms, their floor {table['floor_us'] / 1e3:.2f} ms"
        + (f"; {table['unmeasured']} calls could not be timed" if table["unmeasured"] else "")
        + ("" if slower is None else f"; {slower} calls slower than the library's"),
        soft_wrap=True,
    )
    others = ("library ms", "over it x", "compiled ms", "over that x")
    sums = ("calls", "ms", "share %", "floor ms", "gap ms", "TFLOP/s", *others)
    products = table.get("products")
    output.print_table(
        ("operator", *sums),
        [
            (
                group["op"],
                str(group["count"]),
                f"{group['us'] / 1e3:.3f}",
                f"{100 * group['share']:.1f}",
                f"{group['floor_us'] / 1e3:.3f}",
                f"{group['gap_us'] / 1e3:.3f}",
                f"{group['tflops']:.3g}" if group["tflops"] else "",
                *_compared(group, "library"),
                *_compared(group, "compiled"),
            )
            for group in [*table["operators"], *([products] if products else [])]
        ],
        right=sums,
    )
    shown = table["calls"][:SHOWN_CALLS]
    numbers = ("gap ms", "share %", "n", "us", "library us", "compiled us", "floor us")
    output.print_table(
        (*numbers, "operator", "sizes", "kernel", "part"),
        [
            (
                "" if call["gap_us"] is None else f"{call['gap_us'] / 1e3:.3f}",
                "" if call["share"] is None else f"{100 * call['share']:.1f}",
                str(call["count"]),
                _shown(call["us"], ".1f") + (" SLOWER" if call.get("slower_than_library") else ""),
                _shown(call.get("library_us"), ".1f"),
                _shown(call.get("compiled_us"), ".1f"),
                f"{call['floor_us']:.1f}",
                call["op"],
                call["shape"],
                " ".join([call["kernel"], *(f"{k}={v}" for k, v in call["config"].items())]),
                call["part"] if call["network"] == "unet" else f"{call['network']} {call['part']}",
            )
            for call in shown
        ],
        right=numbers,
    )
    rest = table["calls"][SHOWN_CALLS:]
    if rest:
        gap = sum(call["gap_us"] or 0.0 for call in rest) / 1e3
        console.print(f"and {len(rest)} more with {gap:.3f} ms between them: --json has them")


def _compared(group: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Milliseconds of the library or of torch.compile, and how many times faster ours are."""
    us = group.get(f"{name}_us")
    return _shown(None if us is None else us / 1e3, ".3f"), _shown(group.get(f"over_{name}"), ".2f")


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _sizes(text: str) -> list[tuple[int, int]]:
    return [_size(part) for part in text.split(",")]


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {most}")
        return value

    return number
