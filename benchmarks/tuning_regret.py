"""How good the performance model's choices are, on times of all candidates that were measured.

    python -m benchmarks.tuning_regret benchmarks/results/h200/candidates.json \
        --transfer benchmarks/results/h100/candidates.json --out tuning_regret.json

Needs no GPU. Whole image sizes are held out, one after another: no call of such a size, also where
another size has the same, is in what the constants are fitted on, nor among the neighbours. Then
the model ranks the candidates of that size's calls, and is judged by their measured times:

tuning_regret: how much longer than with each call's best candidate the chosen ones take in all.
worst_regret: the same of the worst call. top4_hit: the share of calls whose first four have one
within 2 % of the best. Each call counts once; those of one candidate do not.

`corrections` says what is known of other sizes: `all` candidates of a call, `entries` what a
profile keeps of it (the best five), or `none` (the constants alone). With --transfer the constants
come from another GPU's times, and nothing is known of this one but its data sheet.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accel.compiler import SHIPPED as PLANS
from accel.kernels.registry import Call, Config, Kernel
from accel.plan.schema import Plan
from accel.runtime.calls import calls_of
from accel.tuning.chips import KNOWN, Chip
from accel.tuning.cost import Model, Times, fit
from accel.tuning.keys import call_of
from accel.tuning.profile import OTHERS

SIZES = (
    *("sd15:512x512", "sd15:768x768", "sd15:1024x1024", "sd15-controlnet:512x512"),
    *("sdxl:1024x1024", "sdxl:1536x1536", "sdxl:896x1152", "sdxl-controlnet:1024x1024"),
)
"""What the files of candidates have, at batch 2."""

HELD_OUT = ("sd15:768x768", "sdxl:896x1152")
"""Between measured sizes, as an image of random size is: the claim. The others are at the ends of
what was measured, or nothing is left of their family without them."""

BEYOND = ("sd15:512x512", "sd15:1024x1024", "sdxl:1024x1024", "sdxl:1536x1536")

PARTS = 5

NOTE = (
    "offline, from times of all candidates. Nothing of a size that is held out is in the fit or "
    "among the neighbours; but the dozen spreads in accel/tuning/cost.py, the same for all chips, "
    "were set with a view to results of this kind on both GPUs"
)

TOP, CLOSE = 4, 1.02


def main() -> None:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("candidates", type=Path, help="times of all candidates on one GPU")
    parser.add_argument("--transfer", type=Path, help="of another GPU: constants from there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    meta, measured = read(options.candidates)
    rows = evaluate(chip_named(meta["gpu"]), measured)
    if options.transfer:
        other, elsewhere = read(options.transfer)
        rows += transferred(chip_named(meta["gpu"]), measured, chip_named(other["gpu"]), elsewhere)
    ceilings: dict[str, float] = {}  # nothing runs here
    document = {"meta": _meta(meta, options), "ceilings": ceilings, "rows": rows}
    text = json.dumps(document, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    for row in rows:
        if row["operator"] == "all":
            print(
                *(f"{row[k]}" for k in ("held_out", "corrections", "operation", "value", "calls"))
            )


def read(path: Path) -> tuple[dict[str, Any], dict[str, Times]]:
    """A file's meta, and its times by call; candidates that failed are left out."""
    document = json.loads(path.read_text(encoding="utf-8"))
    calls = document["calls"] | document.get("residual_with_norm", {})
    found: dict[str, Times] = {}
    for key, candidates in calls.items():
        found[key] = [(name, config_of(c), us) for name, c, us, _ in candidates if us is not None]
    return document["meta"], found


def config_of(config: Any) -> Config:
    """A configuration, also where it was written as `name=value name=value`."""
    if isinstance(config, Mapping):
        return config
    return {name: _value(text) for name, _, text in (c.partition("=") for c in config.split())}


def _value(text: str) -> int | str | bool:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def chip_named(gpu: str) -> Chip:
    """The chip of a file."""
    return next(chip for chip in KNOWN if chip.name == gpu)


def keys_of(size: str) -> set[str]:
    """The keys of a network's calls at a size, batch 2, with its optional inputs and without."""
    family, _, sides = size.partition(":")
    width, height = map(int, sides.split("x"))
    plan = Plan.from_json(json.loads((PLANS / f"{family}.json").read_text(encoding="utf-8")))
    sizes = {"batch": 2, "height": height // 8, "width": width // 8, "tokens": 77}
    dims = {name: sizes[name] for name in plan.dims}
    bare = plan.without(entry.name for entry in plan.inputs if entry.optional)
    calls = calls_of(bare, dims, torch.float16) + calls_of(plan, dims, torch.float16)
    return {call.key for call in calls}


def split(
    measured: Mapping[str, Times], size: str, sizes: Mapping[str, set[str]]
) -> tuple[dict[str, Times], dict[str, Times]]:
    """What may be known, and what is judged: the size's calls that no other size has, too."""
    others = set().union(*(keys for name, keys in sizes.items() if name != size))
    known = {key: times for key, times in measured.items() if key not in sizes[size]}
    held = {
        key: times
        for key, times in measured.items()
        if key in sizes[size] and key not in others and len(times) > 1
    }
    return known, held


def kept(times: Times) -> Times:
    """What a profile's entry keeps of a call's candidates."""
    return sorted(times, key=lambda time: time[2])[: 1 + OTHERS]


def evaluate(chip: Chip, measured: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Rows of every size that is held out, of every kind of correction."""
    sizes = {size: keys_of(size) for size in SIZES}
    rows: list[dict[str, Any]] = []
    pooled: dict[str, dict[str, Sequence[float]]] = defaultdict(dict)
    for size in (*HELD_OUT, *BEYOND):
        known, held = split(measured, size, sizes)
        fitted = fit(chip, known)
        knowledge: dict[str, dict[str, Times]] = {
            "all": known,
            "entries": {key: kept(times) for key, times in known.items() if times},
            "none": {},
        }
        for corrections, neighbours in knowledge.items():
            ranked = judge(Model(chip, fitted, neighbours), held)
            rows += _rows(ranked, size, corrections)
            if size in HELD_OUT:
                pooled[corrections] |= ranked
    for corrections, ranked in pooled.items():
        rows += _rows(ranked, " + ".join(HELD_OUT), corrections)
    return rows + single_shapes(chip, measured)


def single_shapes(chip: Chip, measured: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Rows of calls that are held out by fifths, each fifth from a fit and neighbours of its own.

    The rest of a call's size is known then: what tuning leaves out of a size it has begun with.
    """
    keys = sorted(key for key, times in measured.items() if len(times) > 1)
    ranked: dict[str, Sequence[float]] = {}
    for part in range(PARTS):
        held = {key: measured[key] for key in keys[part::PARTS]}
        known = {key: times for key, times in measured.items() if key not in held}
        ranked |= judge(Model(chip, fit(chip, known), known), held)
    return _rows(ranked, f"every call, by {PARTS} parts", "all")


def transferred(
    chip: Chip, measured: Mapping[str, Times], other: Chip, elsewhere: Mapping[str, Times]
) -> list[dict[str, Any]]:
    """Rows of constants that were fitted on another GPU's times of all sizes."""
    held = {key: times for key, times in measured.items() if len(times) > 1}
    fitted = fit(other, elsewhere)
    rows = _rows(judge(Model(chip, fitted), held), "everything", f"none, fit of {other.name}")
    carried = judge(Model(chip, fitted, elsewhere), held)
    return rows + _rows(carried, "everything", f"all times of {other.name}")


def judge(model: Model, held: Mapping[str, Times]) -> dict[str, Sequence[float]]:
    """The measured times of each call's candidates, as the model ranks them."""
    found = {}
    for key, times in held.items():
        candidates = [(_kernel(name, call_of(key)), config) for name, config, _ in times]
        us = {(name, json.dumps(dict(config))): us for name, config, us in times}
        ranked = model.rank(call_of(key), candidates)
        found[key] = [us[r.kernel.name, json.dumps(dict(r.config))] for r in ranked]
    return found


def _kernel(name: str, call: Call) -> Kernel:
    return Kernel(name, call.op, lambda *_: None, ("cuda",))  # type: ignore[arg-type,return-value]


def _rows(
    ranked: Mapping[str, Sequence[float]], size: str, corrections: str
) -> list[dict[str, Any]]:
    """For all operators together and for each."""
    groups: dict[str, list[Sequence[float]]] = {"all": list(ranked.values())}
    for key, times in ranked.items():
        groups.setdefault(key.partition("(")[0], []).append(times)
    rows = []
    for operator, group in groups.items():
        values = {
            "tuning_regret": sum(t[0] for t in group) / sum(min(t) for t in group) - 1,
            "worst_regret": max(t[0] / min(t) for t in group) - 1,
            "top4_hit": _share(min(t[:TOP]) <= CLOSE * min(t) for t in group),
        }
        for operation, value in values.items():
            rows.append(
                {
                    "operation": operation,
                    "value": round(value, 4),
                    "held_out": size,
                    "corrections": corrections,
                    "operator": operator,
                    "calls": len(group),
                }
            )
    return rows


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _meta(measured: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    )
    kept = ("gpu", "driver", "torch", "cuda", "cudnn", "triton")
    command = f"python -m benchmarks.tuning_regret {options.candidates}"
    if options.transfer:
        command += f" --transfer {options.transfer}"
    return {
        **{name: measured[name] for name in kept},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "note": NOTE,
    }


if __name__ == "__main__":
    main()
