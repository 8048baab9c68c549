"""The engines of the process, whose memory the host counts as it counts that of its models.

ComfyUI drops a MODEL as soon as no node of the prompt uses it, so what an engine holds in VRAM must
not belong to one: it would die at every change of checkpoint. A `NetworkPatcher` owns it instead,
one per structure, device and precision. To the host it is a model like any other: it stands in the
list of loaded models, makes room and is evicted like them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...errors import OutOfMemory
from ...plan.schema import Plan
from ...runtime.network import Network, Seat
from ...runtime.pool import PINNED
from ...runtime.weights import weights_bytes
from ...structure import Structure
from .weights import PatchedSource

logger = logging.getLogger(__name__)

MAX_CHECKPOINTS = 8
"""Checkpoints of one structure that are remembered. Those beyond are read anew."""

POLL_SECONDS = 0.05

DESCRIBE_SECONDS = 0.1
"""That the panel waits for an engine which is being loaded, or makes its kernels."""

CPU = torch.device("cpu")


@dataclass(eq=False)
class Checkpoint:
    """The weights of one file or model in a network: a seat, and what stands in it.

    known: what the weights without patches are known by, as `PatchedSource.recognise` gives it.
    """

    seat: Seat = field(default_factory=Seat)
    known: frozenset[Hashable] = frozenset()
    patched: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    patches_id: Hashable = None


class NetworkPatcher(comfy.model_patcher.ModelPatcher):
    """A structure's engine on one device, as a model that the host loads and unloads.

    Loading takes memory alone: the weights come with `seat`, at the start of a sampling.
    """

    def __init__(
        self,
        pool: Pool,
        structure: Structure,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        instance: int = 0,
    ) -> None:
        # Older hosts ask for the size while they are made.
        self.network: Network | None = None
        self._weights_bytes = weights_bytes(plan, dtype)
        super().__init__(_Holder(structure), device, CPU, size=1)
        # Copies on other devices answer to the same name.
        name = f"{structure.graph_key}{dtype}{instance or ''}"
        self.clone_base_uuid = uuid.uuid5(uuid.NAMESPACE_OID, name)
        self.pool, self.structure, self.plan, self.dtype = pool, structure, plan, dtype
        self.instance = instance
        self.lock = threading.RLock()
        self._waiting = False
        self.last_used = 0.0
        self.graphs = 0
        self._checkpoints: OrderedDict[Hashable, Checkpoint] = OrderedDict()
        self._as_seen = self._description()

    # What the host asks of a model.

    def clone(self, *args: Any, **kwargs: Any) -> NetworkPatcher:
        """Itself: there is one engine, whoever uses it."""
        return self

    def deepclone_multigpu(
        self, new_load_device: torch.device | None = None, models_cache: Any = None
    ) -> NetworkPatcher:
        """The same structure's engine on another device."""
        device = self.load_device if new_load_device is None else new_load_device
        copy = self.pool.network(self.structure, self.plan, device, self.dtype, self.instance)
        copy.begin(self._waiting)
        return copy

    def model_size(self) -> int:
        """Bytes that it needs on the device, or has there."""
        return max(self._weights_bytes, self.loaded_size())

    def loaded_size(self) -> int:
        """Bytes that it has on the device."""
        network = self.network
        return 0 if network is None else network.bytes

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Take the weights' memory, so that models loaded after it see what is left.

        The weights come with `seat`, which also says so if there is no room.
        """
        with self.lock:
            before = self.loaded_size()
            with contextlib.suppress(OutOfMemory):
                self._network()
            return self.loaded_size() - before

    def partially_unload(
        self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Give up the cheapest to have again until `memory_to_free` bytes are free; bytes freed."""
        with self.lock:
            before = self.loaded_size()
            for give_up in self._parts():
                if before - self.loaded_size() >= memory_to_free:
                    break
                give_up()
            freed = before - self.loaded_size()
        if freed:
            comfy.model_management.soft_empty_cache()
        return freed

    def _parts(self) -> list[Any]:
        if self.network is None:
            return []
        return [self.network.free_parked, self.network.clear_executables, self._let_go]

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        """Free everything on the device, unless the host only means to load it again."""
        if unpatch_all:
            self.free()
        return self.model

    def patch_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """There is nothing to patch."""
        return self.model

    def unpatch_model(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to restore."""

    def current_loaded_device(self) -> torch.device:
        """Where its weights are."""
        return CPU if self.network is None else self.load_device

    def free(self) -> None:
        """Give back all memory of the device."""
        if self._let_go():
            comfy.model_management.soft_empty_cache()

    def _let_go(self) -> bool:
        """Hold nothing any more; whether anything was held."""
        with self.lock:
            network, self.network = self.network, None
            self._checkpoints.clear()
            if network is not None:
                network.free_parked()
                network.clear_executables()
                self.graphs += network.counters.graphs
            return network is not None

    # What a sampling asks of it.

    def seat(
        self, identity: Hashable, source: PatchedSource, patches_id: Hashable
    ) -> tuple[Seat, float]:
        """Bring in weights: the seat that holds them, live, and the milliseconds that it took.

        identity: what the unpatched weights are known by. patches_id: equal ones vouch for equal
        patches. Only parameters whose patches differ from those in the seat are rewritten.
        Raises `OutOfMemory`, or whatever reading the source raises; the seat is then forgotten.
        """
        started = time.perf_counter()
        with self.lock:
            network = self._network()
            checkpoint = self._checkpoints.pop(identity, None)
            known = source.recognise(self.dtype)
            _await_arrival(network, source)
            network.pool.trim(PINNED)  # the host's models may need it, and cannot ask for it
            if checkpoint is not None and checkpoint.known.isdisjoint(known):
                network.leave(checkpoint.seat)
                checkpoint = None
            if checkpoint is None:
                checkpoint = Checkpoint()
            checkpoint.known = known
            try:
                self._bring(network, checkpoint, source, patches_id)
            except BaseException:  # what waits of it could not be found again
                network.leave(checkpoint.seat)
                raise
            checkpoint.patches_id = patches_id
            self._checkpoints[identity] = checkpoint
            while len(self._checkpoints) > MAX_CHECKPOINTS:
                network.leave(self._checkpoints.popitem(last=False)[1].seat)
            self.last_used = time.time()
        return checkpoint.seat, (time.perf_counter() - started) * 1e3

    def _bring(
        self, network: Network, checkpoint: Checkpoint, source: PatchedSource, patches_id: Hashable
    ) -> None:
        """Make a checkpoint live, whatever part of it has to be written for that."""
        if checkpoint.seat.source is None:
            network.load(checkpoint.seat, source)
            checkpoint.patched = source.patched
            return
        names = set()
        if checkpoint.patches_id != patches_id:
            patched, before = source.patched, checkpoint.patched
            both = patched.keys() | before.keys()
            names = {name for name in both if patched.get(name) != before.get(name)}
            checkpoint.patched = patched
        if names:
            network.update(checkpoint.seat, names, source)
        else:
            checkpoint.seat.source = source
            network.activate(checkpoint.seat)

    def holds(self, seat: Seat) -> bool:
        """Whether a seat still has its weights: the host may have evicted them."""
        return (
            self.network is not None
            and seat.source is not None
            and (self.network.live is seat or self.network.parked(seat))
        )

    def run(self, seat: Seat, inputs: Mapping[str, Tensor], key: object | None) -> list[Tensor]:
        """The engine's outputs with the weights of `seat`."""
        with self.lock:
            assert self.network is not None
            return self.network.run(seat, inputs, key)

    def serves(self, identity: Hashable) -> bool:
        """Whether the weights known by `identity` are the live ones."""
        with self.lock:
            checkpoint = self._checkpoints.get(identity)
            return (
                checkpoint is not None
                and self.network is not None
                and self.network.live is checkpoint.seat
            )

    def graphs_captured(self) -> int:
        """CUDA graphs captured so far, those of an engine since freed among them."""
        return self.graphs + (0 if self.network is None else self.network.counters.graphs)

    def begin(self, waiting: bool) -> None:
        """A sampling begins: whether it waits for compilers, or libraries run meanwhile."""
        with self.lock:
            self._waiting = waiting
            if self.network is not None:
                self.network.waiting = waiting
                self.network.refresh()

    def described(self) -> dict[str, Any]:
        """The engine as plain values, for the panel, which asks from another thread.

        While it is being loaded or makes its kernels, which may take half a minute: as it was.
        """
        if self.lock.acquire(timeout=DESCRIBE_SECONDS):
            try:
                self._as_seen = self._description()
            finally:
                self.lock.release()
        return self._as_seen

    def _description(self) -> dict[str, Any]:
        network = self.network
        return {
            "graph_key": self.structure.graph_key,
            "family": self.structure.family,
            "device": str(self.load_device),
            "precision": str(self.dtype).removeprefix("torch."),
            "loaded": network is not None,
            "weights_bytes": 0 if network is None else network.weights.bytes,
            "activation_bytes": 0 if network is None else network.activation_bytes,
            "bytes": self.loaded_size(),
            "graphs": self.graphs_captured(),
            "shapes": [] if network is None else network.shapes(),
            "last_used": self.last_used or None,
        }

    @property
    def compiling(self) -> bool:
        """Whether libraries run in place of kernels that are still being compiled."""
        return self.network is not None and self.network.provisional

    def _network(self) -> Network:
        if self.network is None:
            self.network = Network(self.plan, self.load_device, self.dtype)
            self.network.waiting = self._waiting
        return self.network


class Pool:
    """All engines of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._patchers: dict[tuple[str, torch.device, torch.dtype, int], NetworkPatcher] = {}

    def network(
        self,
        structure: Structure,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        instance: int = 0,
    ) -> NetworkPatcher:
        """The engine of a structure on a device, which may hold no memory yet.

        instance: networks of one structure that run in the same step, as two ControlNets do, have
        an engine each, numbered from 0: in one they would change seats twice a step.
        """
        key = (str(structure.graph_key), device, dtype, instance)
        with self._lock:
            if key not in self._patchers:
                self._patchers[key] = NetworkPatcher(self, structure, plan, device, dtype, instance)
            return self._patchers[key]

    def engines(self) -> list[NetworkPatcher]:
        """All of them, whether or not they hold memory."""
        with self._lock:
            return list(self._patchers.values())

    def make_way(self, identity: Hashable, device: torch.device) -> None:
        """Free the engine in which these weights are live: the host is about to load its own.

        The weights then lie once in VRAM. Without this the host's path was 1.7 times slower than
        plain beside a loaded engine (H100, dynamic VRAM off); what slowed it is not known.
        """
        for patcher in self.engines():
            if patcher.load_device == device and patcher.serves(identity):
                patcher.free()

    def forget(self, graph_key: str) -> None:
        """Free a structure's engines on all devices, and forget its plan."""
        with self._lock:
            keys = [key for key in self._patchers if key[0] == graph_key]
            gone = [self._patchers.pop(key) for key in keys]
        for patcher in gone:
            patcher.free()

    def networks(self) -> list[dict[str, Any]]:
        """Every engine as plain values, for the panel."""
        return [patcher.described() for patcher in self.engines()]


def _await_arrival(network: Network, source: PatchedSource) -> None:
    """Wait for what is being read ahead, which then hurries, unless the user interrupts the run."""
    job = None if source.bare is None else network.hasten(source.bare.stamp())
    while job is not None and job.running():
        wait([job], POLL_SECONDS)
        comfy.model_management.throw_exception_if_processing_interrupted()


@lru_cache(maxsize=1)
def pool() -> Pool:
    """The process's engines."""
    return Pool()


class _Holder(nn.Module):
    """What the host takes for the model behind a patcher. The engine has no module."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.device = CPU
        self.title = structure.family or str(structure.graph_key)
