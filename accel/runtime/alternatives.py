"""Choices across operators: what a plan's steps may be rewritten to, decided at every size.

What a norm reads is made either by the step before it or by the norm itself, on the way:

- a product's residual is added by the product, or by the norm that reads the sum. The first saves
  a pass over memory where the product's kernel does it on the way; the second leaves the product
  bare, which is what libraries run fastest;
- parts are put together (ControlNet's residuals with them) in a pass apart, or by the GroupNorm of
  the result, while it makes the statistics.

Which is faster changes with the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels import Call, TensorSpec
from ..plan.schema import Plan, Step
from ..tuning import Choice

Select = Callable[[Sequence[Call]], Sequence[Choice]]

_PRODUCTS = ("linear", "conv2d")
_JOINS = ("concat", "residual_add")
"""Steps that the norm makes superfluous; their inputs are its pairs."""

_MAKERS = {"layer_norm": ("linear",), "group_norm": (*_PRODUCTS, *_JOINS)}
_BOTH = {"layer_norm": "add_layer_norm", "group_norm": "concat_group_norm"}
"""Operators that make a norm's input and the norm: [2, ...]."""


@dataclass(frozen=True)
class _Site:
    """A step, and the norm that reads its result."""

    maker: Step
    norm: Step

    @property
    def bare(self) -> bool:
        """Whether a product stays behind when the norm takes over."""
        return self.maker.op in _PRODUCTS


def settle(plan: Plan, calls: Mapping[str, Call], select: Select) -> tuple[Plan, bool]:
    """The plan with the faster steps at every site, and whether that may change.

    calls: of the plan's steps, by their outputs. select: the kernels of calls, with their times.
    """
    sites = list(_sites(plan))
    pairs = [(_apart(site, calls), _on_the_way(site, calls)) for site in sites]
    # All others too, which are wanted next: so their kernels are compiled together.
    wanted = {call.key: call for call in calls.values()}
    wanted |= {call.key: call for pair in pairs for way in pair for call in way}
    chosen = dict(zip(wanted, select(list(wanted.values())), strict=True))
    moved: dict[str, _Site] = {}
    for site, pair in zip(sites, pairs, strict=True):
        before, after = ([chosen[call.key] for call in way] for way in pair)
        if _faster(after, before, site):
            moved[site.maker.output] = site
    provisional = any(choice.provisional for choice in chosen.values())
    return _rewritten(plan, moved), provisional


def _sites(plan: Plan) -> Iterator[_Site]:
    """Those of every step; what the prompt decides runs once, under the names it was kept by."""
    makers = {
        step.output: step
        for step in plan.steps
        if step.phase == "step"
        and (step.op in _JOINS or (step.op in _PRODUCTS and step.inputs[-1] is not None))
    }
    constants = {None, *(constant.name for constant in plan.constants)}
    for step in plan.steps:
        alone = step.op in _BOTH and constants.issuperset(step.inputs[1:3])
        if alone and not any(step.inputs[3:]):  # nothing else that is added first
            maker = makers.get(step.inputs[0] or "")
            if maker is not None and maker.op in _MAKERS[step.op]:
                del makers[maker.output]  # of several readers the first
                yield _Site(maker, step)


def _apart(site: _Site, calls: Mapping[str, Call]) -> list[Call]:
    return [calls[site.maker.output], calls[site.norm.output]]


def _on_the_way(site: _Site, calls: Mapping[str, Call]) -> list[Call]:
    maker, norm = _apart(site, calls)
    parts, bare = maker.tensors, []
    if site.bare:
        *operands, residual = maker.tensors
        parts = (maker.out, residual)
        bare = [replace(maker, tensors=(*operands, None))]
    both = torch.empty((2, *norm.out.shape), dtype=norm.out.dtype, device="meta")
    tensors = (*parts, *norm.tensors[1:3])
    return [*bare, Call(_BOTH[norm.op], TensorSpec.of(both), tensors, norm.attrs)]


def _faster(after: Sequence[Choice], before: Sequence[Choice], site: _Site) -> bool:
    """By what was measured, here or at sizes near by; else where it saves a pass over memory.

    Which a product does that adds its residual in one apart, and every step that only joins. A
    library's own way to make both is never worth the move.
    """
    if after[-1].kernel.launches is None:
        return False
    own, other = _time(after), _time(before)
    # The times of two GPUs cannot be set against each other.
    mixed = len({choice.elsewhere for choice in (*after, *before)}) > 1
    if own is None or other is None or mixed:
        return not site.bare or before[0].kernel.adds_apart
    return own <= other


def _time(choices: Sequence[Choice]) -> float | None:
    """Microseconds of all, if they are known or can be guessed."""
    times = [choice.about if choice.us is None else choice.us for choice in choices]
    known = [us for us in times if us is not None]
    return sum(known) if len(known) == len(times) else None


def _rewritten(plan: Plan, moved: Mapping[str, _Site]) -> Plan:
    """The plan in which the norms make their input at `moved`, by the name of that."""
    if not moved:
        return plan
    norms = {site.norm.output for site in moved.values()}
    steps: list[Step] = []
    for step in plan.steps:
        if step.output in moved:
            steps += _moved(moved[step.output])
        elif step.output not in norms:
            steps.append(step)
    return replace(plan, steps=tuple(steps))


def _moved(site: _Site) -> Iterator[Step]:
    maker, norm = site.maker, site.norm
    parts, both = maker.inputs, f"{maker.output} and {norm.output}"
    if site.bare:
        *operands, residual = maker.inputs
        parts = (f"{maker.output} alone", residual)
        yield replace(maker, inputs=(*operands, None), output=parts[0])
    yield replace(
        norm,
        op=_BOTH[norm.op],
        inputs=(*parts, *norm.inputs[1:3]),
        output=both,
        shape=(2, *norm.shape),
    )
    for index, output in enumerate((maker.output, norm.output)):
        yield replace(norm, op="result", inputs=(both,), attrs={"index": index}, output=output)
