"""Starts ComfyUI's `main.py` in this Python: `launch.py ROOT ARGUMENTS…`.

Ends when its standard input does, so that no server outlives the test that started it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any


def define_torchvision_ops() -> None:
    """Some CPU builds of torchvision come without their compiled operators.

    torchvision then fails when it registers shapes for them, and with it all that imports it.
    """
    import torch
    from torch import library as operators

    fragment = operators.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            getattr(torch.ops.torchvision, name)
        except AttributeError:
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(fragment)


def tolerate_missing_folders() -> None:
    """An older ComfyUI names folders that newer packages of this Python no longer have."""
    from aiohttp import web

    add_static = web.UrlDispatcher.add_static

    def tolerant(self: Any, prefix: str, path: Any, **options: Any) -> Any:
        if not Path(path).is_dir():
            path = tempfile.mkdtemp()
        return add_static(self, prefix, path, **options)

    web.UrlDispatcher.add_static = tolerant  # type: ignore[method-assign]


class _Nothing(type):
    """A class with every attribute, which can be called, indexed and derived from."""

    def __new__(cls, name: str = "Nothing", *definition: Any, **options: Any) -> Any:
        return type.__new__(cls, name, (), {})

    def __init__(cls, *definition: Any, **options: Any) -> None:
        pass

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return _Nothing()

    def __getitem__(cls, index: Any) -> Any:
        return _Nothing()

    def __or__(cls, other: Any) -> Any:
        return _Nothing()

    __ror__ = __or__


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of packages that are not installed: nothing is in them."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self._packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_Nothing(), name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None:
        pass


def tolerate_missing_packages() -> None:
    """What ComfyUI imports at its start for videos and its list of assets, which no test needs."""
    names = ("av", "pydantic", "sqlalchemy")
    absent = tuple(name for name in names if importlib.util.find_spec(name) is None)
    sys.meta_path.append(_Absent(absent))


_kept: list[object] = []  # a library's definitions go with it


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(root)
    sys.path[0] = str(root)
    sys.argv = [str(root / "main.py"), *sys.argv[2:]]
    if "--cpu" in sys.argv:  # else ComfyUI chooses torch's allocator before anything imports torch
        define_torchvision_ops()
    tolerate_missing_folders()
    tolerate_missing_packages()
    runpy.run_path(sys.argv[0], run_name="__main__")
