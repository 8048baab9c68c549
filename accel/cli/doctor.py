"""`doctor`: is everything here that an engine needs, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DeviceUnavailable, InvalidPlan
from . import output

MINIMUM_TORCH = (2, 8)
MINIMUM_TRITON = (3, 4)
ROOM_FOR_CACHE = 64 * 2**20  # a few dozen plans
REQUIRED = ("filelock", "numpy", "psutil", "rich", "safetensors", "tqdm", "xxhash")


@dataclass(frozen=True)
class Check:
    """One line of the report. `needed` is False where the engine works without it."""

    name: str
    good: bool
    found: str
    advice: str = ""
    needed: bool = True


def add(commands: Any) -> None:
    """Declare the command."""
    command = commands.add_parser(
        "doctor",
        help="check this machine",
        description="Check versions, GPU, cache folder and shipped plans, and say what to do about "
        "each problem. Exit code 1 if something that the engine needs is broken.",
    )
    command.add_argument("--json", action="store_true", help="print a JSON list instead")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run every check and print one line each."""
    checks = [check for group in CHECKS for check in _safely(group)]
    if options.json:
        output.print_json([asdict(check) for check in checks])
    else:
        console = output.stdout()
        for check in checks:
            line = output.mark(check.good).append(f" {check.name}: {check.found}", style="default")
            if not check.good:
                line.append(f" — {check.advice}" + ("" if check.needed else " (optional)"))
            console.print(line, soft_wrap=True)
    broken = [check for check in checks if check.needed and not check.good]
    if not options.json:
        names = ", ".join(check.name for check in broken)
        print(f"to mend: {names}" if broken else "everything an engine needs is here")
    return 1 if broken else 0


def _safely(group: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of a group; what breaks a check is a finding, not a crash."""
    try:
        return list(group())
    except Exception as error:
        name = group.__name__.strip("_").replace("_", " ")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Check(name, False, reason, "report this line")]


def _software() -> Iterator[Check]:
    python = platform.python_version()
    good = sys.version_info >= (3, 10)
    yield Check("Python", good, python, "use Python 3.10 or newer")
    yield Check("Switchyard", True, __version__)
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    yield Check(
        "packages",
        not missing,
        f"without {', '.join(missing)}" if missing else f"all {len(REQUIRED)} found",
        f"pip install {' '.join(missing)}",
    )


def _pytorch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check("PyTorch", False, str(error), "install it as pytorch.org says for your GPU")
        return
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield Check("PyTorch", found >= MINIMUM_TORCH, torch.__version__, "update PyTorch to 2.8+")


def _gpu() -> Iterator[Check]:
    from .. import hardware

    cpu = hardware.describe("cpu")
    free, total = hardware.available_memory("cpu"), cpu.memory_bytes
    yield Check("CPU", True, f"{cpu.name}, {output.size(free)} of {output.size(total)} memory free")
    try:
        gpu = hardware.describe("cuda")
    except DeviceUnavailable as error:
        what, _, advice = str(error).partition(": ")
        # A CPU runs the same engine, for tests and demos: slow, and not broken.
        yield Check("GPU", False, what, advice or "engines run on the CPU", needed=False)
        return
    sm = "".join(str(number) for number in gpu.capability or ())
    free, total = hardware.available_memory("cuda"), gpu.memory_bytes
    yield Check(
        "GPU",
        True,
        f"{gpu.name} (sm_{sm}), {output.size(free)} of {output.size(total)} memory free",
    )
    yield Check("driver", gpu.driver is not None, gpu.driver or "unknown", "update the driver")
    yield Check("CUDA", True, f"{gpu.cuda}, cuDNN {gpu.cudnn}")
    good = gpu.triton is not None and _pair(gpu.triton) >= MINIMUM_TRITON
    package = "triton-windows" if sys.platform == "win32" else "triton"
    yield Check(
        "Triton", good, gpu.triton or "not installed", f"pip install {package}", needed=False
    )


def _cache() -> Iterator[Check]:
    from ..compiler import open_cache

    cache = open_cache(None, None)
    advice = "make the folder writable or set SWITCHYARD_CACHE_DIR"
    try:
        cache.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.root) as file:
            file.write(b"x")
    except OSError as error:
        yield Check("cache", False, f"{cache.root}: {error.strerror or error}", advice)
        return
    free = shutil.disk_usage(cache.root).free
    used = sum(entry.bytes for entry in cache.entries())
    limit = output.size(cache.limit_bytes)
    yield Check(
        "cache",
        free > ROOM_FOR_CACHE,
        f"{cache.root}: {output.size(used)} of at most {limit} used, {output.size(free)} free",
        "make room on the disk or set SWITCHYARD_CACHE_DIR",
    )


def _shipped_plans() -> Iterator[Check]:
    import json

    from ..compiler import SHIPPED
    from ..models import FAMILIES, parameters
    from ..plan.schema import Plan
    from ..structure import structure_of

    good, wrong, missing = 0, [], []
    for family in FAMILIES:
        path = SHIPPED / f"{family.name}.json"
        shapes = {name: parameter.shape for name, parameter in parameters(family.config).items()}
        try:
            plan = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
            if plan.structure.get("graph_key") != structure_of(shapes).graph_key:
                raise InvalidPlan("it is of another structure")
        except FileNotFoundError:
            missing.append(family.name)
        except (OSError, ValueError, InvalidPlan) as error:
            wrong.append(f"{path.name}: {' '.join(str(error).split())}")
        else:
            good += 1
    found = f"{good} of {len(FAMILIES)} families ready"
    if missing:
        found += f"; without {', '.join(missing)}"
    advice = "install Switchyard again; engines of these families are built meanwhile"
    yield Check("shipped plans", not (wrong or missing), "; ".join([found, *wrong]), advice)


def _hosts() -> Iterator[Check]:
    try:
        yield Check("diffusers", True, version("diffusers"))
    except PackageNotFoundError:
        yield Check(
            "diffusers", False, "not installed", "the demo and `build` need it", needed=False
        )
    comfyui = _comfyui()
    found = "not found" if comfyui is None else f"{_comfyui_version(comfyui)} in {comfyui}"
    advice = "set COMFYUI_PATH to its folder"
    yield Check("ComfyUI", comfyui is not None, found, advice, needed=False)


def _comfyui() -> Path | None:
    """ComfyUI's folder: as the user says, or the one whose custom_nodes this pack lies in."""
    places = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    pack = Path(__file__).resolve().parents[2]
    if pack.parent.name == "custom_nodes":
        places.append(pack.parents[1])
    return next((place for place in places if (place / "comfy").is_dir()), None)


def _comfyui_version(folder: Path) -> str:
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "of unknown version"
    return text.partition('"')[2].partition('"')[0] or "of unknown version"


def _pair(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


CHECKS = (_software, _pytorch, _gpu, _cache, _shipped_plans, _hosts)
