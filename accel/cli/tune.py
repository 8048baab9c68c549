"""`tune`: time every kernel of the networks' calls on this GPU, ahead of the first image."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceUnavailable, InvalidInput
from . import output
from .arguments import size as _size

if TYPE_CHECKING:
    from ..hardware import Hardware
    from ..tuning.tune import Store

FAMILIES = "sd15,sd15-controlnet,sdxl,sdxl-controlnet"
SIZES = "512..1536"
LARGEST = 4096
"""Pixels of a side."""

Span = tuple[int, int]
"""The sides of the smallest and the largest square of a range of sizes."""


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "tune",
        help="time the kernels of every image size on this GPU",
        description="Time the kernels that could run a call of the networks, at image sizes that "
        "stand for all between them, and keep the fastest: in your own profile, which engines use "
        "from the next process on, or in a file. Of each kind of call one size is timed in full; "
        "that calibrates a performance model, which rules out what cannot win at the others. It "
        "may be stopped at any time: the same command "
        "goes on where it was. Needs the GPU for itself, and an NVIDIA one.",
    )
    command.add_argument(
        "--families",
        default=FAMILIES,
        metavar="NAMES",
        help="networks, separated by commas, or all (default: %(default)s)",
    )
    command.add_argument(
        "--sizes",
        type=_sizes,
        default=SIZES,
        metavar="A..B|WxH,…",
        help="all between two squares, or single sizes, in pixels (default: %(default)s)",
    )
    command.add_argument(
        "--batch",
        type=_batch,
        default=2,
        metavar="N",
        help="images at once, twice a picture's where it is guided (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="a file such as those in tuning_profiles/ (default: your own profile)",
    )
    command.add_argument(
        "--fresh",
        action="store_true",
        help="measure again what is there already, and replace a file of another machine",
    )
    command.add_argument(
        "--details",
        type=Path,
        metavar="FILE.json",
        help="keep the times of all candidates here; calls that it lacks are timed again",
    )
    command.add_argument(
        "--exhaustive",
        action="store_true",
        help="time every candidate, also those that the performance model rules out; --details "
        "does so, too",
    )
    command.add_argument("--json", action="store_true", help="print a JSON object instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure what is not known yet, and say what there is now."""
    families = _families(options.families)
    _check_files(options)
    device, hardware = _gpu()

    from ..tuning.calibration import KEEP, Calibration
    from ..tuning.chips import chip_of
    from ..tuning.compiling import Compiler
    from ..tuning.profile import profile_cache
    from ..tuning.tune import Details, OwnProfile, ProfileFile, tune

    sizes = _expanded(options.sizes)
    command = (
        f"python -m accel tune --families {','.join(families)} "
        f"--sizes {_written(options.sizes)} --batch {options.batch}"
    )
    cache, fresh = profile_cache(), options.fresh
    store: Store = OwnProfile(hardware, cache)
    if options.out is not None:
        store = ProfileFile(options.out, hardware, command, replace=fresh)
    details = None
    if options.details is not None:
        details = Details(options.details, hardware, command, replace=fresh)
    chip, calibration = chip_of(hardware), None
    if chip is not None:
        known = {} if fresh else {key: entry.times() for key, entry in store.known().items()}
        every = options.exhaustive or details is not None
        calibration = Calibration(chip, known, None if every else KEEP)
    compiler = Compiler(hardware, device, cache)
    try:
        with output.progress("timing kernels", time_left=True) as report:
            report(0.0, "listing the networks' calls")
            calls = _calls(families, sizes, options.batch)
            done = tune(calls, compiler, device, store, details, fresh, calibration, report)
    except KeyboardInterrupt:
        output.stderr().print(
            f"what is measured is in {store.place}: the same command goes on from there"
            + (", without --fresh" if fresh else ""),
            markup=False,
            soft_wrap=True,
        )
        raise
    if options.json:
        output.print_json(
            {
                "gpu": hardware.name,
                "families": families,
                "sizes": [f"{width}x{height}" for width, height in sizes],
                "batch": options.batch,
                **asdict(done),
                "out": None if options.out is None else str(options.out),
                "details": None if options.details is None else str(options.details),
            }
        )
        return 0
    remarks = [
        f"{done.measured} of {done.calls} calls measured in {done.seconds:.0f} s",
        f"{done.known} were known" if done.known else "",
        f"{done.failed} could not be measured" if done.failed else "",
    ]
    line = f"{', '.join(filter(None, remarks))}: {store.place}"
    output.stdout().print(line, markup=False, soft_wrap=True)
    return 0


def _gpu() -> tuple[Any, Hardware]:
    from ..hardware import describe, require

    try:
        device = require("cuda")
        return device, describe(device)
    except DeviceUnavailable as error:
        # Its advice is to run on the CPU, where there is nothing to choose from.
        reason = str(error).partition(";")[0].partition(": use ")[0]
        raise DeviceUnavailable(f"tune needs an NVIDIA GPU to time kernels on: {reason}") from None


def _families(text: str) -> list[str]:
    """The names of shipped plans. Raises `InvalidInput` for others."""
    from ..compiler import SHIPPED

    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    wanted = [name for name in (part.strip() for part in text.split(",")) if name]
    if wanted == ["all"]:
        return shipped
    for name in wanted:
        if name not in shipped:
            raise InvalidInput(f"{name!r} is no family with a plan: use {', '.join(shipped)}")
    if not wanted:
        raise InvalidInput(f"--families names none: use {', '.join(shipped)}")
    return list(dict.fromkeys(wanted))


def _check_files(options: argparse.Namespace) -> None:
    """Raise `InvalidInput` for files that cannot be written: before anything is measured."""
    paths = [path for path in (options.out, options.details) if path is not None]
    for path in paths:
        if path.is_dir():
            raise InvalidInput(f"{path} is a folder: name a file")
        if not path.absolute().parent.is_dir():
            raise InvalidInput(f"{path}: there is no such folder")
    if len(paths) == 2 and paths[0].absolute() == paths[1].absolute():
        raise InvalidInput(f"--out and --details cannot both be {paths[0]}")


def _calls(families: Iterable[str], sizes: Sequence[Span], batch: int) -> list[Any]:
    """Every distinct call of the families' plans, those of a size together."""
    from ..compiler import SHIPPED
    from ..plan.schema import Plan
    from ..runtime.calls import calls_at

    plans = [
        Plan.from_json(json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8")))
        for name in families
    ]
    found = [
        call
        for plan in plans
        for width, height in sizes
        for call in calls_at(plan, width, height, batch)
    ]
    return list({call.key: call for call in found}.values())


def _expanded(parts: Sequence[Span | str]) -> list[Span]:
    from ..tuning.tune import sizes_between

    found: list[Span] = []
    for part in parts:
        found += sizes_between(*map(int, part.split(".."))) if isinstance(part, str) else [part]
    return list(dict.fromkeys(found))


def _written(parts: Sequence[Span | str]) -> str:
    return ",".join(part if isinstance(part, str) else f"{part[0]}x{part[1]}" for part in parts)


def _sizes(text: str) -> list[Span | str]:
    """Sizes as they are, and ranges as `A..B`."""
    found: list[Span | str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)\.\.(\d+)", part.strip())
        if match is None:
            found.append(_size(part))
            continue
        first, last = map(int, match.groups())
        if first % 8 or last % 8 or not 64 <= first <= last <= LARGEST:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no range of sizes: give two sides in multiples of 8 from 64 to "
                f"{LARGEST}, the smaller first, such as 512..1024"
            )
        found.append(f"{first}..{last}")
    return found


def _batch(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 64:
        raise argparse.ArgumentTypeError(f"{text} is no number of images from 1 to 64")
    return number


_batch.__name__ = "number"
