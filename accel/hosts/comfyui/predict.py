"""What a sampling will take before it is queued: seconds and memory, for the panel.

The front end reads what a workflow is about to sample; here the network is found by the header of
the checkpoint, and its plan at hand is asked what its kernels take at that size: nothing runs.
Nothing is said where the structure has no plan yet, or the GPU no profile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import SwitchyardError
from ...hardware import Hardware
from ...runtime.predict import forecast, predict_at
from .catalog import Catalog

WHOLE_STEP = 1.07
"""A step beside its kernels one by one at full clock: 4 to 11 % more, where both were measured."""

KEPT = 64
"""Answers that are kept: somebody tries sizes to and fro."""

FOLDERS = ("checkpoints", "diffusion_models")
PIXELS = range(16, 16385, 8)
COUNTS = range(1, 10001)

# How often the host's samplers call the network in a step, the last step apart, which needs one
# call. Of those that are not here, or choose their steps themselves, nothing is said.
_CALLS = {
    **dict.fromkeys(
        (
            *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "lms"),
            *("dpm_fast", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
            *("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
            *("ddpm", "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp"),
            *("res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "er_sde", "sa_solver"),
            *("gradient_estimation", "gradient_estimation_cfg_pp", "ddim", "uni_pc", "uni_pc_bh2"),
        ),
        1,
    ),
    **dict.fromkeys(
        (
            *("heun", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral"),
            *("dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu"),
            *("seeds_2", "sa_solver_pece"),
        ),
        2,
    ),
    **dict.fromkeys(("heunpp2", "seeds_3"), 3),
}


@dataclass(frozen=True)
class Sampling:
    """What the front end reads from a workflow.

    folder, name: the model's file. width, height: in pixels. batch: images at once. guided: whether
    the network also answers without the prompt. controlnet: whether a ControlNet joins in.
    """

    folder: str
    name: str
    width: int
    height: int
    batch: int
    steps: int
    sampler: str
    guided: bool
    controlnet: bool

    @staticmethod
    def of(data: Mapping[str, Any]) -> Sampling:
        """Raises ValueError for what is none, naming the field at fault."""
        texts, flags = ("folder", "name", "sampler"), ("guided", "controlnet")
        given: dict[str, Any] = {}
        for field in Sampling.__dataclass_fields__:
            value = data.get(field)
            kind = str if field in texts else bool if field in flags else int
            if type(value) is not kind:
                raise ValueError(field)
            given[field] = value
        found = Sampling(**given)
        if found.folder not in FOLDERS:
            raise ValueError("folder")
        for field in ("width", "height"):
            if given[field] not in PIXELS:
                raise ValueError(field)
        for field in ("batch", "steps"):
            if given[field] not in COUNTS:
                raise ValueError(field)
        return found

    @property
    def calls(self) -> int | None:
        """How often the network is called; None if that is not known."""
        each = _CALLS.get(self.sampler)
        return None if each is None else each * (self.steps - 1) + 1


class Predictor:
    """Says what samplings will take, one at a time. Threads may share it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[Any, ...], tuple[float, float, int] | None] = OrderedDict()

    def predict(self, sampling: Sampling, hardware: Hardware | None) -> dict[str, Any]:
        """{"seconds", "bytes"}: of the sampling alone, and of the engine in VRAM. None: unknown."""
        calls = sampling.calls
        if hardware is None or hardware.kind != "cuda" or calls is None:
            return {"seconds": None, "bytes": None}
        with self._lock:
            found = self._times(sampling, hardware)
        if found is None:
            return {"seconds": None, "bytes": None}
        prompt_ms, step_ms, size = found
        return {"seconds": WHOLE_STEP * (prompt_ms + calls * step_ms) / 1e3, "bytes": size}

    def _times(self, sampling: Sampling, hardware: Hardware) -> tuple[float, float, int] | None:
        """Milliseconds of the prompt's part and of a call, and bytes."""
        try:
            plan = self._catalog.plan(sampling.folder, sampling.name)
        except SwitchyardError:
            return None
        if plan is None or plan.structure.get("kind") != "unet":
            return None
        batch = sampling.batch * (2 if sampling.guided else 1)
        size = (sampling.width, sampling.height, batch)
        key = (plan.structure.get("graph_key"), *size, sampling.controlnet)
        if key not in self._answers:
            found = predict_at(plan, *size, forecast(hardware), optional=sampling.controlnet)
            memory = found.weights_bytes + found.activation_bytes
            self._answers[key] = None
            if found.prompt_ms is not None and found.step_ms is not None:
                self._answers[key] = (found.prompt_ms, found.step_ms, memory)
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        return self._answers[key]
