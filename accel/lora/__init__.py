"""Reading LoRAs: one file per format, all giving patches: what fp32 delta a parameter gains."""

from __future__ import annotations

from .blocks import BlockWeights, block_weights
from .configuration import configuration_beside
from .format import Patch
from .lowrank import LowRank
from .reader import Lora, fits, is_lora, read_lora

__all__ = [
    "BlockWeights",
    "Lora",
    "LowRank",
    "Patch",
    "block_weights",
    "configuration_beside",
    "fits",
    "is_lora",
    "read_lora",
]
