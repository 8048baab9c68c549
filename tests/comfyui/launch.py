"""Starts ComfyUI's `main.py` in this Python: `launch.py ROOT ARGUMENTS…`.

Ends when its standard input does, so that no server outlives the test that started it.
"""

import os
import runpy
import sys
import tempfile
import threading
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
    define_torchvision_ops()
    tolerate_missing_folders()
    runpy.run_path(sys.argv[0], run_name="__main__")
