"""What it costs to choose among the kernels that are compiled ahead, by the performance model.

    python -m benchmarks.ahead "NVIDIA H200" --out ahead.json

Needs no GPU, but a profile of it. For each family the kernels that `accel.tuning.ahead` compiles
ahead are found, and sizes drawn at random (the first of `benchmarks.random_sizes`) choose among
them and the libraries'. Rows: ahead_codes: pieces of code. ahead_regret: how much longer the calls
take than if each had the kernel of its own that the model takes for the fastest, every distinct
call counted once; used_regret: the same with the kernels of a first image of 1024² beside them, as
it is in use; libraries_regret: with the libraries alone. Libraries' own algorithms, which only a
GPU lists, are not among the candidates.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from accel import kernels
from accel.bench import machine
from accel.cli.predict import _plan
from accel.hardware import Hardware
from accel.kernels import Call, Config, Kernel
from accel.runtime.calls import calls_ahead, calls_of, dims_at
from accel.tuning import ahead
from accel.tuning.compiling import launch_keys
from accel.tuning.cost import Model
from accel.tuning.profile import Profile, family_of, identity, profiled
from accel.tuning.select import model_of

from .random_sizes import SEED, drawn

FAMILIES = ("sd15", "sdxl")
SIZES = 12


def main() -> None:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpu", help="the name of one with a measured profile")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=machine.commit())
    options = parser.parse_args()
    hardware = profiled()[options.gpu]
    rows = [row for family in FAMILIES for row in rows_of(family, hardware)]
    command = f"python -m benchmarks.ahead '{options.gpu}'"
    meta = {**identity(hardware), "commit": options.commit}
    meta |= {"date": time.strftime("%Y-%m-%d"), "command": command}
    meta["note"] = "offline: times are those that the performance model predicts"
    ceilings: dict[str, float] = {}  # nothing runs here
    if options.out:
        text = json.dumps({"meta": meta, "ceilings": ceilings, "rows": rows}, indent=1) + "\n"
        options.out.write_text(text, encoding="utf-8")
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()))


def rows_of(family: str, hardware: Hardware) -> list[dict[str, Any]]:
    """The rows of a family's plan, without its optional inputs."""
    plan = _plan(family)
    plan = plan.without(entry.name for entry in plan.inputs if entry.optional)
    model = model_of(hardware, Profile(hardware, None))
    assert model is not None, f"{hardware.name} has no constants"
    dims = dims_at(plan, 512, 512, 2)
    chosen = ahead.covering(calls_ahead(plan, dims, torch.float16), hardware, model)
    have = {key for variant in chosen for key in launch_keys(variant)}
    lent: dict[str, list[tuple[Kernel, Config]]] = defaultdict(list)
    for kernel, config, call in chosen:
        lent[family_of(call.key)[0]].append((kernel, config))
    first: set[str] = set()
    for call in calls_of(plan, dims_at(plan, 1024, 1024, 2), torch.float16):
        for r in model.rank(call, kernels.candidates(call, hardware)[:-1])[:1]:
            first |= launch_keys((r.kernel, r.config, call))
    sizes = drawn(SIZES, SEED)
    spent = {"best": 0.0, "ahead": 0.0, "used": 0.0, "libraries": 0.0}
    count = 0
    for width, height in sizes:
        for call in calls_of(plan, dims_at(plan, width, height, 2), torch.float16):
            found = [
                *kernels.candidates(call, hardware)[:-1],
                *ahead.fitting(lent[family_of(call.key)[0]], call, hardware),
            ]
            times = predicted(model, call, [(kernel.name, config) for kernel, config in found])
            known = [(*pair, us) for pair, us in zip(found, times, strict=True) if us is not None]
            libraries = [us for kernel, _, us in known if kernel.launches is None]
            if not libraries:  # nothing to fall back to but the reference, which is not timed
                continue
            codes = [launch_keys((kernel, config, call)) for kernel, config, _ in known]
            spent["best"] += min(us for *_, us in known)
            for name, there in (("ahead", have), ("used", have | first)):
                spent[name] += min(
                    us for (*_, us), code in zip(known, codes, strict=True) if code <= there
                )
            spent["libraries"] += min(libraries)
            count += 1
    common = {"model": family, "sizes": len(sizes), "calls": count}
    return [
        {"operation": "ahead_codes", "value": len(have), **common},
        *(
            {
                "operation": f"{name}_regret",
                "value": round(spent[name] / spent["best"] - 1, 4),
                **common,
            }
            for name in ("ahead", "used", "libraries")
        ),
    ]


def predicted(
    model: Model, call: Call, candidates: Sequence[tuple[str, Config]]
) -> list[float | None]:
    """Microseconds."""
    found: Iterable[Any] = model.predictions(call, candidates)
    return [None if p is None else p.us for p in found]


if __name__ == "__main__":
    main()
