"""The accelerated CONTROL_NET: the host's own object whose network runs on an engine.

Hints, strengths, ranges and chains stay the host's. While a sampling is set up, the host is given
the engine as the model to load in place of the network; while it runs, a stand-in takes the calls.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count
from typing import Any

import comfy.controlnet
import comfy.model_management as management
import torch
from torch import nn

from ...errors import UnsupportedModel
from ...models import unsupported_state
from ...models.calls import bind_call
from ...plan.schema import Plan
from ...runtime.network import Seat
from ...runtime.weights import weights_bytes
from ...structure import Structure
from .decide import unsupported_device
from .journal import Run, journal
from .pool import NetworkPatcher, pool
from .run import (
    KEY,
    PRECISIONS,
    Options,
    Sampling,
    comparing,
    control_nets,
    known_structure,
    prompt_key,
    reason_of,
    request_plan,
)
from .weights import PatchedSource, identity

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

NODE = "Accelerate ControlNet"
"""Whose reasons these are, in a run's report."""

SHARE = 0.4
"""Of the device's memory that the ControlNets' engines of one sampling may take. What the model
itself needs is not known when they are chosen."""

_KINDS = {
    "ControlLora": "a Control-LoRA is put together from the model's own weights at every run",
    "T2IAdapter": "a T2I-Adapter runs once in a sampling, so an engine would gain nothing",
}


def accelerate_controlnet(control_net: Any, options: Options) -> Any:
    """A copy of a CONTROL_NET whose network runs on an engine; itself where that cannot be."""
    line, reason = _Line(options), why_not(control_net)
    if reason is not None:
        line.show("off", f"not accelerated: {reason}")
        return control_net
    return _accelerated(control_net.copy(), line)


def why_not(control_net: Any) -> str | None:
    """Why a CONTROL_NET, in its present state, runs on the host's path alone; one clause."""
    kind = type(control_net)
    if issubclass(kind, EngineMixin):
        kind = kind.__bases__[1]
    if kind is not comfy.controlnet.ControlNet:
        return _KINDS.get(kind.__name__, f"a {kind.__name__} is not a ControlNet of ComfyUI's own")
    replaced = sorted(name for name in vars(control_net) if callable(getattr(kind, name, None)))
    if replaced:
        return f"another node has replaced its method {replaced[0]}"
    module, patcher = control_net.control_model, control_net.control_model_wrapped
    if getattr(module, "control_add_embedding", None) is not None:
        return "a union ControlNet's structure is not known yet"
    try:
        structure = known_structure(module)
    except UnsupportedModel as error:
        return str(error)
    if structure.kind != "controlnet":
        return f"{type(module).__name__} is not a ControlNet of Stable Diffusion"
    dtype = _dtype(control_net)
    if dtype not in PRECISIONS:
        return f"it computes in {dtype}"
    return (
        _unsupported_patcher(patcher, module)
        or unsupported_device(patcher)
        or unsupported_state(module, patches_applied=True)
    )


def _unsupported_patcher(patcher: Any, module: nn.Module) -> str | None:
    if type(patcher).__module__ != "comfy.model_patcher":
        return f"its weights are kept by a {type(patcher).__name__}"
    if patcher.model is not module:
        return "its weights are another network's"
    for attribute, what in (
        ("object_patches", "parts of it are replaced"),
        ("injections", "something is injected into it"),
        ("hook_patches", "LoRAs with hooks are on it"),
        ("weight_wrapper_patches", "its weights are wrapped"),
    ):
        if getattr(patcher, attribute, None):
            return what
    return None


def _dtype(control_net: Any) -> torch.dtype:
    """What it computes in; `get_control` decides the same way."""
    dtype: torch.dtype = control_net.manual_cast_dtype or control_net.control_model.dtype
    return dtype


@dataclass
class _Line:
    """The status line of a node, shared by all copies of its output."""

    options: Options
    shown: str = ""
    logged: set[str] = field(default_factory=set)

    def show(self, state: str, text: str) -> None:
        """Show what is new; the log gets each reason once."""
        if text != self.shown:
            self.shown = text
            journal().status(self.options.node_id, state, text)
        if state in ("host", "off") and text not in self.logged:
            self.logged.add(text)
            logger.warning("%s: %s", self.options.title, text)

    def host(self, reason: str, run: Run | None) -> None:
        """Show why the host runs the network, and note it in the run of an accelerated MODEL."""
        self.show("host", f"host's path: {reason}")
        if run is not None:
            run.why(reason, NODE)

    def rebuilt(self, reason: str, run: Run) -> None:
        """Another pack runs the network in a ControlNet of its own; a run begins."""
        self.shown = ""
        self.host(reason, run)


@dataclass(eq=False)
class Part:
    """A network's part in one sampling: its engine and weights. All its copies share it.

    native: something went wrong in mid-run, and the rest of it is the host's.
    """

    patcher: Any
    engine: NetworkPatcher
    seat: Seat | None = None
    native: bool = False

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], key: object | None) -> Any:
        """The network's forward on the engine, in tensors that nobody else holds.

        Raises `UnsupportedModel`, `InvalidInput` or `OutOfMemory` where that cannot be.
        """
        engine, config = self.engine, self.engine.structure.config
        assert config is not None
        bound = bind_call(config, "comfyui", args, kwargs)
        if engine not in management.loaded_models():  # evicted in mid-run
            management.load_models_gpu([*self._others(), engine])
        with engine.lock:
            if self.seat is None or not engine.holds(self.seat):
                device = self.patcher.load_device
                source = PatchedSource(self.patcher, config, "", device, engine.model.title)
                self.seat, _ = engine.seat(
                    identity(self.patcher), source, self.patcher.patches_uuid
                )
            return bound.finish(engine.run(self.seat, bound.inputs, key))

    def leave_engine(self) -> None:
        """Have the host load its own weights in the engine's place."""
        self.native = True
        self.engine.free()
        management.load_models_gpu([self.patcher, *self._others()])

    def _others(self) -> list[Any]:
        used = management.loaded_models(only_currently_used=True)
        return [model for model in used if model not in (None, self.engine, self.patcher)]


@dataclass
class _Lineup:
    """Which engine each network of a sampling has.

    Networks of one structure get one each. Nobody says that a sampling begins, but all of them are
    asked for before the first runs.
    """

    parts: weakref.WeakSet[Part] = field(default_factory=weakref.WeakSet)
    gathering: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last: weakref.WeakKeyDictionary[NetworkPatcher, weakref.ref[Any]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def close(self) -> None:
        """It runs: who is asked for next belongs to another sampling."""
        self.gathering = False

    def part(
        self, patcher: Any, structure: Structure, plan: Plan, dtype: torch.dtype
    ) -> Part | None:
        """The part of the network behind a patcher; None where the device has no room for it."""
        with self._lock:
            if not self.gathering:
                self.parts, self.gathering = weakref.WeakSet(), True
            parts = list(self.parts)
            for part in parts:
                if part.patcher is patcher:
                    return part
            taken = {part.engine for part in parts}

            def engine(number: int) -> NetworkPatcher:
                return pool().network(structure, plan, patcher.load_device, dtype, number)

            # Rather the one that has its weights already.
            had = [e.instance for e, last in self._last.items() if last() is patcher]
            chosen = next(e for e in map(engine, chain(had, count())) if e not in taken)
            if not _fits(patcher.load_device, [*taken, chosen]):
                return None
            self._last[chosen] = weakref.ref(patcher)
            part = Part(patcher, chosen)
            self.parts.add(part)
            return part


def _fits(device: torch.device, engines: list[NetworkPatcher]) -> bool:
    if device.type == "cpu":
        return True
    needed = sum(weights_bytes(e.plan, e.dtype) for e in engines if e.load_device == device)
    return bool(needed <= SHARE * management.get_total_memory(device))


@lru_cache(maxsize=1)
def _lineup() -> _Lineup:
    return _Lineup()


class EngineMixin:
    """A ControlNet of the host's whose network runs on an engine."""

    switchyard_line: _Line
    switchyard_part: Part | None = None
    # Why the host runs it in this sampling.
    switchyard_reason: str | None = None
    # The hint of the last call, and what stands for it in keys.
    switchyard_hint: tuple[Any, object] = (None, None)

    def copy(self: Any) -> Any:
        """As the host does; nodes that apply a ControlNet begin with this."""
        return _accelerated(super().copy(), self.switchyard_line)  # type: ignore[misc]

    def get_models(self: Any) -> list[Any]:
        """What a sampling has to load: the engine in place of the network."""
        models = comfy.controlnet.ControlBase.get_models(self)
        part, self.switchyard_reason = None, None
        try:
            part = _choose(self)
        except Exception as error:
            self.switchyard_reason = reason_of(error).text
            self.switchyard_line.host(self.switchyard_reason, None)
        self.switchyard_part = part
        return [*models, self.control_model_wrapped if part is None else part.engine]

    def pre_run(self: Any, model: Any, percent_to_timestep_function: Any) -> None:
        """As the host does."""
        _lineup().close()
        super().pre_run(model, percent_to_timestep_function)  # type: ignore[misc]

    def get_control(
        self: Any, x_noisy: Any, t: Any, cond: Any, batched_number: Any, transformer_options: Any
    ) -> Any:
        """As the host does, with the engine in the network's place."""
        module = self.control_model
        if self.switchyard_part is not None and isinstance(module, nn.Module):
            self.control_model = _StandIn(self, module, transformer_options)
        elif self.switchyard_reason is not None:
            # The run is known from now on.
            sampling = _sampling(transformer_options or {})
            self.switchyard_line.host(self.switchyard_reason, sampling and sampling.run)
        try:
            return super().get_control(  # type: ignore[misc]
                x_noisy, t, cond, batched_number, transformer_options
            )
        finally:
            self.control_model = module

    def cleanup(self: Any) -> None:
        """As the host does, after a sampling."""
        self.switchyard_part, self.switchyard_reason = None, None
        self.switchyard_hint = (None, None)
        super().cleanup()  # type: ignore[misc]


class _EngineType(type):
    """Has a class with the engine equal the host's own that it derives from.

    Packs compare the type of a net with the host's (ComfyUI-Advanced-ControlNet), and rebuild it
    with what they were asked to add: a mask, weights for each block. They would leave all of that
    out, silently, of a net whose type they don't know.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[1]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[1])


@lru_cache(maxsize=16)
def _engine_class(base: type) -> type:
    return _EngineType(f"Engine{base.__name__}", (EngineMixin, base), {})


def _accelerated(control_net: Any, line: _Line) -> Any:
    if not isinstance(control_net, EngineMixin):
        kind: Any = type(control_net)
        control_net.__class__ = _engine_class(kind)
    control_net.switchyard_line = line
    control_nets[control_net.control_model] = line.rebuilt
    return control_net


class _StandIn:
    """Stands for the network during one `get_control`."""

    def __init__(self, net: Any, module: nn.Module, options: Mapping[str, Any] | None) -> None:
        self._net, self._module, self._options = net, module, options or {}
        self.dtype = module.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        management.throw_exception_if_processing_interrupted()
        net, part = self._net, self._net.switchyard_part
        if not part.native:
            try:
                result = part.run(args, kwargs, self._key(kwargs.get("hint")))
            except Exception as error:
                self._leave_engine(reason_of(error).text)
            else:
                net.switchyard_line.show("engine", "engine")
                return result
        return self._module(*args, **kwargs)

    def _leave_engine(self, reason: str) -> None:
        sampling = _sampling(self._options)
        self._net.switchyard_line.host(reason, sampling and sampling.run)
        self._net.switchyard_part.leave_engine()

    def _key(self, hint: object) -> object | None:
        """What vouches for an unchanged prompt: the conds of the batch, and the hint itself."""
        sampling = _sampling(self._options)
        prompt = None if sampling is None else prompt_key(sampling, self._options)
        if prompt is None:
            return None
        if self._net.switchyard_hint[0] is not hint:
            self._net.switchyard_hint = (hint, object())
        return prompt, self._net.switchyard_hint[1]


def _sampling(options: Mapping[str, Any]) -> Sampling | None:
    """The run of an accelerated MODEL that a call belongs to."""
    wrappers = (options.get("wrappers") or {}).get("calc_cond_batch") or {}
    for wrapper in wrappers.get(KEY, ()):
        found: Sampling | None = wrapper.__self__.sampling
        return found
    return None


def _choose(net: Any) -> Part | None:
    """The network's part in the sampling that is being set up; None while its engine is built.

    Raises `UnsupportedModel` where the host runs it.
    """
    if comparing.get():
        return None
    net.switchyard_line.shown = ""
    reason = why_not(net)
    device = net.control_model_wrapped.load_device
    if device.type != "cpu" and management.vram_state == management.VRAMState.NO_VRAM:
        reason = reason or "ComfyUI was started with --novram"
    if reason is not None:
        raise UnsupportedModel(reason)
    structure = known_structure(net.control_model)
    options = net.switchyard_line.options
    plan = request_plan(structure, net.control_model, options)
    if plan is None:
        return None
    part = _lineup().part(net.control_model_wrapped, structure, plan, _dtype(net))
    if part is None:
        raise UnsupportedModel("the device has no room for its engine beside the model's")
    part.engine.begin(options.wait)
    _leave_device(net.control_model_wrapped)
    return part


def _leave_device(patcher: Any) -> None:
    """Take the host's own weights off the device: it may have made or left them there."""
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        patcher.partially_unload(None, 1e32)
    elif any(parameter.device != CPU for parameter in patcher.model.parameters()):
        patcher.unpatch_model(CPU, unpatch_weights=True)
