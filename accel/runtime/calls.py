"""The calls of a plan at one size, without weights or a device; how many were timed on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..hardware import Hardware
from ..kernels import Call, reference
from ..plan.memory import Interval, Layout, Slot
from ..plan.schema import Plan
from ..tuning import Choice, ahead
from ..tuning.profile import Profile, profile_cache
from .arena import Arena
from .executable import Executable


class _Collector:
    """Stands where a selector does, keeps the calls and chooses the references."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def select(self, calls: Sequence[Call]) -> list[Choice]:
        self.calls += calls
        return [Choice(reference(call.op), {}, "not run") for call in calls]


class _Overlaid(Arena):
    """All at one place: nothing is computed there, and planning memory takes half of the time."""

    def acquire(self, intervals: list[Interval]) -> tuple[Layout, list[torch.Tensor | None]]:
        size = max((interval.bytes for interval in intervals), default=0)
        block = torch.empty(size, dtype=torch.uint8, device=self.device)
        return Layout({interval.name: Slot(0, 0) for interval in intervals}, size), [block]


def calls_of(plan: Plan, dims: Mapping[str, int], dtype: torch.dtype) -> list[Call]:
    """Every distinct call of a plan, in order.

    plan: specialised to the optional inputs that will come, as an executable's. dims: a size for
    each of the plan's.
    """
    meta = torch.device("meta")
    constants = {
        constant.name: torch.empty(constant.recipe.shape, device=meta, dtype=dtype)
        for constant in plan.constants
    }
    collector: Any = _Collector()
    Executable(plan, dims, constants, dtype, _Overlaid(meta), {}, None, collector)
    return list({call.key: call for call in collector.calls}.values())


def dims_at(plan: Plan, width: int, height: int, batch: int, tokens: int = 77) -> dict[str, int]:
    """A size for each of the plan's dimensions, by that of the images in pixels."""
    sizes = {"batch": batch, "height": height // 8, "width": width // 8, "tokens": tokens}
    return {name: sizes[name] for name in plan.dims}


def calls_at(plan: Plan, width: int, height: int, batch: int, tokens: int = 77) -> list[Call]:
    """Every distinct call in fp16 of a plan at an image size in pixels.

    Without the plan's optional inputs (ControlNets, T2I-Adapters), and with all of them.
    """
    dims = dims_at(plan, width, height, batch, tokens)
    bare = plan.without(entry.name for entry in plan.inputs if entry.optional)
    found = calls_of(bare, dims, torch.float16)
    if bare is not plan:
        found += calls_of(plan, dims, torch.float16)
    return list({call.key: call for call in found}.values())


def calls_ahead(plan: Plan, dims: Mapping[str, int], dtype: torch.dtype) -> list[Call]:
    """Every distinct call of a plan at the sizes of `ahead.SIZES`, the other dimensions as given.

    plan: as `calls_of` takes it.
    """
    found = [
        call
        for width, height in ahead.SIZES
        for call in calls_of(plan, {**dims, "height": height // 8, "width": width // 8}, dtype)
    ]
    return list({call.key: call for call in found}.values())


def timed_calls(hardware: Hardware) -> int:
    """How many calls were timed on such a GPU, by us or on this machine."""
    return len(Profile(hardware, profile_cache()))
