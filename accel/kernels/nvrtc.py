"""CUDA C++ kernels: static source beside this file, compiled by NVRTC, launched by the driver.

For the few kernels that need to say themselves what waits for what, and of which Triton's tiles,
powers of two, fit no power of two. NVRTC is the very library that PyTorch's builds for CUDA bring
along; a compiler, headers or a toolkit are not needed. What was compiled is kept in Triton's cache,
so that one place holds all code. Compiling needs no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import re
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from .shared_objects import beside_pytorch, opened

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent

_DIGEST = hashlib.sha256().digest_size

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_…
_TENSOR_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_…
_SWIZZLES = {32: 1, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_…, by the bytes of a box's row
_PROMOTION_L2_128B = 2
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_…


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = [("name", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_NVRTC: dict[str, list[Any]] = {
    "nvrtcVersion": [_POINTER, _POINTER],
    "nvrtcCreateProgram": [_POINTER, ctypes.c_char_p, ctypes.c_char_p, _INT, _POINTER, _POINTER],
    "nvrtcDestroyProgram": [_POINTER],
    "nvrtcCompileProgram": [_POINTER, _INT, _POINTER],
    "nvrtcGetProgramLogSize": [_POINTER, _POINTER],
    "nvrtcGetProgramLog": [_POINTER, _POINTER],
    "nvrtcGetCUBINSize": [_POINTER, _POINTER],
    "nvrtcGetCUBIN": [_POINTER, _POINTER],
}
_DRIVER: dict[str, list[Any]] = {
    "cuGetErrorString": [_INT, _POINTER],
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [_POINTER, _INT],
    "cuDevicePrimaryCtxRetain": [_POINTER, _INT],
    "cuCtxGetCurrent": [_POINTER],
    "cuCtxSetCurrent": [_POINTER],
    "cuModuleLoadData": [_POINTER, _POINTER],
    "cuModuleGetFunction": [_POINTER, _POINTER, ctypes.c_char_p],
    "cuFuncSetAttribute": [_POINTER, _INT, _INT],
    "cuOccupancyMaxActiveClusters": [_POINTER, _POINTER, _POINTER],
    # configuration, function, arguments, extra
    "cuLaunchKernelEx": [_POINTER, _POINTER, _POINTER, _POINTER],
    # map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill
    "cuTensorMapEncodeTiled": [_POINTER, _INT, ctypes.c_uint32, *(_POINTER,) * 5, *(_INT,) * 4],
}


@dataclass(frozen=True)
class TileMap:
    """What the copy engine needs to know to bring boxes of a tensor, or to take them there.

    sizes, box: elements, the innermost dimension first. strides: elements, of all but the
    innermost. A box's rows have 32, 64 or 128 bytes, and are swizzled by as many. What of a box
    lies outside comes as zeros, and is not written.
    """

    tensor: torch.Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def encoded(self) -> ctypes.Array[Any]:
        """A CUtensorMap. Raises RuntimeError where the driver refuses."""
        rank, width = len(self.sizes), self.tensor.element_size()
        room = (ctypes.c_byte * (128 + 63))()  # it must start at a multiple of 64
        start = -ctypes.addressof(room) % 64
        found = (ctypes.c_byte * 128).from_buffer(room, start)
        _driver(
            "cuTensorMapEncodeTiled",
            *(found, _TENSOR_MAP_TYPES[self.tensor.dtype], rank, self.tensor.data_ptr()),
            (ctypes.c_uint64 * rank)(*self.sizes),
            (ctypes.c_uint64 * (rank - 1))(*(width * stride for stride in self.strides)),
            (ctypes.c_uint32 * rank)(*self.box),
            (ctypes.c_uint32 * rank)(*(1,) * rank),
            *(0, _SWIZZLES[width * self.box[0]], _PROMOTION_L2_128B, 0),
        )
        return found


Argument = TileMap | torch.Tensor | ctypes.c_int64 | ctypes.c_int32 | ctypes.c_float


@dataclass(frozen=True)
class CudaLaunch:
    """One launch of a CUDA C++ kernel as data, as `launch.Launch` is of a Triton kernel.

    source: a file in this folder, whose kernel has the name of the file up to the first dot; what
    it includes lies here too.
    architecture: what it is compiled for ("sm_90a"). grid, threads: blocks, and threads of each.
    shared: bytes beside what the kernel declares. defines: the numbers that it is compiled with.
    cluster: blocks side by side in x that run at one time, near each other. overlaps: whether it
    may begin while the launch before still runs, for which the kernel then waits itself.
    takes_turns: fewer blocks in x do too, each of them more; so that those are launched which find
    place at one time.
    """

    source: str
    architecture: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    defines: Mapping[str, int]
    arguments: Sequence[Argument] = field(default=(), repr=False, compare=False)
    cluster: int = 1
    overlaps: bool = False
    takes_turns: bool = False

    def run(self) -> None:
        """Launch on the current stream. Raises RuntimeError where that fails."""
        function = _loaded(torch.cuda.current_device(), self)
        kept = [_passed(argument) for argument in self.arguments]
        pointers = (_POINTER * len(kept))(*map(ctypes.addressof, kept))
        config = self._config()
        if self.takes_turns and self.cluster > 1:
            most = self.cluster * _clusters_at_once(torch.cuda.current_device(), self)
            config.grid[0] = min(config.grid[0], most)
        _driver("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)

    def _config(self) -> _LaunchConfig:
        """Grid, stream and attributes, as the driver takes them."""
        attributes = []
        if self.cluster > 1:
            size = (ctypes.c_uint32 * 16)(self.cluster, 1, 1)
            attributes.append(_Attribute(_CLUSTER_DIMENSION, 0, size))
        if self.overlaps:
            allowed = (ctypes.c_uint32 * 16)(1)
            attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, allowed))
        return _LaunchConfig(
            *(self.grid, (self.threads, 1, 1), self.shared),
            torch.cuda.current_stream().cuda_stream,
            *((_Attribute * len(attributes))(*attributes), len(attributes)),
        )

    def compile(self) -> bytes:
        """The code (cubin), from Triton's cache if it is there. Raises RuntimeError."""
        name = f"{self.source}.cubin"
        kept = _kept(self._hash, name)
        if kept is not None:
            return kept
        source, included = text(self.source), headers(self.source)
        made = compiled(source, self.architecture, self.defines, included)
        _keep(self._hash, name, made)
        return made

    store = compile

    def warm(self) -> None:
        """Compile, and bring the code to the GPU, which is else done at the first launch."""
        _loaded(torch.cuda.current_device(), self)

    def key(self) -> str:
        """What makes it another piece of code than a second launch's."""
        return self._hash

    @property
    def _hash(self) -> str:
        about = (self.source, self.architecture, tuple(sorted(self.defines.items())))
        return _hash_of(version(), text(self.source), tuple(headers(self.source).items()), *about)


@lru_cache(maxsize=256)
def _hash_of(*about: Any) -> str:
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _kept(key: str, name: str) -> bytes | None:
    """What was compiled before; None if it is not there, damaged, or out of reach."""
    try:
        from triton.runtime.cache import get_cache_manager

        path = get_cache_manager(key).get_file(name)
        content = b"" if path is None else Path(path).read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(code).digest() == digest:
        return code
    if content:
        logger.warning("%s is damaged, and compiled again: %s", name, path)
    return None


def _keep(key: str, name: str, code: bytes) -> None:
    """For later processes, where the folder lets us; Triton writes whole files."""
    from triton.runtime.cache import get_cache_manager

    with contextlib.suppress(OSError):
        content = hashlib.sha256(code).digest() + code
        get_cache_manager(key).put(content, name, binary=True)


def available() -> bool:
    """Whether there is an NVRTC."""
    return _library() is not None


def version() -> tuple[int, int] | None:
    """That of NVRTC."""
    if not available():
        return None
    major, minor = _INT(), _INT()
    _nvrtc("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compiled(
    source: str,
    architecture: str,
    defines: Mapping[str, int],
    included: Mapping[str, str] | None = None,
) -> bytes:
    """The cubin of CUDA C++ source. Raises RuntimeError with the compiler's words.

    included: headers' texts by the names that the source has for them.
    """
    program, included = _POINTER(), included or {}
    names, texts = _words(included), _words(included.values())
    about = (source.encode(), None, len(included), texts, names)
    _nvrtc("nvrtcCreateProgram", ctypes.byref(program), *about)
    try:
        options = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device"]
        options += [f"-D{name}={value}" for name, value in defines.items()]
        try:
            _nvrtc("nvrtcCompileProgram", program, len(options), _words(options))
        except RuntimeError as error:
            log = _read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise RuntimeError(log.rstrip(b"\0").decode(errors="replace").strip()) from error
        return _read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        _nvrtc("nvrtcDestroyProgram", ctypes.byref(program))


def _words(texts: Collection[str]) -> ctypes.Array[Any]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _read(program: Any, size: str, content: str) -> bytes:
    count = _SIZE()
    _nvrtc(size, program, ctypes.byref(count))
    buffer = ctypes.create_string_buffer(count.value)
    _nvrtc(content, program, buffer)
    return buffer.raw


def _passed(argument: Argument) -> Any:
    """What the driver reads an argument's value from."""
    if isinstance(argument, TileMap):
        return argument.encoded()
    return _POINTER(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument


_lock = threading.Lock()
_functions: dict[tuple[int, str, int], Any] = {}
"""Of each device, code and size of shared memory; kept for the life of the process."""


def _loaded(device: int, launch: CudaLaunch) -> Any:
    key = (device, launch.key(), launch.shared)
    if key in _functions:
        return _functions[key]
    code = launch.compile()
    with _lock:
        if key not in _functions:
            _take_context(device)
            module, function = _POINTER(), _POINTER()
            _driver("cuModuleLoadData", ctypes.byref(module), code)
            name = launch.source.split(".")[0].encode()
            _driver("cuModuleGetFunction", ctypes.byref(function), module, name)
            _driver("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared)
            _functions[key] = function
    return _functions[key]


_clusters: dict[tuple[int, str, int], int] = {}
"""Of each device, code and size of shared memory, how many clusters run at one time."""


def _clusters_at_once(device: int, launch: CudaLaunch) -> int:
    """At least one: where none finds place the launch says so."""
    key = (device, launch.key(), launch.shared)
    if key not in _clusters:
        found, function = _INT(), _loaded(device, launch)
        config = replace(launch, overlaps=False)._config()
        _driver("cuOccupancyMaxActiveClusters", ctypes.byref(found), function, ctypes.byref(config))
        _clusters[key] = max(1, found.value)
    return _clusters[key]


def _take_context(device: int) -> None:
    """Have the device's own context in a thread that has none yet; PyTorch's functions are lazy."""
    context, handle = _POINTER(), _INT()
    _driver("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _driver("cuInit", 0)
        _driver("cuDeviceGet", ctypes.byref(handle), device)
        _driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        _driver("cuCtxSetCurrent", context)


@cache
def text(source: str) -> str:
    """Of a file in this folder."""
    return (FOLDER / source).read_text(encoding="utf-8")


@cache
def headers(source: str) -> dict[str, str]:
    """The texts of the files that it includes, by name."""
    return {name: text(name) for name in re.findall(r'(?m)^#include "(.+)"$', text(source))}


@cache
def _library() -> Any:
    """NVRTC of PyTorch's CUDA version, where PyTorch has none, any that was installed, or None."""
    majors = [torch.version.cuda.split(".")[0]] if torch.version.cuda else ["13", "12"]
    for major in majors:
        for place in _places(major):
            with contextlib.suppress(OSError, AttributeError):
                return opened(place, _NVRTC)
    return None


def _places(major: str) -> list[str]:
    """Its files, then the name alone, for the system to find."""
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    return [*beside_pytorch(name, "cuda_nvrtc", major), name]


@cache
def _driver_library() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    return opened(name, _DRIVER)


def _nvrtc(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


def _driver(name: str, *arguments: Any) -> None:
    library = _driver_library()
    status = getattr(library, name)(*arguments)
    if status:
        words = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(words))
        said = (words.value or b"unknown").decode(errors="replace")
        raise RuntimeError(f"{name} failed: {said} (CUDA's status {status})")
