"""A function in a process of its own: its memory on the card is all its own, and so are its faults.

Importing this imports no torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..errors import SwitchyardError

TICK = 15.0
"""Seconds after which a caller that waits hears of it."""


class ProcessFailed(Exception):
    """The process ended without a result; the message is the last of what it said."""


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float,
    waiting: Callable[[float], None] = lambda elapsed: None,
    tick: float = TICK,
) -> Any:
    """What a function of some module returns in a fresh process.

    timeout: seconds after which the process is ended. waiting: called every `tick` seconds with the
    time so far. Raises the `SwitchyardError` that the function raised, or `ProcessFailed`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # Not a daemon: those may start no processes, as torch.compile does.
    process = context.Process(
        target=_child, args=(theirs, function, arguments), daemon=False, name=function.__name__
    )
    process.start()
    theirs.close()
    started = time.monotonic()
    try:
        while not ours.poll(max(0.0, min(tick, started + timeout - time.monotonic()))):
            elapsed = time.monotonic() - started
            if elapsed >= timeout:
                raise ProcessFailed(f"stopped after {timeout:.0f} s")
            waiting(elapsed)
        answer, value = ours.recv()
    except EOFError:
        process.join()
        raise ProcessFailed(f"it ended with code {process.exitcode} and said nothing") from None
    finally:
        ours.close()
        _end(process)
    if answer == "error":
        raise value
    if answer == "failed":
        raise ProcessFailed(value)
    return value


def _end(process: Any) -> None:
    """Wait for a process that is done; one that does not come to its end is ended."""
    process.join(0 if sys.exc_info()[0] else 30)
    if process.is_alive():
        process.terminate()
        process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # what libraries print must not get into the caller's output
    logging.basicConfig(format="%(message)s")
    # "measuring 143 operators": what takes long.
    logging.getLogger(f"{__package__.rpartition('.')[0]}.tuning").setLevel(logging.INFO)
    try:
        pipe.send(("value", function(*arguments)))
    except SwitchyardError as error:
        pipe.send(("error", error))
    except BaseException:
        pipe.send(("failed", "\n".join(traceback.format_exc().strip().splitlines()[-12:])))
