"""Where an engine's time goes: each distinct call, what it takes, and the least that it could take.

The least (`floor_us`) is the larger of arithmetic at the rate of a large matrix product and of
moving every operand once at the rate of a copy. What a kernel finds in the cache can be faster than
that copy. Times are those of calls in isolation, from the choice of their kernel or measured here.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..hardware import Hardware, describe
from ..kernels import Call
from ..tuning import Choice
from ..tuning.measure import Clock, Operands
from .engines import Entry
from .timing import seconds

logger = logging.getLogger(__name__)

CPU_SAMPLES = 3


@dataclass
class _Line:
    """A distinct call of one part of one network."""

    network: str
    part: str
    call: Call
    choice: Choice
    count: int = 0


Measure = Callable[[Call, Choice], float | None]
"""Microseconds of one run, or None if that cannot be had."""


def measured(
    calls: Sequence[Entry], ceilings: Mapping[str, float], device: torch.device
) -> dict[str, Any]:
    """The table of one forward's calls on `device`."""
    hardware = describe(device)
    known: dict[str, float | None] = {}

    def us(call: Call, choice: Choice) -> float | None:
        if choice.us is not None:
            return choice.us
        if call.key not in known:
            known[call.key] = isolated_us(call, choice, hardware, device)
        return known[call.key]

    return table(calls, ceilings, us)


def table(calls: Sequence[Entry], ceilings: Mapping[str, float], us: Measure) -> dict[str, Any]:
    """Distinct calls, the largest gap first, and their sums by operator, as plain JSON values.

    A call's `gap_us` is what all its runs of one forward take beyond their floor; `share` is of the
    sum over all calls. `floor_us` and `us` are of one run in `calls`, and sums in `operators`.
    """
    lines: dict[tuple[str, str, str], _Line] = {}
    for network, part, call, choice in calls:
        line = lines.setdefault((network, part, call.key), _Line(network, part, call, choice))
        line.count += 1
    rows = [_row(line, us(line.call, line.choice), ceilings) for line in lines.values()]
    total = sum(row["count"] * row["us"] for row in rows if row["us"] is not None)
    for row in rows:
        row["share"] = None if row["us"] is None else _ratio(row["count"] * row["us"], total)
    rows.sort(key=lambda row: -(row["gap_us"] or 0.0))
    groups = [_group(op, rows, total) for op in dict.fromkeys(row["op"] for row in rows)]
    groups.sort(key=lambda group: -group["us"])
    return {
        "sum_us": total,
        "floor_us": sum(row["count"] * row["floor_us"] for row in rows),
        "unmeasured": sum(row["count"] for row in rows if row["us"] is None),
        "operators": groups,
        "calls": rows,
    }


def floor_us(call: Call, ceilings: Mapping[str, float]) -> float:
    """The least that a run of a call can take, microseconds."""
    arithmetic = call.flops / (ceilings["matmul_tflops"] * 1e6)
    moving = call.bytes / (ceilings["copy_tbps"] * 1e6)
    return max(arithmetic, moving)


def _row(line: _Line, us: float | None, ceilings: Mapping[str, float]) -> dict[str, Any]:
    call, floor = line.call, floor_us(line.call, ceilings)
    return {
        "network": line.network,
        "part": line.part,
        "op": call.op,
        "shape": shape_text(call),
        "call": call.key,
        "count": line.count,
        "kernel": line.choice.kernel.name,
        "config": dict(line.choice.config),
        "reason": line.choice.reason,
        "us": us,
        "floor_us": floor,
        "gap_us": None if us is None else line.count * (us - floor),
        "flops": call.flops,
        "bytes": call.bytes,
    }


def _group(op: str, rows: Sequence[Mapping[str, Any]], total: float) -> dict[str, Any]:
    own = [row for row in rows if row["op"] == op and row["us"] is not None]

    def add(name: str) -> float:
        return float(sum(row["count"] * row[name] for row in own))

    us, flops = add("us"), add("flops")
    return {
        "op": op,
        "count": sum(row["count"] for row in own),
        "us": us,
        "floor_us": add("floor_us"),
        "gap_us": us - add("floor_us"),
        "share": _ratio(us, total),
        "tflops": _ratio(flops, us * 1e6),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def shape_text(call: Call) -> str:
    """The sizes of a call as people write them: `8192x320 → 2560 geglu + residual`."""
    shapes = [None if spec is None else spec.shape for spec in call.tensors]
    size = "x".join(map(str, call.out.shape))
    notes = [str(call.attrs["activation"])] if call.attrs.get("activation") else []
    x, weight = (*shapes, None, None)[:2]
    if call.op == "linear" and x is not None and weight is not None:
        size = f"{prod(x[:-1])}x{weight[1]} → {weight[0]}"
        notes += _added(call, {3: "residual"})
    elif call.op == "conv2d" and x is not None and weight is not None:
        out, *kernel, _ = weight
        size = f"{'x'.join(map(str, x))} → {out}, {'x'.join(map(str, kernel))}"
        stride = call.attrs.get("stride", (1, 1))
        notes += [f"/{stride[0]}"] if set(stride) != {1} else []
        notes += ["upsampled"] if call.attrs.get("upsample") else []
        notes += _added(call, {3: "embedding", 4: "residual"})
    elif call.op == "attention" and weight is not None:
        heads = int(call.attrs["heads"])
        batch, queries, width = call.out.shape
        size = f"{batch}x{queries} over {weight[1]}, {heads} heads of {width // heads}"
    return " ".join([size, *(note for note in notes if note != "none")])


def _added(call: Call, names: Mapping[int, str]) -> list[str]:
    """What an epilogue adds, by the places of optional tensors."""
    given = call.tensors
    return [f"+ {name}" for place, name in names.items() if place < len(given) and given[place]]


def isolated_us(
    call: Call, choice: Choice, hardware: Hardware, device: torch.device
) -> float | None:
    """Microseconds of one run of a choice by itself, as the tuner times its candidates."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            run = Operands(call, hardware, device).bind(choice.kernel, choice.config)
            if device.type == "cuda":
                return Clock(device, hardware)(run)
            run(0)
            return 1e6 * statistics.median(
                seconds(lambda: run(0), device) for _ in range(CPU_SAMPLES)
            )
    except Exception as error:  # one call that cannot be timed must not cost the table
        logger.warning("%s is not timed: %s", call.key, " ".join(str(error).split()))
        return None
