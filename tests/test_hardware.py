from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel import hardware
from accel.errors import DeviceUnavailable


class Cuda:
    """A stand-in for `torch.cuda` on a machine with GPUs of the given compute capabilities."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities

    def is_available(self) -> bool:
        return bool(self.capabilities)

    def device_count(self) -> int:
        return len(self.capabilities)

    def current_device(self) -> int:
        return 0

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capabilities[index]

    def get_device_name(self, index: int) -> str:
        return f"GPU {index}"

    def get_device_properties(self, device: torch.device) -> Any:
        major, minor = self.capabilities[device.index]
        return SimpleNamespace(
            name=f"GPU {device.index}",
            major=major,
            minor=minor,
            multi_processor_count=132,
            total_memory=80 * 2**30,
            L2_cache_size=50 * 2**20,
        )

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 10 * 2**30, 80 * 2**30

    def memory_reserved(self, device: torch.device) -> int:
        return 6 * 2**30

    def memory_allocated(self, device: torch.device) -> int:
        return 4 * 2**30


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "cuda", Cuda(*capabilities))


def refusal(device: str) -> str:
    with pytest.raises(DeviceUnavailable) as caught:
        hardware.require(device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cpu() -> None:
    found = hardware.describe("cpu")
    assert found.kind == "cpu" and found.name and found.torch == torch.__version__
    assert found.capability is None and found.multiprocessors >= 1
    assert 0 < hardware.available_memory("cpu") <= found.memory_bytes
    assert hardware.require("cpu:0") == torch.device("cpu")


def test_gpu_from_its_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5), (9, 0))
    assert hardware.require("cuda") == torch.device("cuda", 0)
    assert hardware.require(torch.device("cuda:1")) == torch.device("cuda", 1)
    found = hardware.describe("cuda:1")
    assert (found.name, found.kind, found.capability) == ("GPU 1", "cuda", (9, 0))
    assert (found.multiprocessors, found.l2_bytes) == (132, 50 * 2**20)
    assert found.memory_bytes == 80 * 2**30
    assert hardware.available_memory("cuda:1") == 12 * 2**30


def test_cuda_without_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in refusal("cuda")


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert "no NVIDIA GPU or driver" in refusal("cuda")


def test_gpu_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert "only GPU" in refusal("cuda:1")
    pretend(monkeypatch, (9, 0), (9, 0))
    assert "'cuda:1'" in refusal("cuda:2")


def test_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 0))
    assert "compute capability 7.0" in refusal("cuda")


@pytest.mark.parametrize("device", ["mps", "meta", "toaster", "cuda:x"])
def test_other_devices(device: str) -> None:
    assert device in refusal(device)


@pytest.mark.parametrize(
    ("number", "version"),
    [(91002, "9.10.2"), (90100, "9.1.0"), (8902, "8.9.2"), (None, None)],
)
def test_cudnn_version(
    number: int | None, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert hardware._cudnn_version() == version


@pytest.mark.gpu
def test_real_gpu() -> None:
    found = hardware.describe("cuda")
    assert found.capability is not None and found.capability >= (7, 5)
    assert found.driver and found.cudnn and found.l2_bytes and found.multiprocessors > 1
    assert 0 < hardware.available_memory("cuda") <= found.memory_bytes
