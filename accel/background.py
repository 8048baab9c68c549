"""Threads that work beside the host, and come to their end before Python does.

One that is still inside PyTorch when the interpreter goes is torn out of it, which aborts the whole
process. So they are asked to stop, and waited for.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

closing = threading.Event()
"""Set when the process is about to end: work in the background stops where it may."""

PATIENCE = 10.0
"""Seconds that all of them together are given."""

_stops: weakref.WeakKeyDictionary[threading.Thread, Callable[[], object]] = (
    weakref.WeakKeyDictionary()
)


def start(
    name: str,
    work: Callable[..., object],
    *arguments: Any,
    stop: Callable[[], object] = closing.set,
) -> threading.Thread:
    """Do `work` in a thread that the end of the process may cut short.

    name: what the thread does; shown by debuggers. stop: wakes it where it waits for something else
    than `closing`.
    """
    thread = threading.Thread(target=work, args=arguments, name=f"switchyard-{name}", daemon=True)
    _stops[thread] = stop
    thread.start()
    return thread


def _finish() -> None:
    closing.set()
    under_way = list(_stops.items())
    for _, stop in under_way:
        stop()
    until = time.monotonic() + PATIENCE
    for thread, _ in under_way:
        thread.join(max(0.0, until - time.monotonic()))


atexit.register(_finish)
# Executors wait for their threads before that. What Python has for them takes what came last first,
# so that of `concurrent.futures` has to be there already; without it they come to their end later.
_before_executors: Callable[[Callable[[], object]], object]
_before_executors = getattr(threading, "_register_atexit", lambda _: None)
_before_executors(closing.set)
