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
    both = [(_with_residual(site, calls), _residual_after(site, calls)) for site in sites]
    choices = iter(select([call for pair in both for calls_ in pair for call in calls_]))
    moved: dict[str, _Site] = {}
    provisional = False
    for site, pair in zip(sites, both, strict=True):
        before, after = ([next(choices) for _ in calls_] for calls_ in pair)
        provisional |= any(choice.provisional for choice in (*before, *after))
        if _faster(after, before):
            moved[site.product.output] = site
    return _rewritten(plan, moved), provisional


def _sites(plan: Plan) -> Iterator[_Site]:
    products = {
        step.output: step
        for step in plan.steps
        if step.op == "linear" and step.inputs[3] is not None
    }
    for step in plan.steps:
        if step.op == "layer_norm":
            product = products.pop(step.inputs[0] or "", None)  # of several readers the first
            if product is not None and product.phase == step.phase:
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
    """By what was measured; else wherever our kernel saves the pass that a library's product needs.

    A library's own sum and norm are never worth the move.
    """
    if after[1].kernel.launches is None:
        return False
    times = [[choice.us for choice in choices] for choices in (after, before)]
    if any(us is None for row in times for us in row):
        return before[0].kernel.launches is None
    own, other = (sum(us for us in row if us is not None) for row in times)
    return own <= other


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
