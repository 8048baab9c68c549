"""The machine of a run: what it is, what it can do at best, and which commit is measured."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from .timing import timed

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"


def meta(commit: str, command: str = "", device: str | torch.device = "cuda") -> dict[str, Any]:
    """The machine, its software and this run, as plain JSON values."""
    described = asdict(hardware.describe(device))
    capability = described.pop("capability")
    return {
        "gpu": described.pop("name"),
        **described,
        "capability": None if capability is None else list(capability),
        "diffusers": _version("diffusers"),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def ceilings(device: str | torch.device = "cuda") -> dict[str, float | None]:
    """The most there is: matrix product (fp16 on a GPU), copy on the device, copy to it.

    A copy of n bytes counts as 2 n moved, since it reads and writes.
    """
    place = hardware.require(device)
    cuda = place.type == "cuda"
    side, bytes_, dtype = (8192, 2 << 30, torch.float16) if cuda else (512, 1 << 24, torch.float32)
    a, b = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
    matmul_ms = timed(lambda: a @ b, place, 30)["ms"]
    source = torch.ones(bytes_, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    copy_ms = timed(lambda: target.copy_(source), place, 30)["ms"]
    found: dict[str, float | None] = {
        "matmul_tflops": 2 * side**3 / matmul_ms / 1e9,
        "copy_tbps": 2 * bytes_ / copy_ms / 1e9,
        "h2d_gbps": None,
    }
    if cuda:
        half = bytes_ // 2
        host = torch.empty(half, dtype=torch.uint8, pin_memory=True)
        h2d_ms = timed(lambda: target[:half].copy_(host, non_blocking=True), place, 30)["ms"]
        found["h2d_gbps"] = half / h2d_ms / 1e6
    return found


def commit() -> str:
    """The commit of this copy, "-dirty" behind it if files were changed; or "unknown"."""
    root = _git("rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != ROOT:  # a copy inside some other repository
        return UNKNOWN
    return _git("describe", "--always", "--dirty", "--exclude=*") or UNKNOWN


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
