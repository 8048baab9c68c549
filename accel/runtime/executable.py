"""One plan at one shape: buffers, kernels, and on CUDA a captured graph.

The prompt's part (`static` and `prompt` steps) is apart from the rest: its results live outside the
arena, shared by all executables of like prompt shapes, and stay valid while the caller's key says
so.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
import xxhash

from .. import ops
from ..errors import InvalidInput, InvalidPlan, OutOfMemory
from ..kernels import Call, TensorSpec
from ..plan.memory import Interval
from ..plan.schema import Input, Plan, Step, resolve
from ..plan.shapes import evaluate, evaluate_shape, names
from ..tuning import Choice, Selector, selector_for, side_stream
from .alternatives import settle
from .arena import Arena

_PROMPT = ("static", "prompt")


def bind_dims(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The plan's dimensions as given by the inputs' shapes.

    Raises `InvalidInput` for a missing or unknown input, a wrong rank, width or a size that
    disagrees.
    """
    known = {entry.name for entry in plan.inputs}
    for name in shapes:
        if name not in known:
            raise InvalidInput(f"the engine takes {', '.join(sorted(known))}, not {name!r}")
    dims: dict[str, int] = {}
    for entry in plan.inputs:
        shape = shapes.get(entry.name)
        if shape is None:
            if entry.optional:
                continue
            raise InvalidInput(f"the input {entry.name!r} is missing")
        if len(shape) != len(entry.shape):
            raise InvalidInput(
                f"{entry.name} must have {len(entry.shape)} dimensions "
                f"({_describe(entry)}), not {len(shape)}: {list(shape)}"
            )
        if 0 in shape:
            raise InvalidInput(f"{entry.name} is empty: {list(shape)}")
        if not entry.optional:
            for given, size in zip(shape, entry.shape, strict=True):
                if isinstance(size, str) and size.isidentifier():
                    dims.setdefault(size, int(given))
    for entry in plan.inputs:
        shape = shapes.get(entry.name)
        if shape is None:
            continue
        expected = evaluate_shape(entry.shape, dims)
        if tuple(shape) != expected:
            raise InvalidInput(
                f"{entry.name} must be {list(expected)} ({_describe(entry)}), not {list(shape)}"
            )
    return dims


def _describe(entry: Input) -> str:
    return " x ".join("*" if "//" in str(size) else str(size) for size in entry.shape)


@dataclass
class PromptState:
    """Results of the prompt's part for one set of prompt shapes, and what they are valid for."""

    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    key: object | None = None


@dataclass(frozen=True)
class _Call:
    """A step bound to its kernel.

    `out` is None if the kernel allocates or the step is a view, and a tuple of several results.
    """

    step: Step
    run: Callable[..., torch.Tensor]
    attrs: dict[str, Any]
    out: torch.Tensor | tuple[torch.Tensor, ...] | None
    dead: tuple[str, ...]
    choice: Choice | None
    call: Call | None


class Executable:
    """Runs one specialised plan for fixed dimensions. Not thread-safe: its session holds the lock.

    plan: already specialised (`Plan.without`) to the optional inputs that will come.
    constants: the live weights by constant name, at addresses that stay.
    selector: chooses the kernels; by default the device's own.
    Raises `OutOfMemory` when its buffers do not fit.
    """

    def __init__(
        self,
        plan: Plan,
        dims: Mapping[str, int],
        constants: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        arena: Arena,
        prompts: dict[Any, PromptState],
        graph_pool: Any = None,
        selector: Selector | None = None,
    ) -> None:
        started = time.perf_counter()
        self._selector = selector_for(arena.device) if selector is None else selector
        self.plan, self.dims, self.dtype = plan, dict(dims), dtype
        self.device = arena.device
        self._constants = constants
        self._arena = arena
        self._graph_pool = graph_pool
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: list[torch.Tensor] = []
        self.prompt = prompts.setdefault(self._prompt_shapes(), PromptState())
        with torch.inference_mode(False):  # buffers must be writable in and out of inference mode
            self._bind()
        self.captures = 0
        self.prompt_hits = 0
        self.seconds = time.perf_counter() - started

    # Binding: shapes, aliases, liveness, buffers, kernels.

    def _prompt_shapes(self) -> tuple[Any, ...]:
        return tuple(
            (entry.name, evaluate_shape(entry.shape, self.dims))
            for entry in self.plan.inputs
            if entry.phase == "prompt"
        )

    def _prompt_part(self) -> list[Step]:
        """Steps that depend on the prompt alone, sizes too: image sizes share their results."""
        dims = {
            name
            for entry in self.plan.inputs
            if entry.phase == "prompt"
            for size in entry.shape
            for name in names(size)
        }
        apart: set[str | None] = set()
        part = []
        for step in self.plan.steps:
            own = step.phase in _PROMPT and _dims_of(step) <= dims
            if own and not apart.intersection(step.inputs):
                part.append(step)
            else:
                apart.add(step.output)
        return part

    def _bind(self) -> None:
        traced = self._trace(self.plan.steps)
        known = {name: trait.call for name, trait in traced.items() if trait.call is not None}
        plan, provisional = settle(self.plan, known, self._selector.select)
        if plan is not self.plan:
            before = {id(step): traced[step.output] for step in self.plan.steps}
            self.plan = plan
            traced = self._trace(plan.steps, before)
        # The prompt's part first. Both parts keep the plan's order, which respects every
        # dependency.
        first = self._prompt_part()
        in_first = {step.output for step in first}
        steps = first + [step for step in plan.steps if step.output not in in_first]
        split = len(first)
        traits, guessed = self._select(traced)
        self.provisional = provisional or guessed
        root = {name: trait.root for name, trait in traits.items()}
        read_until: dict[str, int] = {}
        for index, step in enumerate(steps):
            for name in step.inputs:
                if name is not None:
                    read_until[root.get(name, name)] = index
        outputs = {root.get(output.value, output.value) for output in plan.outputs}
        intervals: list[Interval] = []
        kept: dict[str, torch.Tensor] = {}  # outside the arena
        planned: dict[str, _Trait] = {}
        for index, step in enumerate(steps):
            trait = traits[step.output]
            # What outlives its graph must not lie in memory that another graph reuses.
            escapes = step.output in outputs or index < split
            if trait.workspace:
                intervals.append(Interval(_workspace(step.output), trait.workspace, index, index))
            if trait.root != step.output or (trait.allocates and not escapes):
                continue
            for name in trait.results:
                last = read_until.get(name, index)
                if index < split and (name in outputs or last >= split):
                    buffers = self.prompt.buffers
                    if name not in buffers:
                        buffers[name] = self._empty(trait.result_shape, trait.dtype)
                    kept[name] = buffers[name]
                elif name in outputs:
                    kept[name] = self._empty(trait.result_shape, trait.dtype)
                else:
                    size = prod(trait.result_shape) * trait.dtype.itemsize
                    intervals.append(Interval(name, size, index, last))
                    planned[name] = trait
        self._make_inputs()
        self._layout, blocks = self._arena.acquire(intervals)
        scratch: dict[str, torch.Tensor] = {}
        for interval in intervals:
            slot = self._layout.slots[interval.name]
            block = blocks[slot.block]
            assert block is not None
            raw = block[slot.offset : slot.offset + interval.bytes]
            if interval.name in planned:
                trait = planned[interval.name]
                kept[interval.name] = raw.view(trait.dtype).view(trait.result_shape)
            else:
                scratch[interval.name] = raw
        # Results that kernels allocate must go when their last reader is done, as planned ones do.
        dead: dict[int, list[str]] = {}
        for name, trait in traits.items():
            owner = traits.get(trait.root)
            if owner is not None and owner.allocates and trait.root not in kept:
                dead.setdefault(read_until.get(trait.root, -1), []).append(name)
        calls = [
            _Call(
                step,
                traits[step.output].runner(scratch.get(_workspace(step.output))),
                traits[step.output].attrs,
                traits[step.output].out(kept),
                tuple(dead.get(index, ())),
                traits[step.output].choice,
                traits[step.output].call,
            )
            for index, step in enumerate(steps)
        ]
        self._prompt_calls, self._step_calls = calls[:split], calls[split:]

    def _trace(
        self, steps: Sequence[Step], before: Mapping[int, _Trait] | None = None
    ) -> dict[str, _Trait]:
        """Concrete shape, strides, storage root and call of every step's result.

        Views are followed on `meta` tensors: whether a reshape aliases is a question of strides.

        before: what is known of steps by their `id`; of those that read the same it is true again.
        """
        metas: dict[str, torch.Tensor] = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for name, t in self._constants.items()
        }
        for entry in self.plan.inputs:
            metas[entry.name] = torch.empty(
                self._stored_shape(entry), dtype=resolve(entry.dtype, self.dtype), device="meta"
            )
        specs: dict[str, TensorSpec] = {}

        def spec(name: str) -> TensorSpec:
            if name not in specs:
                specs[name] = TensorSpec.of(metas[name], name in self._constants)
            return specs[name]

        traits: dict[str, _Trait] = {}
        for step in steps:
            known = None if before is None else before.get(id(step))
            if known is not None and known.call is not None:
                read = tuple(None if name is None else spec(name) for name in step.inputs)
                if known.call.tensors == read:
                    metas[step.output] = torch.empty(known.shape, dtype=known.dtype, device="meta")
                    traits[step.output] = known
                    continue
            op = ops.get(step.op)
            shape = evaluate_shape(step.shape, self.dims)
            dtype = resolve(step.dtype, self.dtype)
            attrs = self._attrs(step, op)
            sources = [None if name is None else metas[name] for name in step.inputs]
            made = op.shape([None if s is None else tuple(s.shape) for s in sources], attrs)
            if tuple(made) != shape:
                raise InvalidPlan(f"{step.output} should be {list(shape)}, {step.op} makes {made}")
            view = _as_view(op, sources, attrs) if op.view else None
            if view is not None:
                source = step.inputs[0]
                assert source is not None
                root = traits[source].root if source in traits else source
                if step.op == "result":
                    root = traits[source].results[attrs["index"]]
                traits[step.output] = _Trait(shape, dtype, root, attrs, view=op.reference)
                metas[step.output] = view
            else:
                metas[step.output] = torch.empty(shape, dtype=dtype, device="meta")
                read = tuple(None if name is None else spec(name) for name in step.inputs)
                call = Call(step.op, spec(step.output), read, attrs)
                traits[step.output] = _Trait(shape, dtype, step.output, attrs, call=call)
                if op.results > 1:
                    names = tuple(f"{step.output} {index}" for index in range(op.results))
                    traits[step.output] = replace(traits[step.output], several=names)
        return traits

    def _select(self, traced: Mapping[str, _Trait]) -> tuple[dict[str, _Trait], bool]:
        """The traits with the kernels of their calls, and whether some are provisional."""
        traits = dict(traced)
        calls = {name: trait.call for name, trait in traits.items() if trait.call is not None}
        choices = self._selector.select(list(calls.values()))
        for (name, call), choice in zip(calls.items(), choices, strict=True):
            assert not (choice.kernel.allocates and traits[name].several), choice.kernel.name
            size = choice.kernel.workspace(call, choice.config)
            traits[name] = replace(traits[name], choice=choice, workspace=size)
        return traits, any(choice.provisional for choice in choices)

    def _attrs(self, step: Step, op: ops.Op) -> dict[str, Any]:
        """The step's attributes with sizes and dtypes made concrete."""
        attrs = {name: self._with_dtypes(value) for name, value in step.attrs.items()}
        for name in op.sizes:
            value = attrs.get(name)
            if value is None:
                continue
            many = isinstance(value, tuple)
            attrs[name] = (evaluate_shape if many else evaluate)(value, self.dims)
        if op.output_dtype is not None:
            attrs[op.output_dtype] = resolve(step.dtype, self.dtype)
        return attrs

    def _with_dtypes(self, value: Any) -> Any:
        """`value` with each `{"dtype": role}` of an ATen call's arguments replaced by the dtype."""
        if isinstance(value, Mapping):
            if value.keys() == {"dtype"} and isinstance(value["dtype"], str):
                return resolve(value["dtype"], self.dtype)
            return {name: self._with_dtypes(entry) for name, entry in value.items()}
        if isinstance(value, tuple):
            return tuple(self._with_dtypes(entry) for entry in value)
        return value

    def _stored_shape(self, entry: Input) -> tuple[int, ...]:
        shape = evaluate_shape(entry.shape, self.dims)
        return shape if entry.permute is None else tuple(shape[d] for d in entry.permute)

    def _make_inputs(self) -> None:
        for entry in self.plan.inputs:
            shared = self.prompt.buffers if entry.phase == "prompt" else {}
            if entry.name not in shared:
                dtype = resolve(entry.dtype, self.dtype)
                shared[entry.name] = self._empty(self._stored_shape(entry), dtype)
            self._inputs[entry.name] = shared[entry.name]

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"buffers of {list(shape)} do not fit on {self.device}") from error

    # Running.

    def run(self, inputs: Mapping[str, torch.Tensor], key: object | None) -> list[torch.Tensor]:
        """Run on `inputs` (by name, any dtype and device); fresh tensors come back.

        key: equal keys vouch for equal prompt inputs and equal weights since the last call with it,
        so that the prompt's part is skipped. `None` vouches for nothing.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            hit = key is not None and self.prompt.key == key
            self.prompt_hits += hit
            if not hit:
                self.prompt.key = None
            for entry in self.plan.inputs:
                if not (hit and entry.phase == "prompt"):
                    value = inputs[entry.name]
                    stored = value if entry.permute is None else value.permute(entry.permute)
                    # The caller may write to pinned memory as soon as this returns.
                    wait = self.device.type != "cuda" or value.is_pinned()
                    self._inputs[entry.name].copy_(stored, non_blocking=not wait)
            if self.device.type == "cuda":
                self._replay(hit)
            else:
                environment = self._environment()
                if hit:
                    self._resume(environment)
                else:
                    self._execute(self._prompt_calls, environment)
                self._execute(self._step_calls, environment)
                self._collect(environment)
            self.prompt.key = key
            self._selector.ran()
            return [output.clone(memory_format=torch.contiguous_format) for output in self._outputs]

    def _environment(self) -> dict[str, Any]:
        return {**self._constants, **self._inputs}

    def _execute(self, calls: Sequence[_Call], environment: dict[str, Any]) -> None:
        for call in calls:
            tensors = [None if name is None else environment[name] for name in call.step.inputs]
            if call.choice is None:
                result = call.run(*tensors, **call.attrs)
            else:
                result = call.run(call.out, *tensors, **call.attrs)
                if isinstance(call.out, torch.Tensor) and result is not call.out:
                    result = call.out.copy_(result)
            environment[call.step.output] = result
            for name in call.dead:
                environment.pop(name, None)

    def _resume(self, environment: dict[str, Any]) -> None:
        """The prompt's results as they stand; what only its own steps read is stale, and unread."""
        for call in self._prompt_calls:
            if call.choice is None:
                sources = [environment[name] for name in call.step.inputs if name is not None]
                environment[call.step.output] = call.run(*sources, **call.attrs)
            else:
                assert call.out is not None
                environment[call.step.output] = call.out

    def _collect(self, environment: dict[str, Any]) -> None:
        self._outputs = [
            environment[o.value] if o.permute is None else environment[o.value].permute(o.permute)
            for o in self.plan.outputs
        ]

    def _replay(self, hit: bool) -> None:
        if self._graphs is None:
            self._capture()
        assert self._graphs is not None
        prompt, step = self._graphs
        if not hit:
            prompt.replay()
        step.replay()

    def _capture(self) -> None:
        """Run once to let libraries choose their algorithms, then record both parts."""
        stream = side_stream(self.device.index or 0)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                environment = self._environment()
                self._execute(self._prompt_calls, environment)
                self._execute(self._step_calls, environment)
                del environment
            torch.cuda.current_stream(self.device).wait_stream(stream)
            torch.cuda.synchronize(self.device)
            environment = self._environment()
            graphs = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
            for graph, calls in zip(graphs, (self._prompt_calls, self._step_calls), strict=True):
                with torch.cuda.graph(
                    graph,
                    pool=self._graph_pool,
                    stream=stream,
                    capture_error_mode="thread_local",
                ):
                    self._execute(calls, environment)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"this image size does not fit on {self.device}: {error}") from error
        self._collect(environment)
        self._graphs = graphs
        self.captures += 1

    def release(self) -> None:
        """Free the captured graphs and the hold on the arena."""
        self._graphs = None
        self._outputs = []
        self._arena.release(self._layout)

    def outdated(self, waiting: bool = False) -> bool:
        """Whether binding anew would give other kernels. waiting: compilers will be waited for."""
        return self.provisional and (waiting or self._selector.settled)

    def selection(self) -> str:
        """What tells its kernels and their configurations from others: equal ones, equal bits."""
        chosen = [(call.key, c.kernel.name, dict(c.config)) for _, call, c in self.calls()]
        return xxhash.xxh3_64_hexdigest(json.dumps(chosen, sort_keys=True).encode())

    def kernels(self) -> Counter[str]:
        """How many calls go to each kernel."""
        return Counter(choice.kernel.name for choice in self._choices())

    def reasons(self) -> dict[str, str]:
        """Why each kernel was chosen: the reasons of the calls that it runs, with their counts."""
        found: dict[str, Counter[str]] = {}
        for choice in self._choices():
            kind = choice.reason.split(",")[0]
            found.setdefault(choice.kernel.name, Counter())[kind] += 1
        return {
            name: "; ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
            for name, kinds in found.items()
        }

    def calls(self) -> list[tuple[str, Call, Choice]]:
        """Every call of a kernel in order: its part ("prompt" or "step"), the call, the choice."""
        parts = (("prompt", self._prompt_calls), ("step", self._step_calls))
        return [
            (part, call.call, call.choice)
            for part, calls in parts
            for call in calls
            if call.call is not None and call.choice is not None
        ]

    def _choices(self) -> list[Choice]:
        return [choice for _, _, choice in self.calls()]


@dataclass(frozen=True)
class _Trait:
    """What binding knows of a step's result. `view`: how it is looked at, if no kernel runs.

    `several`: of several results, which the shape stacks, their names.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    root: str
    attrs: dict[str, Any]
    view: Callable[..., torch.Tensor] | None = None
    call: Call | None = None
    choice: Choice | None = None
    workspace: int = 0
    several: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what needs a buffer, each of `result_shape`."""
        return self.several or (self.root,)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Of each result."""
        return self.shape[1:] if self.several else self.shape

    def out(
        self, kept: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """What the kernel is given to write to, out of the buffers by name."""
        if self.several:
            return tuple(kept[name] for name in self.several)
        return None if self.call is None else kept.get(self.root)

    @property
    def allocates(self) -> bool:
        """Whether the kernel makes its own result."""
        return self.choice is not None and self.choice.kernel.allocates

    def runner(self, workspace: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """The kernel with its configuration and scratch memory, or the view."""
        if self.choice is None:
            assert self.view is not None
            return self.view
        kernel = self.choice.kernel
        if kernel.configs is None:
            return kernel.run
        return partial(kernel.run, config=self.choice.config, workspace=workspace)


def _workspace(output: str) -> str:
    """The name of a step's scratch memory among the planned intervals."""
    return f"{output} workspace"


def _dims_of(step: Step) -> frozenset[str]:
    """The dimensions that a step's result depends on by its sizes."""
    sizes = list(step.shape)
    for name in ops.get(step.op).sizes:
        value = step.attrs.get(name) or ()
        sizes += value if isinstance(value, tuple) else [value]
    return frozenset[str]().union(*map(names, sizes))


def _as_view(
    op: ops.Op, sources: Sequence[torch.Tensor | None], attrs: dict[str, Any]
) -> torch.Tensor | None:
    """The view on meta tensors, or None where the strides force a copy."""
    source = sources[0]
    assert source is not None
    if op.name == "reshape":
        try:
            return source.view(attrs["shape"])
        except RuntimeError:
            return None
    return op.reference(source, **attrs)
