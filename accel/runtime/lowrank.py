"""Low-rank changes of many parameters in one product.

A LoRA of SDXL has some 700 layers: one at a time, a GPU waits for the host between their small
operations. Parameters of one shape whose changes have the same ranks go together: all changes of
all of them are one batched product, accumulated in float32 onto the weights.

A batch always has the size that its shape gives, filled up with zeros, so that the same kernel runs
whichever parameters share it: what comes out for one never depends on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

BATCH_BYTES = 32 << 20
"""Of float32 weights and factors in one batch: some memory beside the arena, for every shape."""

OPEN_BATCHES = 12
"""That are filled at a time, by shape and ranks."""

MOST = 32
"""Parameters in one batch."""


class LowRankPatch(Protocol):
    """A patch whose change may be up @ down * scale."""

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """up [O, r] and down [r, I * prod(k)], floating point, on any device; None if it is not."""

    @property
    def scale(self) -> float:
        """What strength 1 multiplies their product by."""


class Change(NamedTuple):
    """up @ down * scale, its strength included."""

    up: Tensor
    down: Tensor
    scale: float


def batch_size(shape: Sequence[int], ranks: Sequence[int], device: torch.device) -> int:
    """How many parameters of `shape` with changes of `ranks` go together; 1 for one by one.

    On the CPU nothing is gained, and of large matrices or dozens of LoRAs few fit into the memory.
    """
    if device.type == "cpu":
        return 1
    outputs, inputs = shape[0], prod(shape[1:])
    numbers = outputs * inputs + (outputs + inputs) * sum(ranks)
    return max(1, min(MOST, BATCH_BYTES // (4 * numbers)))


def split(changes: Sequence[tuple[T, float]]) -> tuple[list[Change], list[tuple[T, float]]]:
    """The changes of a parameter that are low-rank, and the others."""
    found, others = [], []
    for given, strength in changes:
        # `isinstance` of a protocol would take longer than all else that is done for a parameter.
        factors = getattr(given, "factors", None)
        if factors is None:
            others.append((given, strength))
        else:
            up, down = factors
            found.append(Change(up, down, cast(LowRankPatch, given).scale * strength))
    return found, others


def ranks(changes: Sequence[Change]) -> tuple[int, ...]:
    """The rank of each change: what parameters of one batch have in common beside their shape."""
    return tuple(change.down.shape[0] for change in changes)


class Batch:
    """Up to `size` parameters of one shape and their changes, which have the same ranks."""

    def __init__(self, shape: Sequence[int], size: int, device: torch.device) -> None:
        self._shape, self._size, self._device = tuple(shape), size, device
        self._names: list[str] = []
        self._changes: list[Sequence[Change]] = []
        self._values = torch.empty(
            size, shape[0], prod(shape[1:]), dtype=torch.float32, device=device
        )

    def add(self, name: str, base: Tensor, changes: Sequence[Change]) -> bool:
        """Take a copy of a parameter without these changes; True once the batch is full."""
        self._values[len(self._names)].copy_(base.reshape(self._values.shape[1:]))
        self._names.append(name)
        self._changes.append(changes)
        return len(self._names) == self._size

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its changes, in float32. To be asked for once."""
        self._values[len(self._names) :].zero_()
        ups, downs = [], []
        for changes in zip(*self._changes, strict=True):  # one LoRA's on every parameter
            ups.append(self._scaled(changes))
            downs.append(self._stacked([change.down for change in changes]))
        self._values.baddbmm_(_joined(ups, 2), _joined(downs, 1))
        for name, value in zip(self._names, self._values, strict=False):
            yield name, value.view(self._shape)

    def _scaled(self, changes: Sequence[Change]) -> Tensor:
        """The `up` factors times their scales: that of most LoRAs is the same everywhere."""
        up = self._stacked([change.up for change in changes])
        scales = [change.scale for change in changes]
        if len(set(scales)) == 1:
            return up * scales[0]
        scales += [0.0] * (self._size - len(scales))
        return up * torch.tensor(scales, dtype=torch.float32, device=self._device)[:, None, None]

    def _stacked(self, factors: Sequence[Tensor]) -> Tensor:
        """[size, …] in float32 on the device. The raw bytes go over the bus, in one piece."""
        first = factors[0]
        alike = all((f.dtype, f.device) == (first.dtype, first.device) for f in factors)
        if not alike:
            factors = [factor.to(self._device).float() for factor in factors]
            first = factors[0]
        pinned = self._device.type == "cuda" and first.device.type == "cpu"
        stacked = torch.empty(
            self._size, *first.shape, dtype=first.dtype, device=first.device, pin_memory=pinned
        )
        torch.stack(list(factors), out=stacked[: len(factors)])
        stacked[len(factors) :].zero_()
        return stacked.to(self._device, non_blocking=True).float()


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
