"""What the user sees of runs: the routes behind the panel, lines on nodes, the report, receipts."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management as management
import torch
from server import PromptServer

from . import routes
from .journal import RUN_EVENT, STATUS_EVENT, Run, journal
from .pool import pool

logger = logging.getLogger(__name__)

RECEIPT = "switchyard"
"""Key of the receipt in a picture's metadata."""


def start() -> None:
    """Register the routes, and have the front end told of what happens."""
    server = PromptServer.instance
    if server is None:  # the pack is imported without a server
        return
    routes.register(server)
    journal().subscribe(_tell)


def _tell(event: str, data: dict[str, Any]) -> None:
    """Send an event to the front end. Safe from any thread."""
    server = PromptServer.instance
    server.send_sync(event, data)
    if event == STATUS_EVENT:
        server.send_progress_text(data["text"], data["node_id"])
    if event == RUN_EVENT:
        _leave_receipt(server, data)


def _leave_receipt(server: Any, run: dict[str, Any]) -> None:
    """Add what made the picture to the metadata of the prompt under way, if it has any.

    Nodes that save pictures write every entry of `extra_pnginfo`.
    """
    for item in list(server.prompt_queue.currently_running.values()):
        metadata = item[3].get("extra_pnginfo")
        if isinstance(metadata, dict):
            metadata.setdefault(RECEIPT, []).append(receipt(run))


def receipt(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's record that belongs with the picture."""
    return {
        "model": run["model"],
        "structure": run["family"] or run["graph_key"],
        "mode": run["mode"],
        "gpu": run["gpu"],
        "ms_per_step": run["engine_ms"] if run["mode"] == "engine" else run["host_ms"],
        "steps": run["steps"],
        "loras": run["loras"],
        "controlnets": run["controlnets"],
        "fallbacks": run["reasons"],
    }


def report(last: Run | None = None) -> str:
    """The last run, and the engines in memory, as lines of text."""
    run = last or (journal().runs[-1] if journal().runs else None)
    if run is None:
        return "Nothing has been sampled yet through an accelerated MODEL."
    return "\n".join([*_run_lines(run.to_json()), "", *_memory_lines()])


def _run_lines(run: dict[str, Any]) -> list[str]:
    lines = [f"{run['model']}: {run['status']}"]
    structure = run["family"] or run["graph_key"] or "unknown"
    sizes = ", ".join(f"{d['width']}x{d['height']} batch {d['batch']}" for d in run["dims"])
    lines.append(f"structure {structure} on {run['gpu'] or run['device']}, {sizes or 'no steps'}")
    for path, name in (("engine", "engine"), ("host", "host's path")):
        calls, ms = run[f"{path}_calls"], run[f"{path}_ms"]
        if calls:
            lines.append(f"{name}: {calls} calls" + (f", {ms:.1f} ms each" if ms else ""))
    lines.append(
        f"whole run {run['seconds']:.2f} s, weights brought in {run['swaps_ms']:.0f} ms, "
        f"graphs captured {run['graphs']}, networks traced {run['captures']}"
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
                f"{len(network['shapes'])} sizes ready, {network['graphs']} graphs captured"
            )
    device = management.get_torch_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lines.append(f"VRAM in use {(total - free) >> 20} of {total >> 20} MiB")
    if getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
        lines.append("fp16 accumulation is on: matrix products of the engine use it as well")
    return lines or ["no engine is in memory"]
