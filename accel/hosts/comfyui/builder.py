"""Builds of unknown structures in the background: no image waits for one that need not.

A plan that is shipped or cached comes at once. Any other is made by a separate process of low
priority (`build_process`), one at a time, and the host's path renders until it is there. What
cannot be built is remembered on disk for these versions of the pack, torch and the host; what was
cancelled, or killed, for the life of this process. `Builder.retry` forgets either.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import __version__, processes
from ...cache import DiskCache, Entry
from ...compiler import SHIPPED, open_cache, shipped_plan
from ...errors import InvalidPlan
from ...models import FAMILIES, Family, parameters
from ...plan.schema import Plan
from ...structure import Structure, structure_of
from .journal import BEGIN_EVENT, BUILD_EVENT, STATUS_EVENT, journal

logger = logging.getLogger(__name__)

STALL_SECONDS = 1200.0
"""A process that says nothing for this long is given up; it may wait 900 s for another's build."""

POLL_SECONDS = 0.2
KILL_SECONDS = 3.0
# The panel redraws at every event.
EVENT_SECONDS = 0.25

PLAN = "plan"
FAILURE = "failure"

_BOOT = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module('accel.hosts.comfyui.build_process', run_name='__main__')"
)
_PACK = Path(__file__).parents[3]


class BuildRefused(ValueError):
    """There is no such build, or not in a state in which it can be cancelled or retried."""


@dataclass
class _Build:
    """One structure's way to its plan. `state`: "building", "ready", "failed" or "cancelled"."""

    structure: Structure
    title: str
    diffusers: bool
    state: str = "building"
    fraction: float = 0.0
    text: str = "waiting for another build"
    error: str | None = None
    plan: Plan | None = None
    # Nodes whose lines tell of it, and whether the prompt of each waits.
    nodes: dict[str | None, bool] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)
    unwanted: threading.Event = field(default_factory=threading.Event)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.structure.graph_key,
            "title": self.title,
            "state": self.state,
            "fraction": self.fraction,
            "text": self.text,
            "error": self.error,
        }


class Builder:
    """Plans at hand, and builds of those that are not. One per process; threads may share it.

    cache:    where plans and failures are kept; the user's cache by default.
    notify:   called with a build's state as JSON whenever it changes.
    host_root: folder of the ComfyUI whose classes are traced; that of this process by default.
    command:  how the process is started.
    """

    def __init__(
        self,
        cache: DiskCache | None = None,
        notify: Callable[[dict[str, Any]], None] | None = None,
        host_root: str | None = None,
        command: list[str] | None = None,
    ) -> None:
        self.cache = open_cache(None, None) if cache is None else cache
        self._notify = notify or (lambda data: journal().emit(BUILD_EVENT, data))
        self._host_root = host_root
        self._command = command or process_command()
        self._lock = threading.Lock()
        self._slot = threading.Lock()  # held by the one build that runs
        self._plans: dict[str, Plan] = {}
        self._builds: dict[str, _Build] = {}
        self._shapes: dict[str, str | None] = {}  # graph_key -> shape_key, of files in the cache

    def find(self, structure: Structure) -> Plan | None:
        """The plan at hand: in memory, shipped or cached. Builds nothing."""
        return self.kept(_key(structure), structure)

    def kept(self, graph_key: str, structure: Structure | None = None) -> Plan | None:
        """The plan in memory or in the cache, or that is shipped with the structure."""
        with self._lock:
            plan = self._plans.get(graph_key)
        if plan is None:
            plan = None if structure is None else shipped_plan(structure)
            plan = plan or self._cached(graph_key)
            if plan is not None:
                with self._lock:
                    plan = self._plans.setdefault(graph_key, plan)
        return plan

    def request(
        self,
        structure: Structure,
        network: nn.Module,
        wait: bool = False,
        node_id: str | None = None,
    ) -> Plan | None:
        """The plan if it is at hand; else start or join its build, and None.

        network: the live module. Only where its class comes from is looked at.
        wait: return only when the build has ended, with None if it failed or was cancelled. The
        host's interrupt ends the wait with the host's own exception, and not the build.
        node_id: the node whose line says how far the build is, and how it ended.
        Nothing is built that failed or was cancelled before; `status` says so.
        """
        self._forget_node(node_id)
        plan = self.find(structure)
        if plan is not None:
            return plan
        build = self._start(structure, _is_diffusers(network))
        if build is None:
            return None
        with self._lock:
            build.nodes[node_id] = wait
        self.show(str(structure.graph_key), node_id)
        if not wait:
            return None
        while not build.ended.wait(POLL_SECONDS):
            throw_if_interrupted()
        return build.plan

    def show(self, graph_key: str, node_id: str | None) -> None:
        """Say on a node's line where the build that it asked for is now."""
        with self._lock:
            build = self._builds.get(graph_key)
        if build is not None and node_id in build.nodes:
            journal().status(node_id, *_line_of(build, build.nodes[node_id]))

    def status(self, graph_key: str) -> dict[str, Any]:
        """{"state", "fraction", "text", "error"}.

        state: "ready", "building", "failed", "cancelled", or "unknown" if it was never asked for.
        """
        with self._lock:
            build = self._builds.get(graph_key)
            ready = graph_key in self._plans
        if build is not None and (build.state == "building" or not ready):
            data = build.to_json()
            return {name: data[name] for name in ("state", "fraction", "text", "error")}
        if ready or graph_key in shipped_families() or self.is_cached(graph_key):
            return {"state": "ready", "fraction": 1.0, "text": "ready", "error": None}
        error = self._failure(graph_key)
        if error is not None:
            return {"state": "failed", "fraction": 0.0, "text": "failed", "error": error}
        return {"state": "unknown", "fraction": 0.0, "text": "", "error": None}

    def builds(self) -> list[dict[str, Any]]:
        """Every build of this process and every failure on disk, newest first: "id", "title", …"""
        with self._lock:
            found = {key: build.to_json() for key, build in self._builds.items()}
        for key, failure in self._failures():
            if key not in found and not self.is_cached(key):
                found[key] = {
                    "id": key,
                    "title": failure["title"],
                    "state": "failed",
                    "fraction": 0.0,
                    "text": "failed",
                    "error": failure["error"],
                }
        return list(found.values())[::-1]

    def known_shapes(self) -> dict[str, str]:
        """shape_key -> graph_key, of every build of this process and every file in the cache.

        Of a network of no published family, a checkpoint's file gives the shape_key alone.
        """
        found = {}
        for entry in self.cache.entries():
            if entry.kind not in (PLAN, FAILURE) or entry.version != self.cache.version:
                continue
            if entry.key not in self._shapes:
                self._shapes[entry.key] = _shape_key_of(entry)
            shape_key = self._shapes[entry.key]
            if shape_key is not None:
                found[shape_key] = entry.key
        with self._lock:
            for key, build in self._builds.items():
                found[build.structure.shape_key] = key
        return found

    def is_cached(self, graph_key: str) -> bool:
        """Whether there is a file of this plan; it is not read."""
        return (self.cache.folder / PLAN / f"{graph_key}.json").is_file()

    def cancel(self, graph_key: str) -> None:
        """End a build; it is not begun again until `retry`. Raises BuildRefused if none runs."""
        with self._lock:
            build = self._builds.get(graph_key)
        if build is None or build.state != "building":
            raise BuildRefused("no such build is running")
        build.unwanted.set()
        build.ended.wait(KILL_SECONDS + 10 * POLL_SECONDS)

    def retry(self, graph_key: str) -> None:
        """Forget a failure or a cancel, and build again where the structure is known.

        One known from an earlier process alone is built when it is next asked for. Raises
        BuildRefused if it neither failed nor was cancelled.
        """
        with self._lock:
            build = self._builds.get(graph_key)
            if build is not None and build.state in ("failed", "cancelled"):
                del self._builds[graph_key]
            elif build is not None or self._failure(graph_key) is None:
                raise BuildRefused("this build has neither failed nor been cancelled")
        self._forget_failure(graph_key)
        if build is not None:
            self._start(build.structure, build.diffusers)

    def forget(self, graph_key: str) -> None:
        """Drop a plan from memory, since its file was deleted; engines that run keep theirs."""
        with self._lock:
            self._plans.pop(graph_key, None)
            build = self._builds.get(graph_key)
            if build is not None and build.state == "ready":
                del self._builds[graph_key]

    def close(self) -> None:
        """End all builds, and wait until their processes are gone."""
        with self._lock:
            builds = [build for build in self._builds.values() if build.state == "building"]
        for build in builds:
            build.unwanted.set()
        for build in builds:
            build.ended.wait(KILL_SECONDS + 10 * POLL_SECONDS)

    def note(self, event: str, data: dict[str, Any]) -> None:
        """A listener of the journal: a node that goes on to something else has another line."""
        if event == BEGIN_EVENT or (event == STATUS_EVENT and data["state"] == "off"):
            self._forget_node(data["node_id"])

    def _forget_node(self, node_id: str | None) -> None:
        with self._lock:
            for build in self._builds.values():
                build.nodes.pop(node_id, None)

    def _start(self, structure: Structure, diffusers: bool) -> _Build | None:
        """The running build of a structure, started if need be; None if it shall not be built."""
        key = _key(structure)
        with self._lock:
            build = self._builds.get(key)
            if build is not None and build.state == "building":
                return build
            if build is not None and build.state in ("failed", "cancelled"):
                return None
            build = self._builds[key] = _Build(structure, title_of(structure), diffusers)
            error = self._failure(key)
            if error is not None:
                build.state, build.text, build.error = "failed", "failed", error
                build.ended.set()
        if error is not None:
            logger.warning("%s is not built again: %s", build.title, error)
            self._tell(build)
            return None
        threading.Thread(target=self._run, args=(build,), daemon=True).start()
        return build

    def _run(self, build: _Build) -> None:
        """The thread of a build: its turn, its process, its end."""
        self._tell(build)
        result: dict[str, Any] = {"error": "cancelled", "kind": "cancelled"}
        try:
            while not build.unwanted.is_set():
                if self._slot.acquire(timeout=POLL_SECONDS):
                    try:
                        result = self._converse(build)
                    finally:
                        self._slot.release()
                    break
            if "plan" in result:
                build.plan = Plan.from_json(result["plan"])
        except (InvalidPlan, OSError) as error:
            result = {"error": " ".join(str(error).split()), "kind": "resources"}
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}", "kind": "resources"}
            raise
        finally:
            self._end(build, result)

    def _end(self, build: _Build, result: dict[str, Any]) -> None:
        """Settle how a build ended, tell, and let go who waits for it."""
        key = _key(build.structure)
        try:
            if build.plan is None and result["kind"] in ("unsupported", "failed"):
                failure = {
                    "error": result["error"],
                    "title": build.title,
                    "shape_key": build.structure.shape_key,
                    "versions": versions(),
                }
                self.cache.put(key, FAILURE, failure)
            with self._lock:
                if build.plan is not None:
                    self._plans[key] = build.plan
                    build.state, build.fraction, build.text = "ready", 1.0, "ready"
                elif result["kind"] == "cancelled":
                    build.state, build.text = "cancelled", "cancelled"
                else:
                    build.state, build.text, build.error = "failed", "failed", result["error"]
            if build.state == "failed":
                logger.warning("%s could not be built: %s", build.title, build.error)
            self._tell(build)
        finally:
            build.ended.set()

    def _tell(self, build: _Build) -> None:
        """Tell of a build's state, and say it on the nodes that asked for it."""
        self._notify(build.to_json())
        with self._lock:
            nodes = dict(build.nodes)
        for node_id, waits in nodes.items():
            journal().status(node_id, *_line_of(build, waits))

    def _converse(self, build: _Build) -> dict[str, Any]:
        """Run the process of a build and follow it to its last answer."""
        request = json.dumps(self._request(build)).encode() + b"\n"
        with _process(self._command) as process:
            answers: queue.Queue[bytes | None] = queue.Queue()
            said: deque[bytes] = deque(maxlen=20)
            threads = [
                threading.Thread(target=_read_answers, args=(process, answers), daemon=True),
                threading.Thread(target=_read_errors, args=(process, said), daemon=True),
            ]
            for thread in threads:
                thread.start()
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended already: its status says how
                process.stdin.write(request)
                process.stdin.flush()
            heard = told = time.monotonic()
            while True:
                if build.unwanted.is_set():
                    return {"error": "cancelled", "kind": "cancelled"}
                try:
                    line = answers.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    if time.monotonic() - heard > STALL_SECONDS:
                        minutes = STALL_SECONDS / 60
                        error = f"the build said nothing for {minutes:.0f} minutes"
                        return {"error": error, "kind": "resources"}
                    continue
                if line is None:
                    threads[1].join(KILL_SECONDS)
                    return {"error": _end_of(process, said), "kind": "resources"}
                heard = time.monotonic()
                answer = _parse(line)
                if "plan" in answer or "error" in answer:
                    return answer
                if "progress" in answer:
                    build.fraction = max(build.fraction, float(answer["progress"]))
                    build.text = str(answer["text"])
                    if heard - told > EVENT_SECONDS:
                        told = heard
                        self._tell(build)

    def _request(self, build: _Build) -> dict[str, Any]:
        assert build.structure.config is not None
        return {
            "config": build.structure.config.to_json(),
            "graph_key": build.structure.graph_key,
            "host_root": None if build.diffusers else self._host_root or comfyui_root(),
            "cache_dir": str(self.cache.root),
            "cache_bytes": self.cache.limit_bytes,
            # The host's own may have been extended at its start.
            "path": [entry for entry in sys.path if entry],
        }

    def _cached(self, key: str) -> Plan | None:
        data = self.cache.get(key, PLAN)
        if data is None:
            return None
        try:
            return Plan.from_json(data)
        except InvalidPlan as error:
            logger.warning("a cached plan is built again: %s", error)
            self.cache.remove(key)
            return None

    def _failure(self, key: str) -> str | None:
        """Why these versions cannot build a structure, as far as the disk remembers."""
        data = self.cache.get(key, FAILURE)
        if data is None or data.get("versions") != versions():
            return None
        return str(data.get("error"))

    def _failures(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every failure on disk that still counts, with its key."""
        for entry in self.cache.entries():
            if entry.kind != FAILURE or entry.version != self.cache.version:
                continue
            data = self.cache.get(entry.key, FAILURE)
            if data is not None and data.get("versions") == versions():
                yield (
                    entry.key,
                    {"error": str(data.get("error")), "title": str(data.get("title"))},
                )

    def _forget_failure(self, key: str) -> None:
        with contextlib.suppress(OSError):
            (self.cache.folder / FAILURE / f"{key}.json").unlink()


@lru_cache(maxsize=1)
def builder() -> Builder:
    """The process's builder; its builds end with the process."""
    found = Builder()
    journal().subscribe(found.note)
    atexit.register(found.close)
    return found


@cache
def shipped_families() -> dict[str, Family]:
    """Graph key -> family, of every plan that comes with the pack."""
    found = {}
    for family in FAMILIES:
        if (SHIPPED / f"{family.name}.json").is_file():
            shapes = {name: p.shape for name, p in parameters(family.config).items()}
            found[str(structure_of(shapes).graph_key)] = family
    return found


def title_of(structure: Structure) -> str:
    """A structure's name for people, such as "UNet of no published family (1a2b3c)"."""
    for family in FAMILIES:
        if family.name == structure.family:
            return family.title
    kind = {"unet": "UNet", "controlnet": "ControlNet"}.get(structure.kind, "network")
    return f"{kind} of no published family ({structure.shape_key[:6]})"


def _line_of(build: _Build, waits: bool) -> tuple[str, str]:
    """State and text of the line on a node that asked for a build."""
    if build.state == "building":
        done = f"building {100 * build.fraction:.0f} %"
        return "build", done if waits else f"{done} · host's path meanwhile"
    if build.state == "ready":
        return "engine", "engine ready" if waits else "engine ready: used from the next run"
    return "host", f"host's path: {why_no_plan(build.state, build.error)}"


def why_no_plan(state: str, error: str | None) -> str:
    """What a build that ended without a plan says."""
    if state == "cancelled":
        return "the build of its engine was cancelled"
    return f"its engine could not be built: {error or state}"


def _shape_key_of(entry: Entry) -> str | None:
    """The shape_key in a plan's or a failure's file, which this does not mark as used."""
    try:
        body = json.loads(entry.path.read_bytes())["body"]
        return str((body["structure"] if entry.kind == PLAN else body)["shape_key"])
    except (KeyError, OSError, TypeError, ValueError):
        return None


def versions() -> dict[str, str]:
    """What a failure depends on: with another of these, building is tried again."""
    host = getattr(sys.modules.get("comfyui_version"), "__version__", "")
    return {"pack": __version__, "torch": torch.__version__, "host": str(host)}


def comfyui_root() -> str:
    """Folder of the ComfyUI that this process runs. Raises OSError if it runs none."""
    package = sys.modules.get("comfy")
    for path in getattr(package, "__path__", ()):
        return str(Path(path).resolve().parent)
    raise OSError("ComfyUI's own modules were not found in this process")


def throw_if_interrupted() -> None:
    """Raise the host's own exception if its user has stopped the prompt."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


def process_command() -> list[str]:
    """The command line of the build's process."""
    return processes.command(_BOOT, str(_PACK))


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of low priority without GPU, surely gone afterwards."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=_PACK,
        **processes.options(low=True, PYTHONIOENCODING="utf-8"),
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_answers(process: subprocess.Popen[bytes], answers: queue.Queue[bytes | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


def _read_errors(process: subprocess.Popen[bytes], said: deque[bytes]) -> None:
    assert process.stderr is not None
    with process.stderr as stream:
        said.extend(stream)


def _parse(line: bytes) -> dict[str, Any]:
    """One answer; a line that is none says nothing."""
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _end_of(process: subprocess.Popen[bytes], said: deque[bytes]) -> str:
    """Why a process ended without an answer."""
    try:
        status = process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return "the build's process fell silent"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = str(-status)
        hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
        return f"the build's process was killed by {name}{hint}"
    last = said[-1].decode("utf-8", "replace").strip() if said else "it gave no reason"
    return f"the build's process ended with status {status}: {last}"


def _is_diffusers(network: nn.Module) -> bool:
    return type(network).__module__.partition(".")[0] == "diffusers"


def _key(structure: Structure) -> str:
    if structure.graph_key is None or structure.config is None:
        raise ValueError("only UNets and ControlNets of a known architecture have plans")
    return structure.graph_key
