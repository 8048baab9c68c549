"""Compiling Triton kernels ahead of their use, many at once.

Compiling takes a third of a second a kernel, most of it in Python, whose lock lets one thread work
at a time. So many kernels are compiled by several processes, which leave what they made in Triton's
cache on disk, where this process finds it. They need no GPU, but are told which one is meant.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import kernels
from ..hardware import Hardware
from ..kernels.launch import Launch, pretend
from ..kernels.registry import Call, Config, Kernel, TensorSpec

logger = logging.getLogger(__name__)

Variant = tuple[Kernel, Config, Call]

FEW = 24
"""Distinct kernels that threads compile before more processes would have started."""

MOST_PROCESSES = 16
PROCESS_BYTES = 1 << 30
"""Main memory that a process must find free."""

_ROOT = Path(__file__).resolve().parents[2]
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import accel.tuning.compiling as c; c.serve()"

_compiled: set[tuple[int, str]] = set()
"""Device and key of the launches that this process has compiled or loaded."""


def compile_ahead(variants: Iterable[Variant], hardware: Hardware) -> None:
    """Compile the variants' launches for the current device; what fails shows when it runs."""
    device = torch.cuda.current_device()
    found: dict[str, tuple[Variant, Launch]] = {}
    for variant in variants:
        if variant[0].launches is None:
            continue
        with contextlib.suppress(Exception):
            for launch in launches_of(*variant):
                found.setdefault(launch.key(), (variant, launch))
    new = {key: made for key, made in found.items() if (device, key) not in _compiled}
    _compiled.update((device, key) for key in new)
    if len(new) > FEW:
        distinct = {id(variant): variant for variant, _ in new.values()}
        _compile_apart(list(distinct.values()), hardware)

    def warm(launch: Launch) -> None:
        torch.cuda.set_device(device)
        with contextlib.suppress(Exception):
            launch.warm()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(warm, [launch for _, launch in new.values()]))


def launches_of(kernel: Kernel, config: Config, call: Call) -> Sequence[Launch]:
    """The launches of a Triton kernel for a call, on `meta` tensors: to compile, not to run."""
    assert kernel.launches is not None
    tensors = [None if spec is None else _meta(spec) for spec in call.tensors]
    extra: dict[str, Any] = {}
    if kernel.configs is not None:
        size = kernel.workspace(call, config)
        scratch = torch.empty(size, dtype=torch.uint8, device="meta") if size else None
        extra = {"config": config, "workspace": scratch}
    return kernel.launches(_meta(call.out), *tensors, **extra, **call.attrs)


def _meta(spec: TensorSpec) -> torch.Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")


def _compile_apart(variants: Sequence[Variant], hardware: Hardware) -> None:
    """Compile in processes of their own; where they cannot be had, the caller's threads do it."""
    free = psutil.virtual_memory().available // PROCESS_BYTES
    count = min(MOST_PROCESSES, os.cpu_count() or 1, math.ceil(len(variants) / 8), free)
    if count < 2:
        return
    flags = ["-s"] if sys.flags.no_user_site else []
    command = [sys.executable, *flags, "-c", _BOOT, str(_ROOT)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []
        try:
            for index in range(count):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                )
                stack.callback(_end, process)
                started.append(process)
                assert process.stdin is not None and hardware.capability is not None
                share = [
                    (kernel.name, dict(config), call)
                    for kernel, config, call in variants[index::count]
                ]
                pickle.dump((sys.path, hardware.capability, share), process.stdin)
                process.stdin.close()
            for process in started:
                process.wait()
        except OSError as error:
            logger.info("kernels are compiled in this process alone: %s", error)
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        logger.info("%d processes that compile kernels ended with %s", len(failed), failed[0])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def serve() -> None:
    """Compile the variants that the standard input names, without a GPU."""
    paths, capability, share = pickle.load(sys.stdin.buffer)
    sys.path += [path for path in paths if path not in sys.path]
    pretend(capability)
    kernels.load_triton()
    registered = {kernel.name: kernel for kernel in kernels.kernels()}
    for name, config, call in share:
        for launch in launches_of(registered[name], config, call):
            with contextlib.suppress(Exception):
                launch.store()
