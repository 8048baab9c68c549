"""The end of a process that works in the background."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BUSY = """
import sys, threading, torch
from accel import background
begun = threading.Event()
def work():
    while not background.closing.is_set():
        torch.empty((8, 8), device="meta") @ torch.empty((8, 8), device="meta")
        begun.set()
    print("ended", flush=True)
background.start("test", work)
begun.wait()
"""

WAITING = """
import threading
from accel import background
stopped = threading.Event()
def work():
    stopped.wait()
    print("ended", flush=True)
background.start("test", work, stop=stopped.set)
"""

READING = """
import threading
from accel.hosts.comfyui import catalog
begun = threading.Event()
def bring(path, stop, keep):
    begun.set()
    stop.wait()
    print("ended", flush=True)
catalog.has_room_for = lambda size: True
catalog.Reader(bring).begin(lambda: [catalog.__file__])
begun.wait()
"""

EXECUTOR = """
from concurrent.futures import ThreadPoolExecutor
from accel import background
def work():
    background.closing.wait()
    print("ended", flush=True)
ThreadPoolExecutor(1).submit(work)
"""

CODES = {"busy": BUSY, "waiting": WAITING, "reading": READING, "executor": EXECUTOR}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_threads_end_before_python_does(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ended"), done.stderr


def test_the_end_does_not_wait_for_ever() -> None:
    code = (
        "import time; from accel import background; background.PATIENCE = 0.2; "
        "background.start('test', time.sleep, 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
