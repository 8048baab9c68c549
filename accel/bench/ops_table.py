"""Where an engine's time goes: each distinct call, what it takes, and the least that it could take.

The least (`floor_us`) is the larger of arithmetic at the rate of a large matrix product and of
moving every operand once at the rate of a copy. What a kernel finds in the cache can be faster than
that copy. Beside each call's time is that of PyTorch's own ways (`library_us`) and, for operators
that only move bytes, of torch.compile (`compiled_us`), all measured here in isolation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..kernels import Call
from ..tuning import Choice
from .engines import Entry
from .op_times import OpTimer, Times

SLOWER_RATIO, SLOWER_US = 1.03, 0.3
"""A chosen kernel counts as slower than the library's if it is so by more than either."""

PRODUCTS = ("linear", "conv2d")
"""Matrix products and convolutions, whose sum the table has too."""


@dataclass
class _Line:
    """A distinct call of one part of one network."""

    network: str
    part: str
    call: Call
    choice: Choice
    count: int = 0


Measure = Callable[[Call, Choice], Times]


def measured(
    calls: Sequence[Entry],
    ceilings: Mapping[str, float],
    device: torch.device,
    timer: Measure | None = None,
) -> dict[str, Any]:
    """The table of one forward's calls on `device`, each distinct call timed once."""
    measure = OpTimer(device) if timer is None else timer
    known: dict[str, Times] = {}

    def times(call: Call, choice: Choice) -> Times:
        if call.key not in known:
            known[call.key] = measure(call, choice)
        return known[call.key]

    return table(calls, ceilings, times)


def table(calls: Sequence[Entry], ceilings: Mapping[str, float], times: Measure) -> dict[str, Any]:
    """Distinct calls, the largest gap first, and their sums by operator, as plain JSON values.

    A call's `gap_us` is what all its runs of one forward take beyond their floor; `share` is of the
    sum over all calls. Times are of one run in `calls`, and sums in `operators`; `profile_us` is
    what the choice was made by. `over_library` and `over_compiled`: how many times faster the
    chosen kernels are, over the runs of which both times are known. `slower_than_library`: whether
    a call is, and how many are.
    """
    lines: dict[tuple[str, str, str], _Line] = {}
    for network, part, call, choice in calls:
        line = lines.setdefault((network, part, call.key), _Line(network, part, call, choice))
        line.count += 1
    rows = [_row(line, times(line.call, line.choice), ceilings) for line in lines.values()]
    total = sum(row["count"] * row["us"] for row in rows if row["us"] is not None)
    for row in rows:
        row["share"] = None if row["us"] is None else _ratio(row["count"] * row["us"], total)
    rows.sort(key=lambda row: -(row["gap_us"] or 0.0))
    groups = [_group((op,), rows, total) for op in dict.fromkeys(row["op"] for row in rows)]
    groups.sort(key=lambda group: -group["us"])
    return {
        "sum_us": total,
        "floor_us": sum(row["count"] * row["floor_us"] for row in rows),
        "unmeasured": sum(row["count"] for row in rows if row["us"] is None),
        "slower_than_library": sum(row["slower_than_library"] for row in rows),
        "operators": groups,
        "products": _group(PRODUCTS, rows, total),
        "calls": rows,
    }


def floor_us(call: Call, ceilings: Mapping[str, float]) -> float:
    """The least that a run of a call can take, microseconds."""
    arithmetic = call.flops / (ceilings["matmul_tflops"] * 1e6)
    moving = call.bytes / (ceilings["copy_tbps"] * 1e6)
    return max(arithmetic, moving)


def slower(us: float | None, library_us: float | None) -> bool:
    """Whether a chosen kernel is slower than the library's by more than measuring explains."""
    if us is None or library_us is None:
        return False
    return us > library_us * SLOWER_RATIO and us > library_us + SLOWER_US


def _row(line: _Line, times: Times, ceilings: Mapping[str, float]) -> dict[str, Any]:
    call, floor, us = line.call, floor_us(line.call, ceilings), times.us
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
        "profile_us": line.choice.us,
        "floor_us": floor,
        "gap_us": None if us is None else line.count * (us - floor),
        "library": times.way,
        "library_us": times.way_us,
        "compiled_us": times.compiled_us,
        "slower_than_library": slower(us, times.way_us),
        "flops": call.flops,
        "bytes": call.bytes,
    }


def _group(
    wanted: Sequence[str], rows: Sequence[Mapping[str, Any]], total: float
) -> dict[str, Any]:
    """Sums over the runs of some operators, as far as their time is known."""
    own = [row for row in rows if row["op"] in wanted and row["us"] is not None]
    us, floor, flops = _sum(own, "us"), _sum(own, "floor_us"), _sum(own, "flops")
    group = {
        "op": " + ".join(wanted),
        "count": sum(row["count"] for row in own),
        "us": us,
        "floor_us": floor,
        "gap_us": us - floor,
        "share": _ratio(us, total),
        "tflops": _ratio(flops, us * 1e6),
    }
    for name in ("library", "compiled"):
        both = [row for row in own if row[f"{name}_us"] is not None]
        other = _sum(both, f"{name}_us")
        group[f"{name}_us"] = other if both else None
        ours = _sum(both, "us")
        group[f"over_{name}"] = other / ours if both and ours else None
    return group


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over all runs of the calls."""
    return float(sum(row["count"] * row[name] for row in rows))


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
