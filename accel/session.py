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
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hardware
from .capture import Progress
from .compiler import open_cache, plan_for
from .errors import InvalidFile, InvalidInput, InvalidLora, SwitchyardError, UnsupportedModel
from .lora import (
    BlockWeights,
    Lora,
    Patch,
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
from .runtime.weights import SwapReport
from .settings import settings
from .structure import Structure, canonical_names, structure_of
from .tensorfile import TensorFile, fingerprint_of
from .tuning import selector_for

logger = logging.getLogger(__name__)

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

RECENT_LORA_BYTES = 2 << 30
"""Sizes of LoRA files whose tensors a session keeps in RAM though no engine has them on."""

Weightlike = str | Path | Mapping[str, torch.Tensor]
LoraEntry = tuple[Weightlike, float] | tuple[Weightlike, float, BlockWeights]


class Session:
    """Engines on one device in one precision. One per process is enough.

    device: "cuda", "cuda:1" or "cpu". precision: "fp16", "bf16" or "fp32", of weights and
    activations.
    cache_dir: folder of built plans; the user's cache folder by default.
    progress: called with (fraction, text) while a structure is captured.
    Raises `DeviceUnavailable` without such a device, `InvalidInput` for another precision.
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        precision: str = "fp16",
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
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
        self.captures = 0
        self._progress = progress
        self._lock = threading.RLock()
        self._building = threading.Lock()
        # Held by their engines: when the last engine of a structure goes, so does its memory.
        self._networks: weakref.WeakValueDictionary[str, Network] = weakref.WeakValueDictionary()
        self._loras: weakref.WeakValueDictionary[Any, Lora] = weakref.WeakValueDictionary()
        self._recent_loras: OrderedDict[Any, Lora] = OrderedDict()

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
                        plan, self.device, self.dtype, self._selector
                    )
                with self._lock:
                    engine = Engine(self, network, structure, origin, _host(module))
                    network.load(engine.seat, ModuleSource(module, structure))
        engine.times = {
            "plan_seconds": planned - started,
            "weights_seconds": time.perf_counter() - planned,
        }
        return engine

    def plan(self, structure: Structure, network: nn.Module | type[nn.Module]) -> tuple[Plan, str]:
        """The plan of a structure and where it came from: "shipped", "cache" or "built"."""
        plan, origin = plan_for(structure, network, self.cache, self._progress)
        self.captures += origin == "built"
        return plan, origin

    def _lora(self, source: Weightlike, config: UNetConfig) -> Lora:
        """A parsed LoRA; that of a file is known again while the file is the same.

        Those on an engine are, and of others the last ones: changing strengths is cheap.
        """
        key = None
        if isinstance(source, (str, Path)):
            with contextlib.suppress(OSError):  # reading it says what is wrong with the path
                beside = configuration_beside(Path(source))
                key = (fingerprint_of(source), beside and fingerprint_of(beside), config)
            known = self._loras.get(key)
            if known is not None:
                return self._keep_lora(key, known)
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
        return lora if key is None else self._keep_lora(key, lora)

    def _keep_lora(self, key: Any, lora: Lora) -> Lora:
        """The LoRA itself, which is now the last of those kept."""
        with self._lock:
            self._loras[key] = self._recent_loras[key] = lora
            self._recent_loras.move_to_end(key)
            while sum(size for (_, size, _), *_ in self._recent_loras) > RECENT_LORA_BYTES:
                self._recent_loras.popitem(last=False)
        return lora


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
        self._loras: list[Lora] = []  # held, so that the session knows them again
        self._loras_report: list[dict[str, Any]] = []
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
            return bound.finish(self._network.run(self.seat, bound.inputs, key))

    def load_weights(self, source: Weightlike) -> SwapReport:
        """Swap in another checkpoint of the same structure; the LoRA set stays on.

        source: a `.safetensors` path in single-file or diffusers naming, or a state dict, which is
        kept by reference. Raises `InvalidFile` or `StructureMismatch`, and then nothing has
        changed.
        """
        weights: FileSource | StateDictSource
        if isinstance(source, (str, Path)):
            weights = FileSource(TensorFile(source), self.config)
        else:
            weights = StateDictSource(source, self.config)
        with self.session._lock:
            report = self._network.load(self.seat, weights)
            self._note("load_weights", report, weights.label)
        return report

    def set_loras(self, loras: Sequence[LoraEntry]) -> SwapReport:
        """Replace the whole LoRA set; `[]` restores the checkpoint's weights bit for bit.

        loras: (`.safetensors` path or state dict, strength), or with a third entry, the weights of
        the UNet's blocks, by which strength is multiplied there: a string such as "1,0,0,0,1,…",
        the numbers, or a preset's name (see `accel.lora.blocks`).
        Raises `InvalidFile`, `InvalidLora` or `InvalidInput`, and then nothing has changed.
        """
        used: list[Lora] = []
        described: list[dict[str, Any]] = []
        changes: dict[str, list[tuple[Patch, float]]] = {}
        block_of = blocks(self.config).of
        for source, strength, given in _checked(loras):
            lora = self.session._lora(source, self.config)
            weights = _weights_of_blocks(given, lora, self.config)
            for name, patch in lora.patches.items():
                weight = 1.0 if weights is None else weights.get(block_of.get(name, ""), 1.0)
                if strength * weight != 0.0:
                    changes.setdefault(name, []).append((patch, strength * weight))
            used.append(lora)
            described.append(
                {
                    "name": lora.name,
                    "strength": strength,
                    "blocks": weights,
                    "skipped_keys": len(lora.skipped),
                }
            )
        with self.session._lock:
            report = self._network.set_changes(self.seat, changes)
            self._loras, self._loras_report = used, described
            self._note("set_loras", report, ", ".join(lora.name for lora in used) or "none")
        return report

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
                "forwards": counters.forwards,
                "prompt_hits": counters.prompt_hits,
                "shapes": network.shapes(),
                "weights": None if source is None else source.label,
                "live": network.live is self.seat,
                "parked": self.seat.parked is not None,
                "loras": [dict(lora) for lora in self._loras_report],
                "weights_bytes": network.weights.bytes,
                "activation_bytes": network.activation_bytes,
                "swaps": list(self._swaps),
                "activations_ms": [seconds * 1e3 for seconds in counters.activations[-32:]],
                "fallbacks": list(self._fallbacks),
                "cache_problem": self.session.cache.problem,
            }


class ModuleSource:
    """The parameters of a host's module, by name at each read: hosts replace their objects."""

    def __init__(self, module: nn.Module, structure: Structure) -> None:
        assert structure.config is not None
        self._module = module
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self._names = canonical_names(shapes, structure.config)
        self.label = f"module {type(module).__name__}"

    def read(self, name: str) -> torch.Tensor:
        """The parameter as the module has it now."""
        return self._module.get_parameter(self._names[name])

    def stamp(self) -> Hashable:
        """Where every parameter lies, and its version."""
        return _stamp(self.read(name) for name in self._names)


class FileSource:
    """The parameters of a `.safetensors` file, mapped: each is read when it is asked for."""

    def __init__(self, file: TensorFile, config: UNetConfig) -> None:
        self._file = file
        self._names = canonical_names(file.tensors, config)
        self.label = str(file.path)
        for name in self._names.values():
            _require_numbers(f"{file.path}: {name}", file.tensors[name].dtype, InvalidFile)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, backed by the mapped file."""
        return self._file.read(self._names[name])

    def stamp(self) -> Hashable:
        """The file's fingerprint; InvalidFile once it has changed, since it is mapped."""
        self._file.check_unchanged()
        return self._file.fingerprint


class StateDictSource:
    """The parameters of a state dict, by reference."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: UNetConfig) -> None:
        if not isinstance(tensors, Mapping) or not all(
            isinstance(value, torch.Tensor) for value in tensors.values()
        ):
            raise InvalidInput("weights are given as a .safetensors path or a dict of tensors")
        names = canonical_names(tensors, config)
        self._tensors = {name: tensors[source] for name, source in names.items()}
        self.label = "state dict"
        for name, tensor in self._tensors.items():
            _require_numbers(name, tensor.dtype, InvalidInput)
            if tensor.is_meta or tensor.is_sparse:
                raise InvalidInput(f"{name} is a {tensor.device} tensor without plain values")

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself."""
        return self._tensors[name]

    def stamp(self) -> Hashable:
        """Where every tensor lies, and its version."""
        return _stamp(self._tensors.values())


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


def _stamp(tensors: Iterable[torch.Tensor]) -> Hashable:
    # Tensors made in inference mode count no versions.
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _require_numbers(what: str, dtype: torch.dtype, error: type[SwitchyardError]) -> None:
    if not dtype.is_floating_point:
        raise error(f"{what} holds {dtype}: an engine takes floating-point weights")


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
