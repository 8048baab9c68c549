"""The activation arena: blocks of device memory that every shape's executable plans into."""

from __future__ import annotations

import torch

from ..errors import OutOfMemory
from ..plan.memory import Interval, Layout, plan_memory


class Arena:
    """Blocks of bytes with fixed addresses. Executables hold the blocks that they use.

    Captured graphs keep addresses, so a block is never moved: a larger shape adds one, and a block
    goes when the last executable that uses it does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: list[torch.Tensor | None] = []
        self._users: list[int] = []

    @property
    def bytes(self) -> int:
        """Bytes of all blocks together."""
        return sum(block.numel() for block in self._blocks if block is not None)

    def acquire(self, intervals: list[Interval]) -> tuple[Layout, list[torch.Tensor | None]]:
        """Plan `intervals` into the blocks, adding one if need be, and hold those that are used.

        Raises `OutOfMemory` when the device cannot give the new block; nothing is then held.
        """
        sizes = [0 if block is None else block.numel() for block in self._blocks]
        layout = plan_memory(intervals, sizes)
        if layout.new_block:
            try:
                with torch.inference_mode(False):
                    block = torch.empty(layout.new_block, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError as error:
                mib = layout.new_block >> 20
                raise OutOfMemory(
                    f"{mib} MiB for this image size do not fit on {self.device}"
                ) from error
            self._blocks.append(block)
            self._users.append(0)
        for index in {slot.block for slot in layout.slots.values()}:
            self._users[index] += 1
        return layout, list(self._blocks)

    def release(self, layout: Layout) -> None:
        """Let go of the blocks of an executable that is no more."""
        for index in {slot.block for slot in layout.slots.values()}:
            self._users[index] -= 1
            if self._users[index] == 0:
                self._blocks[index] = None
        while self._blocks and self._blocks[-1] is None:
            self._blocks.pop()
            self._users.pop()
