"""The baselines: how PyTorch itself runs the networks, from plain to compiled.

`eager`: diffusers as it comes. `graph`: channels last, cuDNN's own search for algorithms, one CUDA
graph over all networks. `compile`: torch.compile with CUDA graphs (`reduce-overhead`), each network
whole (`fullgraph`), channels last; the second call records the graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .networks import Inputs, Networks, forward

BASELINES = ("eager", "graph", "compile")
NEED_GPU = ("graph", "compile")

Forward = Callable[[Inputs], Tensor]


def prepare(variant: str, networks: Networks, compiled: Path) -> Forward:
    """The networks as `variant` runs them, on the device where they are.

    compiled: the folder for what torch.compile makes. All but `eager` want a process of their own:
    they change cuDNN's settings.
    """
    if variant == "compile":
        return _compiled(networks, compiled)
    return {"eager": eager, "graph": _graph}[variant](networks)


def eager(networks: Networks) -> Forward:
    """diffusers as it comes."""

    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return forward(networks.unet, networks.controlnets, inputs)

    return call


def _graph(networks: Networks) -> Forward:
    """Inputs are copied in, the output is copied out."""
    _channels_last(networks)
    plain = eager(networks)
    recorded: list[tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = []

    def record(inputs: Inputs) -> None:
        kept = _last(inputs).map(torch.Tensor.clone)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                plain(kept)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = plain(kept)
        recorded.append((graph, kept, output))

    def call(inputs: Inputs) -> Tensor:
        if not recorded:
            record(inputs)
        graph, kept, output = recorded[0]
        for old, new in zip(kept.tensors(), inputs.tensors(), strict=True):
            old.copy_(new)
        graph.replay()
        return output.clone()

    return call


def keep_compiled_in(folder: Path) -> None:
    """From here on torch.compile keeps what it makes in `folder`, and looks for it there alone."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def cache_counts() -> dict[str, int]:
    """How many graphs torch.compile found in its folder in this process, and how many not."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    hits, misses = ("fxgraph_cache_hit", "fxgraph_cache_miss")
    return {"compile_cache_hits": found[hits], "compile_cache_misses": found[misses]}


def _compiled(networks: Networks, folder: Path) -> Forward:
    _channels_last(networks)
    keep_compiled_in(folder)
    unet, *controlnets = (
        torch.compile(network, mode="reduce-overhead", fullgraph=True, dynamic=False)
        for network in (networks.unet, *networks.controlnets)
    )

    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            # The next step overwrites what this one returned.
            return forward(unet, controlnets, _last(inputs)).clone()

    return call


def _channels_last(networks: Networks) -> None:
    torch.backends.cudnn.benchmark = True
    networks.each(lambda network: network.to(memory_format=torch.channels_last))


def _last(inputs: Inputs) -> Inputs:
    """Images in channels-last order."""
    return inputs.map(
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    )
