"""What a plan will take at a size before anything is queued: milliseconds and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..hardware import Hardware
from ..plan.schema import Plan
from ..tuning.forecast import MEASURED, PREDICTED, Forecast
from ..tuning.profile import Profile, profile_cache
from .arena import Arena
from .calls import dims_at
from .executable import Executable, PromptState


@dataclass(frozen=True)
class Prediction:
    """What to expect of a plan at one size.

    step_ms, prompt_ms: milliseconds of a step, and of what is done once a prompt; the sum of the
    kernels' times, without the host's: None where one is not known, as on a CPU.
    weights_bytes, activation_bytes: on the device. Not with them: CUDA's own memory, some 500 MiB,
    the scratch memory of libraries whose GPU is not here, and other models.
    measured, predicted, unknown: calls whose times were measured on such a GPU, predicted by the
    performance model, or are not known.
    """

    step_ms: float | None
    prompt_ms: float | None
    weights_bytes: int
    activation_bytes: int
    measured: int
    predicted: int
    unknown: int


def forecast(hardware: Hardware) -> Forecast:
    """What calls take on a GPU, by all that is known of it on this machine."""
    return Forecast(hardware, Profile(hardware, profile_cache()))


def predict(plan: Plan, dims: Mapping[str, int], dtype: torch.dtype, times: Forecast) -> Prediction:
    """Bind a plan without memory and without kernels, and add up.

    plan: specialised to the optional inputs that will come. dims: a size for each of the plan's.
    """
    meta = torch.device("meta")
    constants = {
        constant.name: torch.empty(constant.recipe.shape, device=meta, dtype=dtype)
        for constant in plan.constants
    }
    arena, prompts = Arena(meta), dict[Any, PromptState]()
    selector: Any = times
    bound = Executable(plan, dims, constants, dtype, arena, prompts, None, selector)
    reasons: Counter[str] = Counter()
    total: dict[str, float | None] = {"prompt": 0.0, "step": 0.0}
    for part, _, choice in bound.calls():
        reasons[choice.reason] += 1
        us, so_far = choice.about if choice.us is None else choice.us, total[part]
        total[part] = None if us is None or so_far is None else so_far + us / 1e3
    kept = (buffer for state in prompts.values() for buffer in state.buffers.values())
    return Prediction(
        total["step"],
        total["prompt"],
        sum(_bytes(tensor) for tensor in constants.values()),
        arena.bytes + sum(_bytes(buffer) for buffer in kept),
        reasons[MEASURED],
        reasons[PREDICTED],
        sum(reasons.values()) - reasons[MEASURED] - reasons[PREDICTED],
    )


def predict_at(
    plan: Plan,
    width: int,
    height: int,
    batch: int,
    times: Forecast,
    dtype: torch.dtype = torch.float16,
    tokens: int = 77,
    optional: bool = False,
) -> Prediction:
    """Of an image size in pixels. optional: with the plan's optional inputs, such as ControlNets.

    batch: of one forward; guidance makes it twice that of the images.
    """
    if not optional:
        plan = plan.without(entry.name for entry in plan.inputs if entry.optional)
    return predict(plan, dims_at(plan, width, height, batch, tokens), dtype, times)


def _bytes(tensor: torch.Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()
