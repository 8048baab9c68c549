"""What every test shares: an own cache folder, NaN in uninitialised memory, skips by machine."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # a test without torch shall not pay for its import
    import torch

    from accel.models import UNetConfig
    from accel.plan.schema import Plan


def pytest_configure(config: pytest.Config) -> None:
    """See to it that kernels can run, and that the cores are not fought for.

    Triton and torch read the environment when they are imported, which is later.
    """
    if shutil.which("nvidia-smi") is None:  # else kernels run on the GPU
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Networks as small as those here only lose by being shared out among threads, and thirty times
    # over where another process is on the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; put the others in order."""
    reasons = {}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            reasons["gpu"] = "needs an NVIDIA GPU"
    # May name several, as in PATH: comfyui/server.py runs them all, the other tests the first.
    os.environ.setdefault("COMFYUI_PATHS", os.environ.get("COMFYUI_PATH", "~/ComfyUI"))
    comfyui = Path(os.environ["COMFYUI_PATHS"].split(os.pathsep)[0]).expanduser()
    os.environ["COMFYUI_PATH"] = str(comfyui)
    if not (comfyui / "comfy").is_dir():
        reasons["comfyui"] = f"needs a ComfyUI checkout; {comfyui} (COMFYUI_PATH) has none"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.path.stem in _MADE_ONCE:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=_when)


_MADE_ONCE = {
    "test_bench",
    "test_capture",
    "test_host_diffusers",
    "test_kernel_attention_hopper",
    "test_kernel_compile",
    "test_kernel_matmul_hopper",
    "test_models",
}
"""Files for whose tests something is compiled or captured that takes seconds: by one worker."""


def _when(item: pytest.Item) -> int:
    """First what takes minutes and cannot be shared out, so that all workers end together."""
    if item.path.stem in _LONGEST:
        return _LONGEST.index(item.path.stem) - len(_LONGEST)
    return 0 if item.get_closest_marker("xdist_group") else 1


_LONGEST = ("test_host_comfyui", "test_kernel_compile")


def pytest_collection_finish() -> None:
    """What is imported by now stays, and no collection of garbage looks through it again.

    With torch and a host there it would take a third of a second, and many tests ask for one.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test alone: no test reads what the user or another test built."""
    folder = tmp_path / "switchyard-cache"
    for name in os.environ:
        if name.startswith("SWITCHYARD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SWITCHYARD_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` gives NaN, so that a read before the first write shows up in the result.

    Not on a GPU: the fills would be captured into CUDA graphs, and kernels chosen differently.
    """
    torch = sys.modules.get("torch")  # a test without torch shall not pay for its import
    if torch is None or request.node.get_closest_marker("gpu"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def plan_cache(run_folder: Path) -> Path:
    """A cache folder that holds the plan of the tiny SD1.5-shaped UNet, captured once a run."""
    from support import tiny_config

    return _captured(run_folder / "plans", tiny_config())


@pytest.fixture(scope="session")
def small_plans(run_folder: Path) -> Path:
    """A cache folder that holds the plan of `support.two_levels`, captured once a run."""
    from support import two_levels

    return _captured(run_folder / "small-plans", two_levels())


def _captured(folder: Path, config: UNetConfig) -> Path:
    from diffusers import UNet2DConditionModel
    from support import make_unet

    from accel.session import Session
    from accel.structure import structure_of

    session = Session("cpu", "fp32", cache_dir=folder)
    session.plan(structure_of(make_unet(0, config)), UNet2DConditionModel)
    return folder


@pytest.fixture(scope="session")
def tiny_unet() -> torch.nn.Module:
    """The tiny SD1.5-shaped UNet of diffusers, seeded. Not to be changed."""
    from support import make_unet

    return make_unet(0)


@pytest.fixture(scope="session")
def tiny_plan(plan_cache: Path, tiny_unet: torch.nn.Module) -> Plan:
    """The plan of `tiny_unet`, from the cache that a run fills once."""
    from accel.session import Session
    from accel.structure import structure_of

    plan, origin = Session("cpu", "fp32", cache_dir=plan_cache).plan(
        structure_of(tiny_unet), tiny_unet
    )
    assert origin == "cache"
    return plan
