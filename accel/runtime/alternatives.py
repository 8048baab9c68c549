"""Choices across operators: what a plan's steps may be rewritten to, decided at every size.

A residual is added either by the product that it belongs to, or by the LayerNorm that reads the
sum. The first saves a pass over memory where the product's kernel does it on the way; the second
leaves the product bare, which is what libraries run fastest. Which is faster changes with the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels import Call, TensorSpec
from ..plan.schema import Plan, Step
from ..tuning import Choice

Select = Callable[[Sequence[Call]], Sequence[Choice]]


@dataclass(frozen=True)
class _Site:
    """A product with a residual, and the LayerNorm that reads their sum."""

    product: Step
    norm: Step


def settle(plan: Plan, calls: Mapping[str, Call], select: Select) -> tuple[Plan, bool]:
    """The plan with the faster steps at every site, and whether that may change.

    calls: of the plan's steps, by their outputs. select: the kernels of calls, with their times.
    """
    sites = list(_sites(plan))
    pairs = [(_with_residual(site, calls), _residual_after(site, calls)) for site in sites]
    wanted = {call.key: call for pair in pairs for both in pair for call in both}
    chosen = dict(zip(wanted, select(list(wanted.values())), strict=True))
    moved: dict[str, _Site] = {}
    for site, pair in zip(sites, pairs, strict=True):
        before, after = ([chosen[call.key] for call in both] for both in pair)
        if _faster(after, before):
            moved[site.product.output] = site
    provisional = any(choice.provisional for choice in chosen.values())
    return _rewritten(plan, moved), provisional


def _sites(plan: Plan) -> Iterator[_Site]:
    """Those of every step; what the prompt decides runs once, under the names it was kept by."""
    products = {
        step.output: step
        for step in plan.steps
        if step.op == "linear" and step.inputs[3] is not None and step.phase == "step"
    }
    constants = {None, *(constant.name for constant in plan.constants)}
    for step in plan.steps:
        if step.op == "layer_norm" and constants.issuperset(step.inputs[1:]):
            product = products.pop(step.inputs[0] or "", None)  # of several readers the first
            if product is not None:
                yield _Site(product, step)


def _with_residual(site: _Site, calls: Mapping[str, Call]) -> list[Call]:
    return [calls[site.product.output], calls[site.norm.output]]


def _residual_after(site: _Site, calls: Mapping[str, Call]) -> list[Call]:
    product, norm = calls[site.product.output], calls[site.norm.output]
    *operands, residual = product.tensors
    both = torch.empty((2, *product.out.shape), dtype=product.out.dtype, device="meta")
    tensors = (product.out, residual, *norm.tensors[1:])
    return [
        replace(product, tensors=(*operands, None)),
        Call("add_layer_norm", TensorSpec.of(both), tensors, norm.attrs),
    ]


def _faster(after: Sequence[Choice], before: Sequence[Choice]) -> bool:
    """By what was measured, here or at sizes near by; else where the product adds in a pass apart.

    A library's own sum and norm are never worth the move.
    """
    if after[1].kernel.launches is None:
        return False
    own, other = _time(after), _time(before)
    if own is None or other is None:
        return before[0].kernel.adds_apart
    return own <= other


def _time(choices: Sequence[Choice]) -> float | None:
    """Microseconds of both, if they are known or can be guessed."""
    times = [choice.about if choice.us is None else choice.us for choice in choices]
    known = [us for us in times if us is not None]
    return sum(known) if len(known) == len(times) else None


def _rewritten(plan: Plan, moved: Mapping[str, _Site]) -> Plan:
    """The plan whose sums at `moved`, by the product's output, are made by their LayerNorms."""
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
    product, norm = site.product, site.norm
    *operands, residual = product.inputs
    alone, both = f"{product.output} alone", f"{product.output} and {norm.output}"
    yield replace(product, inputs=(*operands, None), output=alone)
    yield replace(
        norm,
        op="add_layer_norm",
        inputs=(alone, residual, *norm.inputs[1:]),
        output=both,
        shape=(2, *norm.shape),
    )
    for index, output in enumerate((product.output, norm.output)):
        part = f"{both} {index}"
        attrs = {"dim": 0, "start": index, "length": 1}
        view = replace(norm, op="slice_dim", inputs=(both,), attrs=attrs, output=part)
        yield replace(view, shape=(1, *norm.shape))
        shape = {"shape": norm.shape}
        yield replace(view, op="reshape", inputs=(part,), attrs=shape, output=output)
