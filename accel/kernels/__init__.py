"""Kernels: implementations of the operators. Which one runs is chosen in `tuning`."""

from __future__ import annotations

import importlib
import logging
from functools import cache

from ..hardware import Hardware
from . import cublaslt, cudnn, library
from .launch import Launch
from .registry import (
    NO_CONFIG,
    Call,
    Config,
    Kernel,
    TensorSpec,
    compiled_kernel,
    kernel,
    kernels,
    reference,
)
from .registry import candidates as _candidates

__all__ = [
    "NO_CONFIG",
    "Call",
    "Config",
    "Kernel",
    "Launch",
    "TensorSpec",
    "candidates",
    "compiled_kernel",
    "cublaslt",
    "cudnn",
    "kernel",
    "kernels",
    "library",
    "load_triton",
    "reference",
]

logger = logging.getLogger(__name__)

_TRITON = (
    "norm",
    "matmul",
    "gemv",
    "attention",
    "attention_hopper",
    "matmul_hopper",
    "conv",
    "pointwise",
)
"""Modules whose kernels need Triton (one only its cache), which costs a second to import and may be
missing."""


@cache
def load_triton() -> bool:
    """Register the Triton kernels; whether there are any."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        logger.info("there is no Triton here, PyTorch's own kernels run: %s", error)
        return False
    for name in _TRITON:
        try:
            importlib.import_module(f".{name}", __package__)
        except Exception as error:  # a version of Triton that lacks something: the others still run
            logger.warning("the Triton kernels of %s are not used: %s", name, error)
    return True


def candidates(
    call: Call, hardware: Hardware, without_ours: bool = False, only: str | None = None
) -> list[tuple[Kernel, Config]]:
    """Every implementation of a call with every configuration of it, the default choice first.

    Last comes the operator's reference, which runs everywhere. without_ours: none that is compiled
    here, but for those that are not measured. only: the name of the one that is asked for.
    """
    if hardware.kind == "cuda":
        load_triton()
    return _candidates(call, hardware, without_ours, only)
