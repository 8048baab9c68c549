"""A real ComfyUI on loopback, with this repository and `testpack` as its custom nodes.

`installations()` lists what COMFYUI_PATH names; `Server` starts one. Nothing is written into a
checkout: models, outputs, settings and byte code go to a folder of the caller's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .checkpoints import ensure

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Workflow = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Installation:
    """A ComfyUI checkout and the Python that runs it."""

    root: Path
    python: Path

    @property
    def version(self) -> str:
        """As `comfyui_version.py` says."""
        found = re.search(
            r'__version__ = "([^"]+)"', (self.root / "comfyui_version.py").read_text("utf-8")
        )
        return found[1] if found else "unknown"


def installations() -> list[Installation]:
    """The checkouts of COMFYUI_PATH (several separated as in PATH; by default ~/ComfyUI).

    COMFYUI_PYTHON names the Python for all; else it is the checkout's .venv or venv, or this one.
    """
    found = []
    named = os.environ.get("COMFYUI_PATHS") or os.environ.get("COMFYUI_PATH", "~/ComfyUI")
    for name in named.split(os.pathsep):
        root = Path(name).expanduser()
        if not (root / "comfy").is_dir():
            continue
        candidates = [
            root / folder / place
            for folder in (".venv", "venv")
            for place in ("bin/python", "Scripts/python.exe")
        ]
        if os.environ.get("COMFYUI_PYTHON"):
            candidates = [Path(os.environ["COMFYUI_PYTHON"]).expanduser()]
        python = next((path for path in candidates if path.exists()), Path(sys.executable))
        found.append(Installation(root, python))
    return found


@lru_cache
def why_not(installation: Installation) -> str | None:
    """Why this installation cannot run tests, or None."""
    modules = "torch, aiohttp, safetensors, einops, transformers, scipy, xxhash, filelock, pytest"
    done = subprocess.run(
        [installation.python, "-c", f"import {modules}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode == 0:
        return None
    return f"{installation.python}: {done.stderr.strip().splitlines()[-1]}"


def environment(folder: Path, device: str = "cpu") -> dict[str, str]:
    """Of a process that runs ComfyUI: an own cache, no byte code in checkouts, on a CPU one thread.

    Of PYTHONPATH it keeps all but this repository's own modules, whose names are not for ComfyUI.
    """
    variables = {**os.environ, "SWITCHYARD_CACHE_DIR": str(folder / "switchyard-cache")}
    variables["PYTHONDONTWRITEBYTECODE"] = "1"
    variables["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        # More threads only wait for each other on networks this small, above all on busy machines.
        variables.setdefault("OMP_NUM_THREADS", "1")
        variables.setdefault("OMP_WAIT_POLICY", "passive")
    named = variables.pop("PYTHONPATH", "").split(os.pathsep)
    paths = [Path(path).resolve() for path in named if path]  # it runs in another folder
    others = [str(path) for path in paths if path not in (ROOT, ROOT / "tests")]
    if others:
        variables["PYTHONPATH"] = os.pathsep.join(others)
    return variables


class ServerError(RuntimeError):
    """The server did not start, refused a workflow, or a workflow failed."""


@dataclass(frozen=True)
class Result:
    """A finished workflow.

    outputs: `ui` of every output node by its id. status: `success` or `error`. error: the message
    of the node that failed. seconds: from the queue to the end.
    """

    prompt_id: str
    outputs: dict[str, Any]
    status: str
    error: str | None
    seconds: float


class Server:
    """A running ComfyUI. Use it as a context manager.

    folder: an empty folder of the caller's, the server's base directory.
    models: files of `checkpoints.FILES` are written there and shared between servers; by default
        `folder / "models"`.
    pack: whether this repository is among its custom nodes. packs: folders of other packs.
    arguments: further command line arguments; `--cpu` is given unless `device` is "cuda". Both
        are `flags`.
    """

    def __init__(
        self,
        installation: Installation,
        folder: Path,
        *,
        models: Path | None = None,
        pack: bool = True,
        packs: Sequence[Path] = (),
        arguments: Sequence[str] = (),
        device: str = "cpu",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.installation = installation
        self.folder = folder
        self.models = models or folder / "models"
        self.log_path = folder / "server.log"
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._cuda = device != "cpu"
        self.flags = [*([] if self._cuda else ["--cpu"]), *arguments]
        self.models.mkdir(parents=True, exist_ok=True)
        if not (folder / "models").exists():
            _link(self.models, folder / "models")
        _link(HERE / "testpack", folder / "custom_nodes" / "testpack")
        if pack:
            _link(ROOT, folder / "custom_nodes" / "switchyard")
        for other in packs:
            _link(other, folder / "custom_nodes" / other.name)
        self.port = _free_port()
        self.client_id = uuid.uuid4().hex
        self._command = [
            str(installation.python),
            str(HERE / "launch.py"),
            str(installation.root),
            *("--base-directory", str(folder), "--port", str(self.port), "--listen", "127.0.0.1"),
            *("--disable-api-nodes", "--disable-auto-launch"),
            *("--database-url", "sqlite:///:memory:"),
            *self.flags,
        ]
        self._environment = environment(folder, device) | dict(variables or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the server's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything the server has printed."""
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def start(self, timeout: float = 180) -> None:
        """Returns when the server answers. Raises ServerError with the end of its log."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        until = time.monotonic() + timeout
        while True:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended while it started:\n{self.log[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except (OSError, ServerError):
                if time.monotonic() > until:
                    self.stop()
                    raise ServerError(f"ComfyUI does not answer:\n{self.log[-4000:]}") from None
                time.sleep(0.2)

    def stop(self) -> None:
        """Ends the server, whatever it is doing."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None

    def get(self, path: str) -> Any:
        """The JSON under a path."""
        return self._request(path, None)

    def post(self, path: str, body: Any) -> Any:
        """What the server answers, JSON or None. Raises ServerError with its message."""
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code}: {error.read().decode()[:4000]}") from None
        return json.loads(body) if body else None

    def idle(self) -> bool:
        """Whether it answers, and runs nothing."""
        try:
            queue = self.get("/queue")
        except (OSError, ServerError):
            return False
        return not queue["queue_running"] and not queue["queue_pending"]

    def ensure(self, *names: str) -> None:
        """Write files of `checkpoints.FILES` into the server's models folder."""
        ensure(self.models, *names)

    def queue(self, workflow: Workflow) -> str:
        """Queue a workflow in API format. Returns its prompt id."""
        answer = self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})
        prompt_id: str = answer["prompt_id"]
        return prompt_id

    def wait(
        self, prompt_id: str, timeout: float = 300, poll: Callable[[], None] | None = None
    ) -> Result:
        """Wait for a queued workflow. Raises ServerError if the server ends or time is out."""
        started = time.monotonic()
        while True:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry.get("status"):
                return _result(prompt_id, entry)
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended in mid-run:\n{self.log[-4000:]}")
            if time.monotonic() - started > timeout:
                raise ServerError(f"no result after {timeout:g} s:\n{self.log[-4000:]}")
            if poll is not None:
                poll()
            time.sleep(0.05)

    def run(self, workflow: Workflow, timeout: float = 300) -> Result:
        """Queue a workflow, wait, and raise ServerError with its message if it failed."""
        result = self.wait(self.queue(workflow), timeout)
        if result.status != "success":
            raise ServerError(f"{result.error}\n{self.log[-4000:]}")
        return result

    def record_path(self, name: str) -> Path:
        """Where TestSampler, TestProbe or TestSave saved something under this name."""
        return self.folder / "output" / f"{name}.safetensors"

    def record(self, name: str) -> dict[str, torch.Tensor]:
        """What TestSampler, TestProbe or TestSave saved under this name."""
        return load_file(self.record_path(name))

    def memory_in_use(self) -> int:
        """MiB on the whole GPU; 0 without one."""
        if not self._cuda:
            return 0
        (device,) = self.get("/system_stats")["devices"]
        return int(device["vram_total"] - device["vram_free"]) >> 20

    def free(self) -> int:
        """Unload everything. Returns `memory_in_use` once that no longer falls."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        used = self.memory_in_use()
        until = time.monotonic() + (15 if self._cuda else 0)
        still = time.monotonic()
        while time.monotonic() < until and time.monotonic() < still + 2:
            time.sleep(0.2)
            now = self.memory_in_use()
            if now < used:
                used, still = now, time.monotonic()
        return used


def _result(prompt_id: str, entry: Mapping[str, Any]) -> Result:
    status = entry["status"]
    times: dict[str, float] = {}
    error = None
    for kind, data in status.get("messages", ()):
        times[kind] = data.get("timestamp", 0) / 1000
        if kind == "execution_error":
            error = (
                f"{data['node_type']}: {data['exception_type']}: {data['exception_message']}\n"
                + "".join(data.get("traceback", ()))
            )
        elif kind == "execution_interrupted":
            error = "interrupted"
    end = max(times.values(), default=0.0)
    return Result(
        prompt_id,
        entry.get("outputs", {}),
        status.get("status_str", "error"),
        error,
        end - times.get("execution_start", end),
    )


def _link(source: Path, target: Path) -> None:
    """A symbolic link; a copy where the system does not allow links."""
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "__pycache__"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
