"""diffusers: pipelines and networks whose forward runs on engines.

    pipe = accelerate(StableDiffusionXLPipeline.from_pretrained(...).to("cuda"))
    image = pipe("a harbour at dawn").images[0]
    restore(pipe)

The pipeline and its networks stay the objects that they are, of a subclass made for each: LoRAs,
FreeU, schedulers, saving and loading go on as before. Every call follows the network as it then is;
only a write through `.data` to single elements may go unseen until the next load. What an engine
cannot do runs on the network's own forward, with a warning that says why.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import logging
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from .. import Engine, Session
from ..errors import SwitchyardError, UnsupportedModel
from ..models import config_of_module, unsupported_state
from ..models.calls import prompt_tensors
from ..models.unet_live import network_kind, unwrap

logger = logging.getLogger(__name__)

Target = TypeVar("Target")

_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DEVICES = ("cpu", "cuda")
_CPU = torch.device("cpu")


def accelerate(target: Target, session: Session | None = None) -> Target:
    """Run a pipeline's UNet and ControlNets, or one such network, on engines. Returns `target`.

    session: whose engines; by default one per process for the network's own device and dtype.
    The weights wait on the CPU while an engine has them; the network still says that it is where it
    was, and may be moved as before. Without a session, a network on the CPU gets its engine at the
    first call, since it may yet be moved to a card. A network that cannot be accelerated is left as
    it is, with one warning that says why; nothing is raised. `restore` a network before its layers
    are called one by one: their weights are parked.
    """
    networks = _networks(target)
    if not networks:
        logger.warning("%s is not accelerated: it has no UNet", type(target).__name__)
    accelerated = [_accelerate(network, session) for network in networks]
    if isinstance(target, DiffusionPipeline) and any(accelerated) and _state(target) is None:
        target.__class__ = _pipeline_class(type(target))
    return target


def restore(target: Target) -> Target:
    """Undo `accelerate`: the classes as before, the weights back on their device."""
    for network in _networks(target):
        state = _state(network)
        if state is not None:
            state.remove()
    if isinstance(target, DiffusionPipeline) and _state(target) is not None:
        target.__class__ = _state(target)
    return target


def engines(target: object) -> list[Engine]:
    """The engines that now serve a pipeline or network, UNet first: for reports and swaps."""
    states = [_state(network) for network in _networks(target)]
    return [state.engine for state in states if state is not None and state.engine is not None]


def _networks(target: object) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        return [unwrap(target)]
    found: list[nn.Module] = []
    for name in ("unet", "controlnet"):
        part = getattr(target, name, None)
        nets = getattr(part, "nets", None)  # of a MultiControlNetModel
        found += [unwrap(net) for net in nets or (part,) if isinstance(net, nn.Module)]
    return found


def _accelerate(module: nn.Module, session: Session | None) -> bool:
    """Put one network on an engine. False, and a warning, where that cannot be."""
    state = _state(module)
    if state is not None and session in (None, state.session):
        return True
    if state is not None:
        state.remove()
    reason = _why_not(module)
    if reason is None:
        state = _Network(module, session)
        if session is not None or state.home != _CPU:
            state.follow()
            reason = state.reason
        if reason is None:
            state.install()
            return True
        state.unpark()
    logger.warning("%s is not accelerated: %s", type(module).__name__, reason)
    return False


def _why_not(module: nn.Module) -> str | None:
    """Why a network cannot be accelerated as it stands, found before anything is touched."""
    if network_kind(module) is None or not hasattr(module, "down_blocks"):
        return "it is neither a UNet nor a ControlNet of Stable Diffusion"
    device, dtype = _placement(module)
    if dtype not in _PRECISIONS:
        return _unknown(dtype)
    if device.type not in _DEVICES:
        return f"it is on {device}, and engines run on CUDA or the CPU"
    try:
        _adapters(module)
    except UnsupportedModel as error:
        return str(error)
    return unsupported_state(_without_adapters(module))


def _unknown(dtype: torch.dtype) -> str:
    return f"its weights are {dtype}, not one of {', '.join(_PRECISIONS.values())}"


def _placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return _CPU, torch.float32


_sessions: dict[tuple[torch.device, torch.dtype], Session] = {}
_sessions_lock = threading.Lock()


def _default_session(device: torch.device, dtype: torch.dtype) -> Session:
    with _sessions_lock:
        if (device, dtype) not in _sessions:
            _sessions[device, dtype] = Session(device=device, precision=_PRECISIONS[dtype])
        return _sessions[device, dtype]


# Subclasses that pass for the original.


class _PassesForBase(type):
    """Its classes equal the class they are made from: `from_pipe` compares types, not ancestry."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def _subclass(original: type, state: object, members: dict[str, Any]) -> type:
    """A subclass that carries `state`, with the name of `original`: what is saved goes by names.

    Copies and pickles of its objects are of the original class.
    """

    def reduce(self: object, protocol: Any) -> Any:
        plain = state.plain() if isinstance(state, _Network) else _stand_in(original, vars(self))
        return plain.__reduce_ex__(1)  # later protocols insist on the object's own class

    own = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": reduce,
        "_switchyard": state,
    }
    return _PassesForBase(original.__name__, (original,), own | members)


def _state(target: object) -> Any:
    """What `_subclass` was given: a `_Network`, or a pipeline's own class. None elsewhere."""
    return vars(type(target)).get("_switchyard")


def _stand_in(cls: type, fields: Mapping[str, Any]) -> Any:
    """Another object of the class with the same attributes."""
    other: Any = object.__new__(cls)
    vars(other).update(fields)
    return other


# One call of a pipeline.


class _Run:
    """One call of a pipeline, in which what depends on its prompt alone is computed once.

    Every tensor that a key names is held, so that its `id` stays its own while the call lasts.
    """

    _numbers = itertools.count()

    def __init__(self, hoist: bool, pipe: Any = None) -> None:
        self._number = next(self._numbers)
        self._hoist, self._pipe = hoist, pipe
        self._held: dict[int, Tensor] = {}
        self._timestep: float | None = None
        self._step, self._steps = -1, 1

    def key(self, prompt: Sequence[Tensor]) -> object | None:
        """Equal keys vouch for the same tensors, unchanged. None: nothing can be vouched for."""
        # In inference mode tensors have no version: a change in place would go unseen.
        if not self._hoist or any(tensor.is_inference() for tensor in prompt):
            return None
        self._held.update((id(tensor), tensor) for tensor in prompt)
        return (self._number, *((id(tensor), tensor._version) for tensor in prompt))

    def step(self, timestep: Any) -> tuple[int, int]:
        """Which step, from 0, of how many a network is called for at `timestep`.

        All calls of one step have one timestep, whichever network's they are.
        """
        now = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        if now != self._timestep:
            if self._timestep is None:
                self._steps = self._count(now)
            self._timestep, self._step = now, self._step + 1
        return min(self._step, self._steps - 1), self._steps

    def _count(self, first: float) -> int:
        """How many steps the pipeline takes, of its scheduler's from `first` on."""
        listed = self._pipe.scheduler.timesteps.tolist()
        start = listed.index(first) if first in listed else 0
        own = listed[start : start + getattr(self._pipe, "_num_timesteps", len(listed))]
        # Schedulers of second order list a timestep twice in a row.
        return max(1, len(list(itertools.groupby(own))))

    def end(self) -> None:
        self._hoist, self._pipe = False, None
        self._held.clear()


_run: ContextVar[_Run | None] = ContextVar("switchyard_run", default=None)


def _pipeline_class(original: Any) -> type:
    signature = inspect.signature(original.__call__)

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _Run(_may_hoist(signature.bind_partial(self, *args, **kwargs).arguments), self)
        token = _run.set(run)
        try:
            return original.__call__(self, *args, **kwargs)
        finally:
            _run.reset(token)
            run.end()

    return _subclass(original, original, {"__call__": call})


def _may_hoist(arguments: Mapping[str, Any]) -> bool:
    """Whether only the pipeline itself has the prompt in its hands.

    A callback that is given the prompt could change it without a trace, through `.data`.
    """
    callback = arguments.get("callback_on_step_end")
    if callback is None:
        return True
    names = arguments.get("callback_on_step_end_tensor_inputs") or ["latents"]
    return set(getattr(callback, "tensor_inputs", names)) <= {"latents"}


# One network.


class _Network:
    """A network on an engine, and what the engine was last told of it.

    home: the device where the network belongs and says to be. Its weights are there, or parked on
        the CPU while the engine has them.
    reason: why the network as it stands cannot run on an engine, or None.
    """

    def __init__(self, module: nn.Module, session: Session | None) -> None:
        self.module, self.original = module, type(module)
        self.session = session
        self.home, _ = _placement(module)
        self.engine: Engine | None = None
        self.reason: str | None = None
        self._lock = threading.RLock()
        self._return_dict = list(inspect.signature(self.original.forward).parameters).index(
            "return_dict"
        )
        self._layers: _Layers | None = None
        # What the engine was given. None: it does not have what the module has.
        self._weights: _Contents | None = None
        self._fused: object = None
        self._loras: _Contents | None = None
        self._scales: object = None
        self._seen: _Run | None = None
        self._refused: tuple[_Run | None, str | None] = (None, None)

    def install(self) -> None:
        """From here on, calls of the module come to this object."""
        self.module.__class__ = _network_class(self)
        if self._layers is not None:
            self._layers = _Layers(self.module)

    def remove(self) -> None:
        """Give the module its class and weights back."""
        with self._lock:
            fields = vars(self.module)
            # accelerate's hooks leave the forward that they found on the instance.
            if self._is_own(fields.get("forward")):
                del fields["forward"]
            if self._is_own(fields.get("_old_forward")):
                fields["_old_forward"] = types.MethodType(self.original.forward, self.module)
            self.module.__class__ = self.original
            self.engine = None
            self.unpark()

    def plain(self) -> nn.Module:
        """The module as it would be without `accelerate`: another object, the same layers."""
        fields = dict(vars(self.module))
        if self._is_own(fields.get("forward")) or self._is_offload(fields):
            del fields["forward"]
        plain: nn.Module = _stand_in(self.original, fields)
        return plain

    def _is_own(self, forward: object) -> bool:
        own = vars(type(self.module)).get("forward")
        return own is not None and getattr(forward, "__func__", None) is own

    def _is_offload(self, fields: Mapping[str, Any]) -> bool:
        """Whether the forward on the instance only moves the module before it calls the class's."""
        hook = type(fields.get("_hf_hook"))
        known = (hook.__module__, hook.__name__) == ("accelerate.hooks", "CpuOffload")
        return known and "forward" in fields and self._is_own(fields.get("_old_forward"))

    # Where the weights are.

    def unpark(self) -> None:
        """Bring the weights home, for the network's own forward."""
        if self._place(self.home):
            self._weights = None  # a change on the card need not show

    def _place(self, device: torch.device) -> bool:
        """Whether anything had to be moved. Weights that a hook has taken away stay with it."""
        plain = self.plain()
        devices = {parameter.device for parameter in plain.parameters()}
        if devices <= {device} or torch.device("meta") in devices:
            return False
        with torch.inference_mode(False):
            nn.Module.to(plain, device)
        if device == _CPU:
            torch.cuda.empty_cache()  # the engine's weights are one block, which needs the room
        return True

    def moves(self, convert: Callable[[Tensor], Tensor]) -> bool:
        """Whether `convert`, asked of all weights, has been dealt with by a change of home."""
        with self._lock:
            self._layers = None
            device, dtype = _placement(self.module)
            asked = convert(torch.empty(0, dtype=dtype, device=self.home))
            before, self.home = self.home, asked.device
            if asked.dtype != dtype or device != _CPU or asked.device.type not in _DEVICES:
                return False
            if before == self.home == _CPU:
                return False
            # Adapters may have come in another dtype.
            nn.Module._apply(self.plain(), lambda t: t if t.dtype == dtype else convert(t).to(_CPU))
            return True

    # Following the module.

    def follow(self) -> None:
        """Give the engine the module as it stands; `reason` then says whether it runs there."""
        try:
            self.reason = self._follow()
        except SwitchyardError as error:
            self.reason = str(error)
        self._layers = _Layers(self.module)

    def _follow(self) -> str | None:
        module = self.plain()
        adapters, fused = _adapters(module)
        bare = _without_adapters(module)
        dtype = _placement(bare)[1]
        reason = unsupported_state(bare) if dtype in _PRECISIONS else _unknown(dtype)
        if reason is not None:
            return reason
        session = self.session or _default_session(self.home, dtype)
        engine = self.engine
        if (
            engine is None
            or engine.session is not session
            or engine.config != config_of_module(bare)
        ):
            self.engine = engine = self._weights = None
            self._place(_CPU)
            engine = session.engine(bare)
            self._loras, self._scales = _Contents(()), []
        elif (
            self._weights is None
            or fused != self._fused
            or not self._weights.are(list(bare.parameters()))
        ):
            self._weights = None
            self._place(_CPU)
            engine.load_weights(bare.state_dict())
        self.engine = engine
        if self._weights is None:
            self._weights, self._fused = _Contents(bare.parameters()), fused
        factors = [factor for adapter in adapters for factor in adapter.tensors]
        scales = [(adapter.name, adapter.path, adapter.scale) for adapter in adapters]
        if self._loras is None or scales != self._scales or not self._loras.are(factors):
            self._loras = None
            engine.set_loras(_state_dicts(adapters))
            self._loras, self._scales = _Contents(factors), scales
        return None

    def _unchanged(self, deep: bool) -> bool:
        """Whether the module still is what the engine was given."""
        return (
            self._layers is not None
            and self._weights is not None
            and self._loras is not None
            and self._layers.same()
            and self._weights.same(deep)
            and self._loras.same(deep)
        )

    # Running.

    def before_call(self) -> None:
        """A forward that someone else put on the instance finds the weights home."""
        fields = vars(self.module)
        forward = fields.get("forward")
        if forward is not None and not self._is_own(forward) and not self._is_offload(fields):
            with self._lock:
                self._fall_back("its method forward is replaced", _run.get())

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward: on the engine where that gives the same result."""
        with self._lock:
            run = _run.get()
            # Within a run there is no way back: it would move the weights at every other step.
            if run is None or self._refused[0] is not run:
                try:
                    return self._on_engine(run, args, kwargs)
                except SwitchyardError as error:
                    self._fall_back(str(error), run)
            return self.original.forward(self.module, *args, **kwargs)

    def _on_engine(self, run: _Run | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises `UnsupportedModel` while the module, as it stands, cannot run there."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            raise UnsupportedModel("gradients are asked for: call it under torch.no_grad()")
        new, self._seen = run is None or run is not self._seen, run
        if new and run is not None and self.engine is not None:
            self.engine.refresh()
        known = self._layers is not None and (
            self._weights is not None if self.reason is None else self._layers.same()
        )
        for _ in range(3):
            if not known:
                self.follow()
            if self.reason is not None:
                raise UnsupportedModel(self.reason)
            assert self.engine is not None
            key = None
            if run is not None:
                key = run.key(prompt_tensors(self.engine.config, "diffusers", args, kwargs))
                if self.engine.scheduled:
                    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
                    self.engine.at_step(*run.step(timestep))
            result = self.engine.call(args, kwargs, key)
            # Looked at while the device works: a change is from before this call.
            if self._unchanged(deep=new):
                self._refused = (None, None)
                return self._wrapped(result, args, kwargs)
            known = False
        raise UnsupportedModel("it changes while it is called")

    def _wrapped(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self._return_dict - 1  # without self
        wanted = args[place] if len(args) > place else kwargs.get("return_dict", True)
        if isinstance(result, Tensor):
            return UNet2DConditionOutput(sample=result) if wanted else (result,)
        return ControlNetOutput(*result) if wanted else result

    def _fall_back(self, reason: str, run: _Run | None) -> None:
        """Make ready for the module's own forward. Says so once in a run, or a row of calls."""
        if self._refused != (run, reason):
            logger.warning("%s runs without its engine: %s", self.original.__name__, reason)
            if self.engine is not None:
                self.engine.note_fallback(reason)
            self._refused = (run, reason)
        self.unpark()


def _network_class(state: _Network) -> type:
    original: Any = state.original

    @torch.compiler.disable
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return state.forward(args, kwargs)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state.before_call()
        return original.__call__(self, *args, **kwargs)

    def apply(self: nn.Module, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return self if state.moves(fn) else original._apply(self, fn, *args, **kwargs)

    members = {
        "__call__": call,
        "_apply": apply,
        "device": property(lambda self: state.home),
        "forward": forward,
    }
    return _subclass(original, state, members)


class _Layers:
    """Every attribute of every layer, as it was: what can change a result between two calls.

    A comparison takes 1 ms for SDXL, where `unsupported_state` takes 30.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [
            (layer, type(layer), {name: _copied(value) for name, value in vars(layer).items()})
            for layer in module.modules()
        ]
        self._forwards = {kind: kind.forward for _, kind, _ in self._layers}
        self._hooks = self._global_hooks()

    @staticmethod
    def _global_hooks() -> list[int]:
        hooks = nn.modules.module
        return [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)]

    def same(self) -> bool:
        """Whether nothing is different now. Parameters are compared by identity."""
        if any(kind.forward is not forward for kind, forward in self._forwards.items()):
            return False
        if self._hooks != self._global_hooks():
            return False
        try:
            for layer, kind, fields in self._layers:
                if type(layer) is not kind or vars(layer) != fields:
                    return False
        except RuntimeError:  # tensors that are not the same have no truth value
            return False
        return True


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set, OrderedDict) else value


class _Contents:
    """What some tensors hold: the place and version of each, and a few bytes of it.

    Writes through `.data`, as peft does to fuse a LoRA, leave no version: they show in the bytes.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._marks = self._now()
        self._samples = [sample for tensor in self._tensors for sample in _samples(tensor)]
        self._bytes = self._read()

    def _now(self) -> tuple[list[int], list[int]]:
        places = [tensor.data_ptr() for tensor in self._tensors]
        return places, [tensor._version for tensor in self._versioned]

    def _read(self) -> list[bytes]:
        return [ctypes.string_at(address, size) for address, size in self._samples]

    def same(self, deep: bool) -> bool:
        """Whether the tensors still hold that; without `deep`, their bytes are not looked at."""
        # The places come first: nothing is read from where a tensor no longer is.
        return self._marks == self._now() and (not deep or self._bytes == self._read())

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and hold the same."""
        same = len(tensors) == len(self._tensors) and all(map(_is, tensors, self._tensors))
        return same and self.same(deep=True)


def _is(one: object, other: object) -> bool:
    return one is other


def _samples(tensor: Tensor) -> list[tuple[int, int]]:
    """Address and size of up to 64 bytes at a tensor's start, middle and end, if it is in RAM."""
    if tensor.device.type != "cpu" or tensor.data_ptr() == 0:
        return []
    behind = int(tensor.storage_offset()) * tensor.element_size()
    size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes() - behind)
    part = min(64, size)
    return [(tensor.data_ptr() + at, part) for at in (0, (size - part) // 2, size - part)]


# LoRAs that peft has put into a network.


@dataclass(frozen=True)
class _Adapter:
    """One LoRA on one layer: weight + scale * up @ down; DoRA's, with the norms of its outputs."""

    path: str
    name: str
    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All that was trained."""
        return [self.up, self.down, *([] if self.magnitude is None else [self.magnitude])]


def _is_adapter(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("peft.") and hasattr(layer, "base_layer")


def _adapters(module: nn.Module) -> tuple[list[_Adapter], object]:
    """The LoRAs that are on, and which are fused into the weights.

    Raises `UnsupportedModel` for any that is more than up times down, or DoRA.
    """
    found, fused = [], []
    for path, layer in module.named_modules():
        if not _is_adapter(layer):
            continue
        reason = _unlike_lora(layer)
        if reason is not None:
            raise UnsupportedModel(f"{path} {reason}")
        lora: Any = layer
        if lora.merged_adapters:
            fused.append((path, tuple(lora.merged_adapters)))
        elif not lora.disable_adapters:
            for name in lora.active_adapters:
                if name in lora.lora_A:
                    up, down = lora.lora_B[name].weight, lora.lora_A[name].weight
                    magnitude = None
                    if name in lora.lora_magnitude_vector:
                        magnitude = lora.lora_magnitude_vector[name].weight
                    scale = float(lora.scaling[name])
                    found.append(_Adapter(path, name, up, down, scale, magnitude))
    return found, fused


# How peft names what runs a DoRA.
_DORA = ("DoraLinearVariant", "DoraConv2dVariant")


def _unlike_lora(layer: Any) -> str | None:
    """Why an adapter is more, or other, than a LoRA or DoRA of a linear or convolution layer."""
    kind = type(layer)
    if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in ("Linear", "Conv2d"):
        return f"is an adapter of {kind.__module__}.{kind.__name__}, which is not known here"
    if layer.merged_adapters and layer.disable_adapters:
        return "has a fused adapter that is switched off"
    if _is_adapter(layer.base_layer):
        return "has an adapter on an adapter"
    for name in layer.lora_A:
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None and type(variant).__name__ not in _DORA:
            return f"has the adapter {name!r}, which is a variant of LoRA"
        if layer.lora_B[name].bias is not None or getattr(layer, "fan_in_fan_out", False):
            return f"has the adapter {name!r}, which is more than up times down"
        if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
            return f"has the adapter {name!r} in training"
    return None


def _without_adapters(module: nn.Module) -> nn.Module:
    """The network without peft's layers: their parents are stand-ins, all else is the same."""
    if _is_adapter(module):
        return module.get_submodule("base_layer")
    children = {name: child and _without_adapters(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    stand_in: nn.Module = _stand_in(type(module), vars(module) | {"_modules": children})
    return stand_in


def _state_dicts(adapters: Iterable[_Adapter]) -> list[tuple[dict[str, Tensor], float]]:
    """One state dict in peft's naming for each LoRA; its strength is in the alphas.

    There peft has it too, which matters for DoRA: the strength is in the change that is normed.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        tensors = found.setdefault(adapter.name, {})
        tensors[f"{adapter.path}.lora_A.weight"] = adapter.down.detach()
        tensors[f"{adapter.path}.lora_B.weight"] = adapter.up.detach()
        alpha = adapter.scale * adapter.down.shape[0]
        tensors[f"{adapter.path}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        if adapter.magnitude is not None:
            tensors[f"{adapter.path}.lora_magnitude_vector"] = adapter.magnitude.detach()
    return [(tensors, 1.0) for tensors in found.values()]
