"""CUDA's libraries as PyTorch's builds bring them along, for `ctypes`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def beside_pytorch(name: str, package: str, major: str) -> list[str]:
    """Where the file of that name lies: with PyTorch, or in NVIDIA's packages.

    package: the library's own, of those that CUDA 12 was cut into. major: CUDA's.
    """
    pytorch = Path(torch.__file__).parent
    packages = pytorch.parent / "nvidia"
    folders = (pytorch / "lib", packages / f"cu{major}" / "lib", packages / package / "lib")
    return [str(folder / name) for folder in folders if (folder / name).is_file()]


def opened(place: str, functions: Mapping[str, list[Any]]) -> Any:
    """The library with its functions' arguments declared.

    Raises OSError where it cannot be had, AttributeError where it lacks a function.
    """
    found = ctypes.CDLL(place)
    for name, arguments in functions.items():
        getattr(found, name).argtypes = arguments
    return found
