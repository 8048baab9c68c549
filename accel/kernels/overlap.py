"""Launches that begin before the one ahead of them has ended: programmatic dependent launch."""

from __future__ import annotations

from inspect import signature

import triton.language as tl

from ..hardware import Hardware
from .registry import Call, Config

_COMPILES = "_semantic" in signature(tl.extra.cuda.gdc_wait).parameters
"""Whether this Triton can compile the instructions for it; 3.4 cannot."""


def can_overlap(hardware: Hardware) -> bool:
    """Whether launches may overlap there: from Hopper on."""
    return _COMPILES and hardware.capability is not None and hardware.capability >= (9, 0)


def fits(call: Call, config: Config, hardware: Hardware) -> bool:
    """Whether a configuration asks for no more than that; see `Kernel.fits`."""
    return can_overlap(hardware) or not (config.get("pdl") or config.get("early"))
