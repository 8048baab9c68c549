"""How long weights take to change: checkpoints from every tier, LoRAs, mixes, beside diffusers'.

    python -m benchmarks.swaps --out swaps.json [--model sdxl] [--checkpoints 8] [--folder DIR]
                               [--only PART,...] [--comfyui PATH]

Random weights at full size in `--checkpoints` files, which are written to the folder first and stay
in the page cache if RAM allows. Each row of an operation has the median, fastest and slowest of
its times (`ms`, until the weights are in place and the device is done), `bytes` written to the
arena, `tier` that they came from, `limit_ms` (what the bus or the card's memory needs for the bytes
that move, by the copies measured in this run), `must_ms` where there is a bound to hold, and
`first_step_ms` of the forward after it. LoRAs' `factors` are where their own tensors came from.
`step_beside_prefetch` is a step, on its own stream to its end, while the next checkpoint is fetched
to `tier`; `alone_ms` is the same while none is. All of it is checked: the last checkpoint, without
LoRAs, must give a fresh engine's output bit for bit. Diffusers' rows have `variant` "diffusers";
"comfyui" are those of ComfyUI's own loader and patcher with the same files, where one is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel import Engine, Session
from accel.bench import results
from accel.bench.machine import UNKNOWN, ceilings, commit, meta
from accel.bench.networks import (
    Case,
    Inputs,
    case_of,
    make_inputs,
    make_module,
    random_lora,
    release_memory,
)
from accel.bench.timing import enter, seconds, synchronize, timed
from accel.demo.audition import Options, run_audition
from accel.demo.material import SUPPORTED
from accel.models import UNetConfig, parameters
from accel.runtime.pool import PINNED, Pool

ENOUGH = 1 << 50
SWAPS = 20
FORWARDS, TURNS = 30, 5
ROUNDS = 2
LORA_ROUNDS = 7
WARMUPS = 5
FETCHES = {"device": 4, "pinned RAM": 2}
COMFYUI_SECONDS = 120

PARTS = (
    *("checkpoints", "mixes", "prefetch", "loras", "schedule", "forwards"),
    *("diffusers", "comfyui", "audition"),
)
LORA_PARTS = ("loras", "schedule", "forwards", "comfyui")

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


def main() -> None:
    """Measure one model and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--commit")
    parser.add_argument("--skip-diffusers", action="store_true")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--only-loras", action="store_true", help=f"= {','.join(LORA_PARTS)}")
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI's folder, to be measured beside")
    arguments = parser.parse_args()
    parts = chosen(arguments)
    device = enter(arguments.device)
    width, height = (int(side) for side in arguments.size.split("x"))
    case = case_of(arguments.model, (width, height), precision=arguments.precision)
    command = f"python -m benchmarks.swaps --model {arguments.model} --size {arguments.size}"
    if set(parts) != set(PARTS):
        command += f" --only {','.join(parts)}"
    machine = {
        "meta": meta(arguments.commit or commit() or UNKNOWN, command, device),
        "ceilings": ceilings(device),
    }
    document = results.new_document(machine, "random weights; swaps timed on the host's clock")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for row in measure(
            case,
            device,
            Path(folder),
            machine["ceilings"],
            arguments.checkpoints,
            parts,
            arguments.comfyui,
        ):
            document["rows"].append(case.facts | row)
            results.save(document, arguments.out)  # what was measured stays, whatever comes


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The parts to measure, in order."""
    only = LORA_PARTS if arguments.only_loras else PARTS
    if arguments.only:
        only = tuple(arguments.only.split(","))
        if unknown := set(only) - set(PARTS):
            raise SystemExit(f"--only: {', '.join(sorted(unknown))}: use {', '.join(PARTS)}")
    skipped = {"diffusers"} if arguments.skip_diffusers else set()
    if arguments.comfyui is None:
        skipped.add("comfyui")
    if arguments.model not in SUPPORTED:
        skipped.add("audition")
    return [part for part in PARTS if part in only and part not in skipped]


def say(text: str) -> None:
    """Tell what is being done."""
    print(text, file=sys.stderr, flush=True)


def measure(
    case: Case,
    device: torch.device,
    folder: Path,
    limits: dict[str, float | None],
    checkpoints: int = 8,
    parts: Collection[str] = PARTS,
    comfyui: Path | None = None,
) -> Iterator[Row]:
    """The rows of a case, each once it is measured.

    folder: where the checkpoints are written. limits: `ceilings`. parts: of `PARTS`. comfyui: a
    ComfyUI's folder, which that part needs.
    """
    say(f"writing {checkpoints} checkpoints")
    files = write_checkpoints(case, device, folder, checkpoints)
    own: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "checkpoints": Bench.checkpoints,
        "mixes": Bench.mixes,
        "prefetch": Bench.prefetch,
        "loras": Bench.loras,
        "schedule": Bench.schedule,
        "forwards": Bench.forwards,
    }
    if not own.keys().isdisjoint(parts):
        bench = Bench(case, device, files, limits)
        for part, rows in own.items():
            if part in parts:
                yield from rows(bench)
        bench.close()
    if "diffusers" in parts:
        yield from diffusers_rows(case, device, files)
    if "comfyui" in parts:
        assert comfyui is not None
        yield from comfyui_rows(case, device, files, comfyui)
    if "audition" in parts:
        yield audition_row(folder, (case.width, case.height), str(device))


def write_checkpoints(case: Case, device: torch.device, folder: Path, count: int) -> list[Path]:
    """Distinct files of one structure in the case's precision."""
    module = make_module(case.config, 0, device, case.dtype)
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    paths = []
    for index in range(count):
        paths.append(folder / f"checkpoint-{index}.safetensors")
        factor = 1 + 0.01 * index
        save_file({name: (value * factor).cpu() for name, value in state.items()}, paths[-1])
    release_memory(device)
    return paths


class Bench:
    """One engine whose pool's budgets decide which tier a checkpoint comes from."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        files: Sequence[Path],
        limits: dict[str, float | None],
    ) -> None:
        self.case, self.device, self.files, self.limits = case, device, files, limits
        self.pool = Pool({str(device): 0, PINNED: 0})
        self.session, self.engine = self.another(self.pool)
        self.inputs: Inputs = make_inputs(case, 0, device)
        say("binding the size")
        self.engine.load_weights(files[0])
        self.forward()
        self.fresh = self.forward().clone()
        self.fresh_ms = timed(self.forward, device, FORWARDS)["ms"]
        self.arena = int(self.engine.report()["weights_bytes"])
        self.stored = files[0].stat().st_size

    @cached_property
    def five(self) -> list[tuple[Path, float]]:
        """LoRAs in files beside the checkpoints, and strengths: the one of rank 32, four others."""
        kinds = [random_lora(self.case.config), *mixed_loras(self.case.config)]
        found = []
        for index, (one, strength) in enumerate(zip(kinds, (0.8, 0.3, 0.4, 0.5, 0.6), strict=True)):
            path = self.files[0].with_name(f"lora-{index}.safetensors")
            save_file(one, path)
            found.append((path, strength))
        return found

    @property
    def lora(self) -> Path:
        """The one of rank 32."""
        return self.five[0][0]

    def close(self) -> None:
        """Give the memory back."""
        self.pool.shrink(str(self.device))
        self.pool.shrink(PINNED)
        del self.engine
        release_memory(self.device)

    def another(self, pool: Pool) -> tuple[Session, Engine]:
        """A session and its engine, which share nothing with those of another pool."""
        module = make_module(self.case.config, 0, torch.device("cpu"), self.case.dtype)
        session = Session(self.device, self.case.precision, pool=pool)
        return session, session.engine(module)

    def forward(self, engine: Engine | None = None) -> Tensor:
        """One call of the engine."""
        output: Tensor = (engine or self.engine).call((), self.inputs.arguments)
        return output

    def budgets(self, device: int, pinned: int) -> None:
        """Bytes of the pool's tiers; what they no longer hold goes."""
        self.pool.set_budget(str(self.device), device)
        self.pool.set_budget(PINNED, pinned)

    def across_the_bus(self, count: int) -> float:
        """Milliseconds in which so many bytes reach the device; on a CPU, are copied."""
        gbps = self.limits["h2d_gbps"]
        return count / (gbps * 1e6) if gbps else self.within(count)

    def within(self, count: int) -> float:
        """Milliseconds in which the device copies so many bytes from one place to another."""
        tbps = self.limits["copy_tbps"]
        assert tbps is not None
        return 2 * count / (tbps * 1e9)

    def row(
        self,
        operation: str,
        changes: Sequence[Callable[[], Any]],
        limit: Callable[[int], float],
        must: Callable[[float], float] | None = None,
        moved: int | None = None,
        **facts: Any,
    ) -> Row:
        """Time changes of the same kind, each with the forward after it.

        limit: milliseconds for the bytes that move: `moved`, or those that were written. must: the
        bound that is promised, given the limit.
        """
        say(f"{operation} {facts}")
        times, firsts, written = [], [], 0
        for change in changes:
            synchronize(self.device)
            started = time.perf_counter()
            report = change()
            synchronize(self.device)
            times.append((time.perf_counter() - started) * 1e3)
            written = report.bytes
            firsts.append(seconds(self.forward, self.device) * 1e3)
        limit_ms = limit(written if moved is None else moved)
        row: Row = {
            "variant": "engine",
            "operation": operation,
            "ms": statistics.median(times),
            "ms_min": min(times),
            "ms_max": max(times),
            "bytes": written,
            "limit_ms": limit_ms,
            "first_step_ms": statistics.median(firsts),
            **facts,
        }
        if must is not None:
            row["must_ms"] = must(limit_ms)
            row["held"] = row["ms"] <= row["must_ms"]
        return row

    def checkpoints(self) -> Iterator[Row]:
        """Checkpoints in turn from files, from pinned RAM, and from the device."""
        loads = [lambda path=path: self.engine.load_weights(path) for path in self.files] * ROUNDS
        self.budgets(0, 0)
        yield self.row(
            "checkpoint_file",
            loads,
            self.across_the_bus,
            lambda limit: 800.0,
            moved=self.stored,
            tier="page cache",
        )
        for operation, tier, device, pinned in (
            ("checkpoint_pinned", "pinned RAM", 0, ENOUGH),
            ("checkpoint_seat", "device", ENOUGH, 0),
        ):
            self.budgets(device, pinned)
            began = time.perf_counter()
            for path in self.files:
                self.engine.prefetch(path).result()
            fetched = (time.perf_counter() - began) * 1e3 / len(self.files)
            held = self.pool.report()["tiers"][str(self.device) if device else PINNED]
            facts = {"tier": tier, "waiting": held["blocks"], "prefetch_ms": fetched}
            if held["blocks"] < len(self.files):
                say(f"only {held['blocks']} of {len(self.files)} checkpoints fit: {tier}")
            if tier == "device":
                yield self.row(
                    operation, loads, self.within, lambda limit: 12.0, moved=self.arena, **facts
                )
            else:
                yield self.row(
                    operation,
                    loads,
                    self.across_the_bus,
                    lambda limit: 1.25 * limit,
                    moved=self.stored,
                    **facts,
                )

    def loras(self) -> Iterator[Row]:
        """One LoRA on, stronger, off, then five at once; with the bare weights parked and not."""
        path = self.lora
        for tier, device, pinned in (("device", ENOUGH, 0), ("pinned RAM", 0, ENOUGH)):
            self.budgets(device, pinned)
            self.engine.set_loras([])
            if pinned:
                self.engine.prefetch(self.files[0]).result()
            self.engine.load_weights(self.files[0])
            parked = tier == "device"
            limit = self.within if parked else self.across_the_bus

            def bound(limit_ms: float, parked: bool = parked) -> float:
                return 60.0 if parked else 1.25 * limit_ms

            for _ in range(2):  # the file is parsed once, and its first use parks the bare weights
                self.engine.set_loras([(path, 0.5)])
                self.engine.set_loras([])
            if parked:
                fresh = path.with_name("fresh-lora.safetensors")
                fresh.write_bytes(path.read_bytes())
                change = partial(self.engine.set_loras, [(fresh, 0.8)])
                facts = {"tier": tier, "loras": 1, "factors": "page cache"}
                yield self.row("lora_first_on", [change], limit, **facts)
                self.engine.set_loras([])
            factors = "device" if parked else "RAM"
            times: dict[str, list[Any]] = {"lora_on": [], "lora_strength": [], "lora_off": []}
            for _ in range(LORA_ROUNDS):
                for operation, chosen in (
                    ("lora_on", [(path, 0.8)]),
                    ("lora_strength", [(path, 0.3)]),
                    ("lora_off", []),
                ):
                    times[operation].append(
                        self.row(
                            operation,
                            [lambda chosen=chosen: self.engine.set_loras(chosen)],
                            limit,
                            bound,
                            tier=tier,
                            loras=1,
                            factors=factors,
                        )
                    )
            yield from map(_merged, times.values())
            self.engine.set_loras(self.five)
            self.engine.set_loras([])
            rounds = []
            for _ in range(LORA_ROUNDS):
                rounds.append(
                    self.row(
                        "lora_on",
                        [lambda: self.engine.set_loras(self.five)],
                        limit,
                        lambda limit_ms: 200.0,
                        tier=tier,
                        loras=5,
                        factors=factors,
                    )
                )
                self.engine.set_loras([])
            yield _merged(rounds)

    def schedule(self) -> Iterator[Row]:
        """A switch of LoRAs between two steps, which must take less than a step."""
        self.budgets(ENOUGH, 0)
        self.engine.set_loras([])
        self.engine.load_weights(self.files[0])
        path = self.lora
        self.engine.schedule_loras([(path, 0.8, 0.0, 0.5)])
        self.engine.at_step(0, 2)
        facts = {"tier": "device", "loras": 1, "factors": "device"}
        times: dict[str, list[Any]] = {"off": [], "on": []}
        for _ in range(LORA_ROUNDS):
            for step, to in ((1, "off"), (0, "on")):
                switch = partial(self.engine.at_step, step, 2)
                row = self.row(
                    "lora_schedule", [switch], self.within, lambda limit: self.fresh_ms, **facts
                )
                times[to].append(row | {"to": to})
        yield from map(_merged, times.values())
        self.engine.set_loras([])

    def prefetch(self) -> Iterator[Row]:
        """A step while the next checkpoint is fetched, beside as many steps while none is."""
        for tier, device, pinned in (("device", ENOUGH, 0), ("pinned RAM", 0, ENOUGH)):
            say(f"step_beside_prefetch to {tier}")
            self.engine.load_weights(self.files[0])
            self.budgets(0, 0)
            self.budgets(device, pinned)
            alone, beside, fetched = [], [], []
            for path in self.files[1 : 1 + FETCHES[tier]] or self.files:
                self.steps(lambda count: count >= WARMUPS)
                began = time.perf_counter()
                job = self.engine.prefetch(path)
                count, ms = self.steps(lambda count, job=job: count > 0 and job.done())
                fetched.append((time.perf_counter() - began) * 1e3)
                beside.append(ms)
                alone.append(self.steps(lambda done, count=count: done >= count)[1])
            held = self.pool.report()["tiers"][str(self.device) if device else PINNED]
            alone_ms, ms = statistics.median(alone), statistics.median(beside)
            yield {
                "variant": "engine",
                "operation": "step_beside_prefetch",
                "tier": tier,
                "from": "page cache",
                "ms": ms,
                "ms_min": min(beside),
                "ms_max": max(beside),
                "alone_ms": alone_ms,
                "alone_ms_min": min(alone),
                "alone_ms_max": max(alone),
                "prefetch_ms": statistics.median(fetched),
                "waiting": held["blocks"],
                "must_ms": 1.03 * alone_ms,
                "held": ms <= 1.03 * alone_ms,
            }

    def steps(self, enough: Callable[[int], bool]) -> tuple[int, float]:
        """Steps until `enough` of their count: how many, and the mean milliseconds of one.

        Each is waited for, but not what else the device does meanwhile.
        """
        synchronize(self.device)
        started, count = time.perf_counter(), 0
        while not enough(count):
            self.forward()
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            count += 1
        return count, (time.perf_counter() - started) * 1e3 / max(count, 1)

    def mixes(self) -> Iterator[Row]:
        """Two checkpoints mixed from pinned RAM, and a difference of three; from files, too."""
        a, b, c = (self.files[index % len(self.files)] for index in range(3))
        for tier, pinned in (("page cache", 0), ("pinned RAM", ENOUGH)):
            self.budgets(0, pinned)
            for path in (a, b, c) if pinned else ():
                self.engine.prefetch(path).result()
            for operation, parts, change in (
                ("mix", 2, lambda: self.engine.mix([(a, 0.6), (b, 0.4)])),
                ("add_difference", 3, lambda: self.engine.add_difference(a, b, c, 0.5)),
            ):
                moved = parts * self.stored
                yield self.row(operation, [change] * 3, self.across_the_bus, moved=moved, tier=tier)

    def forwards(self) -> Iterator[Row]:
        """A forward after many swaps: as fast as before them, and the same bit for bit."""
        self.budgets(ENOUGH, 0)
        lora = self.lora
        for index in range(SWAPS):
            self.engine.load_weights(self.files[index % len(self.files)])
            self.engine.set_loras([(lora, 0.5)] if index % 2 else [])
        self.engine.set_loras([])
        self.engine.load_weights(self.files[0])
        # By turns with an engine that was made just now: clocks change by more than is asked.
        session, engine = self.another(Pool({str(self.device): 0, PINNED: 0}))
        engine.load_weights(self.files[0])
        equal = torch.equal(self.forward(), self.forward(engine))
        after, fresh = [], []
        for _ in range(TURNS):
            after.append(timed(self.forward, self.device, FORWARDS)["ms"])
            fresh.append(timed(partial(self.forward, engine), self.device, FORWARDS)["ms"])
        del engine, session
        ms, limit = statistics.median(after), statistics.median(fresh)
        yield {
            "variant": "engine",
            "operation": "forward_after_swaps",
            "tier": "device",
            "ms": ms,
            "ms_min": min(after),
            "ms_max": max(after),
            "swaps": SWAPS,
            "limit_ms": limit,
            "must_ms": 1.01 * limit,
            "held": ms <= 1.01 * limit,
            "equal": equal and bool(torch.equal(self.forward(), self.fresh)),
            "pool": self.pool.report(),
        }


def _merged(rows: Sequence[Row]) -> Row:
    """One row of several that timed the same change once each."""
    times = [row["ms"] for row in rows]
    merged = rows[-1] | {
        "ms": statistics.median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "first_step_ms": statistics.median(row["first_step_ms"] for row in rows),
    }
    return merged | {"held": merged["ms"] <= merged["must_ms"]}


def mixed_loras(config: UNetConfig) -> list[dict[str, Tensor]]:
    """Four more LoRAs: low ranks and high ones, convolutions, a LoHa."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    convolutions: dict[str, Tensor] = {}
    hadamard: dict[str, Tensor] = {}
    for name, parameter in parameters(config).items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        shape = parameter.shape
        if name.endswith(".weight") and len(shape) == 4 and "resnets" in name:
            convolutions[f"{layer}.lora_down.weight"] = normal(16, *shape[1:])
            convolutions[f"{layer}.lora_up.weight"] = normal(shape[0], 16, 1, 1)
            convolutions[f"{layer}.alpha"] = torch.tensor(8.0)
        elif name.endswith(".weight") and len(shape) == 2 and ".attn" in name:
            for half in ("w1", "w2"):
                hadamard[f"{layer}.hada_{half}_a"] = normal(shape[0], 8)
                hadamard[f"{layer}.hada_{half}_b"] = normal(8, shape[1])
            hadamard[f"{layer}.alpha"] = torch.tensor(4.0)
    ranks = [random_lora(config, rank, seed) for rank, seed in ((8, 1), (64, 2))]
    return [*ranks, convolutions, hadamard]


def audition_row(folder: Path, size: tuple[int, int], device: str, steps: int = 20) -> Row:
    """Two pictures by each checkpoint of a folder: the part of the time without a step under way.

    The files hold no text encoders and no VAE: random vectors stand in for the prompt, and pictures
    are linear previews.
    """
    say("audition")
    options = Options(folder, folder / "sheet.png", None, size, steps, images=2, device=device)
    result = run_audition(options)
    rest = result.rows[1:]
    return {
        "variant": "engine",
        "operation": "audition",
        "tier": "prefetched",
        "pictures": len(result.rows),
        "steps": steps,
        "ms": statistics.median(row.steps_ms for row in result.rows),
        "ms_min": min(row.steps_ms for row in result.rows),
        "ms_max": max(row.steps_ms for row in result.rows),
        "idle_ms": statistics.median(row.idle_ms for row in rest),
        "swap_ms": statistics.median(row.swap_ms for row in rest if row.swap_ms),
        "idle": result.idle,
        "must_idle": 0.05,
        "held": result.idle <= 0.05,
    }


def diffusers_rows(case: Case, device: torch.device, files: Sequence[Path]) -> Iterator[Row]:
    """The same by diffusers: a file into its module, and a LoRA loaded and fused."""
    unet: Any = make_module(case.config, 0, device, case.dtype)

    def row(operation: str, change: Callable[[], Any], count: int = 3) -> Row:
        say(f"diffusers: {operation}")
        times = [seconds(change, device) * 1e3 for _ in range(count)]
        return {
            "variant": "diffusers",
            "operation": operation,
            "ms": statistics.median(times),
            "ms_min": min(times),
            "ms_max": max(times),
        }

    files_in_turn = iter([*files, *files, *files])

    def load() -> None:
        unet.load_state_dict(load_file(next(files_in_turn), device=str(device)))

    yield row("checkpoint_file", load) | {"tier": "page cache"}
    lora = peft_lora(random_lora(case.config), case.config)

    def fuse() -> None:
        unet.load_lora_adapter(dict(lora), prefix=None, adapter_name="one")
        unet.fuse_lora(lora_scale=0.8, adapter_names=["one"])

    def unfuse() -> None:
        unet.unfuse_lora()
        unet.unload_lora()

    for operation, change in (("lora_on", fuse), ("lora_off", unfuse)):
        yield row(operation, change, 1) | {"loras": 1, "tier": "device", "factors": "RAM"}


def comfyui_rows(
    case: Case, device: torch.device, files: Sequence[Path], comfyui: Path
) -> Iterator[Row]:
    """The same by ComfyUI's own loader and patcher, in a process of its own."""
    say("comfyui")
    python = comfyui / ".venv" / "bin" / "python"
    lora = files[0].with_name("lora-0.safetensors")
    if not lora.exists():
        save_file(random_lora(case.config), lora)
    command = [str(python if python.exists() else sys.executable), "-m", "benchmarks.swaps_comfyui"]
    command += [str(comfyui.resolve()), "--model", case.model]
    command += ["--size", f"{case.width}x{case.height}", "--batch", str(case.batch)]
    command += [*map(str, files[:3]), "--lora", str(lora)]
    if device.type == "cpu":
        command.append("--cpu")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    late = threading.Timer(COMFYUI_SECONDS * (8 if device.type == "cpu" else 1), process.kill)
    late.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            say(f"comfyui: ended with {process.returncode}")
    finally:
        late.cancel()
        process.kill()
        process.wait()


def peft_lora(kohya: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A LoRA of `random_lora` as diffusers takes it."""
    found = {}
    for name in parameters(config):
        module = name.removesuffix(".weight")
        layer = "lora_unet_" + module.replace(".", "_")
        if f"{layer}.alpha" in kohya:
            down = kohya[f"{layer}.lora_down.weight"]
            scale = float(kohya[f"{layer}.alpha"]) / down.shape[0]
            found[f"{module}.lora_A.weight"] = down
            found[f"{module}.lora_B.weight"] = kohya[f"{layer}.lora_up.weight"] * scale
    return found


if __name__ == "__main__":
    main()
