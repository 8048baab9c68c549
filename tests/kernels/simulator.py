"""CUDA C++ kernels on the CPU: their source as C++, with simulated/ in place of Hopper."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from accel.kernels import nvrtc
from accel.kernels.nvrtc import CudaLaunch, TileMap

SIMULATED = Path(__file__).with_name("simulated")
COMPILER = shutil.which("g++") if sys.platform == "linux" else None  # its ucontext.h

_ERROR_BYTES = 2000
_GUARD = 1 << 15
"""Numbers before and behind a tensor, NaN, that no kernel may touch."""


class _Descriptor(ctypes.Structure):
    _fields_ = [
        ("tensor", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 3),
        ("box", ctypes.c_int32 * 4),
    ]


class Simulator:
    """Builds each variant once, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts: dict[str, str] = {}
        """What is run in place of files in accel/kernels."""

    def run(self, launch: CudaLaunch) -> None:
        """As CudaLaunch.run. Raises RuntimeError if the kernel does what it must not."""
        library = ctypes.CDLL(str(self.build(launch)))
        guarded = [_guarded(argument) for argument in launch.arguments]
        kept = [_passed(argument) for argument in guarded]
        pointers = (ctypes.c_void_p * len(kept))(*map(ctypes.addressof, kept))
        words = ctypes.create_string_buffer(_ERROR_BYTES)
        x, y, _ = launch.grid
        about = (launch.threads, launch.shared, pointers, words, ctypes.c_size_t(_ERROR_BYTES))
        if library.run(x, y, launch.cluster, *about):
            raise RuntimeError(words.value.decode())
        for given, used in zip(launch.arguments, guarded, strict=True):
            if given is not used:
                _take_back(given, used)

    def build(self, launch: CudaLaunch) -> Path:
        """Raises RuntimeError with the compiler's words."""
        source = self.texts.get(launch.source, nvrtc.text(launch.source))
        name = launch.source.split(".")[0]
        text = f"{source}\nRUNS({name})\n"
        defines = [f"-D{name}={value}" for name, value in sorted(launch.defines.items())]
        key = hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{key}.so"
        if not path.exists():
            options = ["-std=c++17", "-O1", "-pthread", "-shared", "-fPIC", "-x", "c++", "-"]
            command = [str(COMPILER), *defines, *options, "-o", str(path)]
            # Read as if it lay there, so that the header is the simulated one.
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, cwd=SIMULATED
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
        return path


def _guarded(argument: Any) -> Any:
    """A tensor's copy among NaN, if it is no slice of another, whose test has seen to that."""
    if not isinstance(argument, torch.Tensor) or not argument.is_contiguous():
        return argument
    room = argument.new_full((argument.numel() + 2 * _GUARD,), float("nan"))
    return room[_GUARD:-_GUARD].view(argument.shape).copy_(argument)


def _take_back(given: Any, used: Any) -> None:
    room = used.as_strided((used.numel() + 2 * _GUARD,), (1,), 0)
    if not torch.cat([room[:_GUARD], room[-_GUARD:]]).isnan().all():
        raise RuntimeError("a kernel wrote before or behind a tensor")
    given.copy_(used)


def _passed(argument: Any) -> Any:
    """What holds the value of a kernel's argument."""
    if isinstance(argument, TileMap):
        width = argument.tensor.element_size()
        return _Descriptor(
            argument.tensor.data_ptr(),
            argument.sizes,
            tuple(width * stride for stride in argument.strides),
            argument.box,
        )
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument
