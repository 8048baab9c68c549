"""What the engine runs on: devices, their limits and the versions of the libraries."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .errors import DeviceUnavailable

if TYPE_CHECKING:  # torch is imported where it is used: `cache list` or `--help` never need it
    import torch

# Turing, the first generation whose tensor cores the libraries serve in fp16.
MINIMUM_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Hardware:
    """One device and the software that drives it. What a CPU lacks is `None`."""

    name: str
    kind: str  # "cpu" or "cuda"
    capability: tuple[int, int] | None  # (9, 0) for sm_90
    multiprocessors: int  # SMs; physical cores of a CPU
    memory_bytes: int  # of the whole device, not what is free
    l2_bytes: int | None
    driver: str | None  # NVIDIA's driver, "570.86.15"
    torch: str
    cuda: str | None  # runtime that torch was built with
    cudnn: str | None
    triton: str | None
    shared_bytes: int | None = None  # shared memory that one thread block may have


def require(device: str | torch.device) -> torch.device:
    """The device, with its index filled in, if the engine can run there.

    Raises DeviceUnavailable, in one line, when there is no such device here or it is too old.
    """
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise DeviceUnavailable(f"device {str(device)!r} is unknown: use 'cuda' or 'cpu'") from None
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise DeviceUnavailable(f"device '{wanted}' is not supported: use 'cuda' or 'cpu'")
    if torch.version.cuda is None:
        raise DeviceUnavailable(
            f"device '{wanted}' is not available: this PyTorch ({torch.__version__}) is built "
            "without CUDA; install its CUDA build or use device='cpu'"
        )
    if not torch.cuda.is_available():
        raise DeviceUnavailable(
            f"device '{wanted}' is not available: no NVIDIA GPU or driver is visible to PyTorch "
            "(see nvidia-smi and CUDA_VISIBLE_DEVICES); use device='cpu'"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= count:
        raise DeviceUnavailable(
            f"device '{wanted}' does not exist: use 'cuda:0'"
            + (f" to 'cuda:{count - 1}'" if count > 1 else ", the only GPU here")
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        raise DeviceUnavailable(
            f"{torch.cuda.get_device_name(index)} has compute capability {_dotted(capability)}, "
            f"the engine needs {_dotted(MINIMUM_CAPABILITY)} (RTX 20 series) or newer: "
            "use the host's own path"
        )
    return torch.device("cuda", index)


def describe(device: str | torch.device) -> Hardware:
    """Facts about a device. Raises DeviceUnavailable as `require` does."""
    import torch

    found = require(device)
    if found.type == "cpu":
        return Hardware(
            name=_cpu_name(),
            kind="cpu",
            capability=None,
            multiprocessors=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            l2_bytes=None,
            driver=None,
            torch=torch.__version__,
            cuda=torch.version.cuda,
            cudnn=None,
            triton=_triton_version(),
        )
    properties = torch.cuda.get_device_properties(found)
    return Hardware(
        name=properties.name,
        kind="cuda",
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=_driver_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=_cudnn_version(),
        triton=_triton_version(),
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", None),
    )


def available_memory(device: str | torch.device) -> int:
    """Bytes that a new allocation could get now.

    On a GPU that is what the driver has free plus what PyTorch holds without using it (fragments
    included, so a single block may be smaller); on the CPU what the system can give without
    swapping. Limits of containers are not seen. Raises DeviceUnavailable as `require` does.
    """
    import torch

    found = require(device)
    if found.type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(found)
    idle = torch.cuda.memory_reserved(found) - torch.cuda.memory_allocated(found)
    return int(free + idle)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _cudnn_version() -> str | None:
    import torch

    number = torch.backends.cudnn.version()
    if number is None:
        return None
    # 91002 is 9.10.2; up to version 8 the factor was 1000: 8902 is 8.9.2.
    major, rest = divmod(number, 10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _triton_version() -> str | None:
    for name in ("triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@lru_cache(maxsize=1)
def _driver_version() -> str | None:
    """The driver's version from NVML, the library that comes with every driver; torch has none."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(81)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE + 1
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        if nvml.nvmlSystemGetDriverVersion(text, len(text)) != 0:
            return None
    finally:
        nvml.nvmlShutdown()
    return text.value.decode("ascii", "replace")


def _cpu_name() -> str:
    try:  # Linux; platform.processor() is empty there
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"
