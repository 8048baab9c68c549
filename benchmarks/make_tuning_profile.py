"""Measure kernels for the profile of this GPU that comes with the pack.

    python -m benchmarks.make_tuning_profile FAMILY:WxH[:BATCH] …

Times every candidate of every call of the shipped plans at those image sizes, without the optional
inputs and with all of them, and writes the fastest to `tuning_profiles/`. What the file there has,
of the same GPU and libraries, stays; with --missing it is not measured again. --details keeps the
times of all candidates.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch

from accel.compiler import SHIPPED as PLANS
from accel.hardware import Hardware, describe
from accel.kernels import Call
from accel.plan.schema import Plan
from accel.runtime.calls import calls_of
from accel.tuning.compiling import Compiler
from accel.tuning.measure import measure
from accel.tuning.profile import PROFILE_VERSION, SHIPPED, Entry, Profile, identity
from accel.tuning.select import fastest


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="+", help="sd15:512x512, sdxl:1024x1024:1, …")
    parser.add_argument("--out", type=Path, help="default: the GPU's file in tuning_profiles/")
    parser.add_argument("--missing", action="store_true", help="only what the file has not yet")
    parser.add_argument("--details", type=Path, help="all candidates' times, as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device("cuda", torch.cuda.current_device())
    hardware = describe(device)
    out = options.out or SHIPPED / f"{_file_name(hardware.name)}.json"
    calls: dict[str, Call] = {}
    for case in options.case:
        calls |= {call.key: call for call in _calls(case)}
    if options.missing:
        calls = {key: call for key, call in calls.items() if key not in _earlier(out, hardware)}
    print(f"{len(calls)} calls", flush=True)
    entries, details = _measured(list(calls.values()), hardware, device)
    out.write_text(
        json.dumps(_with_what_was(out, hardware, entries), indent=0, sort_keys=True) + "\n"
    )
    if options.details:
        options.details.write_text(json.dumps(details))


def _calls(case: str) -> list[Call]:
    family, size, *rest = case.split(":")
    width, height = map(int, size.split("x"))
    plan = Plan.from_json(json.loads((PLANS / f"{family}.json").read_text(encoding="utf-8")))
    sizes = {"batch": int(rest[0]) if rest else 2, "height": height // 8, "width": width // 8}
    dims = {name: (sizes | {"tokens": 77})[name] for name in plan.dims}
    bare = plan.without(entry.name for entry in plan.inputs if entry.optional)
    found = calls_of(bare, dims, torch.float16)
    return found if bare is plan else found + calls_of(plan, dims, torch.float16)


def _measured(
    calls: list[Call], hardware: Hardware, device: torch.device
) -> tuple[dict[str, Entry], dict[str, Any]]:
    started, entries, details = time.perf_counter(), {}, {}
    for call, results in measure(calls, Compiler(hardware, device), device):
        best = fastest(results)
        if best is not None:
            entries[call.key] = best
        details[call.key] = [(r.kernel.name, dict(r.config), r.us, r.problem) for r in results]
    print(f"{len(entries)} measured in {time.perf_counter() - started:.0f} s", flush=True)
    return entries, details


def _with_what_was(out: Path, hardware: Hardware, entries: dict[str, Entry]) -> dict[str, Any]:
    profile = Profile(hardware, None)
    profile.add(entries)
    document = profile.to_json()
    document["entries"] = _earlier(out, hardware) | document["entries"]
    return document


def _earlier(out: Path, hardware: Hardware) -> dict[str, Any]:
    """The file's entries, if they are of the same GPU and libraries."""
    if not out.exists():
        return {}
    document = json.loads(out.read_text(encoding="utf-8"))
    same = document["meta"] == identity(hardware) and document["version"] == PROFILE_VERSION
    return dict(document["entries"]) if same else {}


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


if __name__ == "__main__":
    main()
