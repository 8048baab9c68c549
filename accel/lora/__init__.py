"""Reading LoRAs: one file per format, all giving patches that add an fp32 delta to a parameter."""

from __future__ import annotations

from .format import Patch
from .lowrank import LowRank
from .reader import Lora, fits, read_lora

__all__ = ["Lora", "LowRank", "Patch", "fits", "read_lora"]
