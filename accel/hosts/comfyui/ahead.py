"""Bringing the next checkpoint to where an engine takes it from: pinned RAM, or the device.

What is brought is the file's network, and is found by the file: a MODEL that turns out to hold the
same, bit for bit as far as is looked at, is brought in from there. It lies in the engine's own
pool, within its budgets; what of it is on the device the host sees as the engine's, and takes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Hashable
from concurrent.futures import Future, wait

import comfy.model_management as management
import torch

from ...errors import SwitchyardError
from ...runtime.network import Network
from ...sources import FileSource
from ...tensorfile import Fingerprint, fingerprint_of
from .catalog import has_room_for
from .pool import POLL_SECONDS, NetworkPatcher, pool
from .weights import file_sample, file_source

logger = logging.getLogger(__name__)


def bring_nearer(path: str, stop: threading.Event, keep: Collection[str] = ()) -> None:
    """Bring a file's network to the engine that will run it, if that is loaded; waits for it.

    keep: files of which nothing that waits goes for it, beside what is in use. Nothing happens
    where memory is short, for a file of another structure or precision, and for a ControlNet.
    """
    kept = set[Fingerprint]()
    for other in keep:
        with contextlib.suppress(OSError):
            kept.add(fingerprint_of(other))
    for patcher in pool().engines():
        config = patcher.structure.config
        assert config is not None
        if config.kind != "unet":  # the host does not tell which file a ControlNet is of
            continue
        try:
            source = file_source(fingerprint_of(path), config)
        except (OSError, SwitchyardError) as error:
            logger.debug("%s is not brought nearer: %s", path, error)
            continue
        started = time.perf_counter()
        job = _begin(patcher, source, kept)
        if job is None:
            continue
        # Looked at here, so that the sampling need not wait for it.
        for dtype in (None, patcher.dtype):
            file_sample(source.file.fingerprint, config, dtype)
        while not stop.is_set() and not job.done():
            wait([job], POLL_SECONDS)
        logger.debug("%s was brought nearer in %.1f s", path, time.perf_counter() - started)


def _begin(
    patcher: NetworkPatcher, source: FileSource, kept: Collection[Fingerprint]
) -> Future[None] | None:
    """The prefetch for one engine; None where there is none. Nothing of the engine is held."""
    network = patcher.network
    if network is None or patcher.instance:
        return None
    kinds = {source.stored(name).dtype for name in network.weights.shapes}
    if patcher.dtype != torch.float32 and not kinds <= {patcher.dtype, torch.float32}:
        return None  # a MODEL of it will be run in another precision
    onto_device = _device_has_room(patcher, network)
    if not onto_device and not has_room_for(network.weights.bytes):
        return None

    def keep(stamp: Hashable) -> bool:
        return isinstance(stamp, tuple) and stamp[0] in kept  # of files they begin with it

    return network.prefetch(source, onto_device, keep)


def _device_has_room(patcher: NetworkPatcher, network: Network) -> bool:
    """Whether a copy leaves to the host what it needs for other models and for a sampling."""
    device: torch.device = patcher.load_device
    size = network.weights.bytes
    reserve = max(size, management.minimum_inference_memory())
    if device.type == "cpu":
        return has_room_for(size + reserve)
    return bool(management.get_free_memory(device) - size >= reserve)
