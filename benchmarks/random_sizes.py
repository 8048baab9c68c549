"""An engine at image sizes drawn at random: how fast, and how soon.

    python -m benchmarks.random_sizes --out random_sizes.json [--models sd15,sdxl] [--sizes 12]

Sides are multiples of 8 from 512 to 1536 pixels, the same for every model; batch 2, fp16, random
weights. Caches of kernels and plans begin empty, in a folder of the run's own. Rows by `operation`:

engine_build, engine_fetch: ms from a network in memory to its engine's first result, without the
time of seating the weights (`weights_ms`): with the caches empty, and in a later process.
new_size: ms that the first call at a size takes beyond a later one, and how many pieces of code
were `compiled` for it. All sizes one after another in one process, in which kernels had been
compiled ahead. random_size_mfu: of what the GPU reaches at the nearest of the `ANCHORS`, each the
first size of its own process, the share at this one. random_size_gain: by how much longer all sizes
together take (`over`) with the libraries' kernels alone, and with the choices that were measured at
1024² lent to all sizes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accel import kernels
from accel.bench import results
from accel.bench.engines import EngineVariant, executables
from accel.bench.measure import describe_machine
from accel.bench.networks import Case, case_of, make_inputs, make_networks, release_memory
from accel.bench.process import run_isolated
from accel.bench.timing import enter, seconds, timed
from accel.kernels import Call
from accel.plan.schema import Plan
from accel.runtime.calls import calls_at
from accel.session import Session
from accel.tuning.profile import Entry, Profile, family_of
from accel.tuning.select import Choice, Selector, _adopted

ANCHORS = ((512, 512), (1024, 1024), (1536, 1536))
LIMITS_MS = {"new_size": 500.0, "engine_fetch": 1000.0, "engine_build": 15000.0}
SEED, ITERATIONS, TIMEOUT = 5, 20, 900.0

Size = tuple[int, int]


def main() -> None:
    """Run every model and write one JSON object, after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="sd15,sdxl")
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=results.UNKNOWN)
    options = parser.parse_args()
    command = f"python -m benchmarks.random_sizes --models {options.models} --seed {options.seed}"
    machine = run_isolated(
        describe_machine, options.device, options.commit, command, timeout=TIMEOUT
    )
    sizes = drawn(options.sizes, options.seed)
    document = results.new_document(machine, __doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        for model in options.models.split(","):
            case = case_of(model, ANCHORS[1])
            ceiling = machine["ceilings"]["matmul_tflops"]
            for row in rows_of(case, sizes, options.device, Path(folder), ceiling):
                document["rows"].append(row)
                results.save(document, options.out)  # what was measured stays, whatever comes


def drawn(count: int, seed: int) -> list[Size]:
    """Sizes at random."""
    generator = random.Random(seed)
    sides = range(512, 1537, 8)
    return [(generator.choice(sides), generator.choice(sides)) for _ in range(count)]


def rows_of(
    case: Case,
    sizes: Sequence[Size],
    device: str,
    folder: Path,
    ceiling: float,
    isolated: bool = True,
    anchors: Sequence[Size] = ANCHORS,
) -> Iterator[dict[str, Any]]:
    """The rows of a model, as they are measured. ceiling: TFLOP/s of a large product."""

    def run(what: str, kind: str, at: Sequence[Size]) -> dict[str, Any]:
        say(f"{case.model}: {what}")
        if not isolated:
            return measured(case, kind, at, device, folder)
        found: dict[str, Any] = run_isolated(
            measured, case, kind, at, device, folder, timeout=TIMEOUT
        )
        return found

    def start(operation: str, found: Mapping[str, Any]) -> dict[str, Any]:
        names = ("weights_ms", "settled_s")
        facts = {name: found[name] for name in names}
        return _row(case, operation, ms=found["start_ms"], **facts)

    yield start("engine_build", run("caches are empty", "engine", [(case.width, case.height)]))
    engine = run("sizes at random", "engine", [(case.width, case.height), *sizes])
    yield start("engine_fetch", engine)
    own = engine["sizes"][1:]
    for size in own:
        extra = size["first_ms"] - size["ms"]
        yield _row(case, "new_size", **_place(size), ms=extra, compiled=size["compiled"])
    nearest = [run(f"{w}x{h}", "engine", [(w, h)])["sizes"][0] for w, h in anchors]
    for size in own:
        like = min(nearest, key=lambda anchor: abs(_pixels(anchor) - _pixels(size)))
        share = (size["tflop"] / size["ms"]) / (like["tflop"] / like["ms"])
        facts = {"ms_step": size["ms"], "mfu": size["tflop"] / size["ms"] * 1e3 / ceiling}
        of = f"{like['width']}x{like['height']}"
        yield _row(case, "random_size_mfu", **_place(size), value=share, of=of, **facts)
    total = sum(size["ms"] for size in own)
    for over, what, kind in (
        ("libraries", "libraries alone", "libraries"),
        ("tuned at one size", "tuned at one size", "one"),
    ):
        found = run(what, kind, sizes)["sizes"]
        gain = sum(size["ms"] for size in found) / total - 1
        yield _row(case, "random_size_gain", value=gain, over=over, sizes=len(own))


def _place(size: Mapping[str, Any]) -> dict[str, int]:
    return {"width": size["width"], "height": size["height"]}


def _row(case: Case, operation: str, **facts: Any) -> dict[str, Any]:
    row = {"operation": operation, "model": case.model, "batch": case.batch, **facts}
    return row | ({"limit_ms": LIMITS_MS[operation]} if operation in LIMITS_MS else {})


def _pixels(size: dict[str, Any]) -> int:
    return int(size["width"] * size["height"])


def measured(
    case: Case, kind: str, sizes: Sequence[Size], device_name: str, folder: Path
) -> dict[str, Any]:
    """An engine at one size after another.

    kind: of its kernels: "engine", "libraries", or "one" for the choices measured at the case's
    size, lent to all.
    """
    device = enter(device_name)
    networks = make_networks(case, device)
    networks.each(lambda network: network.to("cpu"))
    release_memory(device)
    session = _session(case, kind, device, folder)
    variant = EngineVariant(case, networks, device, session=session)
    selector, times = variant.session._selector, variant.unet.times
    if isinstance(selector, _OfOneSize):
        selector.lend(variant.unet._network.plan, case)
    rows: list[dict[str, Any]] = []
    start_ms = settled_s = 0.0
    for width, height in sizes:
        here = case.resized(width, height)
        inputs, compiled = make_inputs(here, 0, device), selector.compiler.waited_for
        first_ms = 1e3 * seconds(partial(variant, inputs), device)
        compiled = selector.compiler.waited_for - compiled
        if not rows:
            start_ms = 1e3 * times["plan_seconds"] + first_ms
            settled_s = seconds(variant.session.settle, device)
        bound = executables(variant.unet)[-1]
        tflop = sum(call.flops for _, call, _ in bound.calls()) / 1e12
        ms = timed(partial(variant, inputs), device, ITERATIONS)["ms"]
        facts = {"first_ms": first_ms, "compiled": compiled, "ms": ms, "tflop": tflop}
        rows.append({"width": width, "height": height, **facts})
    return {
        "sizes": rows,
        "start_ms": start_ms,
        "weights_ms": 1e3 * times["weights_seconds"],
        "settled_s": settled_s,
    }


def _session(case: Case, kind: str, device: Any, folder: Path) -> Session:
    session = Session(device, case.precision, folder)
    own = session._selector
    if kind != "engine":
        chooser = _Libraries if kind == "libraries" else _OfOneSize
        profile = Profile(own.hardware, None)
        session._selector = chooser(own.compiler, own.device, profile, measuring=False)
    return session


class _Libraries(Selector):
    """Chooses the libraries' kernels, and ours for what they do not have."""

    def _known(self, key: str, call: Call) -> Choice:
        return self._library(call)

    def prepare(self, *arguments: Any) -> None:
        """There is nothing to compile ahead."""


class _OfOneSize(_Libraries):
    """Lends what was measured at one size to all, however far; else a library's."""

    lent: Mapping[str, Mapping[int, Entry]] = {}

    def lend(self, plan: Plan, case: Case) -> None:
        """Know from now on what was measured of the calls of the case's size."""
        found: dict[str, dict[int, Entry]] = defaultdict(dict)
        for call in calls_at(plan, case.width, case.height, case.batch):
            entry = self.profile.get(call.key)
            if entry is not None:
                family, rows = family_of(call.key)
                found[family][rows] = entry
        self.lent = found

    def _known(self, key: str, call: Call) -> Choice:
        family, rows = family_of(key)
        known = self.lent.get(family, {})
        for other in sorted(known, key=lambda other: abs(math.log(other / rows))):
            candidates = kernels.candidates(call, self.hardware)
            found = _adopted(known[other], call, candidates, self.hardware)
            if found is not None:
                return Choice(*found, "measured at one size", about=known[other].us * rows / other)
        return self._library(call)


def say(text: str) -> None:
    """Tell what is being done, and since when."""
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
