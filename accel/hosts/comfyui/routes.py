"""The server's routes behind the panel, all under /switchyard and all JSON.

    GET  state            the GPU, the engines, the builds, totals and the last run
    GET  checkpoints      every file of the models folder with its badge
    GET  runs             the last runs, newest first
    POST engines/delete   {"id"}: a built engine's file, never one that came with the pack
    POST builds/cancel    {"id"}
    POST builds/retry     {"id"}
    POST predict          a sampling (`predict.Sampling`): its seconds and bytes before it is queued

What cannot be done is answered with {"error": "one line"} and 400 (bad request), 404 (no such
thing) or 409 (not in this state). An id is a graph key and never becomes part of a path before it
was found to be one. Whatever touches the disk runs in a thread, off the server's event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from aiohttp import web

from ... import __version__
from .journal import BEGIN_EVENT, GRAPH_KEY, RUN_EVENT, Journal, journal

if TYPE_CHECKING:  # torch and the compiler are not imported before they are needed
    from ...hardware import Hardware
    from .builder import Builder
    from .catalog import Catalog, Engines, Prefetcher
    from .predict import Predictor

logger = logging.getLogger(__name__)

PREFIX = "/switchyard"
WEB = Path(__file__).parents[3] / "web"
LONGEST_BODY = 4096

QUEUED_SECONDS = 1.0
"""After this time a prompt that has arrived is in the queue."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_T = TypeVar("_T")


class BadRequest(Exception):
    """The request makes no sense; the message is for its sender."""


class Panel:
    """What the routes answer from. The host's functions are passed in, and what they need built
    at the first request.

    names, locate: the host's lists of model files, and their paths.
    networks, forget: the engines in memory, and what frees those of a graph key.
    """

    def __init__(
        self,
        names: Callable[[str], Iterable[str]],
        locate: Callable[[str, str], str | None],
        networks: Callable[[], list[Mapping[str, Any]]],
        builder: Builder | None = None,
        journal: Journal | None = None,
        forget: Callable[[str], None] = lambda key: None,
    ) -> None:
        self._names, self._locate, self._networks = names, locate, networks
        self._forget = forget
        self._own_builder, self._own_journal = builder, journal
        self._lock = threading.Lock()
        self._catalog: Catalog | None = None
        self._engines: Engines | None = None
        self._predictor: Predictor | None = None

    @property
    def journal(self) -> Journal:
        """The process's journal, or the one given."""
        return self._own_journal or journal()

    @property
    def builder(self) -> Builder:
        """The process's builder, or the one given."""
        from .builder import builder

        return self._own_builder or builder()

    @property
    def catalog(self) -> Catalog:
        """The models folder."""
        from .catalog import Catalog

        with self._lock:
            if self._catalog is None:
                self._catalog = Catalog(self._names, self._locate, self.builder)
            return self._catalog

    @property
    def engines(self) -> Engines:
        """The engines on disk and in memory."""
        from .catalog import Engines

        with self._lock:
            if self._engines is None:
                self._engines = Engines(self.builder, self._networks)
            return self._engines

    @property
    def predictor(self) -> Predictor:
        """What samplings will take."""
        from .predict import Predictor

        catalog = self.catalog
        with self._lock:
            if self._predictor is None:
                self._predictor = Predictor(catalog)
            return self._predictor

    def state(self) -> dict[str, Any]:
        """The answer to GET state. A cache that cannot be read leaves its part empty."""
        runs = list(self.journal.runs)
        nothing: list[dict[str, Any]] = []
        return {
            "version": __version__,
            "gpu": _or(None, gpu),
            "host": host(),
            "engines": _or(nothing, self.engines.listing),
            "builds": _or(nothing, self.builder.builds),
            "totals": self.journal.totals,
            "last_run": runs[-1].to_json() if runs else None,
        }

    def checkpoints(self) -> dict[str, Any]:
        """The answer to GET checkpoints."""
        entries, scanning = self.catalog.listing()
        return {"checkpoints": entries, "scanning": scanning}

    def runs(self) -> dict[str, Any]:
        """The answer to GET runs."""
        return {"runs": [run.to_json() for run in list(self.journal.runs)[::-1]]}

    def delete(self, key: str) -> dict[str, Any]:
        """The answer to POST engines/delete. What it holds in memory is freed as well."""
        freed = self.engines.delete(key)
        self._forget(key)
        return {"deleted": True, "freed_bytes": freed}

    def cancel(self, key: str) -> dict[str, Any]:
        """The answer to POST builds/cancel."""
        self._known(key)
        self.builder.cancel(key)
        return {"cancelled": True}

    def retry(self, key: str) -> dict[str, Any]:
        """The answer to POST builds/retry."""
        self._known(key)
        self.builder.retry(key)
        return {"retried": True}

    def predict(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to POST predict. Raises BadRequest."""
        from .predict import Sampling

        try:
            sampling = Sampling.of(asked)
        except ValueError as error:
            raise BadRequest(f"{error} is missing, or no such thing") from None
        return self.predictor.predict(sampling, _hardware()[1])

    def _known(self, key: str) -> None:
        if self.builder.status(key)["state"] == "unknown":
            raise LookupError("there is no such build")


def register(server: Any, panel: Panel | None = None) -> None:
    """Add the routes to the host's server, and read ahead what its queue needs next. Once each.

    server: the host's PromptServer, before it starts to listen.
    """
    if any(getattr(route, "path", None) == f"{PREFIX}/state" for route in server.routes):
        return
    if panel is None:
        import folder_paths

        panel = Panel(
            folder_paths.get_filename_list, folder_paths.get_full_path, networks, forget=forget
        )
    add_routes(server.routes, panel)
    serve_scripts(server.routes, WEB)
    _ReaderAhead(server, panel)


def add_routes(routes: web.RouteTableDef, panel: Panel) -> None:
    """Put the panel's routes into a table."""
    reads = {"state": panel.state, "checkpoints": panel.checkpoints, "runs": panel.runs}
    for name, read in reads.items():
        routes.get(f"{PREFIX}/{name}")(_reading(read))
    actions = {
        "engines/delete": panel.delete,
        "builds/cancel": panel.cancel,
        "builds/retry": panel.retry,
    }
    for name, action in actions.items():
        routes.post(f"{PREFIX}/{name}")(_acting(partial(_on_id, action)))
    routes.post(f"{PREFIX}/predict")(_acting(panel.predict))


def networks() -> list[Mapping[str, Any]]:
    """The engines in memory: none as long as nothing has been accelerated."""
    pool = sys.modules.get(f"{__package__}.pool")
    return [] if pool is None else list(pool.pool().networks())


def forget(graph_key: str) -> None:
    """Free the memory of a structure's engines, if it has any."""
    pool = sys.modules.get(f"{__package__}.pool")
    if pool is not None:
        pool.pool().forget(graph_key)


def bring(path: str, stop: threading.Event, keep: Collection[str]) -> None:
    """Bring a file nearer to the engine that will run it, if any engine is in memory."""
    if f"{__package__}.pool" in sys.modules:
        from .ahead import bring_nearer

        bring_nearer(path, stop, keep)


def host() -> dict[str, Any]:
    """Versions of the host and of torch, and whether its memory is dynamic."""
    memory = sys.modules.get("comfy.memory_management")
    return {
        "comfyui": str(getattr(sys.modules.get("comfyui_version"), "__version__", "unknown")),
        "dynamic_vram": bool(getattr(memory, "aimdo_enabled", False)),
        "torch": str(getattr(sys.modules.get("torch"), "__version__", "unknown")),
    }


def gpu() -> dict[str, Any]:
    """The device that the host computes on. `problem`: why no engine can run there.

    timed_calls: calls of operators whose kernels were timed on such a GPU, by us or here.
    """
    from ...runtime.calls import timed_calls

    name, hardware, problem = _hardware()
    found: dict[str, Any] = {"capability": None, "vram_mib": None, "timed_calls": 0}
    if hardware is not None and hardware.capability is not None:
        found["capability"] = ".".join(map(str, hardware.capability))
        found["vram_mib"] = hardware.memory_bytes >> 20
        found["timed_calls"] = timed_calls(hardware)
    return {**found, "name": name, "problem": problem}


@lru_cache(maxsize=1)  # neither changes while the host runs, and the driver is slow to ask
def _hardware() -> tuple[str, Hardware | None, str | None]:
    """The device that the host computes on: its name, and facts or why no engine can run there."""
    import torch

    from ...errors import DeviceUnavailable
    from ...hardware import describe

    management = sys.modules.get("comfy.model_management")
    if management is not None:
        device = management.get_torch_device()
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        hardware = describe(device)
    except DeviceUnavailable as error:
        return str(device), None, str(error)
    return hardware.name, hardware, None


def serve_scripts(table: web.RouteTableDef, folder: Path) -> None:
    """Serve the pack's scripts and help where the host's own route for them does not match.

    It never does where the name of the pack's folder is written otherwise in an address, as a space
    is. `folder` lies in the pack's.
    """
    name = folder.parent.name
    if quote(name) == name:
        return
    root = folder.resolve()
    # As code points: a brace or a backslash means something in a route, or in its expression. Of an
    # address only the percent sign is not decoded before it is matched.
    escaped = "".join(f"\\U{ord(character):08x}" for character in name.replace("%", "%25"))

    @table.get(f"/extensions/{{pack:{escaped}}}/{{path:.+}}")
    async def serve(request: web.Request) -> web.StreamResponse:
        try:
            path = (root / request.match_info["path"]).resolve()
        except ValueError:  # a null character
            raise web.HTTPNotFound from None
        if not path.is_relative_to(root) or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)


class _ReaderAhead:
    """Starts to read the next prompt's files when a sampling begins, or one is queued meanwhile."""

    def __init__(self, server: Any, panel: Panel) -> None:
        self._queue, self._locate = server.prompt_queue, panel._locate
        self._sampling: set[int] = set()
        self._prefetcher: Prefetcher | None = None
        panel.journal.subscribe(self._listen)
        server.add_on_prompt_handler(self._on_prompt)

    def _listen(self, event: str, data: dict[str, Any]) -> None:
        if event == BEGIN_EVENT:
            self._sampling.add(data["id"])
            self._look()
        elif event == RUN_EVENT:
            self._sampling.discard(data["id"])

    def _on_prompt(self, json_data: dict[str, Any]) -> dict[str, Any]:
        # The server has yet to check the prompt, and to put it into the queue.
        timer = threading.Timer(QUEUED_SECONDS, self._look)
        timer.daemon = True
        timer.start()
        return json_data

    def _look(self) -> None:
        if not self._sampling:
            return
        if self._prefetcher is None:
            from .catalog import Prefetcher

            self._prefetcher = Prefetcher(self._queue, self._locate, bring)
        self._prefetcher.look()


def _reading(read: Callable[[], dict[str, Any]]) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await _answer(read)

    return handle


def _acting(action: Callable[[dict[str, Any]], dict[str, Any]]) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            body = await _body_of(request)
        except BadRequest as error:
            return _error(400, str(error))
        return await _answer(lambda: action(body))

    return handle


async def _answer(work: Callable[[], dict[str, Any]]) -> web.StreamResponse:
    """Do the work in a thread; its result or its error as JSON."""
    loop = asyncio.get_running_loop()
    status, data = await loop.run_in_executor(None, _attempt, work)
    return _json(data, status)


def _attempt(work: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    from .builder import BuildRefused
    from .catalog import EngineRefused

    try:
        return 200, work()
    except BadRequest as error:
        return 400, {"error": str(error)}
    except EngineRefused as error:
        return (404 if error.missing else 409), {"error": str(error)}
    except BuildRefused as error:
        return 409, {"error": str(error)}
    except LookupError as error:
        return 404, {"error": str(error)}
    except OSError as error:
        return 409, {"error": f"the disk says no: {error.strerror or error}"}
    except Exception as error:
        logger.warning("the panel got no answer", exc_info=True)
        return 500, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


async def _body_of(request: web.Request) -> dict[str, Any]:
    """The object in a request's body. Raises BadRequest."""
    # A page of another site may send a form or plain text unasked, but not this.
    if request.content_type != "application/json":
        raise BadRequest("the body must be application/json")
    try:
        await request.content.readexactly(LONGEST_BODY + 1)
    except asyncio.IncompleteReadError as error:
        body = error.partial
    else:
        raise BadRequest("the body is too long")
    try:
        data = json.loads(body)
    except (RecursionError, ValueError):
        raise BadRequest("the body is no JSON") from None
    if not isinstance(data, dict):
        raise BadRequest("the body is no JSON object")
    return data


def _on_id(action: Callable[[str], dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
    return action(_id_of(body))


def _id_of(body: dict[str, Any]) -> str:
    """The id in a request's body. Raises BadRequest."""
    key = body.get("id")
    if not isinstance(key, str) or not GRAPH_KEY.fullmatch(key):
        raise BadRequest('the body must be {"id": …} with 32 hexadecimal digits')
    return key


def _or(default: _T, part: Callable[[], _T]) -> _T:
    """One part of an answer, or nothing in its place where the disk or the device fails."""
    try:
        return part()
    except (OSError, RuntimeError) as error:
        logger.warning("the panel lacks a part: %s", error)
        return default


def _json(data: dict[str, Any], status: int) -> web.Response:
    return web.json_response(data, status=status, headers={"Cache-Control": "no-store"})


def _error(status: int, text: str) -> web.Response:
    return _json({"error": text}, status)
