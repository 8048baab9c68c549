"""Timing, while nothing runs, what was chosen without having been timed.

A call that the performance model chose a kernel for is one that this user really runs. When the
engines have been idle for a while, the few candidates are timed that may well be quicker, call by
call, as long as there are such, and the times remembered. They count in the next process: in this
one equal runs give equal bits.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractContextManager
from functools import partial

from .. import background
from .select import Selector

logger = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""How long nothing must have run."""

_used = time.monotonic()
"""When an engine of this process ran last: several sessions may share a device."""


def _unused_since(when: float) -> bool:
    return _used == when


class IdleTuner:
    """Times the guesses of a selector while no session uses a device. Thread-safe.

    lock: held while something is timed, and by whoever runs an engine of the session. Those of
    others may begin meanwhile: what was timed then is thrown away, and timed again.
    """

    def __init__(
        self,
        selector: Selector,
        lock: AbstractContextManager[object],
        after: float = IDLE_SECONDS,
    ) -> None:
        self._selector, self._lock, self._after = selector, lock, after
        self._stopped = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def used(self) -> None:
        """An engine was run just now."""
        global _used
        _used = time.monotonic()
        with self._starting:
            if self._thread is None and self._selector.guessed():
                self._thread = background.start("idle", self._work, stop=self._stopped.set)

    def stop(self) -> None:
        """Time nothing more: the session is gone."""
        self._stopped.set()

    def _work(self) -> None:
        try:
            while (calls := self._selector.guessed()) and not self._stopped.is_set():
                used = _used
                left = used + self._after - time.monotonic()
                if left > 0:
                    self._stopped.wait(left)
                    continue
                call = calls[0]
                self._selector.compile_likely(call)  # which takes long, and no GPU
                with self._lock:
                    if _unused_since(used):
                        self._selector.time_likely(call, partial(_unused_since, used))
        except Exception as error:  # out of memory, or a GPU that is of no more use
            logger.info("nothing is timed in idle time any more: %s", error)
        finally:
            with self._starting:
                self._thread = None
