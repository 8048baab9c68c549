"""`python -m training`: train the tiny world, export it, and check what it draws."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from accel.errors import SwitchyardError

from .export import MOST_BYTES, export, total_bytes
from .paint import check
from .phases import MINUTES, PHASES, Settings, train
from .plot import plot

ROOT = Path(__file__).parents[1]
_SMOKE_MINUTES = {"vae": 0.4, "base": 0.4, "sketch": 0.2, "night": 0.2, "edges": 0.2}
_STEPS = (*PHASES, "export", "check", "plot")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says. 0: done; 1: the check failed; 2: wrong use, one line."""
    options = _parser().parse_args(arguments)
    smoke = options.what == ["smoke"]
    chosen = list(_STEPS) if smoke or options.what == ["all"] else options.what
    device = torch.device("cpu" if smoke else options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    settings = Settings(
        work=options.work / "smoke" if smoke else options.work,
        device=device,
        seed=options.seed,
        steps=options.steps,
        small=options.small or (4 if smoke else None),
        resume=options.resume,
        graphs=not options.no_graphs,
    )
    out = settings.work / "files" if smoke or options.out is None else options.out
    try:
        minutes = _minutes(_SMOKE_MINUTES if smoke else MINUTES, options.minutes)
        fine = [_run(what, minutes, settings, out, smoke) for what in chosen]
    except (OSError, ValueError, SwitchyardError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    # Nobody learns to draw in two minutes on a CPU: there the check only has to run.
    return 0 if all(fine) or smoke else 1


def _run(what: str, minutes: dict[str, float], settings: Settings, out: Path, smoke: bool) -> bool:
    started, fine = time.perf_counter(), True
    if what in PHASES:
        train(what, minutes[what], settings)
    elif what == "export":
        export(settings.work, out)
        size = total_bytes(out)
        print(f"export: {size / 1e6:.2f} MB in {out}, {MOST_BYTES / 1e6:.0f} at most", flush=True)
        fine = size <= MOST_BYTES
    elif what == "check":
        fine = check(out, settings.device, settings.seed, *((4, 8) if smoke else ()))
    else:
        plot(settings.work, out / "curves.png")
    print(f"{what}: {time.perf_counter() - started:.0f} s in all", flush=True)
    return fine


def _minutes(default: dict[str, float], given: list[str]) -> dict[str, float]:
    """Each phase's time. Raises ValueError."""
    found = dict(default)
    for text in given:
        phase, _, number = text.rpartition("=")
        if phase and phase not in PHASES:
            raise ValueError(f"--minutes {text}: there is no phase {phase!r}")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"--minutes {text}: {number!r} is no number") from None
        if not 0 < value < 1e6:
            raise ValueError(f"--minutes {text}: give more than 0")
        found.update({phase: value} if phase else dict.fromkeys(PHASES, value))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the tiny world. Each phase ends after its minutes and may be stopped: "
        "what was learned is written every 15 seconds. `all` is everything in order; `smoke` the "
        "same in two minutes on a CPU, to see that it runs.",
    )
    parser.add_argument(
        "what",
        nargs="+",
        choices=(*_STEPS, "all", "smoke"),
        metavar="WHAT",
        help=f"any of {', '.join(_STEPS)}; or all, or smoke, alone",
    )
    work = ROOT / "build" / "tiny_world"
    parser.add_argument("--work", type=Path, default=work, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        help="of export, check and plot; default: files/ in the work folder",
    )
    parser.add_argument(
        "--minutes",
        action="append",
        default=[],
        metavar="[PHASE=]M",
        help=f"per phase; default: {', '.join(f'{p}={m}' for p, m in MINUTES.items())}",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="per phase, if the time allows")
    parser.add_argument("--small", type=int, metavar="N", help="batch and pool of N, one size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from a phase's own result")
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
