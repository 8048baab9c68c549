"""Reading LoRAs: one file per format, all giving patches: what fp32 delta a parameter gains."""

from __future__ import annotations

from .blocks import Blocks, BlockWeights
from .format import Patch
from .lowrank import LowRank
from .reader import Lora, fits, is_lora, read_lora

__all__ = [
    "BlockWeights",
    "Blocks",
    "Lora",
    "LowRank",
    "Patch",
    "fits",
    "is_lora",
    "read_lora",
]
