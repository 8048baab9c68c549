"""Linear layers' kernel for Hopper beside all others, at the sizes of SDXL and SD1.5.

    python -m benchmarks.product_kernel --out product_kernel.json --commit COMMIT [--seconds 60]

Each candidate is compared with a float32 product and timed as tuning does (in a CUDA graph, weights
not in the cache), and the graph again and again for a while, as in a network that draws as much
power as there is (`sustained_us`). The likeliest to matter come first; the file is written anew
after each. They run in a process of their own: one that hangs, or leaves the GPU unusable, is
noted, and another process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accel.bench import machine
from accel.hardware import Hardware, describe
from accel.kernels import Call, Config, Kernel, TensorSpec, candidates
from accel.ops import get
from accel.tuning.compiling import Compiler
from accel.tuning.measure import Clock, Operands

NAME = "cuda.matmul"

Shape = tuple[int, int, int, str, str, torch.dtype]
"""Rows, depth, rows of the weight, activation, what is added, dtype."""

F16, BF16 = torch.float16, torch.bfloat16
SHAPES: tuple[Shape, ...] = (
    # SDXL, 1024 x 1024, batch 2
    (2048, 1280, 10240, "geglu", "bias", F16),
    (8192, 640, 5120, "geglu", "bias", F16),
    (2048, 5120, 1280, "none", "bias residual", F16),
    (2048, 1280, 3840, "none", "", F16),
    (8192, 2560, 640, "none", "bias residual", F16),
    (8192, 640, 1920, "none", "", F16),
    (2048, 1280, 1280, "none", "bias residual", F16),
    (8192, 640, 640, "none", "bias residual", F16),
    (2048, 5120, 1280, "none", "bias", F16),
    (2048, 1280, 10240, "geglu", "bias", BF16),
    # SD1.5, 512 x 512, batch 2
    (8192, 320, 2560, "geglu", "bias", F16),
    (2048, 640, 5120, "geglu", "bias", F16),
    (512, 1280, 10240, "geglu", "bias", F16),
    (8192, 1280, 320, "none", "bias residual", F16),
    (2048, 2560, 640, "none", "bias residual", F16),
    (512, 5120, 1280, "none", "bias residual", F16),
    (8192, 320, 960, "none", "", F16),
    (2048, 640, 1920, "none", "", F16),
)

SUSTAINED_S = 0.08

PATIENCE = 10.0
"""Seconds without a word after which a process hangs."""


def call_of(shape: Shape) -> Call:
    """The operator's call."""
    rows, depth, wide, activation, riders, dtype = shape
    columns = wide // (2 if activation == "geglu" else 1)

    def spec(*size: int, constant: bool = False) -> TensorSpec:
        return TensorSpec.of(torch.empty(size, dtype=dtype, device="meta"), constant)

    bias = spec(wide, constant=True) if "bias" in riders else None
    residual = spec(rows, columns) if "residual" in riders else None
    tensors = (spec(rows, depth), spec(wide, depth, constant=True), bias, residual)
    return Call("linear", spec(rows, columns), tensors, {"activation": activation})


def work(hardware: Hardware) -> Iterator[tuple[Shape, Call, list[tuple[Kernel, Config]]]]:
    """Shapes with their candidates, the most important first."""
    for shape in SHAPES:
        call = call_of(shape)
        found = candidates(call, hardware)[:-1]
        own = [candidate for candidate in found if candidate[0].name == NAME]
        others = [candidate for candidate in found if candidate[0].name != NAME]
        yield shape, call, own[:1] + others + own[1:]


def named(shape: Shape, kernel: Kernel, config: Config) -> dict[str, Any]:
    """The fields of a row that tell it from the others."""
    names = ("rows", "depth", "columns", "activation", "riders")
    row: dict[str, Any] = {"operation": "product_kernel", **dict(zip(names, shape, strict=False))}
    row["precision"] = str(shape[5]).removeprefix("torch.")
    return row | {"kernel": kernel.name, "config": dict(config)}


def say(**line: Any) -> None:
    """A line of JSON for the process that waits for it."""
    print(json.dumps(line), flush=True)


def serve() -> None:
    """Time what the standard input does not name as done; answer in lines of JSON."""
    torch.backends.cuda.matmul.allow_tf32 = False
    done = set(json.loads(sys.stdin.readline()))
    device = torch.device("cuda", 0)
    hardware = describe(device)
    compiler, clock = Compiler(hardware, device), Clock(device, hardware)
    for shape, call, found in work(hardware):
        left = [c for c in found if json.dumps(named(shape, *c)) not in done]
        if not left:
            continue
        with torch.no_grad():
            operands = Operands(call, hardware, device)
            wide = [None if t is None else t.float() for t in operands._sets[0]]
            truth = get("linear").reference(*wide, **call.attrs)
            own = distance(operands.expected(), truth)
            # The first few by themselves, so that they are there early.
            for part in (left[:1], left[1:]):
                say(at=None)
                compiler.compile((*candidate, call) for candidate in part)
                for kernel, config in part:
                    row = named(shape, kernel, config)
                    say(at=row)
                    try:
                        row |= timed(operands, clock, kernel, config, truth)
                        row |= {"rel_err_eager": own, "tflops": call.flops / row["us"] / 1e6}
                    except Exception as error:
                        row["problem"] = f"{type(error).__name__}: {error}"[:500]
                    say(row=row)
                    torch.cuda.synchronize()  # what is broken for good ends this process


def timed(
    operands: Operands, clock: Clock, kernel: Kernel, config: Config, truth: torch.Tensor
) -> dict[str, Any]:
    """Times and error of one candidate."""
    run = operands.bind(kernel, config)
    wrong = distance(run(0), truth)
    timer = clock.timer(run)
    us = timer()
    if not kernel.allocates:  # again, as it runs in a network: captured, back to back
        wrong = max(wrong, distance(operands.out, truth))
    timer.under_load(SUSTAINED_S * 1e6 / 4)
    sustained = timer.under_load(SUSTAINED_S * 1e6)()
    return {"us": us, "sustained_us": sustained, "rel_err": wrong}


def distance(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2; what is not a number is infinitely far."""
    found = float((result.float() - truth).norm() / truth.norm())
    return found if found == found else float("inf")


def main() -> None:
    """Have processes time candidates until all are done, or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--seconds", type=float, default=60.0, help="when to stop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    until = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    command = f"python -m benchmarks.product_kernel --seconds {options.seconds:g}"
    meta = machine.meta(options.commit or machine.commit(), command)
    done: list[str] = []
    fruitless = 0
    while time.monotonic() < until and fruitless < 3:
        before = len(done)
        ended = attend(done, rows, until, lambda: write(options.out, meta, rows))
        fruitless = fruitless + 1 if len(done) == before else 0
        if ended:
            break
    write(options.out, meta, rows)
    summarise(rows)


def attend(done: list[str], rows: list[dict[str, Any]], until: float, written: Any) -> bool:
    """Start a process, and note what it says till it ends or hangs; whether all was done."""
    arguments = [sys.executable, "-m", "benchmarks.product_kernel", "--serve", "--out", os.devnull]
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    process.stdin.write(json.dumps(done) + "\n")
    process.stdin.close()
    at: Mapping[str, Any] | None = None
    problem = "the process ended"
    while (left := until - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(left, PATIENCE + 40 * (at is None)))
        except queue.Empty:
            problem = "it hangs"
            break
        if line is None:
            break
        said = json.loads(line) if line.startswith("{") else {}
        if "at" in said:
            at = said["at"]
            if at is not None:
                done.append(json.dumps(at))
        elif "row" in said:
            at = None
            rows.append(said["row"])
            written()
    over = time.monotonic() >= until
    process.kill() if over or problem == "it hangs" else None
    code = process.wait()
    if at is not None and not over:
        rows.append({**at, "problem": f"{problem} ({code})"})
        written()
    return over or (code == 0 and at is None)


def write(path: Path, meta: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """All of it, at once."""
    part = path.with_suffix(".part")
    text = json.dumps({"meta": meta, "ceilings": {}, "rows": rows}, indent=1) + "\n"
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def summarise(rows: list[dict[str, Any]]) -> None:
    """A line for each candidate, the quickest of a shape first."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        fields = ("rows", "depth", "columns", "activation", "riders", "precision")
        shapes.setdefault(" ".join(str(row[name]) for name in fields), []).append(row)
    for shape, found in shapes.items():
        print(shape)
        for row in sorted(found, key=lambda row: row.get("sustained_us", float("inf"))):
            figures = row.get("problem") or (
                f"{row['us']:7.1f} us, sustained {row['sustained_us']:7.1f} us,"
                f" {row['tflops']:4.0f} TFLOP/s,"
                f" error {row['rel_err']:.2e} (eager {row['rel_err_eager']:.2e})"
            )
            config = " ".join(f"{name}={value}" for name, value in row["config"].items())
            print(f"  {figures}  {row['kernel']} {config}")


if __name__ == "__main__":
    main()
