"""Sessions and engines: what hosts and scripts hold.

A `Session` owns a device: its networks (one per structure), the plan cache, and the lock that
orders calls. An `Engine` is one seat in a network: a checkpoint, its LoRAs, and a call that looks
like the module's own.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hardware
from .capture import Progress
from .compiler import open_cache, plan_for
from .errors import InvalidInput, InvalidLora, UnsupportedModel
from .lora import (
    BlockWeights,
    Lora,
    block_weights,
    configuration_beside,
    fits,
    read_lora,
)
from .models import (
    FAMILIES,
    UNetConfig,
    adapter_names,
    blocks,
    parameters,
    unsupported_state,
)
from .models.calls import bind_call
from .plan.schema import Plan
from .runtime.network import Network, Seat
from .runtime.pool import Pool, process_pool
from .runtime.predict import Prediction, predict_at
from .runtime.weights import Source, SwapReport
from .settings import settings
from .sources import (
    FileSource,
    ModuleSource,
    StateDictSource,
    Weightlike,
    added_difference,
    mixture,
    source_of,
)
from .structure import Structure, structure_of
from .tensorfile import TensorFile, fingerprint_of
from .tuning import selector_for
from .tuning.forecast import Forecast
from .tuning.idle import IdleTuner

logger = logging.getLogger(__name__)

HEADERS = 256
"""Headers of checkpoints, about 1 MB for SDXL, that a session keeps."""

RECENT_LORA_BYTES = 2 << 30
"""Sizes of LoRA files whose tensors a session keeps in RAM though no engine has them on."""

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

LoraEntry = tuple[Weightlike, float] | tuple[Weightlike, float, BlockWeights]


class Session:
    """Engines on one device in one precision. One per process is enough.

    device: "cuda", "cuda:1" or "cpu". precision: "fp16", "bf16" or "fp32", of weights and
    activations.
    cache_dir: folder of built plans; the user's cache folder by default.
    progress: called with (fraction, text) while a structure is captured.
    pool: memory for weights that wait; by default the process's own.
    Raises `DeviceUnavailable` without such a device, `InvalidInput` for another precision.
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        precision: str = "fp16",
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
        pool: Pool | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise InvalidInput(
                f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}"
            )
        self.device = hardware.require(device)
        self.precision, self.dtype = precision, PRECISIONS[precision]
        root = Path(cache_dir) if cache_dir is not None else settings().cache_dir
        self.cache = open_cache(root, settings().cache_bytes)
        self._selector = selector_for(self.device, root, measuring=True, waiting=True)
        self.pool = process_pool() if pool is None else pool
        self.captures = 0
        self._progress = progress
        self._lock = threading.RLock()
        self._idle = IdleTuner(self._selector, self._lock) if settings().idle else None
        if self._idle is not None:
            weakref.finalize(self, self._idle.stop)
        self._building = threading.Lock()
        # Held by their engines: when the last engine of a structure goes, so does its memory.
        self._networks: weakref.WeakValueDictionary[str, Network] = weakref.WeakValueDictionary()
        self._loras: weakref.WeakValueDictionary[Any, Lora] = weakref.WeakValueDictionary()
        self._recent_loras: OrderedDict[Any, tuple[Lora, int]] = OrderedDict()
        self._sources: dict[Any, FileSource] = {}

    def engine(self, module: nn.Module) -> Engine:
        """The engine of a UNet or ControlNet, its weights seated; built, or fetched by structure.

        The module itself is left as it is, but moved to the CPU if it is on the engine's device:
        only one copy of the weights stays there. Raises `UnsupportedModel` when the module or its
        state cannot be compiled, before anything is touched; `OutOfMemory` when its weights do not
        fit.
        """
        reason = unsupported_state(module)
        if reason is not None:
            raise UnsupportedModel(reason)
        structure = structure_of(module)
        started = time.perf_counter()
        with self._building:  # not the session's lock: engines run while another is built
            key = str(structure.graph_key)
            network, origin = self._networks.get(key), "memory"
            if network is None:
                plan, origin = self.plan(structure, module)
            planned = time.perf_counter()
            with _off_the_device(module, self.device):
                if network is None:
                    network = self._networks[key] = Network(
                        plan, self.device, self.dtype, self._selector, self.pool
                    )
                with self._lock:
                    engine = Engine(self, network, structure, origin, _host(module))
                    network.load(engine.seat, ModuleSource(module, structure))
        engine.times = {
            "plan_seconds": planned - started,
            "weights_seconds": time.perf_counter() - planned,
        }
        return engine

    def settle(self, seconds: float = 120.0) -> bool:
        """Wait until nothing is compiled in the background; False if that takes longer."""
        deadline = time.monotonic() + seconds
        while not self._selector.settled:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def plan(self, structure: Structure, network: nn.Module | type[nn.Module]) -> tuple[Plan, str]:
        """The plan of a structure and where it came from: "shipped", "cache" or "built"."""
        plan, origin = plan_for(structure, network, self.cache, self._progress)
        self.captures += origin == "built"
        return plan, origin

    def _source(self, given: Weightlike, config: UNetConfig) -> FileSource | StateDictSource:
        """A checkpoint; a file's header is kept while the file is the same: it takes 20 ms."""
        key = None
        if isinstance(given, (str, Path)):
            with contextlib.suppress(OSError):  # reading it says what is wrong with the path
                key = (fingerprint_of(given), config)
        with self._lock:
            source = self._sources.get(key)
        if source is not None:
            return source
        found = source_of(given, config)
        if isinstance(found, FileSource) and key is not None:
            with self._lock:
                while len(self._sources) >= HEADERS:
                    self._sources.pop(next(iter(self._sources)))
                self._sources[key] = found
        return found

    def _lora(self, source: Weightlike, config: UNetConfig) -> Lora:
        """A parsed LoRA; that of a file is known again while the file is the same.

        Those on an engine are, and of others the last ones: changing strengths is cheap.
        """
        key, size = None, 0
        if isinstance(source, (str, Path)):
            with contextlib.suppress(OSError):  # reading it says what is wrong with the path
                beside = configuration_beside(Path(source))
                key = (fingerprint_of(source), beside and fingerprint_of(beside), config)
                size = Path(source).stat().st_size
            known = self._loras.get(key)
            if known is not None:
                return self._keep_lora(key, known, size)
        shapes = {name: parameter.shape for name, parameter in parameters(config).items()}
        try:
            lora = read_lora(source, adapter_names(config), shapes)
        except InvalidLora as error:
            raise InvalidLora(f"{error}{_made_for(source, config)}") from error
        if lora.skipped:
            logger.warning(
                "LoRA %r: %d keys are of text encoders and not used here; load it into the "
                "pipeline's own text encoders too",
                lora.name,
                len(lora.skipped),
            )
        return lora if key is None else self._keep_lora(key, lora, size)

    def _keep_lora(self, key: Any, lora: Lora, size: int) -> Lora:
        """The LoRA itself, of a file of `size` bytes, which is now the last of those kept."""
        with self._lock:
            self._loras[key], self._recent_loras[key] = lora, (lora, size)
            self._recent_loras.move_to_end(key)
            while sum(size for _, size in self._recent_loras.values()) > RECENT_LORA_BYTES:
                self._recent_loras.popitem(last=False)
        return lora


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A LoRA that is on from the part `start` of a sampling to the part `end`."""

    lora: Lora
    strength: float
    start: float
    end: float


class Engine:
    """A checkpoint on an accelerated network. Call it as the module's `forward` is called.

    Made by `Session.engine`. Threads may share it: calls of one session are ordered by its lock.
    """

    def __init__(
        self, session: Session, network: Network, structure: Structure, origin: str, host: str
    ) -> None:
        assert structure.config is not None
        self.session, self.structure, self.origin = session, structure, origin
        self.config = structure.config
        self.seat = Seat()
        self._network = network
        self._host = host
        self._swaps: deque[dict[str, Any]] = deque(maxlen=32)
        self._fallbacks: deque[str] = deque(maxlen=32)
        self._loras: list[dict[str, Any]] = []
        self._held: list[Lora] = []  # so that the session knows them again
        self._schedule: tuple[Scheduled, ...] | None = None
        self.times: dict[str, float] = {}
        weakref.finalize(self, network.leave, self.seat)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward: same arguments; the result tensor (a ControlNet: its residuals)."""
        return self.call(args, kwargs)

    def call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], key: object | None = None
    ) -> Any:
        """As `__call__`. With a key, the prompt's part is skipped while the key stays the same.

        The key vouches that context, pooled text and hint have not changed since the last call with
        an equal key; weights need no vouching. Raises `InvalidInput` for tensors that do not fit,
        and `UnsupportedModel` for an argument that the engine does not know.
        """
        _require_comparable(key)
        bound = bind_call(self.config, self._host, args, kwargs)  # type: ignore[arg-type]
        with self.session._lock:
            result = bound.finish(self._network.run(self.seat, bound.inputs, key))
        if self.session._idle is not None:
            self.session._idle.used()
        return result

    def load_weights(self, source: Weightlike) -> SwapReport:
        """Swap in another checkpoint of the same structure; the LoRA set stays on.

        source: a `.safetensors` path in single-file or diffusers naming, or a state dict, which is
        kept by reference. Raises `InvalidFile` or `StructureMismatch`, and then nothing has
        changed.
        """
        return self._load("load_weights", self.session._source(source, self.config))

    def mix(self, parts: Sequence[tuple[Weightlike, float]]) -> SwapReport:
        """Swap in a weighted sum of checkpoints: `[(a, 0.6), (b, 0.4)]`; the LoRA set stays on.

        parts: (`.safetensors` path or state dict, weight), summed in float32 and rounded once, as
        if they had been merged in float32 beforehand. Weights need not add up to 1. Raises
        `InvalidInput`, `InvalidFile` or `StructureMismatch`, and then nothing has changed.
        """
        return self._load("mix", mixture(parts, self.config))

    def add_difference(
        self, a: Weightlike, b: Weightlike, c: Weightlike, strength: float = 1.0
    ) -> SwapReport:
        """Swap in a + strength · (b - c), what `b` has learned beyond `c` added to `a`.

        Computed, and refused, as `mix` is.
        """
        return self._load("add_difference", added_difference(a, b, c, strength, self.config))

    def prefetch(self, source: Weightlike) -> Future[None]:
        """Bring a checkpoint that comes next nearer, in the background; this returns at once.

        It waits on the device if the pool has room there, else in pinned RAM if it has room there;
        `load_weights` then finds it. A state dict is in RAM already: nothing is done for one. The
        result is done when it waits, and has no value; it is cancelled by a load of the same file
        that comes before it is begun. Raises as `load_weights` does where the header of the file
        already tells.
        """
        return self._network.prefetch(self.session._source(source, self.config))

    def _load(self, operation: str, source: Source) -> SwapReport:
        with self.session._lock:
            report = self._network.load(self.seat, source)
            self._note(operation, report, source.label)
        return report

    def set_loras(self, loras: Sequence[LoraEntry]) -> SwapReport:
        """Replace the whole LoRA set; `[]` restores the checkpoint's weights bit for bit.

        loras: (`.safetensors` path or state dict, strength), or with a third entry, the weights of
        the UNet's blocks, by which strength is multiplied there: a string such as "1,0,0,0,1,…",
        the numbers, or a preset's name (see `accel.lora.blocks`).
        Raises `InvalidFile`, `InvalidLora` or `InvalidInput`, and then nothing has changed.
        """
        parsed: list[tuple[Lora, float]] = []
        whole: list[Lora] = []
        used: list[dict[str, Any]] = []
        for source, strength, given in _checked(loras):
            lora = self.session._lora(source, self.config)
            weights = _weights_of_blocks(given, lora, self.config)
            whole.append(lora)
            used.append(_told(lora, strength, weights))
            if weights is None:
                parsed.append((lora, strength))
                continue
            for block, part in lora.by_block(blocks(self.config).of).items():
                parsed.append((part, strength * weights.get(block or "", 1.0)))
        with self.session._lock:
            report = self._wear(tuple(parsed), used, "set_loras")
            self._held, self._schedule = whole, None
        return report

    def schedule_loras(self, loras: Sequence[tuple[Weightlike, float, float, float]]) -> None:
        """Replace the whole LoRA set by one that changes over a sampling: see `at_step`.

        loras: (`.safetensors` path or state dict, strength, start, end). Start and end are parts of
        the sampling, 0 ≤ start < end ≤ 1: a LoRA is on at the steps i of n with start ≤ i / n <
        end. All of them are read here; the weights change at the first step. Raises as `set_loras`
        does, and `InvalidInput` for a start or an end that is none; then nothing has changed.
        """
        planned = []
        for entry in loras:
            if not isinstance(entry, (tuple, list)) or len(entry) != 4:
                raise InvalidInput(
                    "scheduled LoRAs are a list of (path or state dict, strength, start, end)"
                )
            source, strength, start, end = entry
            numbers = all(isinstance(part, (int, float)) for part in (start, end))
            if not numbers or not 0 <= start < end <= 1:
                raise InvalidInput(
                    f"a LoRA's start and end are parts of the sampling, 0 ≤ start < end ≤ 1, "
                    f"not {start!r} and {end!r}"
                )
            ((source, strength, _),) = _checked([(source, strength)])
            planned.append(Scheduled(self.session._lora(source, self.config), strength, start, end))
        with self.session._lock:
            self._schedule = tuple(planned)

    @property
    def scheduled(self) -> bool:
        """Whether LoRAs change over a sampling, so that `at_step` is to be called."""
        return self._schedule is not None

    def at_step(self, step: int, steps: int) -> SwapReport:
        """Put on the LoRAs that the schedule has for step `step`, from 0, of `steps`.

        To be called before each step of a sampling, as accelerated pipelines of diffusers do. Only
        parameters whose LoRAs change are written, and nothing at all where none does. Without a
        schedule the LoRA set stays as it is.
        """
        if not 0 <= step < steps:
            raise InvalidInput(f"there is no step {step!r} of {steps!r}")
        with self.session._lock:
            if self._schedule is None:
                return SwapReport(0.0, 0, 0)
            now = [one for one in self._schedule if one.start <= step / steps < one.end]
            wanted = tuple((one.lora, one.strength) for one in now)
            # By identity: two LoRAs of equal content have patches of their own.
            if [(id(a), s) for a, s in wanted] == [(id(a), s) for a, s in self.seat.adapters]:
                return SwapReport(0.0, 0, 0)
            return self._wear(wanted, [_told(one.lora, one.strength) for one in now], "at_step")

    def _wear(
        self, adapters: tuple[tuple[Lora, float], ...], told: list[dict[str, Any]], operation: str
    ) -> SwapReport:
        report = self._network.set_adapters(self.seat, adapters)
        self._loras = told
        self._note(operation, report, ", ".join(one["name"] for one in told) or "none")
        return report

    def predict(
        self, width: int, height: int, batch: int = 2, tokens: int = 77, optional: bool = False
    ) -> Prediction:
        """What an image size, in pixels, will take: milliseconds and memory. Runs nothing.

        batch: of one forward; guidance makes it twice that of the images. optional: with the
        residuals of ControlNets and T2I-Adapters. Raises `InvalidInput` for no size.
        """
        if min(width, height, batch, tokens) < 1 or width % 8 or height % 8:
            raise InvalidInput(f"{width}x{height}, batch {batch}: sides are multiples of 8 pixels")
        selector = self.session._selector
        times = Forecast(selector.hardware, selector.profile)
        return predict_at(
            *(self._network.plan, width, height, batch, times, self.session.dtype),
            tokens=tokens,
            optional=optional,
        )

    def refresh(self) -> None:
        """Between two samplings: let go of kernels that have given way to others.

        A size that is new while kernels are being compiled ahead begins with those there are.
        """
        with self.session._lock:
            self._network.refresh()

    def note_fallback(self, reason: str) -> None:
        """Record that the host ran its own path, and why."""
        self._fallbacks.append(reason)

    def _note(self, operation: str, report: SwapReport, what: str) -> None:
        self._swaps.append(
            {
                "operation": operation,
                "what": what,
                "ms": report.seconds * 1e3,
                "bytes": report.bytes,
                "constants": report.constants,
            }
        )

    def report(self) -> dict[str, Any]:
        """What this engine is and did, as plain JSON values."""
        with self.session._lock:
            network, counters = self._network, self._network.counters
            source = self.seat.source
            return {
                "structure": {
                    "kind": self.structure.kind,
                    "family": self.structure.family,
                    "graph_key": self.structure.graph_key,
                    "shape_key": self.structure.shape_key,
                },
                "device": str(self.session.device),
                "precision": self.session.precision,
                "source": self.origin,
                "times": dict(self.times),
                "captures": self.session.captures,
                "graphs": counters.graphs,
                "binds": counters.binds,
                "evictions": counters.evictions,
                "renewed": counters.renewed,
                "forwards": counters.forwards,
                "prompt_hits": counters.prompt_hits,
                "shapes": network.shapes(),
                "weights": None if source is None else source.label,
                "live": network.live is self.seat,
                "parked": network.parked(self.seat),
                "loras": [dict(lora) for lora in self._loras],
                "lora_schedule": [
                    {"name": s.lora.name, "strength": s.strength, "start": s.start, "end": s.end}
                    for s in self._schedule or ()
                ],
                "weights_bytes": network.weights.bytes,
                "activation_bytes": network.activation_bytes,
                "swaps": list(self._swaps),
                "activations_ms": [seconds * 1e3 for seconds in counters.activations[-32:]],
                "fallbacks": list(self._fallbacks),
                "pool": network.pool.report(),
                "cache_problem": self.session.cache.problem,
            }


def _checked(
    loras: Sequence[LoraEntry],
) -> Iterator[tuple[Weightlike, float, BlockWeights | None]]:
    """The set as given, None where it has no block weights; InvalidInput for what is no set."""
    for entry in loras:
        if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
            raise InvalidInput(
                "LoRAs are given as a list of (path or state dict, strength), or with block "
                "weights behind"
            )
        source, strength, weights = (*entry, None)[:3]
        if not isinstance(source, (str, Path, Mapping)):
            raise InvalidInput(f"a LoRA is a path or a state dict, not a {type(source).__name__}")
        if not isinstance(strength, (int, float)) or not abs(strength) <= sys.float_info.max:
            raise InvalidInput(f"a LoRA's strength is a finite number, not {strength!r}")
        if not isinstance(weights, (str, Sequence, type(None))):
            raise InvalidInput(f"block weights are a string or numbers, not {weights!r}")
        yield source, float(strength), weights


def _told(
    lora: Lora, strength: float, weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What the report says of a LoRA that is on."""
    skipped = len(lora.skipped)
    return {"name": lora.name, "strength": strength, "blocks": weights, "skipped_keys": skipped}


def _weights_of_blocks(
    given: BlockWeights | None, lora: Lora, config: UNetConfig
) -> dict[str, float] | None:
    """Block -> weight, None where none are given. InvalidInput, which names the LoRA."""
    if given is None:
        return None
    known = blocks(config)
    try:
        return block_weights(given, known.names, known.attention)
    except InvalidInput as error:
        raise InvalidInput(f"LoRA {lora.name!r}: {error}") from error


def _require_comparable(key: object) -> None:
    """A key that can change, or that does not compare to a bool, vouches for nothing."""
    try:
        hash(key)
    except TypeError:
        raise InvalidInput(f"the key must be hashable, a {type(key).__name__} is not") from None
    if isinstance(key, torch.Tensor):
        raise InvalidInput("the key must not be a tensor: give its identity and version")


@contextlib.contextmanager
def _off_the_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module that is on `device` to the CPU first, so that two copies never lie there.

    Should the block fail, the module goes back.
    """
    parameter = next(module.parameters(), None)
    if device.type == "cpu" or parameter is None or parameter.device != device:
        yield
        return
    nn.Module.to(module, "cpu")
    torch.cuda.empty_cache()
    try:
        yield
    except BaseException:
        nn.Module.to(module, device)
        raise


def _host(module: nn.Module) -> str:
    return "diffusers" if hasattr(module, "down_blocks") else "comfyui"


def _made_for(source: Weightlike, config: UNetConfig) -> str:
    """Which families a LoRA that does not fit was made for, as the end of a sentence."""
    if isinstance(source, (str, Path)):
        shapes = {name: info.shape for name, info in TensorFile(source).tensors.items()}
    else:
        shapes = {name: tuple(t.shape) for name, t in source.items() if hasattr(t, "shape")}
    for family in FAMILIES:
        if family.config == config:
            continue
        targets = {name: p.shape for name, p in parameters(family.config).items()}
        matched, total = fits(shapes, adapter_names(family.config), targets)
        if total and matched == total:
            return f"; all {total} layers fit {family.title}"
    return ""
