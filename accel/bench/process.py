"""A function in a process of its own: its memory on the card is all its own, and so are its faults.

Importing this imports no torch.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from ..errors import SwitchyardError

TICK = 15.0
"""Seconds after which a caller that waits hears of it."""


class ProcessFailed(Exception):
    """The process ended without a result; the message is the last of what it said."""


class Fresh:
    """A process that has imported `modules`, touched no GPU, and waits for what it shall run.

    Started ahead of its use, since importing takes seconds. It runs one function, and ends by
    itself if this process does.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may start no processes, as torch.compile does.
        self._process = context.Process(target=_child, args=(theirs, tuple(modules)), daemon=False)
        self._process.start()
        theirs.close()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float,
        waiting: Callable[[float], None] = lambda elapsed: None,
        tick: float = TICK,
    ) -> Any:
        """What a function of some module returns there, as `run_isolated` has it."""
        started = time.monotonic()
        try:
            self._pipe.send((function, arguments))
            while not self._pipe.poll(max(0.0, min(tick, started + timeout - time.monotonic()))):
                elapsed = time.monotonic() - started
                if elapsed >= timeout:
                    raise ProcessFailed(f"stopped after {timeout:.0f} s")
                waiting(elapsed)
            answer, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise ProcessFailed(f"it ended with code {code} and said nothing") from None
        finally:
            self.close()
        if answer == "error":
            raise value
        if answer == "failed":
            raise ProcessFailed(value)
        return value

    def close(self) -> None:
        """End it; one that waits still ends at once."""
        self._pipe.close()
        _end(self._process)


@contextmanager
def fresh_processes(count: int, modules: Sequence[str]) -> Iterator[Iterator[Fresh]]:
    """Processes that import at the same time, to be taken one after the other."""
    started: list[Fresh] = []
    try:
        for _ in range(count):
            started.append(Fresh(modules))
        yield iter(started)
    finally:
        for process in started:
            process.close()


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float,
    waiting: Callable[[float], None] = lambda elapsed: None,
    tick: float = TICK,
    process: Fresh | None = None,
) -> Any:
    """What a function of some module returns in a fresh process.

    timeout: seconds after which the process is ended. waiting: called every `tick` seconds with the
    time so far. process: one started before. Raises the `SwitchyardError` that the function raised,
    or `ProcessFailed`.
    """
    process = process or Fresh()
    return process.run(function, *arguments, timeout=timeout, waiting=waiting, tick=tick)


def _end(process: Any) -> None:
    """Wait for a process that is done; one that does not come to its end is ended."""
    process.join(0 if sys.exc_info()[0] else 30)
    if process.is_alive():
        process.terminate()
        process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _child(pipe: Connection, modules: tuple[str, ...]) -> None:
    os.dup2(2, 1)  # what libraries print must not get into the caller's output
    for module in modules:
        with suppress(Exception):  # whatever needs it says so better
            importlib.import_module(module)
    try:
        function, arguments = pipe.recv()
    except EOFError:
        return  # it was closed, and has nothing to run
    logging.basicConfig(format="%(message)s")
    # "measuring 143 operators": what takes long.
    logging.getLogger(f"{__package__.rpartition('.')[0]}.tuning").setLevel(logging.INFO)
    try:
        pipe.send(("value", function(*arguments)))
    except SwitchyardError as error:
        pipe.send(("error", error))
    except BaseException:
        pipe.send(("failed", "\n".join(traceback.format_exc().strip().splitlines()[-12:])))
