"""How good the performance model's choices are, on times of all candidates that were measured.

    python -m benchmarks.tuning_regret benchmarks/results/h200/candidates.json \
        --transfer benchmarks/results/h100/candidates.json --out tuning_regret.json

Needs no GPU. Whole image sizes are held out, one after another: no call of such a size, also where
another size has the same, is in what the constants are fitted on, nor among the neighbours. Then
the model ranks the candidates of that size's calls, and is judged by their measured times:

tuning_regret: how much longer than with each call's best candidate the chosen ones take in all.
worst_regret: the same of the worst call. over_tenth: the share of calls where it is more than a
tenth. top4_hit: the share of calls whose first four have one within 2 % of the best. Each call
counts once; those of one candidate do not.

same_launch_*: what of that may be noise. Some GroupNorms have two configurations that make the very
same launches; by how much the slower of their times is over the other, of calls of under 5 us and
of others. None of the regrets is corrected by it.

What prediction leaves open timing decides. after_top2_*, after_top3_*, after_top4_*: the regrets
when the fastest of the first so many of each call is chosen. after_idle_*: when in idle time those
are timed which the model expects to win something (`Model.contenders`), round after round; and what
that costs: after_idle_timings, those of them that are of kernels that are compiled for it
(after_idle_compiled), the calls of which anything is timed (after_idle_calls), and the seconds that
the GPU works (after_idle_gpu_s). The times that decide are those that judge, so noise of measuring
is not in these.

`corrections` says what is known of other sizes: `all` candidates of a call, `entries` what a
profile keeps of it (the best five), or `none` (the constants alone). With --transfer the constants
come from another GPU's times, and nothing is known of this one but its data sheet. `the best on` it
says what no prediction was needed for: each call's fastest candidate there, measured there, run
here. An H100 and an H200 have the same multiprocessors and libraries, and differ in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel.compiler import SHIPPED as PLANS
from accel.kernels.registry import Call, Config, Kernel
from accel.plan.schema import Plan
from accel.runtime.calls import calls_of
from accel.tuning import measure as measuring
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
    "were set with a view to results of this kind on both GPUs. On the H100 each candidate was "
    "timed once, and a few are off by far (30.8 us where the same launch under another name takes "
    "3.8); on the H200 those close to the best five times. The worst call tells of that, too: see "
    "same_launch_*"
)

TOP, CLOSE = 4, 1.02

OURS = ("triton.", "cuda.")
"""How the names of kernels begin that are compiled."""


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
    pooled: dict[str, dict[str, Judged]] = defaultdict(dict)
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
    return rows + single_shapes(chip, measured) + noise(measured)


def noise(measured: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Rows of how far two times of one launch differ, under two names.

    Names that differ in `grid` alone, which is a wish: no image has more blocks than tiles.
    """
    pairs: dict[str, list[float]] = {"under 5 us": [], "from 5 us": []}
    for key, times in measured.items():
        alike: dict[str, list[float]] = defaultdict(list)
        for name, config, us in times:
            if "grid" in config:
                batch, *sides, width = call_of(key).out.shape[-4:]
                columns = batch * math.ceil(width / int(config["channels"]))
                tiles = math.ceil(math.prod(sides) / int(config["rows"]))
                strips = max(1, min(int(config["grid"]) // columns, tiles))
                alike[f"{name} {dict(config) | {'grid': strips}}"].append(us)
        for found in alike.values():
            if len(found) > 1:
                pairs["under 5 us" if min(found) < 5 else "from 5 us"].append(
                    max(found) / min(found) - 1
                )
    rows = []
    for group, apart in pairs.items():
        apart.sort()
        shares = {"median": 0.5, "p90": 0.9, "worst": 1.0}
        for name, share in shares.items():
            if apart:
                value = apart[min(len(apart) - 1, int(share * len(apart)))]
                rows.append(_row(f"same_launch_{name}", value, "noise", "-", group, len(apart)))
    return rows


def single_shapes(chip: Chip, measured: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Rows of calls that are held out by fifths, each fifth from a fit and neighbours of its own.

    The rest of a call's size is known then: what tuning leaves out of a size it has begun with.
    """
    keys = sorted(key for key, times in measured.items() if len(times) > 1)
    ranked: dict[str, Judged] = {}
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
    carried = judge(Model(chip, fitted, carried=elsewhere, origin=other), held)
    rows += _rows(carried, "everything", f"all times of {other.name}")
    same = {key: _in_order(held[key], elsewhere[key]) for key in held.keys() & elsewhere.keys()}
    return rows + _rows(same, "everything", f"the best on {other.name}")


def _in_order(times: Times, elsewhere: Times) -> Judged:
    """A call's times as they are ranked on another GPU; what was not timed there last."""
    there = {(name, json.dumps(dict(config))): us for name, config, us in elsewhere}
    ranked = sorted(times, key=lambda t: there.get((t[0], json.dumps(dict(t[1]))), math.inf))
    return Judged([us for *_, us in ranked], [])


@dataclass(frozen=True)
class Judged:
    """Measured times of one call.

    ranked: of all candidates, as the model ranks them. rounds: of those that are timed in idle
    time, each with its kernel's name.
    """

    ranked: Sequence[float]
    rounds: Sequence[Sequence[tuple[str, float]]]

    @property
    def best(self) -> float:
        """Of all candidates."""
        return min(self.ranked)

    @property
    def settled(self) -> float:
        """Of what is chosen after idle time."""
        return min((us for timed in self.rounds for _, us in timed), default=self.ranked[0])


def judge(model: Model, held: Mapping[str, Times]) -> dict[str, Judged]:
    """What the model makes of each call."""
    found = {}
    for key, times in held.items():
        call = call_of(key)
        candidates = [(_kernel(name, call), config) for name, config, _ in times]
        us = {(name, json.dumps(dict(config))): us for name, config, us in times}

        def measured(
            pairs: Iterable[tuple[Kernel, Config]], us: Mapping[tuple[str, str], float] = us
        ) -> list[tuple[str, Config, float]]:
            return [(k.name, c, us[k.name, json.dumps(dict(c))]) for k, c in pairs]

        ranked = measured((r.kernel, r.config) for r in model.rank(call, candidates))
        rounds: list[list[tuple[str, Config, float]]] = []
        timed: list[tuple[str, Config, float]] = []
        while more := model.contenders(call, candidates, timed):
            again = sorted(timed, key=lambda time: time[2])[:1]  # as idle time does
            rounds.append(again + measured(more))
            timed += rounds[-1][len(again) :]
        found[key] = Judged(
            [us for *_, us in ranked], [[(n, us) for n, _, us in r] for r in rounds]
        )
    return found


def _kernel(name: str, call: Call) -> Kernel:
    return Kernel(name, call.op, lambda *_: None, ("cuda",))  # type: ignore[arg-type,return-value]


def _rows(ranked: Mapping[str, Judged], size: str, corrections: str) -> list[dict[str, Any]]:
    """For all operators together and for each."""
    groups: dict[str, list[Judged]] = {"all": list(ranked.values())}
    for key, judged in ranked.items():
        groups.setdefault(key.partition("(")[0], []).append(judged)
    rows = []
    for operator, group in groups.items():
        values = _regrets(group, [j.ranked[0] for j in group], "tuning_regret", "worst_regret")
        values["over_tenth"] = _share(j.ranked[0] > 1.1 * j.best for j in group)
        values["top4_hit"] = _share(min(j.ranked[:TOP]) <= CLOSE * j.best for j in group)
        if operator == "all":
            for top in range(2, TOP + 1):
                chosen = [min(j.ranked[:top]) for j in group]
                values |= _regrets(group, chosen, f"after_top{top}_regret", f"after_top{top}_worst")
        rounds = [timed for j in group for timed in j.rounds]
        if operator == "all" and rounds:
            chosen = [j.settled for j in group]
            values |= _regrets(group, chosen, "after_idle_regret", "after_idle_worst")
            own = [name for timed in rounds for name, _ in timed if name.startswith(OURS)]
            values |= {
                "after_idle_calls": sum(bool(j.rounds) for j in group),
                "after_idle_timings": sum(map(len, rounds)),
                "after_idle_compiled": len(own),
                "after_idle_gpu_s": 1e-6 * sum(timing_us([us for _, us in r]) for r in rounds),
            }
        for operation, value in values.items():
            rows.append(_row(operation, value, size, corrections, operator, len(group)))
    return rows


def _row(
    operation: str, value: float, held_out: str, corrections: str, operator: str, calls: int
) -> dict[str, Any]:
    return {
        "operation": operation,
        "value": round(value, 4),
        "held_out": held_out,
        "corrections": corrections,
        "operator": operator,
        "calls": calls,
    }


def _regrets(
    group: Sequence[Judged], chosen: Sequence[float], together: str, worst: str
) -> dict[str, float]:
    """How much longer than the best the chosen ones take, together and at worst."""
    return {
        together: sum(chosen) / sum(j.best for j in group) - 1,
        worst: max(us / j.best for us, j in zip(chosen, group, strict=True)) - 1,
    }


def timing_us(times: Sequence[float]) -> float:
    """Microseconds that the GPU works while candidates of a call that take so long are timed."""
    if not times:
        return 0.0
    best, total = min(times), 0.0
    for us in times:
        once = us * measuring.LAUNCHES
        replays = min(
            measuring.REPLAYS,
            max(measuring.ENOUGH_REPLAYS, -(-measuring.ENOUGH_US // once)),
        )
        rounds = 1 + (measuring.ROUNDS if us <= measuring.CLOSE * best else 0)
        total += 3 * us + rounds * replays * (once + 60)  # 60: the cache is emptied, events
    return total


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
