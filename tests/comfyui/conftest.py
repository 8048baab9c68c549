"""Runs the tests of this folder inside the Python of a ComfyUI, whose checkout COMFYUI_ROOT names.

`tests/test_host_comfyui.py` starts that for every installation it finds. To run some by hand:
`COMFYUI_ROOT=~/ComfyUI ~/ComfyUI/.venv/bin/python -m pytest tests/comfyui`. Anywhere else they are
skipped, and nothing is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .server import Server

_COMFYUI = os.environ.get("COMFYUI_ROOT")


class _Elsewhere(pytest.Module):
    """A test file that this Python cannot import."""

    def collect(self) -> Any:
        pytest.skip(
            "runs inside ComfyUI's own Python: test_host_comfyui.py starts it there",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    """Leave the files of this folder unread outside ComfyUI's Python."""
    return None if _COMFYUI else _Elsewhere.from_parent(parent, path=module_path)


def _enter_comfyui(root: Path) -> None:
    """As ComfyUI's main.py: its folder comes first, and it computes on the CPU unless told."""
    pack = str(Path(__file__).parents[2])
    # Both have a `nodes`; ComfyUI's is the one that everybody there means.
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", pack)), pack]
    # As the host's main module does, before its nodes put a folder in front that has another one.
    import utils.extra_config  # noqa: F401

    from .launch import define_torchvision_ops

    define_torchvision_ops()
    from comfy.cli_args import args

    args.cpu = os.environ.get("COMFYUI_DEVICE", "cpu") == "cpu"
    args.disable_api_nodes = True
    if not args.cpu:
        _set_up_dynamic_vram()
    from .testpack import models

    models.register()


def _set_up_dynamic_vram() -> None:
    """As main.py does on a GPU: without it, pinning host memory ends the process.

    COMFYUI_DYNAMIC_VRAM=0 leaves it at that, as `--disable-dynamic-vram` does.
    """
    try:
        from comfy_aimdo import control
    except ImportError:  # ComfyUI before 0.4 has none
        return
    control.init()
    if os.environ.get("COMFYUI_DYNAMIC_VRAM", "1") == "0":
        return
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    try:
        ready = control.init_devices((device.index, 0) for device in devices)
    except TypeError:
        ready = control.init_devices(device.index for device in devices)
    if ready:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


if _COMFYUI:
    _enter_comfyui(Path(_COMFYUI).expanduser())


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `checkpoints.ensure` writes; COMFYUI_TEST_MODELS names one that several runs share."""
    shared = os.environ.get("COMFYUI_TEST_MODELS")
    return Path(shared) if shared else tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def shared_plans(cache_folder: Path) -> None:
    """No network is traced twice: plans are in COMFYUI_TEST_CACHE, which several runs may share.

    Everything else that is kept, as the journal, is this process's own.
    """
    shared = os.environ.get("COMFYUI_TEST_CACHE")
    if not _COMFYUI or not shared:
        return
    from accel.compiler import open_cache
    from accel.hosts.comfyui.builder import builder

    if builder().cache.root != Path(shared):
        builder().cache = open_cache(Path(shared), None)


@pytest.fixture(scope="session")
def load(models_folder: Path) -> Callable[..., Any]:
    """`load("tiny-sd15", "a")`: the MODEL of a checkpoint file, read again at every call."""
    import comfy.sd

    from .checkpoints import ensure

    def loaded(kind: str = "tiny-sd15", letter: str = "a") -> Any:
        (path,) = ensure(models_folder, f"checkpoints/{kind}-{letter}.safetensors")
        return comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, output_clip=False
        )[0]

    return loaded


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[Server]:
    """One real server for the whole run, with this repository and `testpack` in it."""
    from .server import Installation, Server

    assert _COMFYUI is not None
    installation = Installation(Path(_COMFYUI).expanduser(), Path(sys.executable))
    folder = tmp_path_factory.mktemp("server")
    cache = os.environ.get("COMFYUI_TEST_CACHE")
    variables = {"SWITCHYARD_CACHE_DIR": cache} if cache else {}
    with Server(installation, folder, models=models_folder, variables=variables) as running:
        yield running
