"""Times of one call: of the kernel chosen for it, of PyTorch's own ways, and of torch.compile.

All are timed in this process, one after the other on the same tensors, and as the tuner times its
candidates: captured, with weights that are not in the cache. So their ratios compare like with
like.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..hardware import Hardware, describe
from ..kernels import NO_CONFIG, Call, Config, Kernel, candidates, reference
from ..tuning import Choice
from ..tuning.measure import Clock, Operands
from .timing import seconds

logger = logging.getLogger(__name__)

PYTORCH = (
    *("cublas.linear", "cublas.linear_onto", "cudnn.conv2d", "cudnn.attention"),
    "flash.attention",
)
"""Kernels that are PyTorch's own ways, with every pass they need; so are all of `torch.*`. What
else there is to choose from (`cublaslt.*`, `cudnn_frontend.*`, …), no user of PyTorch gets."""

ARITHMETIC = ("linear", "conv2d", "attention")
"""Operators for which torch.compile calls the same libraries; all others only move bytes."""

CPU_SAMPLES = 3


@dataclass(frozen=True)
class Times:
    """Microseconds of one run, None for what cannot be had.

    us: of the chosen kernel. way_us: of the fastest of PyTorch's own ways, whose name is
    `way`. compiled_us: of the operator's reference as torch.compile has it.
    """

    us: float | None = None
    way: str | None = None
    way_us: float | None = None
    compiled_us: float | None = None


class OpTimer:
    """Times calls on a device.

    backend: torch.compile's, or None to compile nothing; by default its own on a GPU, none
    elsewhere.
    """

    def __init__(self, device: torch.device, backend: str | None = None) -> None:
        self._device, self._hardware = device, describe(device)
        self._clock = Clock(device, self._hardware) if device.type == "cuda" else None
        self._backend = "inductor" if backend is None and device.type == "cuda" else backend

    def __call__(self, call: Call, choice: Choice) -> Times:
        """All times of a call. What cannot be timed costs only itself."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                operands = Operands(call, self._hardware, self._device)
            except torch.OutOfMemoryError:
                logger.warning("%s is not timed: no memory for its tensors", call.key)
                return Times()
            us = self._us(operands, choice.kernel, choice.config)
            way, way_us = self._way(operands, choice, us)
            compiled_us = self._compiled(operands)
        del operands
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return Times(us, way, way_us, compiled_us)

    def _way(
        self, operands: Operands, choice: Choice, us: float | None
    ) -> tuple[str | None, float | None]:
        """The fastest of PyTorch's own ways. The chosen one, if among them, is not timed again."""
        best: tuple[str | None, float | None] = (None, None)
        for kernel, config in pytorch_ways(operands.call, self._hardware):
            chosen = kernel.name == choice.kernel.name and dict(config) == dict(choice.config)
            found = us if chosen else self._us(operands, kernel, config)
            if found is not None and (best[1] is None or found < best[1]):
                best = kernel.name, found
        return best

    def _compiled(self, operands: Operands) -> float | None:
        call = operands.call
        if self._backend is None or call.op in ARITHMETIC:
            return None
        try:
            return self._us(operands, compiled(call, self._backend), NO_CONFIG)
        except Exception as error:  # no compiler at all
            logger.warning("nothing is compiled: %s", " ".join(str(error).split()))
            return None
        finally:
            # Each call counts as another recompilation of one function, of which few are allowed.
            torch.compiler.reset()

    def _us(self, operands: Operands, kernel: Kernel, config: Config) -> float | None:
        try:
            run = operands.bind(kernel, config)
            run(0)  # what compiles or chooses an algorithm must have done so when it is captured
            if self._clock is not None:
                return self._clock(run)
            samples = [seconds(lambda: run(0), self._device) for _ in range(CPU_SAMPLES)]
            return 1e6 * statistics.median(samples)
        except Exception as error:  # one that cannot be timed must not cost the table
            reason = " ".join(str(error).split())
            logger.warning("%s is not timed: %s: %s", operands.call.key, kernel.name, reason)
            return None


def pytorch_ways(call: Call, hardware: Hardware) -> Sequence[tuple[Kernel, Config]]:
    """What PyTorch itself offers for a call: its libraries' kernels, else the plain reference."""
    found = [
        (kernel, config)
        for kernel, config in candidates(call, hardware)
        if kernel.name in PYTORCH or kernel.name.startswith("torch.")
    ]
    return found or [(eager(call), NO_CONFIG)]


class _Anywhere:
    """In place of a reference's buffer: the result stays where it was made, without a copy."""

    def copy_(self, result: torch.Tensor) -> torch.Tensor:
        return result


def eager(call: Call) -> Kernel:
    """The operator's reference with a result of its own, as a user of PyTorch would run it."""
    plain = reference(call.op).run

    def run(out: None, *tensors: torch.Tensor | None, **attrs: Any) -> torch.Tensor:
        return plain(_Anywhere(), *tensors, **attrs)

    return Kernel(f"eager.{call.op}", call.op, run, ("cpu", "cuda"), allocates=True)


def compiled(call: Call, backend: str) -> Kernel:
    """The operator's reference as torch.compile has it, for this call's shapes alone."""
    plain, attrs = eager(call).run, dict(call.attrs)

    def whole(*tensors: torch.Tensor | None) -> torch.Tensor:
        return plain(None, *tensors, **attrs)

    fast = torch.compile(whole, fullgraph=True, dynamic=False, backend=backend)

    def run(out: None, *tensors: torch.Tensor | None, **rest: Any) -> torch.Tensor:
        result: torch.Tensor = fast(*tensors)
        return result

    return Kernel("torch.compile", call.op, run, ("cpu", "cuda"), allocates=True)
