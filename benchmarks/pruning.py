"""What `accel tune` times and what its performance model rules out, on times that are recorded.

    python -m benchmarks.pruning benchmarks/results/h200/candidates.json --out pruning.json

Needs no GPU. `accel.tuning.tune.tune` itself runs, as if nothing were known, but takes each time
from the file of all candidates' times. Rows:

pruning_share: of the candidates, how many are timed. pruning_regret: how much longer the fastest of
those take than the fastest of all, in all; pruning_worst: the same of the worst call. By `calls`:
all, and those alone of which candidates were ruled out.
tune_candidates, tune_seconds: for `accel tune` of SD1.5 and SDXL with their ControlNets from
512² to 1536². Candidates are listed as on that GPU, but for the libraries' own algorithms, of which
as many are assumed as the file has of its calls. Seconds are those of the GPU, by times that the
model predicts; of the model itself, as it takes here; and of the host, by what `COSTS` assumes:
it knows nothing of how long cuDNN takes to make its plans. Nor is counted what the model says
nothing of, which `accel tune` times (`cost.NEAR_BY_ALONE`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from accel import kernels
from accel.cli.tune import FAMILIES, _calls
from accel.hardware import Hardware
from accel.kernels import Call, Config, Kernel
from accel.tuning import measure as measuring
from accel.tuning import tune as tuning
from accel.tuning.calibration import KEEP, Calibration
from accel.tuning.chips import Chip
from accel.tuning.compiling import _launches
from accel.tuning.cost import Fit, Model, Times, fit
from accel.tuning.keys import call_of
from accel.tuning.profile import Entry, profiled
from accel.tuning.tune import sizes_between

from .tuning_regret import _meta, chip_named, read, timing_us

COSTS = {"call": 0.02, "candidate": 0.006, "compile": 0.35, "start": 5.0, "processes": 16}
"""Seconds of the host, assumed: of a call (operands, reference), of a candidate (its first run, the
comparison, recording its graph), of compiling a kernel in one of so many processes, and until those
have started."""


def main() -> None:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("candidates", type=Path, help="times of all candidates on one GPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    meta, measured = read(options.candidates)
    chip = chip_named(meta["gpu"])
    rows = replayed(chip, measured) + estimated(chip, measured, profiled()[chip.name])
    options.transfer = None
    head = _meta(meta, options) | {
        "command": f"python -m benchmarks.pruning {options.candidates}",
        "note": f"offline; the host's seconds are assumed: {COSTS}",
    }
    ceilings: dict[str, float] = {}  # nothing runs here
    text = json.dumps({"meta": head, "ceilings": ceilings, "rows": rows}, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()))


@dataclass
class _Store:
    """What a run keeps."""

    entries: dict[str, Entry] = field(default_factory=dict)
    fit: Fit | None = None
    place: str = "memory"

    def known(self) -> Mapping[str, Entry]:
        return self.entries

    def add(self, entries: Mapping[str, Entry]) -> None:
        self.entries |= entries

    def keep_fit(self, fit: Fit) -> None:
        self.fit = fit


def replay(
    chip: Chip, measured: Mapping[str, Times], keep: int | None = KEEP
) -> tuple[dict[str, Entry], dict[str, int], Fit | None]:
    """A run of `tune` on recorded times: what it keeps, how many it timed of each call, its fit."""
    registered = _registered()
    timed: dict[str, int] = {}

    def recorded(
        calls: Sequence[Call], compiler: Any, device: Any, prune: measuring.Prune | None
    ) -> Iterator[tuple[Call, list[measuring.Measurement]]]:
        for call in calls:
            us = {(name, _text(config)): time for name, config, time in measured[call.key]}
            found: Sequence[tuple[Kernel, Config]] = [
                (registered[name], config) for name, config, _ in measured[call.key]
            ]
            found = found if prune is None else prune(call, found)
            timed[call.key] = len(found)
            yield (
                call,
                [
                    measuring.Measurement(k, config, us[k.name, _text(config)])
                    for k, config in found
                ],
            )

    store = _Store()
    calibration = Calibration(chip, keep=keep)
    compiler: Any = None  # nothing is compiled
    with mock.patch.object(tuning, "measure", recorded):
        calls = [call_of(key) for key, times in measured.items() if times]
        tuning.tune(calls, compiler, torch.device("cpu"), store, calibration=calibration)
    return store.entries, timed, store.fit


def replayed(chip: Chip, measured: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Rows of a run on recorded times."""
    entries, timed, _ = replay(chip, measured)
    # Times within `TIE` count as equal when the fastest is chosen.
    best = {key: min(us for *_, us in measured[key]) for key in entries}
    pruned = [key for key in entries if timed[key] < len(measured[key])]
    rows = []
    for which, keys in (("all", list(entries)), ("pruned", pruned)):
        values = {
            "pruning_share": sum(timed[k] for k in keys) / sum(len(measured[k]) for k in keys),
            "pruning_regret": sum(_least(entries[k]) for k in keys) / sum(best[k] for k in keys)
            - 1,
            "pruning_worst": max(_least(entries[k]) / best[k] for k in keys) - 1,
        }
        rows += [
            {"operation": name, "value": round(value, 4), "calls": which, "count": len(keys)}
            for name, value in values.items()
        ]
    return rows


def _least(entry: Entry) -> float:
    return min(us for *_, us in entry.times())


def estimated(
    chip: Chip, measured: Mapping[str, Times], hardware: Hardware
) -> list[dict[str, Any]]:
    """Rows of the whole command: how many calls and candidates, and how long they would take."""
    calls = _calls(FAMILIES.split(","), sizes_between(512, 1536), 2)
    algorithms = _algorithms(measured)
    model = Model(chip, fit(chip, measured), measured)
    times: dict[str, Times] = {}
    for call in calls:
        found = [*kernels.candidates(call, hardware)[:-1], *algorithms.get(call.op, ())]
        named = [(kernel.name, config) for kernel, config in found]
        predicted = model.predictions(call, named)
        times[call.key] = [
            (*pair, p.us) for pair, p in zip(named, predicted, strict=True) if p is not None
        ]
    rows = []
    registered = _registered()
    by_key = {call.key: call for call in calls}
    for which, keep in (("exhaustive", None), ("pruned", KEEP)):
        started = time.perf_counter()
        calibration = Calibration(chip, keep=keep)
        full = {call.key for call in calibration.in_full(calls)}
        for key in full:
            calibration.learn(key, times[key])
        kept = {}
        for key, call in by_key.items():
            pairs = [(registered[name], config) for name, config, _ in times[key]]
            worth = pairs if key in full else calibration.worth_timing(call, pairs)
            chosen = {(kernel.name, _text(config)) for kernel, config in worth}
            kept[key] = [t for t in times[key] if (t[0], _text(t[1])) in chosen]
        modelled = time.perf_counter() - started
        codes = _launches(
            (registered[name], config, by_key[key])
            for key, found in kept.items()
            for name, config, _ in found
        )
        count = sum(map(len, kept.values()))
        starts = 1 + -(-(len(calls) - len(full)) // tuning.AT_ONCE)
        seconds = {
            "gpu": sum(timing_us([us for *_, us in found]) for found in kept.values()) * 1e-6,
            "host": COSTS["call"] * len(calls) + COSTS["candidate"] * count,
            "compiling": COSTS["compile"] * len(codes) / COSTS["processes"]
            + COSTS["start"] * starts,
            "model": modelled,
        }
        parts = {name: round(value) for name, value in seconds.items()}
        common = {"which": which, "calls": len(calls), "in_full": len(full), "codes": len(codes)}
        rows += [
            {"operation": "tune_candidates", "value": count, **common},
            {"operation": "tune_seconds", "value": round(sum(seconds.values())), **common, **parts},
        ]
    return rows


def _algorithms(measured: Mapping[str, Times]) -> dict[str, list[tuple[Kernel, Config]]]:
    """By operator the algorithms of libraries that only a GPU lists: those that most calls have."""
    registered = _registered()
    calls: dict[str, int] = defaultdict(int)
    counts: dict[str, dict[str, tuple[int, Kernel, Config]]] = defaultdict(dict)
    for key, times in measured.items():
        op = key.partition("(")[0]
        calls[op] += 1
        for name, config, _ in times:
            if name.startswith(("cublaslt.", "cudnn_frontend.")):
                text = f"{name} {_text(config)}"
                seen = counts[op].get(text, (0, None, None))[0]
                counts[op][text] = (seen + 1, registered[name], config)
    return {
        op: [(kernel, config) for seen, kernel, config in found.values() if 2 * seen > calls[op]]
        for op, found in counts.items()
    }


def _registered() -> dict[str, Kernel]:
    kernels.load_triton()
    return {kernel.name: kernel for kernel in kernels.kernels()}


def _text(config: Config) -> str:
    return json.dumps(dict(config), sort_keys=True)


if __name__ == "__main__":
    main()
