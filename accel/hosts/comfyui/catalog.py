"""The files of the models folder, and the engines on disk: what serves what.

A file is known by its header alone; no weight is read. Files change, so facts are kept by path,
size and time of change. `Prefetcher` reads the files of the next prompt in the queue ahead, while
the present one is being sampled. The host's functions are passed in.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ... import background
from ...cache import Entry
from ...compiler import SHIPPED
from ...errors import InvalidFile, SwitchyardError
from ...models import UNetConfig
from ...plan.schema import Plan
from ...structure import Structure, structure_of
from .builder import PLAN, Builder, shipped_families, title_of
from .journal import GRAPH_KEY

logger = logging.getLogger(__name__)

FOLDERS = ("checkpoints", "diffusion_models", "controlnet")
"""The host's names of the folders whose files may hold a denoiser or a ControlNet."""

INPUTS = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "control_net_name": "controlnet",
}
"""Inputs of loader nodes of whatever class, and the folder that a name in them belongs to."""

BLOCK_BYTES = 8 << 20
# What else is running must not be pushed out of memory for what may be needed next.
SPARE_BYTES = 2 << 30
SPARE_SHARE = 0.1
NICENESS = 10

Names = Callable[[str], Iterable[str]]
"""The files in one of FOLDERS: names relative to it."""

Locate = Callable[[str, str], str | None]
"""Full path of a file, from folder and name; None if there is none."""

Stamp = tuple[int, int]


class EngineRefused(ValueError):
    """There is no such engine, or it cannot be deleted. `missing` tells which."""

    def __init__(self, text: str, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing


@dataclass(frozen=True)
class Facts:
    """What a file's header says.

    kind: "unet", "controlnet", "module" for anything else, "" where the header cannot be read;
    `problem` says why for the last two.
    """

    kind: str
    family: str | None = None
    title: str | None = None
    graph_key: str | None = None
    shape_key: str | None = None
    problem: str | None = None


class Catalog:
    """The models folder's files with their badges. Threads may share it.

    names, locate: the host's lists of files and their paths.
    builder: which plans are there, and which could not be made.
    """

    def __init__(self, names: Names, locate: Locate, builder: Builder) -> None:
        self._names, self._locate, self._builder = names, locate, builder
        self._facts: dict[str, tuple[Stamp, Facts]] = {}
        self._lock = threading.Lock()
        self._scan: threading.Thread | None = None

    def listing(self, wait_seconds: float = 0.5) -> tuple[list[dict[str, Any]], bool]:
        """Every file whose header is known, and whether others are still being read.

        Blocks for the folders' listing, and at most `wait_seconds` for headers. An entry: "name",
        "folder", "family", "title", "badge", "why". badge: "ready", "build" (made at the first
        use), "unsupported" (the host's path), or "unreadable".
        """
        found: list[tuple[str, str, str | None, Stamp | None]] = []
        unknown = False
        for folder in FOLDERS:
            for name in self._list(folder):
                path = self._find(folder, name)
                stamp = _stamp(path)
                found.append((folder, name, path, stamp))
                unknown = unknown or self._stale(path, stamp)
        scanning = unknown and self._read_headers([path for *_, path, _ in found], wait_seconds)
        badges: dict[str, tuple[str, str | None]] = {}
        shapes: dict[str, str] = {}
        with contextlib.suppress(OSError):  # of the cache: the files can be listed without it
            shapes = self._builder.known_shapes()
        entries = []
        for folder, name, path, stamp in found:
            facts = self._known(path, stamp)
            if facts is not None:
                entry = self._entry(facts, badges, shapes)
                entries.append({"name": name, "folder": folder, **entry})
        return entries, scanning

    def plan(self, folder: str, name: str) -> Plan | None:
        """The plan at hand of a listed file's network; None without one.

        Raises SwitchyardError for a file that cannot be read.
        """
        path = self._find(folder, name) if name in self._list(folder) else None
        if path is None:
            return None
        structure = structure_of(path)
        if structure.graph_key is not None:
            return self._builder.find(structure)
        key = self._builder.known_shapes().get(structure.shape_key)  # of no published family
        return None if key is None else self._builder.kept(key)

    def _list(self, folder: str) -> list[str]:
        try:
            return list(self._names(folder))
        except (KeyError, OSError) as error:  # an older host has no such folder, or it is gone
            logger.debug("the folder %s cannot be listed: %s", folder, error)
            return []

    def _find(self, folder: str, name: str) -> str | None:
        try:
            return self._locate(folder, name)
        except (KeyError, OSError, ValueError):
            return None

    def _stale(self, path: str | None, stamp: Stamp | None) -> bool:
        if path is None or stamp is None:
            return False
        with self._lock:
            return self._facts.get(path, (None,))[0] != stamp

    def _known(self, path: str | None, stamp: Stamp | None) -> Facts | None:
        if path is None or stamp is None:
            return Facts("", problem="the file is gone, or a link to nothing")
        with self._lock:
            known = self._facts.get(path)
        # While a changed file is being read again, what it held before says nothing.
        return known[1] if known is not None and known[0] == stamp else None

    def _read_headers(self, paths: list[str | None], wait_seconds: float) -> bool:
        """Read what is new or changed in a thread; whether it is still at it after the wait."""
        with self._lock:
            scan = self._scan
            if scan is None or not scan.is_alive():
                scan = threading.Thread(target=self._scan_all, args=(paths,), daemon=True)
                self._scan = scan
                scan.start()
        scan.join(wait_seconds)
        return scan.is_alive()

    def _scan_all(self, paths: list[str | None]) -> None:
        _lower_priority()
        for path in paths:
            stamp = _stamp(path)
            if path is not None and stamp is not None and self._stale(path, stamp):
                facts = facts_of(path)
                with self._lock:
                    self._facts[path] = (stamp, facts)
        gone = set(self._facts) - {path for path in paths if path is not None}
        with self._lock:
            for path in gone:
                del self._facts[path]

    def _entry(
        self, facts: Facts, badges: dict[str, tuple[str, str | None]], shapes: dict[str, str]
    ) -> dict[str, str | None]:
        badge = "build"
        why = facts.problem
        graph_key = facts.graph_key or shapes.get(facts.shape_key or "")
        if facts.kind == "":
            badge = "unreadable"
        elif facts.kind == "module":
            badge = "unsupported"
        elif graph_key is None:
            why = "of no published family: its engine is made at the first use"
        else:
            if graph_key not in badges:
                badges[graph_key] = self._badge(graph_key)
            badge, why = badges[graph_key]
        return {"family": facts.family, "title": facts.title, "badge": badge, "why": why}

    def _badge(self, graph_key: str) -> tuple[str, str | None]:
        status = self._builder.status(graph_key)
        if status["state"] == "ready":
            return "ready", None
        if status["state"] == "failed":
            return "unsupported", f"its engine could not be built: {status['error']}"
        return "build", None


def facts_of(path: str) -> Facts:
    """What a file holds, from its header. Problems are facts too: nothing is raised."""
    name = os.path.basename(path)
    if name.lower().endswith(".gguf"):
        return Facts("module", problem="a GGUF file: its weights are quantised")
    try:
        structure = structure_of(path)
    except InvalidFile as error:
        # The panel shows the name already, and the folder is nobody's business there.
        text = str(error).replace(path, "the file", 1)
        return Facts("", problem=text)
    except SwitchyardError as error:
        return Facts("module", problem=str(error))
    except OSError as error:
        return Facts("", problem=f"the file cannot be read: {error.strerror or error}")
    except Exception as error:  # whatever a stranger's file may do, the others are listed
        logger.debug("%s cannot be read", path, exc_info=True)
        return Facts("", problem=f"the file cannot be read: {type(error).__name__}")
    if structure.kind == "module":
        return Facts("module", problem="it holds no UNet or ControlNet of Stable Diffusion")
    return Facts(
        structure.kind,
        structure.family,
        title_of(structure),
        structure.graph_key,
        structure.shape_key,
    )


class Engines:
    """The plans that come with the pack and those in the cache, and the memory that they hold.

    networks: the engines in memory, as `Pool.networks` describes them.
    """

    def __init__(
        self, builder: Builder, networks: Callable[[], list[Mapping[str, Any]]] = list
    ) -> None:
        self._builder, self._networks = builder, networks
        self._titles: dict[str, tuple[str | None, str]] = {}
        self._deleting = threading.Lock()

    def listing(self) -> list[dict[str, Any]]:
        """All engines, those last used first; see the fields in the panel's routes."""
        loaded: dict[str, list[Mapping[str, Any]]] = {}
        for network in self._networks():
            loaded.setdefault(str(network["graph_key"]), []).append(network)
        engines: list[dict[str, Any]] = []
        for key, family in shipped_families().items():
            size = _size(SHIPPED / f"{family.name}.json")
            engines.append(
                {
                    "id": key,
                    "family": family.name,
                    "title": family.title,
                    "structure": key,
                    "bytes": size,
                    "source": "shipped",
                    "last_used": None,
                    "deletable": False,
                }
            )
        for entry in self._built():
            family_name, title = self._title(entry)
            engines.append(
                {
                    "id": entry.key,
                    "family": family_name,
                    "title": title,
                    "structure": entry.key,
                    "bytes": entry.bytes,
                    "source": "built",
                    "last_used": entry.used,
                    "deletable": True,
                }
            )
        for engine in engines:
            engine.update(_memory(loaded.get(str(engine["id"]), []), engine["last_used"]))
        return sorted(engines, key=lambda engine: -(engine["last_used"] or 0.0))

    def delete(self, graph_key: str) -> int:
        """Delete a built engine's file; bytes freed. Raises EngineRefused."""
        with self._deleting:  # what two ask for at once is freed once
            return self._delete(graph_key)

    def _delete(self, graph_key: str) -> int:
        entries = [entry for entry in self._builder.cache.entries() if entry.key == graph_key]
        plans = [entry for entry in entries if entry.kind == PLAN]
        if not plans:
            if graph_key in shipped_families():
                raise EngineRefused("this engine comes with the pack and cannot be deleted")
            raise EngineRefused("there is no such engine", missing=True)
        if self._builder.status(graph_key)["state"] == "building":
            raise EngineRefused("this engine is being built: cancel that first")
        root = self._builder.cache.root.resolve()
        for entry in plans:
            # A folder of the cache may be a link to elsewhere.
            if not entry.path.parent.resolve().is_relative_to(root):
                raise EngineRefused("this engine's file lies outside of the cache folder")
        freed = sum(entry.bytes for entry in self._builder.cache.remove(graph_key))
        if any(entry.path.exists() for entry in plans):
            raise EngineRefused("the engine's file cannot be removed: make its folder writable")
        self._builder.forget(graph_key)
        return freed

    def _built(self) -> list[Entry]:
        cache = self._builder.cache
        return [
            entry
            for entry in cache.entries()
            if entry.kind == PLAN
            and entry.version == cache.version
            and GRAPH_KEY.fullmatch(entry.key)
            and entry.key not in shipped_families()
        ]

    def _title(self, entry: Entry) -> tuple[str | None, str]:
        """Family and title of a cached plan, which this does not mark as used."""
        if entry.key not in self._titles:
            self._titles[entry.key] = _cached_title(entry)
        return self._titles[entry.key]


def _cached_title(entry: Entry) -> tuple[str | None, str]:
    try:
        structure = json.loads(entry.path.read_bytes())["body"]["structure"]
        config = UNetConfig.from_json(structure["config"])
        family = structure["family"]
        found = Structure(config.kind, family, {}, config, entry.key, structure["shape_key"])
        return family, title_of(found)
    except (KeyError, OSError, TypeError, ValueError):
        return None, f"a damaged file ({entry.key[:6]})"


def _memory(networks: list[Mapping[str, Any]], last_used: float | None) -> dict[str, Any]:
    """What an engine has in memory, on all devices."""
    used = [float(n["last_used"]) for n in networks if n.get("last_used")]
    sizes: list[dict[str, Any]] = []
    total = 0
    for network in networks:
        total += int(network["weights_bytes"]) + int(network["activation_bytes"])
        for shape in network["shapes"]:
            dims = shape["dims"]
            size = {
                "width": 8 * int(dims["width"]),
                "height": 8 * int(dims["height"]),
                "batch": int(dims["batch"]),
                "controlnet": bool(shape["controlnet"]),
            }
            if size not in sizes:
                sizes.append(size)
    return {
        "sizes": sizes,
        "last_used": max([*used, *([last_used] if last_used else [])], default=None),
        "loaded": any(network["loaded"] for network in networks),
        "vram_mib": round(total / 2**20),
    }


Paths = Callable[[], Iterable[str]]
"""The files to read, for whoever asks when it is their turn."""

Bring = Callable[[str, threading.Event, Collection[str]], None]
"""Brings a file that has been read still nearer, unless it is told to stop. What was brought of the
files named last stays where it is."""


class Reader:
    """Reads files that come next into the system's cache.

    One file at a time, in a thread of low priority, and only what the memory has room for. bring:
    what is done with each that has been read.
    """

    def __init__(self, bring: Bring | None = None) -> None:
        self._bring = bring
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._busy = False
        self._after: Paths | None = None
        self._keep: Collection[str] = ()
        self.done: deque[tuple[str, int]] = deque(maxlen=32)
        """The last files that were read, and how many bytes of each."""

    def begin(self, paths: Paths) -> None:
        """Begin to read what `paths`, asked in the thread, names; returns at once.

        While files are being read it waits for its turn, in place of what waited before.
        """
        with self._lock:
            if self._busy:
                self._after = paths
                return
            self._busy = True
            self._stop.clear()
            # What is done with a file is PyTorch's work, too.
            self._thread = background.start("next", self._run, paths, stop=self._stop.set)

    def stop(self) -> None:
        """Stop reading, and wait for the thread."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def wait(self, seconds: float) -> bool:
        """Whether nothing is being read any more, after at most `seconds`."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def _run(self, paths: Paths) -> None:
        _lower_priority()
        following: Paths | None = paths
        while following is not None:
            try:
                for path in following():
                    self._read(path)
            except Exception:  # a convenience: it must never be what a user has to look at
                logger.debug("a file that comes next was not read ahead", exc_info=True)
            with self._lock:
                following, self._after = self._after, None
                if self._stop.is_set():
                    following = None
                self._busy = following is not None

    def _read(self, path: str) -> None:
        size = os.stat(path).st_size
        if not has_room_for(size):
            logger.debug("%s is not read ahead: too little memory is free", path)
            return
        started, read = time.perf_counter(), 0
        block = bytearray(BLOCK_BYTES)
        with open(path, "rb", buffering=0) as file:
            while not self._stop.is_set():
                count = file.readinto(block)
                if not count:
                    break
                read += count
                # What was free may have been taken meanwhile.
                if read % (64 * BLOCK_BYTES) == 0 and not has_room_for(size - read):
                    break
        self.done.append((path, read))
        logger.debug("read %s ahead in %.1f s", path, time.perf_counter() - started)
        if self._bring is not None and read == size:
            self._bring(path, self._stop, self._keep)


class Prefetcher(Reader):
    """Reads the files of the next prompt in the queue. One per process.

    queue: the host's queue of prompts. locate: full path of a file. bring: as for `Reader`.
    """

    def __init__(self, queue: Any, locate: Locate, bring: Bring | None = None) -> None:
        super().__init__(bring)
        self._queue, self._locate = queue, locate
        self._read_for: Any = None

    def look(self) -> None:
        """Begin to read what the next prompt needs and the running one does not; returns at once.

        Does nothing again for the same prompt.
        """
        self.begin(self._next)

    def _next(self) -> Iterator[str]:
        running, waiting = queued_prompts(self._queue)
        if waiting is None or waiting[0] == self._read_for:
            return
        self._read_for, prompt = waiting
        present = {file for other in running for file in model_files(other)}
        wanted = {file: self._locate(*file) for file in (*present, *model_files(prompt))}
        self._keep = [path for path in wanted.values() if path is not None]
        for file, path in wanted.items():
            if path is not None and file not in present:
                yield path


def queued_prompts(queue: Any) -> tuple[list[Any], tuple[str, Any] | None]:
    """The prompts that run, and id and prompt of the one that comes next, of the host's queue."""
    with queue.mutex:
        running = [item[2] for item in queue.currently_running.values()]
        # A heap: its first entry is the smallest.
        return running, queue.queue[0][1:3] if queue.queue else None


def model_files(prompt: Any) -> list[tuple[str, str]]:
    """(folder, name) of every model file that a prompt in API form names, each once."""
    files: list[tuple[str, str]] = []
    if not isinstance(prompt, Mapping):
        return files
    for node in prompt.values():
        inputs = node.get("inputs") if isinstance(node, Mapping) else None
        for name, folder in INPUTS.items():
            value = inputs.get(name) if isinstance(inputs, Mapping) else None
            if isinstance(value, str) and (folder, value) not in files:
                files.append((folder, value))
    return files


def has_room_for(size: int) -> bool:
    """Whether the memory takes `size` bytes more and keeps a reserve."""
    memory = psutil.virtual_memory()
    return bool(memory.available - size >= max(SPARE_BYTES, SPARE_SHARE * memory.total))


def _lower_priority() -> None:
    """Of this thread alone, where the system can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _stamp(path: str | None) -> Stamp | None:
    if path is None:
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
