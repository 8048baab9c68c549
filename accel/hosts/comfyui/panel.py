"""What the user sees of runs: the routes behind the panel, lines on nodes, the report, receipts."""

from __future__ import annotations

import json
import logging
import uuid
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.model_management as management
import torch
import xxhash
from comfy_execution.utils import get_executing_context
from server import PromptServer

from . import routes
from .journal import BEGIN_EVENT, KEPT_RUNS, RUN_EVENT, STATUS_EVENT, Run, journal
from .pool import pool

logger = logging.getLogger(__name__)

RECEIPT = "switchyard"
"""Key of the receipt in a picture's metadata."""

NODES = "Switchyard"
"""What the ids of the pack's nodes begin with."""

REPORT = "SwitchyardReport"
"""The pack's one node that accelerates nothing."""

KEPT_ENDED = 16
"""Prompts that are not in the queue: the server may still be checking them."""


@cache
def start() -> None:
    """Register the routes, and have the front end told of what happens. Once."""
    server = PromptServer.instance
    if server is None:  # the pack is imported without a server
        return
    routes.register(server)
    metadata = _Metadata(server)
    nodes, clients = _nodes(), _Clients(server)

    def tell(event: str, data: dict[str, Any]) -> None:
        """Send an event to the front end. Safe from any thread."""
        nodes.note(event, data)
        if event != STATUS_EVENT:
            server.send_sync(event, data)
        elif (client := clients.of(data["node_id"])) is not None:
            server.send_sync(event, data, client)
            server.send_progress_text(data["text"], data["node_id"], client)
        if event == RUN_EVENT:
            metadata.add(data)

    journal().subscribe(tell)


class _Clients:
    """Whose nodes they are: ids mean something in the workflow alone that was queued."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._known: dict[str, str | None] = {}

    def of(self, node_id: str) -> str | None:
        """The client that queued a node's prompt; a build tells of a node long after it."""
        if get_executing_context() is not None:
            self._known[node_id] = self._server.client_id
        return self._known.get(node_id)


class _Metadata:
    """The metadata that goes into the pictures of each queued prompt, by the prompt's id.

    The queue hands out copies of what it runs; the dictionary that nodes write into pictures is the
    one that came with the prompt.
    """

    def __init__(self, server: Any) -> None:
        self._queue = server.prompt_queue
        self._known: dict[str, dict[str, Any]] = {}
        server.add_on_prompt_handler(self._on_prompt)

    def _on_prompt(self, json_data: Any) -> Any:
        """Keep hold of a new prompt's metadata. What is malformed is the server's to refuse.

        A prompt without the pack's nodes is none of its business.
        """
        if not isinstance(json_data, dict):
            return json_data
        extra = json_data.setdefault("extra_data", {})
        if isinstance(extra, dict) and _has_our_nodes(json_data.get("prompt")):
            metadata = extra.get("extra_pnginfo")
            if metadata is None:
                metadata = extra["extra_pnginfo"] = {}
            if isinstance(metadata, dict):
                prompt_id = json_data.get("prompt_id") or str(uuid.uuid4())
                json_data["prompt_id"] = prompt_id
                self._forget_ended()
                self._known[str(prompt_id)] = metadata
        return json_data

    def _forget_ended(self) -> None:
        with self._queue.mutex:  # the queue's own method would copy every prompt in it
            items = [*self._queue.currently_running.values(), *self._queue.queue]
            queued = {item[1] for item in items}
        ended = [key for key in self._known if key not in queued]
        for key in ended[:-KEPT_ENDED]:
            del self._known[key]

    def add(self, run: dict[str, Any]) -> None:
        """Leave a run's receipt with the prompt that is being executed."""
        for item in list(self._queue.currently_running.values()):
            metadata = self._known.get(item[1])
            if metadata is not None:
                metadata.setdefault(RECEIPT, []).append(receipt(run))


def _has_our_nodes(prompt: Any) -> bool:
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    kinds = (node.get("class_type") for node in nodes if isinstance(node, dict))
    return any(isinstance(kind, str) and kind.startswith(NODES) for kind in kinds)


def receipt(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's record that belongs with the picture."""
    return {
        "model": run["model"],
        "structure": run["family"] or run["graph_key"],
        "mode": run["mode"],
        "gpu": run["gpu"],
        "ms_per_step": {
            path: round(run[f"{path}_ms"], 2)
            for path in ("engine", "host")
            if run[f"{path}_ms"] is not None
        },
        "steps": run["steps"],
        "loras": run["loras"],
        "controlnets": run["controlnets"],
        "fallbacks": run["reasons"],
    }


class _Nodes:
    """What the runs' records do not hold: which node sampled, and which came back unaccelerated."""

    def __init__(self) -> None:
        self._samplers: dict[int, tuple[str, str | None]] = {}  # and a digest of what it was asked
        self._off: dict[str, _Off] = {}

    def note(self, event: str, data: dict[str, Any]) -> None:
        """Remember what an event says, in the thread of the node that is being executed."""
        if event == BEGIN_EVENT:
            self._off.pop(_root(data["node_id"]), None)
            executing = get_executing_context()
            if executing is not None:
                sampler = _root(executing.node_id)
                asked = _asked(_running(executing.prompt_id), sampler)
                self._samplers[data["id"]] = sampler, asked
                for old in list(self._samplers)[:-KEPT_RUNS]:
                    del self._samplers[old]
        elif event == STATUS_EVENT and data["state"] == "off":
            last = max(self._samplers, default=0)
            self._off[_root(data["node_id"])] = _Off(data["text"], last)

    def off(self, nodes: Collection[str]) -> dict[str, _Off]:
        """Those of `nodes` that gave out what they were given."""
        return {node: self._off[node] for node in nodes if node in self._off}

    def runs(
        self, prompt: Any, before: Collection[str], nodes: Collection[str], since: int
    ) -> list[Run]:
        """The last run of each node of `before`: later than run `since`, or of a MODEL of `nodes`.

        Only of those that are asked the same in `prompt`: a node of another workflow may have the
        same id. The host may have taken a MODEL from its cache that another node has made.
        """
        found = {}
        asked: dict[str, str | None] = {}
        for run in list(journal().runs):
            sampler, then = self._samplers.get(run.id, ("", None))
            if sampler not in before:
                continue
            if sampler not in asked:
                asked[sampler] = _asked(prompt, sampler)
            if then not in (None, asked[sampler]):
                continue
            if run.id > since or _root(run.node_id) in nodes:
                found[sampler] = run
        return sorted(found.values(), key=lambda run: run.id)


@dataclass(frozen=True)
class _Off:
    """Why a node does not accelerate, and the last run before it said so."""

    line: str
    last_run: int


@cache
def _nodes() -> _Nodes:
    return _Nodes()


def _root(node_id: str | None) -> str:
    """The node of the prompt itself, of one that it has put in its own place."""
    return str(node_id).partition(".")[0]


def report(prompt: Any = None, node_id: str | None = None) -> str:
    """What the samplings before a node ran on, and the engines in memory, as lines of text.

    prompt, node_id: the prompt in API form, and the node in it. Of a node that no accelerated one
    leads to, the last run of all.
    """
    before = _upstream(prompt, node_id)
    ours = [node for node in before if _kind(prompt[node]).startswith(NODES)]
    ours = [node for node in ours if _kind(prompt[node]) != REPORT]
    off = _nodes().off(ours)
    parts = [[f"node {node}: {said.line}"] for node, said in off.items()]
    if ours:
        since = max((said.last_run for said in off.values()), default=0)
        runs = _nodes().runs(prompt, before, [node for node in ours if node not in off], since)
    else:
        runs = list(journal().runs)[-1:]
        parts = [["no accelerated node leads here; the last run of all:"]]
    if not runs and not off:
        return "Nothing has been sampled yet through an accelerated MODEL."
    parts += [*(_run_lines(run.to_json()) for run in runs), _memory_lines()]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _running(prompt_id: str) -> Any:
    """The prompt in API form that is being executed under that id; None where nobody knows it."""
    queue = getattr(PromptServer.instance, "prompt_queue", None)
    items = [] if queue is None else list(queue.currently_running.values())
    return next((item[2] for item in items if item[1] == prompt_id), None)


def _asked(prompt: Any, node_id: str) -> str | None:
    """A digest of a node and all that comes into it; None if they are not known."""
    if not prompt or node_id not in prompt:
        return None
    nodes = [(n, prompt[n]) for n in (node_id, *_upstream(prompt, node_id))]
    told = [(n, _kind(node), node.get("inputs")) for n, node in nodes]
    return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())


def _upstream(prompt: Any, node_id: str | None) -> list[str]:
    """The nodes that what comes into a node depends on, the nearest first."""
    found: dict[str, None] = {}
    waiting = deque([node_id])
    while prompt and waiting:
        inputs = prompt.get(waiting.popleft(), {}).get("inputs", {})
        links = [link for link in inputs.values() if isinstance(link, list) and link]
        sources = [str(link[0]) for link in links]
        new = [source for source in sources if source in prompt and source not in found]
        found.update(dict.fromkeys(new))
        waiting.extend(new)
    return list(found)


def _kind(node: Any) -> str:
    return str(node.get("class_type"))


def _run_lines(run: dict[str, Any]) -> list[str]:
    lines = [f"{run['model']}: {run['status']}"]
    structure = run["family"] or run["graph_key"] or "unknown"
    sizes = ", ".join(f"{d['width']}x{d['height']} batch {d['batch']}" for d in run["dims"])
    lines.append(f"structure {structure} on {run['gpu'] or run['device']}, {sizes or 'no steps'}")
    for path, name in (("engine", "engine"), ("host", "host's path")):
        calls, ms = run[f"{path}_calls"], run[f"{path}_ms"]
        if calls:
            each = f", {ms:.1f} ms each" if ms else ""
            lines.append(f"{name}: {calls} call{'' if calls == 1 else 's'}{each}")
    lines.append(
        f"whole run {run['seconds']:.2f} s, weights brought in {run['swaps_ms']:.0f} ms, "
        f"graphs captured {run['graphs']}, networks traced {run['captures']}"
    )
    if run["compiling"]:
        lines.append(
            "kernels for this GPU are being compiled in the background, once: until then the "
            "libraries' run, which are slower"
        )
    if run["speedup"]:
        lines.append(f"{run['speedup']:.2f}x of this machine's own path at that size")
    if run["compared_db"] is not None:
        lines.append(f"{run['compared_db']:.0f} dB from the latent of the host's own path")
    for reason in run["reasons"]:
        where = f" ({reason['node']})" if reason["node"] else ""
        lines.append(f"host's path: {reason['text']}{where}")
    if run["error"]:
        lines.append(f"ended early: {run['error']}")
    return lines


def _memory_lines() -> list[str]:
    lines = []
    for network in pool().networks():
        if network["loaded"]:
            lines.append(
                f"{network['family'] or network['graph_key']} on {network['device']}: "
                f"weights {network['weights_bytes'] >> 20} MiB, "
                f"activations {network['activation_bytes'] >> 20} MiB, "
                f"sizes ready {len(network['shapes'])}, graphs captured {network['graphs']}"
            )
    device = management.get_torch_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lines.append(f"VRAM in use {(total - free) >> 20} of {total >> 20} MiB")
    if getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
        lines.append(
            "fp16 accumulation is on: of the engine, only the products that PyTorch does follow; "
            "kernels of its own add in fp32"
        )
    return lines or ["no engine is in memory"]
