"""Compiling Triton kernels ahead of their use: many at once, or in the background.

Compiling takes a third of a second a kernel, most of it in Python, whose lock lets one thread work
at a time. So many kernels are compiled by several processes, which leave what they made in Triton's
cache on disk, where this process finds it. They need no GPU, but are told which one is meant.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash

from .. import kernels
from ..cache import DiskCache
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

NICENESS = 10
KIND = "compiled"

_ROOT = Path(__file__).resolve().parents[2]
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import accel.tuning.compiling as c; c.serve()"

_processes: set[subprocess.Popen[bytes]] = set()
"""Those under way, which must not outlive this one."""


class Compiler:
    """What there is of Triton's code for one device, and how the rest is made. Thread-safe.

    cache: keeps which code was compiled before, so that later processes know what Triton's own
    cache has.
    """

    def __init__(
        self, hardware: Hardware, device: torch.device, cache: DiskCache | None = None
    ) -> None:
        self.hardware, self._device, self._cache = hardware, device, cache
        about = [hardware.capability, hardware.triton, os.environ.get("TRITON_CACHE_DIR")]
        self._key = xxhash.xxh3_64_hexdigest(json.dumps(about).encode())
        self._lock = threading.Lock()
        self._loaded: set[str] = set()
        self._stored = self._read()
        self._under_way: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether something is being compiled in the background."""
        return bool(self._under_way)

    def has(self, variant: Variant) -> bool:
        """Whether the variant can run without compiling; what compiling refused counts, too."""
        known = self._loaded | self._stored
        return all(key in known for key in _launches((variant,)))

    def compile(self, variants: Iterable[Variant]) -> None:
        """Compile and load what is not loaded; what fails shows when it runs."""
        found = {k: made for k, made in _launches(variants).items() if k not in self._loaded}
        unknown = {id(variant): variant for k, (variant, _) in found.items() if not self._knows(k)}
        if len(unknown) > FEW:
            compile_apart(list(unknown.values()), self.hardware, os.cpu_count() or 1)

        def warm(launch: Launch) -> None:
            with torch.cuda.device(self._device), contextlib.suppress(Exception):
                launch.warm()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            list(threads.map(warm, [launch for _, launch in found.values()]))
        self._loaded |= found.keys()
        self._remember(found.keys())

    def compile_later(self, variants: Sequence[Variant]) -> None:
        """Compile in the background, at low priority, on a quarter of the processor."""
        with self._lock:
            found = {k: v for k, v in _launches(variants).items() if k not in self._under_way}
            self._under_way |= found.keys()
        wanted = list({id(variant): variant for variant, _ in found.values()}.values())

        def work() -> None:
            try:
                compile_apart(wanted, self.hardware, (os.cpu_count() or 1) // 4, NICENESS)
            finally:
                # Also what failed: it is tried once more where it is needed, and then refused.
                self._remember(found)
                with self._lock:
                    self._under_way -= found.keys()

        if wanted:
            threading.Thread(target=work, name="switchyard-compile", daemon=True).start()

    def _knows(self, key: str) -> bool:
        return key in self._loaded or key in self._stored

    def _read(self) -> set[str]:
        found = None if self._cache is None else self._cache.get(self._key, KIND)
        return set(found["keys"]) if found and isinstance(found.get("keys"), list) else set()

    def _remember(self, keys: Iterable[str]) -> None:
        with self._lock:
            new = set(keys) - self._stored
            if not new:
                return
            self._stored |= new | self._read()
            if self._cache is not None:
                self._cache.put(self._key, KIND, {"keys": sorted(self._stored)})


def _launches(variants: Iterable[Variant]) -> Mapping[str, tuple[Variant, Launch]]:
    """The distinct launches of the variants, by what tells their code apart."""
    found: dict[str, tuple[Variant, Launch]] = {}
    for variant in variants:
        if variant[0].launches is None:
            continue
        with contextlib.suppress(Exception):
            for launch in launches_of(*variant):
                key = xxhash.xxh3_64_hexdigest(launch.key().encode())
                found.setdefault(key, (variant, launch))
    return found


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


def compile_apart(
    variants: Sequence[Variant], hardware: Hardware, processes: int, niceness: int = 0
) -> None:
    """Compile in so many processes, or fewer; where they cannot be had, nothing is."""
    free = psutil.virtual_memory().available // PROCESS_BYTES
    count = min(MOST_PROCESSES, max(1, processes), math.ceil(len(variants) / 8), free)
    flags = ["-s"] if sys.flags.no_user_site else []
    command = [sys.executable, *flags, "-c", _BOOT, str(_ROOT)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
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
            _processes.add(process)
            started.append(process)
            assert process.stdin is not None and hardware.capability is not None
            share = [
                (kernel.name, dict(config), call) for kernel, config, call in variants[index::count]
            ]
            pickle.dump((niceness, sys.path, hardware.capability, share), process.stdin)
            process.stdin.close()
        for process in started:
            process.wait()
    except OSError as error:
        logger.info("kernels are compiled where they are used: %s", error)
    finally:
        for process in started:
            _end(process)
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        logger.info("%d processes that compile kernels ended with %s", len(failed), failed[0])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    _processes.discard(process)


@atexit.register
def _end_all() -> None:
    for process in list(_processes):
        _end(process)


def serve() -> None:
    """Compile the variants that the standard input names, without a GPU."""
    niceness, paths, capability, share = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(AttributeError, OSError):  # Windows has no such thing
        os.nice(niceness)
    sys.path += [path for path in paths if path not in sys.path]
    pretend(capability)
    kernels.load_triton()
    registered = {kernel.name: kernel for kernel in kernels.kernels()}
    for name, config, call in share:
        for launch in launches_of(registered[name], config, call):
            with contextlib.suppress(Exception):
                launch.store()
