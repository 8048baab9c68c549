"""The separate process that makes the plan of one structure; `builder` starts it and listens.

Tracing a network takes up to a minute, holds Python's lock and changes settings of the whole
process, so it is kept out of the host's. The request, one line of JSON, comes on the standard
input; answers, a line each, leave on the standard output:

    {"progress": 0.41, "text": "tracing the network"}
    {"plan": {…}, "source": "built"}         or    {"error": "one line", "kind": "unsupported"}

The input stays open for as long as the plan is wanted: when it closes, this process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ...models import UNetConfig

NICENESS = 10
PARENT_POLL_SECONDS = 2.0
# Importing torch and the host takes seconds, before there is anything to count.
STARTED = 0.04

Send = Callable[[dict[str, Any]], None]


def main() -> int:
    """Serve the one request on the standard input. Returns the exit status."""
    send = _open_answers()
    with contextlib.suppress(AttributeError, OSError):  # Windows: the parent has set the priority
        os.nice(NICENESS)
    request = json.loads(sys.stdin.buffer.readline())
    _end_with_the_parent()
    sys.path += [entry for entry in request["path"] if entry not in sys.path]
    try:
        answer = build(request, send)
    except MemoryError:
        answer = {"error": "the computer's memory is too small", "kind": "resources"}
    except Exception as error:
        answer = {"error": _line(error), "kind": _kind(error)}
    send(answer)
    return 0 if "plan" in answer else 1


def build(request: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """The answer to a request: the plan, from the cache if another process was faster."""
    send({"progress": 0.0, "text": "starting"})
    from ...compiler import open_cache, plan_for
    from ...errors import UnsupportedModel
    from ...models import UNetConfig
    from ...structure import structure_of

    config = UNetConfig.from_json(request["config"])
    root = request["host_root"]
    network = diffusers_network(config) if root is None else comfyui_network(config, root)
    structure = structure_of(network)
    if structure.graph_key != request["graph_key"]:
        raise UnsupportedModel("the host's own network of this architecture is another one")
    cache = open_cache(Path(request["cache_dir"]), request["cache_bytes"])

    def progress(fraction: float, text: str) -> None:
        send({"progress": STARTED + (1.0 - STARTED) * fraction, "text": text})

    plan, source = plan_for(structure, network, cache, progress)
    return {"plan": plan.to_json(), "source": source}


def diffusers_network(config: UNetConfig) -> nn.Module:
    """diffusers' network of an architecture, without weights."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    from ...models import diffusers_kwargs

    cls: Any = UNet2DConditionModel if config.kind == "unet" else ControlNetModel
    with torch.device("meta"):
        network: nn.Module = cls(**diffusers_kwargs(config)).eval()
    return network


def comfyui_network(config: UNetConfig, host_root: str) -> nn.Module:
    """ComfyUI's own network of an architecture, without weights.

    host_root: folder of ComfyUI. Raises UnsupportedModel where its classes cannot express it.
    """
    import torch

    _import_comfyui(host_root)
    import comfy.cldm.cldm
    import comfy.ldm.modules.diffusionmodules.openaimodel
    import comfy.ops

    arguments = comfyui_arguments(config)
    place = {
        "dtype": torch.float16,
        "device": "meta",
        "operations": comfy.ops.disable_weight_init,
    }
    cls: Any = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel
    if config.kind == "controlnet":
        cls = comfy.cldm.cldm.ControlNet
    network: nn.Module = cls(**arguments, **place).eval()
    return network


def comfyui_arguments(config: UNetConfig) -> dict[str, Any]:
    """What ComfyUI's UNetModel or ControlNet is made with; its defaults are left out."""
    first = config.block_out_channels[0]
    arguments: dict[str, Any] = {
        "image_size": 32,  # unused there, but required
        "in_channels": config.in_channels,
        "model_channels": first,
        "num_res_blocks": list(config.layers_per_block),
        "channel_mult": [
            _Width(channels) if channels % first else channels // first
            for channels in config.block_out_channels
        ],
        "use_spatial_transformer": True,
        "transformer_depth": [depth for level in config.down_depths for depth in level],
        "transformer_depth_middle": config.mid_depth,
        "context_dim": config.context_dim or None,
        "use_linear_in_transformer": config.linear_projection,
        "legacy": False,
        **_heads(config),
    }
    if config.pooled_dim is not None:
        arguments |= {"num_classes": "sequential", "adm_in_channels": config.pooled_dim}
    if config.kind == "controlnet":
        return arguments | {"hint_channels": config.hint_channels}
    # Depths of the up path are taken from the end.
    flat = [depth for level in config.up_depths for depth in level]
    return arguments | {
        "out_channels": config.out_channels,
        "transformer_depth_output": flat[::-1],
    }


class _Width:
    """A level's channels where they are no multiple of the first level's.

    ComfyUI multiplies what it is given by the first level's channels; this stays what it is.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __mul__(self, first: int) -> int:
        return self.channels

    __rmul__ = __mul__


def _heads(config: UNetConfig) -> dict[str, int]:
    """Attention heads as ComfyUI takes them: one number, or one width, for all levels."""
    from ...errors import UnsupportedModel

    assert config.heads is not None
    used = [
        (heads, channels // heads)
        for level, (heads, channels) in enumerate(
            zip(config.heads, config.block_out_channels, strict=True)
        )
        if config.has_attention(level)
    ] or [(1, config.block_out_channels[0])]
    numbers, widths = {heads for heads, _ in used}, {width for _, width in used}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop()}
    if len(widths) == 1:
        return {"num_head_channels": widths.pop()}
    raise UnsupportedModel(f"{config.heads} attention heads differ in number and in width")


def _import_comfyui(host_root: str) -> None:
    """Make ComfyUI importable, on the CPU: this process must not take memory of the GPU."""
    if host_root not in sys.path:
        sys.path.insert(0, host_root)
    from comfy.cli_args import args

    args.cpu = True


def _open_answers() -> Send:
    """Write answers to the standard output, and what anything else prints there to the error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(answer: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(answer, allow_nan=False) + "\n")
            answers.flush()

    return send


def _end_with_the_parent() -> None:
    parent = os.getppid()

    def until_closed() -> None:
        # Not the buffered reader: it would be locked when Python shuts down.
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os._exit(1)

    def until_orphaned() -> None:
        # A fork of the host may hold the other end of the input for longer than the host lives.
        import psutil

        while os.getppid() == parent and psutil.pid_exists(parent):
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    for watch in (until_closed, until_orphaned):
        threading.Thread(target=watch, daemon=True).start()


def _kind(error: Exception) -> str:
    """Whether trying again may help: "unsupported", "failed", or "resources" that may come back."""
    from ...errors import UnsupportedModel

    if isinstance(error, UnsupportedModel):
        return "unsupported"
    return "resources" if isinstance(error, OSError) else "failed"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if _kind(error) == "unsupported" and text:
        return text
    return f"{name}: {text}" if text else name


if __name__ == "__main__":
    status = main()
    # Without Python's own shutdown: a thread still waits for the parent.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
