"""Implementations of operators, and the choice among them.

A kernel computes into the buffer that memory planning gave it and returns it. One that cannot (its
library makes its own result) says so with `allocates`: its result is then used where it is, and no
buffer is planned for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .. import ops

Run = Callable[..., torch.Tensor]
"""`run(out, *tensors, **attrs) -> result`; `out` is None for a kernel that allocates."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator. `devices`: device types it runs on."""

    name: str
    op: str
    run: Run
    devices: tuple[str, ...]
    allocates: bool = False


@dataclass(frozen=True)
class Choice:
    """A selected kernel and why it was."""

    kernel: Kernel
    reason: str


_KERNELS: list[Kernel] = []


def kernel(
    op: str, *, name: str, devices: tuple[str, ...], allocates: bool = False
) -> Callable[[Run], Run]:
    """Register the decorated function as an implementation of operator `op`; earlier ones win."""

    def register(run: Run) -> Run:
        _KERNELS.append(Kernel(name, op, run, devices, allocates))
        return run

    return register


@cache
def select(op: str, device: str) -> Choice:
    """The kernel for an operator on a device type: the library's, else the operator's reference."""
    for candidate in _KERNELS:
        if candidate.op == op and device in candidate.devices:
            return Choice(candidate, f"first of the library's for {device}")
    return Choice(_reference(op), f"no kernel for {device}, the reference runs")


@cache
def _reference(op: str) -> Kernel:
    reference = ops.get(op).reference

    def run(out: torch.Tensor, *tensors: torch.Tensor | None, **attrs: Any) -> torch.Tensor:
        return out.copy_(reference(*tensors, **attrs))

    return Kernel(f"reference.{op}", op, run, ("cpu", "cuda"))
