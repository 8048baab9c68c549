"""How processes of Python are started that work for this one, without its GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def command(code: str, *arguments: str) -> list[str]:
    """The command line that runs `code`. Windows' portable Python ignores PYTHONPATH."""
    flags = ["-s"] if sys.flags.no_user_site else []
    return [sys.executable, *flags, "-c", code, *arguments]


def options(low: bool, **variables: str) -> dict[str, Any]:
    """Arguments of `Popen`: no window, no GPU, one thread. low: at low priority, on Windows.

    variables: of the environment, beside this process's own. A Ctrl+C in the host's console is the
    host's to handle.
    """
    quiet = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    below = getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0) if low else 0
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {
        "env": {**os.environ, **alone, **variables},
        "creationflags": quiet | below,
        "start_new_session": os.name == "posix",
    }
