"""`predict FAMILY|FILE`: seconds and memory of image sizes, before anything is run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceUnavailable, InvalidInput
from . import output
from .arguments import size as _size

if TYPE_CHECKING:
    from ..hardware import Hardware
    from ..plan.schema import Plan

SIZES = ("512x512", "768x768", "1024x1024", "832x1216", "1536x1536")


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "predict",
        help="seconds and memory of image sizes, before anything is run",
        description="Add up what a network's kernels take at each image size, by what was measured "
        "on the GPU, or else by its performance model, and say what memory the weights and the "
        "activations need. Nothing is run: the GPU need not be here. The time is the kernels' "
        "alone, each at full clock: a whole step took 4 to 11 % longer where both were measured.",
    )
    command.add_argument("target", metavar="FAMILY|FILE", help="such as sdxl, or a checkpoint")
    command.add_argument(
        "--size", action="append", type=_size, metavar="WxH", help="in pixels; may be repeated"
    )
    command.add_argument(
        "--batch",
        type=_count,
        default=2,
        metavar="N",
        help="images at once, twice a picture's where it is guided (default: %(default)s)",
    )
    command.add_argument(
        "--steps", type=_count, default=20, metavar="N", help="of a picture (default: %(default)s)"
    )
    command.add_argument(
        "--controlnet", action="store_true", help="with the residuals of a ControlNet"
    )
    command.add_argument(
        "--gpu", metavar="NAME", help="one with a profile, as its driver calls it (default: yours)"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one row a size."""
    plan = _plan(options.target)
    hardware = _gpu(options.gpu)

    from ..runtime.predict import forecast, predict_at

    times = forecast(hardware)
    rows = []
    for width, height in options.size or [_size(size) for size in SIZES]:
        found = predict_at(
            *(plan, width, height, options.batch, times), optional=options.controlnet
        )
        seconds = None
        if found.step_ms is not None and found.prompt_ms is not None:
            seconds = (found.prompt_ms + options.steps * found.step_ms) / 1e3
        rows.append({"width": width, "height": height, "seconds": seconds, **asdict(found)})
    if options.json:
        facts = {"gpu": hardware.name, "batch": options.batch, "steps": options.steps}
        output.print_json({**facts, "controlnet": options.controlnet, "rows": rows})
        return 0
    output.print_table(
        ("size", "ms a step", f"s, {options.steps} steps", "memory", "times"),
        [
            (
                f"{row['width']}x{row['height']}",
                _about(row["step_ms"], 1),
                _about(row["seconds"], 2),
                output.size(row["weights_bytes"] + row["activation_bytes"]),
                _basis(row),
            )
            for row in rows
        ],
        right=("ms a step", f"s, {options.steps} steps", "memory"),
    )
    return 0


def _about(value: float | None, digits: int) -> str:
    return "—" if value is None else f"~{value:.{digits}f}"


def _basis(row: dict[str, Any]) -> str:
    counts = {name: row[name] for name in ("measured", "predicted", "unknown") if row[name]}
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _plan(target: str) -> Plan:
    """The plan of a family, or of a file's structure. Raises `InvalidInput` without one."""
    from ..compiler import SHIPPED, open_cache, shipped_plan
    from ..plan.schema import Plan
    from .inspect import structure_of_file

    path = SHIPPED / f"{target}.json"
    if path.parent == SHIPPED and path.is_file():
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    if not Path(target).suffix:
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))
        raise InvalidInput(f"{target!r} is no family with a plan: use {names}, or a file")
    structure = structure_of_file(Path(target))
    plan = shipped_plan(structure)
    if plan is None:
        kept = open_cache(None, None).get(str(structure.graph_key), "plan")
        if kept is None:
            raise InvalidInput(f"{target} has no plan yet: `python -m accel build {target}`")
        plan = Plan.from_json(kept)
    return plan


def _gpu(name: str | None) -> Hardware:
    from ..hardware import describe, require
    from ..tuning.profile import profiled

    if name is None:
        try:
            return describe(require("cuda"))
        except DeviceUnavailable as error:
            reason = str(error).partition(";")[0].partition(": use ")[0]
            raise DeviceUnavailable(f"{reason}: name a GPU with --gpu") from None
    found = profiled()
    if name not in found:
        raise InvalidInput(f"there is no profile of {name!r}: use {', '.join(sorted(found))}")
    return found[name]


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


_count.__name__ = "number"
