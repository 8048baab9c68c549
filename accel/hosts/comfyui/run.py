"""One sampling: where it runs, the weights that it needs, and every call of its denoiser.

The host calls these wrappers from the outside in: OUTER_SAMPLE around everything, PREPARE_SAMPLING
where models are loaded, SAMPLER_SAMPLE around the loop over the steps, CALC_COND_BATCH once a step,
APPLY_MODEL around each call of the network, DIFFUSION_MODEL in its place. Nothing is decided later
than it must be: options and conditioning are looked at before loading, so that a run of the host's
own path is loaded for it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from types import CodeType
from typing import Any

import comfy.model_management as management
import torch
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor, nn

from ...errors import SwitchyardError, UnsupportedModel
from ...hardware import describe
from ...models.calls import bind_call
from ...plan.schema import Plan
from ...runtime.network import Seat
from ...runtime.weights import weights_bytes
from ...structure import Structure, structure_of
from ..stack import with_room
from .builder import builder, why_no_plan
from .decide import (
    ATTENTION,
    Reason,
    called_elsewhere,
    exact_attention,
    foreign_class,
    forget,
    hooked,
    learn,
    network_state,
    pristine,
    prompts_named,
    watched,
    why_host_call,
    why_host_run,
)
from .journal import Run, journal, status_line
from .pool import NetworkPatcher, pool
from .weights import PREFIX, PatchedSource, identity

logger = logging.getLogger(__name__)

KEY = "switchyard"
"""Of our wrappers, attachments and additional models in the host's dictionaries."""

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)

comparing: ContextVar[bool] = ContextVar("comparing", default=False)
"""Whether the sampling under way shows what the host makes of it, without any engine."""

control_nets: weakref.WeakKeyDictionary[nn.Module, Callable[[str, Run], None]] = (
    weakref.WeakKeyDictionary()
)
"""Networks of accelerated CONTROL_NETs, and what tells their nodes why the host runs them."""

_structures: weakref.WeakKeyDictionary[nn.Module, Structure] = weakref.WeakKeyDictionary()


@dataclass
class Options:
    """What the node says. `wait`: build an unknown structure's engine before the first image.

    compare: run the next sampling on the host's path as well, and say how close the engine is.
    node_id: where the status line goes. title: the model's name in reports.
    """

    wait: bool = False
    compare: bool = False
    node_id: str | None = None
    title: str = "model"


@dataclass
class Binding:
    """A module of the host's, and the engine and weights that stand for it in this sampling."""

    patcher: Any
    engine: NetworkPatcher
    seat: Seat
    source: Any

    @classmethod
    def of(cls, patcher: Any, engine: NetworkPatcher) -> tuple[Binding, float]:
        """With the weights brought in, and the milliseconds that it took."""
        seat, ms = bring_in(patcher, engine)
        return cls(patcher, engine, seat, seat.source), ms

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: object | None) -> Tensor:
        """The denoiser's forward on the engine.

        Raises `UnsupportedModel`, `InvalidInput` or `OutOfMemory` where that cannot be.
        """
        config = self.engine.structure.config
        assert config is not None
        bound = bind_call(config, "comfyui", *_without_attention(args, kwargs))
        # In mid-run the host may have loaded what evicted it, and another sampling of the same file
        # may have put other LoRAs on it.
        if not self.engine.holds(self.seat) or self.seat.source is not self.source:
            self.seat, _ = bring_in(self.patcher, self.engine)
            self.source = self.seat.source
        result: Tensor = bound.finish(self.engine.run(self.seat, bound.inputs, key))
        return result


@dataclass
class Sampling:
    """One run: what was decided, and what happened."""

    run: Run
    options: Mapping[str, Any] = field(default_factory=dict)
    bindings: dict[int, Binding] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    # Where nothing else spoke against the engine: what earlier runs taught, until it shows again.
    suspected: frozenset[CodeType] = frozenset()
    engine: NetworkPatcher | None = None
    on_engine: bool = False
    watched: bool = False  # others may reach into the network between its calls
    calls: list[tuple[str, tuple[int, ...], float]] = field(default_factory=list)
    graphs_before: int = 0
    # By cond uuid: the prompt's tensors, held; None once they have changed under it.
    prompts: dict[Any, tuple[Any, ...] | None] = field(default_factory=dict)
    prompts_vouched: bool = True
    prompts_named: bool = False  # others may write into them
    # In every key: a guider that samples again has the same uuids, but sizes in its prompt's `y`.
    token: object = field(default_factory=object)

    def why(self, reason: Reason) -> None:
        """Note why something ran on the host's path."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.run.why(reason.text, reason.node)


class Acceleration:
    """How a MODEL is accelerated. Shared by all its clones: its methods are their wrappers."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._samplings: list[Sampling] = []
        self._said: set[str] = set()
        self._leaving = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Acceleration:
        return self  # older hosts copy options deeply, bound methods among them

    @property
    def sampling(self) -> Sampling | None:
        """The run under way."""
        return self._samplings[-1] if self._samplings else None

    @property
    def loading_for_engine(self) -> bool:
        """Whether the run under way has the engine hold the weights."""
        return self.sampling is not None and self.sampling.on_engine

    # Around a run.

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the books of one sampling; with `compare`, repeat it on the host's path."""
        guider = executor.class_obj
        conds = {kind: [dict(cond) for cond in given] for kind, given in guider.conds.items()}
        with self._recorded() as sampling:
            result = with_room(executor, *args, **kwargs)
        if sampling.run.host_calls:
            forget(sampling.suspected)
        if self.options.compare and sampling.run.engine_calls:
            self.options.compare = False
            guider.conds = conds
            try:
                with self._compared() as host:
                    expected = with_room(executor, *args, **kwargs)
                self._tell_comparison(sampling, host, result, expected)
            except Exception as error:  # the picture is there
                line = f"{status_line(sampling.run)} · not compared: {reason_of(error).text}"
                logger.warning("%s: %s", self.options.title, line)
                journal().status(self.options.node_id, "engine", line)
        return result

    @contextmanager
    def _compared(self) -> Iterator[Sampling]:
        """A sampling on the host's path that is no run of the user's: in no journal."""
        run = Run(id=0, started=time.time(), model=self.options.title)
        sampling = Sampling(run)
        self._samplings.append(sampling)
        token = comparing.set(True)
        try:
            yield sampling
        finally:
            comparing.reset(token)
            self._samplings.remove(sampling)

    @contextmanager
    def _recorded(self) -> Iterator[Sampling]:
        options = self.options
        run = journal().begin(options.title, node_id=options.node_id)
        sampling = Sampling(run)
        self._samplings.append(sampling)
        error: str | None = None
        try:
            yield sampling
        except BaseException as problem:
            error = str(problem) or type(problem).__name__
            raise
        finally:
            self._samplings.remove(sampling)
            if sampling.engine is not None:
                run.graphs = sampling.engine.graphs_captured() - sampling.graphs_before
                run.vram_bytes = sampling.engine.loaded_size()
                run.compiling = sampling.engine.compiling
            journal().finish(run, error)
            if run.mode == "building":  # the build may have ended since, and goes on telling
                builder().show(str(run.graph_key), options.node_id)

    def _tell_comparison(
        self, engine: Sampling, host: Sampling, result: Tensor, expected: Tensor
    ) -> None:
        decibel = engine.run.compared_db = psnr(result, expected)
        ms, sizes = host.run.ms("host"), host.run.dims
        if ms and len(sizes) == 1 and engine.run.graph_key:
            journal().note_baseline(engine.run.graph_key, sizes[0], engine.run.gpu, ms)
        line = f"{status_line(engine.run)} · {decibel:.0f} dB from the host's own"
        logger.info("%s: %s", self.options.title, line)
        journal().status(self.options.node_id, "engine", line)

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Decide where the run goes, have the host load for that, and bring in the weights."""
        sampling = self.sampling
        if sampling is None:  # a caller that goes around the sampler
            return executor(model, noise_shape, conds, *args, **kwargs)
        sampling.options = options = kwargs.get("model_options", args[0] if args else None) or {}
        engine = self._decide(sampling, model, options, conds, noise_shape)
        if engine is not None:
            sampling.on_engine, sampling.engine = True, engine
            engine.begin(self.options.wait)
            sampling.graphs_before = engine.graphs_captured()
            model.set_additional_models(KEY, [engine])
            try:
                _make_room(model)
                prepared = executor(model, noise_shape, conds, *args, **kwargs)
                self._bind(sampling, model, prepared[2])
                self._start(sampling)
                return prepared
            except Exception as error:
                sampling.why(reason_of(error))
                self._leave_engine(sampling)
            finally:
                model.remove_additional_models(KEY)
        self._start(sampling)
        pool().make_way(identity(model), model.load_device)
        return executor(model, noise_shape, conds, *args, **kwargs)

    def _decide(
        self, sampling: Sampling, model: Any, options: Any, conds: Any, noise_shape: Any
    ) -> NetworkPatcher | None:
        try:
            self._describe(sampling, model, conds)
            return self._engine_for(sampling, model, options, conds, noise_shape)
        except Exception as error:
            sampling.why(reason_of(error))
            return None

    def _describe(self, sampling: Sampling, model: Any, conds: Any) -> None:
        run = sampling.run
        run.device = str(model.load_device)
        run.loras = max(map(_loras, model.patches.values()), default=0)
        chains = list(_chains(conds))
        run.controlnets = max(map(len, chains), default=0)
        if not comparing.get():
            _tell_rebuilt(chain.from_iterable(chains), run)
        run.gpu = describe(model.load_device).name if model.load_device.type != "cpu" else "cpu"

    def _engine_for(
        self, sampling: Sampling, model: Any, options: Any, conds: Any, noise_shape: Any
    ) -> NetworkPatcher | None:
        """The engine that this run goes to; None, with the reasons noted, for the host's path."""
        if comparing.get():
            return None
        if getattr(model, "acceleration", None) is not self:
            text = f"a node has made another kind of model of it: {type(model).__name__}"
            if hooked(conds):
                text = "the host made a model of its own for LoRAs with hooks"
            sampling.why(Reason(text, None))
            return None
        structure = structure_of_model(model)
        run = sampling.run
        run.family, run.graph_key = structure.family, structure.graph_key
        for reason in why_host_run(model, options, conds):
            sampling.why(reason)
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        if dtype not in PRECISIONS:
            sampling.why(Reason(f"the model computes in {dtype}", None))
        if sampling.reasons:
            if all(reason.learned for reason in sampling.reasons):
                sampling.suspected = frozenset().union(*(r.learned for r in sampling.reasons))
            return None
        sampling.watched = watched(model, options, conds)
        sampling.prompts_named = prompts_named(model, options)
        known = builder().find(structure) is not None
        plan = request_plan(structure, model.model.diffusion_model, self.options)
        run.captures = int(plan is not None and not known)
        if plan is None:
            run.mode = "building"
            return None
        problem = _too_small(model, plan, dtype, noise_shape)
        if problem is not None:
            sampling.why(problem)
            return None
        return pool().network(structure, plan, model.load_device, dtype)

    def _bind(self, sampling: Sampling, model: Any, loaded: list[Any]) -> None:
        """Bring in the weights for the model, and for its copies on other devices."""
        assert sampling.engine is not None
        engines = [other for other in loaded if isinstance(other, NetworkPatcher)]
        for patcher in [model, *loaded]:
            if getattr(patcher, "acceleration", None) is not self:
                continue
            if id(patcher.model.diffusion_model) in sampling.bindings:
                continue  # of clones that share a network the host loads the one that samples last
            engine = next(
                other
                for other in [sampling.engine, *engines]
                if other.load_device == patcher.load_device
                and other.clone_base_uuid == sampling.engine.clone_base_uuid
            )
            binding, ms = Binding.of(patcher, engine)
            sampling.run.swaps_ms += ms
            sampling.bindings[id(patcher.model.diffusion_model)] = binding

    def _start(self, sampling: Sampling) -> None:
        """Say once why this run is not on the engine."""
        if sampling.on_engine or not sampling.reasons:
            return
        sampling.run.mode = "host"
        line = status_line(sampling.run)
        journal().status(self.options.node_id, "host", line)
        if line not in self._said:
            self._said.add(line)
            logger.warning("%s: %s", self.options.title, line)

    def _leave_engine(self, sampling: Sampling) -> None:
        """Free the engine's weights, so that the host's own have the room."""
        sampling.on_engine = False
        for engine in {binding.engine for binding in sampling.bindings.values()}:
            engine.free()
        if sampling.engine is not None:
            sampling.engine.free()
        sampling.bindings.clear()

    def sampler_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Time the loop over the steps."""
        sampling = self.sampling
        try:
            result = executor(*args, **kwargs)
        except BaseException:  # the user's interrupt among them: what was called was called
            if sampling is not None:
                _count(sampling, None)
            raise
        if sampling is not None and sampling.calls:
            if isinstance(result, Tensor) and result.is_cuda:
                torch.cuda.synchronize(result.device)
            _count(sampling, time.perf_counter())
        return result

    # In a step.

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any
    ) -> Any:
        """Have the prompts on the device, and see which stand behind the step's uuids (`_key`)."""
        sampling = self.sampling
        if sampling is not None:
            theirs = sampling.prompts_named or "multigpu_clones" in options
            if sampling.on_engine and not theirs:
                _bring_over(conds, x.device)
            _see_prompts(sampling, conds, options)
        return executor(model, conds, x, timestep, options)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """See that the call leads to `diffusion_model`, or that the network has its weights."""

        def run(*args: Any, **kwargs: Any) -> Any:
            module = executor.class_obj.diffusion_model
            module = getattr(module, "_orig_mod", module)  # one that torch.compile took in
            sampling = self.sampling
            if sampling is None or not called_elsewhere(module):
                return executor.original(*args, **kwargs)
            sampling.suspected = frozenset()
            x = args[0] if args else kwargs["x"]
            self._leave_if_replaced(sampling, module, x)
            before, started = len(sampling.calls), time.perf_counter()
            result = executor.original(*args, **kwargs)
            if len(sampling.calls) == before:
                sampling.calls.append(("host", tuple(x.shape), started))
            return result

        return _innermost(executor, run, args, kwargs)

    def _leave_if_replaced(self, sampling: Sampling, module: nn.Module, x: Tensor) -> None:
        binding = sampling.bindings.get(id(module))
        if binding is not None:
            try:
                _look_again(module)
            except UnsupportedModel as error:
                learn(binding.patcher, sampling.options)
                self._go_native(sampling, reason_of(error), x)

    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The network's forward, under whatever wrappers others have added inside ours."""
        if torch.compiler.is_compiling():  # a node compiles the network: ours is no part of that
            return self._outside_compiling(executor, *args, **kwargs)
        return self._wrapped(executor, *args, **kwargs)

    @torch.compiler.disable
    def _outside_compiling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(executor, *args, **kwargs)

    def _wrapped(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        alone = len(executor.wrappers) == 1

        def run(*args: Any, **kwargs: Any) -> Any:
            return self._forward(executor.original, executor.class_obj, alone, args, kwargs)

        return _innermost(executor, run, args, kwargs)

    def _forward(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        alone: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        sampling = self.sampling
        if sampling is None:
            return original(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        dims = tuple(x.shape)
        binding = sampling.bindings.get(id(module))
        if binding is not None:
            management.throw_exception_if_processing_interrupted()
            key = _key(sampling, args, kwargs) if alone else None
            started = time.perf_counter()
            try:
                if sampling.watched or not sampling.calls:
                    _look_again(module)
                result = binding.call(args, kwargs, key)
            except UnsupportedModel as error:
                given = _transformer_options(args, kwargs)
                learn(binding.patcher, sampling.options)
                reason = why_host_call(given, kwargs) or reason_of(error)
                self._go_native(sampling, reason, x)
            except Exception as error:
                self._go_native(sampling, reason_of(error), x)
            else:
                sampling.calls.append(("engine", dims, started))
                return result
        if sampling.engine is not None:
            with self._leaving:  # another device's thread may be loading what this one needs
                pass
        if sampling.suspected:
            shown = why_host_call(_transformer_options(args, kwargs), kwargs)
            if shown is not None or network_state(module) is not None:
                sampling.suspected = frozenset()
        sampling.calls.append(("host", dims, time.perf_counter()))
        return original(*args, **kwargs)

    def _go_native(self, sampling: Sampling, reason: Reason, x: Tensor) -> None:
        """In mid-run: load the host's own weights, for the rest of it."""
        sampling.why(reason)
        with self._leaving:
            patchers = [binding.patcher for binding in sampling.bindings.values()]
            if not patchers:  # another device's thread was here first, and has loaded for all
                return
            self._leave_engine(sampling)
            logger.warning("%s goes on without its engine: %s", self.options.title, reason.text)
            journal().status(self.options.node_id, "host", f"host's path: {reason.text}")
            used = management.loaded_models(only_currently_used=True)
            # The host's list may name models that are gone, as None.
            others = [
                m
                for m in used
                if m is not None and not isinstance(m, NetworkPatcher) and m not in patchers
            ]
            memory = patchers[0].memory_required(list(x.shape))
            management.load_models_gpu([*patchers, *others], memory_required=memory)


def bring_in(patcher: Any, engine: NetworkPatcher) -> tuple[Seat, float]:
    """The seat with a MODEL's weights, and the milliseconds that bringing them in took."""
    config = engine.structure.config
    assert config is not None
    source = PatchedSource(patcher, config, PREFIX, patcher.load_device, engine.model.title)
    return engine.seat(identity(patcher), source, patcher.patches_uuid)


def request_plan(structure: Structure, network: nn.Module, options: Options) -> Plan | None:
    """The plan, if it is at hand; None while it is built, which the node's line tells.

    Raises `UnsupportedModel` where there will be none.
    """
    plan = builder().request(structure, network, options.wait, options.node_id)
    if plan is not None:
        return plan
    state = builder().status(str(structure.graph_key))
    if state["state"] == "building":
        return None
    plan = builder().find(structure)  # the build may have ended just now
    if plan is None:
        raise UnsupportedModel(why_no_plan(state["state"], state["error"]))
    return plan


def structure_of_model(model: Any) -> Structure:
    """The structure of a MODEL's denoiser. Raises `UnsupportedModel`."""
    module = model.model.diffusion_model
    if module not in _structures:
        with pristine(model):
            return known_structure(module)
    return known_structure(module)


def known_structure(module: nn.Module) -> Structure:
    """The structure of a network, looked at once. Raises `UnsupportedModel`."""
    if module not in _structures:
        _structures[module] = structure_of(module)
    return _structures[module]


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal to noise in dB, over the range of `reference`; 200 at most."""
    error = (image.double() - reference.double()).square().mean().item()
    peak = (reference.max() - reference.min()).double().item()
    return min(200.0, 10 * math.log10(peak * peak / error)) if error and peak else 200.0


def _innermost(
    executor: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Have the wrappers that others have added inside ours executed around `run`."""
    inner = executor.wrappers[executor.idx + 1 :]
    return WrapperExecutor.new_class_executor(run, executor.class_obj, inner).execute(
        *args, **kwargs
    )


def _make_room(model: Any) -> None:
    """Take the model's own weights off the device, before the host loads the engine.

    The host loads first what a model brings along, so both would be there for a moment. With
    --highvram they are there from the file's loading on. A network that something is injected into
    is left to the host, which ejects that before it comes to it.
    """
    sharing = [other for other in management.loaded_models() if model.is_clone(other)]
    there = model.loaded_size() > 0 or model.weights_loaded()
    if there and not any(other.is_injected for other in sharing):
        model.unload_weights()
        management.soft_empty_cache()


def _too_small(model: Any, plan: Plan, dtype: torch.dtype, noise_shape: Any) -> Reason | None:
    """Why the device has no room for the engine, whatever the host evicts."""
    device = model.load_device
    if device.type == "cpu":
        return None
    if management.vram_state == management.VRAMState.NO_VRAM:
        return Reason("ComfyUI was started with --novram", None)
    shape = [noise_shape[0] * 2, *noise_shape[1:]]
    needed = weights_bytes(plan, dtype) + model.memory_required(shape)
    total = management.get_total_memory(device) - management.extra_reserved_memory()
    if needed <= total:
        return None
    gib = 1 << 30
    return Reason(
        f"the engine needs {needed / gib:.1f} GiB of VRAM and {total / gib:.1f} are there", None
    )


def _loras(patches: list[Any]) -> int:
    """How many of a weight's patches are LoRAs. A merge's is the other model's list of patches."""
    return sum(not isinstance(patch[1], list) for patch in patches)


def _chains(conds: Any) -> Iterator[list[Any]]:
    """The ControlNets of each conditioning, the last to be applied first."""
    for cond in chain.from_iterable(conds.values()):
        found, control = [], cond.get("control")
        while control is not None:
            found.append(control)
            control = control.previous_controlnet
        yield found


def _tell_rebuilt(controls: Iterable[Any], run: Run) -> None:
    """Say so where a pack has made a ControlNet of its own from an accelerated one."""
    rebuilt: dict[nn.Module, str] = {}
    for control in controls:
        module = getattr(control, "control_model", None)
        if not isinstance(module, nn.Module) or hasattr(control, "switchyard_line"):
            continue
        reason = foreign_class(control)
        if reason is not None and module in control_nets:
            rebuilt[module] = reason
    for module, reason in rebuilt.items():  # positive and negative share them
        control_nets[module](reason, run)


_PROMPT = ("c_crossattn", "crossattn_controlnet", "y")
"""What the conditioning has of a prompt, by the host's names."""


def _bring_over(conds: Any, device: torch.device) -> None:
    """Move prompts to the device once a sampling.

    Encoders leave them on the CPU, where the host would put cond and uncond together at each step,
    and copy them over: on a busy machine that can take longer than the engine's step.
    """
    for cond in chain.from_iterable(given or () for given in conds):
        held = cond.get("model_conds") or {}
        for name in _PROMPT:
            tensor = getattr(held.get(name), "cond", None)
            if isinstance(tensor, Tensor) and tensor.device != device:
                held[name] = held[name]._copy_with(tensor.to(device))


def _see_prompts(sampling: Sampling, conds: Any, options: Any) -> None:
    """Hold the tensors behind each uuid; whoever changes them under it loses its vouching."""
    # These stand between the conditioning and the network, and may change what arrives there.
    replaced = ("model_function_wrapper", "sampler_calc_cond_batch_function")
    wrappers = (options.get("transformer_options") or {}).get("wrappers") or {}
    sampling.prompts_vouched = (
        not sampling.prompts_named
        and not any(options.get(name) for name in replaced)
        and _only_ours(wrappers.get("calc_cond_batch"))
    )
    for given in conds:
        for cond in given or ():
            tensors = tuple(
                getattr(cond.get("model_conds", {}).get(name), "cond", None) for name in _PROMPT
            )
            uuid = cond.get("uuid")
            seen = sampling.prompts.setdefault(uuid, tensors)
            if seen is not None and any(a is not b for a, b in zip(seen, tensors, strict=True)):
                sampling.prompts[uuid] = None


def _only_ours(wrappers: Mapping[Any, list[Any]] | None) -> bool:
    return all(key == KEY or not given for key, given in (wrappers or {}).items())


def _key(sampling: Sampling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object | None:
    options = kwargs.get("transformer_options", args[5] if len(args) > 5 else None) or {}
    return prompt_key(sampling, options)


def prompt_key(sampling: Sampling, options: Mapping[str, Any]) -> object | None:
    """What vouches for an unchanged prompt: this sampling's conds that make up the batch."""
    uuids = options.get("uuids")
    # Hooks on the conditioning bring wrappers of their own: the call has all there are.
    outside = (options.get("wrappers") or {}).get("apply_model")
    if not sampling.prompts_vouched or not uuids or not _only_ours(outside):
        return None
    if any(sampling.prompts.get(uuid) is None for uuid in uuids):
        return None
    return (sampling.token, *uuids)


def _transformer_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    given = kwargs.get("transformer_options", args[5] if len(args) > 5 else None)
    return given if isinstance(given, Mapping) else {}


def _look_again(module: nn.Module) -> None:
    """Raise `UnsupportedModel` for what was put into the network since the run was decided."""
    state = network_state(module)
    if state is not None:
        raise UnsupportedModel(state)


def _without_attention(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without a choice of attention that makes no difference."""
    given = _transformer_options(args, kwargs)
    if ATTENTION not in given or not exact_attention(given[ATTENTION]):
        return args, kwargs
    rest = {name: value for name, value in given.items() if name != ATTENTION}
    if "transformer_options" in kwargs:
        return args, {**kwargs, "transformer_options": rest}
    return (*args[:5], rest, *args[6:]), kwargs


def _count(sampling: Sampling, end: float | None) -> None:
    """Enter the calls of one loop in the run. The first may have captured a graph: not timed.

    end: when the device had done them; None where that is not known.
    """
    calls, sampling.calls = sampling.calls, []
    alike = len({(path, dims) for path, dims, _ in calls}) == 1
    ms = None
    if end is not None and alike and len(calls) > 1:
        ms = (end - calls[1][2]) * 1e3 / (len(calls) - 1)
    controlnets = sampling.run.controlnets  # their time is part of a call's
    for path, (batch, _, height, width), _ in calls:
        dims = {"width": width * 8, "height": height * 8, "batch": batch}
        if controlnets:
            dims["controlnets"] = controlnets
        sampling.run.call(path, dims, ms)


def reason_of(error: Exception) -> Reason:
    """Why an error sends a run to the host's path. The user's interrupt is raised again.

    An error that nobody foresaw costs the speed, not the picture; the log has all of it.
    """
    if isinstance(error, management.InterruptProcessingException):
        raise error
    if isinstance(error, SwitchyardError):
        return Reason(str(error), None)
    if isinstance(error, torch.OutOfMemoryError):
        return Reason("the device has no memory left", None)
    logger.warning("the engine failed unexpectedly", exc_info=error)
    return Reason(f"the engine failed: {type(error).__name__}: {error}".split("\n", 1)[0], None)
