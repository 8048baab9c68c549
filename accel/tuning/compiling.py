"""Compiling kernels ahead of their use: many at once, or in the background.

Compiling takes a third of a second a kernel, most of it in Python, whose lock lets one thread work
at a time. So many kernels are compiled by several processes, which leave what they made in Triton's
cache on disk, where this process finds it. They need no GPU, but are told which one is meant. Which
kernels are compiled ahead is found out in such a process, too.
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
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash

from .. import background, kernels, processes
from ..cache import DiskCache
from ..hardware import Hardware
from ..kernels.launch import cache_token, pretend
from ..kernels.registry import AnyLaunch, Call, Config, Kernel, TensorSpec
from .keys import call_of

logger = logging.getLogger(__name__)

Variant = tuple[Kernel, Config, Call]

FEW = 24
"""Distinct kernels that threads compile before more processes would have started."""

MOST_PROCESSES, EACH = 16, 4
"""Processes at most, and kernels for which another is worth its start."""

PROCESS_BYTES = 1 << 30
"""Main memory that a process must find free."""

KEPT = 1 << 12
"""Variants of which the keys of the launches are kept."""

NICENESS = 10
KIND = "compiled"
AHEAD = "ahead"

_ROOT = Path(__file__).resolve().parents[2]
# Of this pack's folder and of the current one only `accel` is wanted.
_BOOT = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; "
    "import accel.tuning.compiling as compiling; del sys.path[0]; compiling.serve()"
)

PATIENCE = 150.0
"""Seconds after which a process hangs that has compiled nothing in them."""

_processes: dict[subprocess.Popen[bytes], threading.Event] = {}
"""Those under way, which must not outlive this one, and what says that they are wanted no more."""

_starting = threading.Lock()
"""Held while one is started, so that none starts unseen while others are ended."""

_deadly: set[str] = set()
"""What tells code apart whose compilation ended a process, or did not come to an end."""


class Compiler:
    """What there is of kernels' code for one device, and how the rest is made. Thread-safe.

    cache: keeps which code was compiled before, so that later processes know what Triton's own
    cache has.
    """

    def __init__(
        self, hardware: Hardware, device: torch.device, cache: DiskCache | None = None
    ) -> None:
        self.hardware, self._device, self._cache = hardware, device, cache
        # What is compiled counts as long as Triton's cache is the one that it was put into.
        about = [hardware.capability, hardware.triton, cache_token() if cache else None]
        self._key = xxhash.xxh3_64_hexdigest(json.dumps(about).encode())
        self._lock = threading.Lock()
        self._keys: dict[tuple[Any, ...], Collection[str]] = {}
        self._loaded: set[str] = set()
        self._stored = self._read()
        self._tried: set[str] = set()
        self._under_way: set[str] = set()
        self.waited_for = 0
        """Pieces of code that `compile` had to compile, in all."""

    @property
    def busy(self) -> bool:
        """Whether something is being compiled in the background."""
        return bool(self._under_way)

    def has(self, variant: Variant) -> bool:
        """Whether the variant can run without compiling; what compiling refused counts, too."""
        return all(map(self._knows, self._keys_of(variant)))

    def loaded(self, variant: Variant) -> bool:
        """Whether all of its code is on the GPU."""
        keys = self._keys_of(variant)
        return bool(keys) and self._loaded.issuperset(keys)

    def _keys_of(self, variant: Variant) -> Collection[str]:
        """What tells the code of its launches apart: asked several times while a size is bound."""
        kernel, config, call = variant
        which = (kernel.name, *sorted(config.items()), call.key)
        found = self._keys.get(which, ())
        if not found:  # or asked in vain, which may have passed
            if len(self._keys) >= KEPT:
                self._keys.clear()
            found = self._keys[which] = tuple(_launches((variant,)))
        return found

    def remembered(self, plan: str) -> list[Variant] | None:
        """The variants that `remember` kept of a plan; None if it kept none that can be had."""
        found = None if self._cache is None else self._cache.get(self._plan_key(plan), AHEAD)
        try:
            return None if found is None else variants_of(found["variants"])
        except (LookupError, TypeError, ValueError):  # of another version, or damaged
            return None

    def remember(self, plan: str, variants: Iterable[Variant]) -> None:
        """Keep which variants a plan has ahead, for later processes."""
        if self._cache is not None:
            self._cache.put(self._plan_key(plan), AHEAD, {"variants": named(variants)})

    def _plan_key(self, plan: str) -> str:
        return xxhash.xxh3_64_hexdigest(f"{self._key} {self.hardware.name} {plan}".encode())

    def compile(self, variants: Iterable[Variant]) -> None:
        """Compile and load what is not loaded; what fails shows when it runs."""
        new = [variant for variant in variants if not self.loaded(variant)]
        found = {k: made for k, made in _launches(new).items() if k not in self._loaded}
        unknown = {k: variant for k, (variant, _) in found.items() if not self._knows(k)}
        self.waited_for += len(unknown)
        if len(unknown) > FEW:
            started = time.perf_counter()
            compile_apart(unknown, self.hardware, processors())
            seconds = time.perf_counter() - started
            logger.info("%d kernels were compiled in %.1f s", len(unknown), seconds)

        def warm(item: tuple[str, tuple[Variant, AnyLaunch]]) -> str | None:
            key, (_, launch) = item
            with torch.cuda.device(self._device), contextlib.suppress(Exception):
                launch.warm()
                return key
            return None

        tried = {key: made for key, made in found.items() if key not in _deadly}
        with ThreadPoolExecutor(min(8, processors())) as threads:
            warmed = {key for key in threads.map(warm, tried.items()) if key is not None}
        self._loaded |= warmed
        self._tried |= found.keys() - warmed
        self._remember(warmed)

    def compile_later(self, variants: Sequence[Variant]) -> None:
        """Compile in the background, at low priority, on a quarter of the processor."""
        found = _launches(variants)
        with self._lock:
            found = {k: made for k, made in found.items() if k not in self._under_way}
            self._under_way |= found.keys()
        if found:
            background.start("compile", self._work, found)

    def _work(self, found: Mapping[str, tuple[Variant, AnyLaunch]]) -> None:
        try:
            wanted = {key: variant for key, (variant, _) in found.items()}
            done = compile_apart(wanted, self.hardware, processors() // 4, NICENESS)
            for key in found.keys() - done - _deadly:  # refused there, or no process could be had
                if background.closing.is_set():
                    return
                with torch.cuda.device(self._device), contextlib.suppress(Exception):
                    found[key][1].compile()
                    done.add(key)
            self._tried |= found.keys() - done
            self._remember(done)
        finally:
            with self._lock:
                self._under_way -= found.keys()

    def _knows(self, key: str) -> bool:
        return key in self._loaded or key in self._stored or key in self._tried

    def _read(self) -> set[str]:
        found = None if self._cache is None else self._cache.get(self._key, KIND)
        return set(found["keys"]) if found and isinstance(found.get("keys"), list) else set()

    def _remember(self, keys: Iterable[str]) -> None:
        with self._lock:  # several threads may have compiled
            new = set(keys) - self._stored
            if not new:
                return
            self._stored = stored = self._stored | new | self._read()
            if self._cache is not None:
                self._cache.put(self._key, KIND, {"keys": sorted(stored)})


def processors() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _launches(variants: Iterable[Variant]) -> Mapping[str, tuple[Variant, AnyLaunch]]:
    """The distinct launches of the variants, by what tells their code apart."""
    found: dict[str, tuple[Variant, AnyLaunch]] = {}
    for variant in variants:
        if variant[0].launches is None:
            continue
        with contextlib.suppress(Exception):
            for launch in launches_of(*variant):
                key = xxhash.xxh3_64_hexdigest(launch.key().encode())
                found.setdefault(key, (variant, launch))
    return found


def named(variants: Iterable[Variant]) -> list[list[Any]]:
    """The variants as JSON holds them."""
    return [[kernel.name, dict(config), call.key] for kernel, config, call in variants]


def variants_of(found: Iterable[Any]) -> list[Variant]:
    """What `named` made JSON of. Raises LookupError, TypeError or ValueError for anything else."""
    registered = {kernel.name: kernel for kernel in kernels.kernels()}
    return [(registered[name], dict(config), call_of(key)) for name, config, key in found]


def launch_keys(variant: Variant) -> set[str]:
    """What tells the code of its launches apart; nothing for what is not compiled here."""
    return set(_launches((variant,)))


def launches_of(kernel: Kernel, config: Config, call: Call) -> Sequence[AnyLaunch]:
    """The launches of a compiled kernel for a call, on `meta` tensors: to compile, not to run."""
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
    variants: Mapping[str, Variant], hardware: Hardware, most: int, niceness: int = 0
) -> set[str]:
    """Compile in so many processes, or fewer; the keys of launches that Triton's cache has now.

    variants: by the keys of their launches. Where no process can be had, nothing is compiled. One
    that crashes or hangs costs what it was at, which is not tried again, and another goes on.
    """
    free = psutil.virtual_memory().available // PROCESS_BYTES
    count = min(MOST_PROCESSES, max(1, most), math.ceil(len(variants) / EACH), free)
    distinct = {id(variant): variant for variant in variants.values()}.values()
    shares = [list(distinct)[index::count] for index in range(count)]
    if not shares:
        logger.info("kernels are compiled where they are used: too little memory is free")
        return set()
    done: set[str] = set()
    stop = threading.Event()

    def work(share: list[Variant]) -> None:
        done.update(_compile_share(share, (niceness, sys.path, hardware.capability), stop))

    # Not a pool's threads: Python would wait for those when it ends, and they for the processes.
    threads = [threading.Thread(target=work, args=(share,), daemon=True) for share in shares]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # the user has had enough
        _end_those(stop)
        raise
    return done


def made_apart(job: Callable[[], Any], hardware: Hardware) -> Any:
    """What a job that needs no GPU returns, from a process of its own at low priority.

    job: may be pickled; its result may be JSON, and is not None. Where no process can be had, or
    one that was killed or hung gave no answer, it is done here; None if this process is to end.
    """
    question = pickle.dumps((NICENESS, sys.path, hardware.capability, job))
    free = psutil.virtual_memory().available >= PROCESS_BYTES
    process = _started(threading.Event(), low=True) if free else None
    if process is not None:
        try:
            lines = _answers(process, question)
        finally:
            _end(process)
        with contextlib.suppress(IndexError, ValueError):  # it ended before, or in the midst of it
            return json.loads(lines[1])
        logger.info("a process that chooses kernels ended with %s", process.returncode)
    return None if background.closing.is_set() else job()


def deadly(variant: Variant) -> bool:
    """Whether compiling it ended a process, or hung: this one had better not try."""
    return bool(_deadly) and not _deadly.isdisjoint(_launches((variant,)))


def _compile_share(
    variants: list[Variant], about: tuple[Any, ...], stop: threading.Event
) -> set[str]:
    """The keys that processes, one after another, say they have compiled."""
    done: set[str] = set()
    while variants:
        named = [(kernel.name, dict(config), call) for kernel, config, call in variants]
        process = _started(stop, low=about[0] > 0)
        if process is None:
            break
        try:
            lines = _answers(process, pickle.dumps((*about, named)))
        finally:
            _end(process)
        done.update(*map(str.split, lines))
        count = len(lines) - 1  # behind the first, one for each variant
        if count in (-1, len(variants)) or stop.is_set() or background.closing.is_set():
            if count < 0:
                logger.info("a process that compiles kernels ended with %s", process.returncode)
            break
        kernel, config, call = variants[count]
        logger.warning("compiling %s %s for %s fails badly", kernel.name, dict(config), call.key)
        _deadly.update(_launches((variants[count],)))
        variants = variants[count + 1 :]
    return done


def _started(stop: threading.Event, low: bool) -> subprocess.Popen[bytes] | None:
    """A process that serves; None where none can be had, or is wanted."""
    with _starting:
        if stop.is_set() or background.closing.is_set():
            return None
        try:
            process = subprocess.Popen(
                processes.command(_BOOT, str(_ROOT)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=_ROOT,
                **processes.options(low),
            )
        except OSError as error:
            logger.info("kernels are compiled where they are used: %s", error)
            return None
        _processes[process] = stop
        return process


def _answers(process: subprocess.Popen[bytes], question: bytes) -> list[str]:
    """The lines that a process answers until it ends; one that falls silent is ended."""
    lines: list[str] = []

    def listen() -> None:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError), process.stdin:  # it has ended
            process.stdin.write(question)
        with process.stdout:
            for line in process.stdout:
                lines.append(line.decode())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    heard = -1
    while listener.is_alive():
        listener.join(PATIENCE)
        if listener.is_alive() and len(lines) == heard:
            process.kill()
        heard = len(lines)
    return lines


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    _processes.pop(process, None)


def _end_those(stop: threading.Event | None) -> None:
    """End the processes that `stop` is of; None: all."""
    with _starting:
        (background.closing if stop is None else stop).set()
        ended = [process for process, own in _processes.items() if stop in (None, own)]
    for process in ended:
        _end(process)


atexit.register(_end_those, None)


class _Unpickler(pickle.Unpickler):
    """Finds this package under its own name, whatever a host has imported it as."""

    def find_class(self, module: str, name: str) -> Any:
        package, _, inner = module.rpartition(".accel.")
        return super().find_class(f"accel.{inner}" if package else module, name)


def serve() -> None:
    """Compile what the standard input names, or do a job that it holds, without a GPU.

    Answers a line when it begins and one for each variant, with the keys of what it compiled, or
    one with what the job returns. Ends when nobody listens any more.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    niceness, paths, capability, asked = _Unpickler(sys.stdin.buffer).load()
    with contextlib.suppress(AttributeError, OSError):  # Windows: the parent has set the priority
        os.nice(niceness)
    sys.path += [path for path in paths if path not in sys.path]
    pretend(capability)
    kernels.load_triton()
    print(file=answers, flush=True)
    if callable(asked):
        print(json.dumps(asked()), file=answers, flush=True)
        return
    registered = {kernel.name: kernel for kernel in kernels.kernels()}
    for name, config, call in asked:
        stored: list[str] = []
        for key, (_, launch) in _launches([(registered[name], config, call)]).items():
            with contextlib.suppress(Exception):
                launch.store()
                stored.append(key)
        print(*stored, file=answers, flush=True)
