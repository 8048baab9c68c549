"""The commands. Importing this imports no torch, so that `--help` is instant.

Each command is one module with `add(commands)`, which declares its arguments, and a function that
does the work and returns the exit code: 0 done, 1 something is broken (`doctor`), 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import SwitchyardError
from ..settings import settings
from . import audition, bench, build, cache, demo, doctor, inspect, predict, tune

COMMANDS = (demo, audition, inspect, predict, build, bench, tune, cache, doctor)
INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    top = _Parser(
        prog="python -m accel",
        description="Switchyard: one compiled engine for every checkpoint.",
        epilog="Every command has its own --help. Settings: SWITCHYARD_CACHE_DIR (folder), "
        "SWITCHYARD_CACHE_GIB (size limit), SWITCHYARD_LOG (debug, info, warning or error), "
        "SWITCHYARD_TUNE and SWITCHYARD_IDLE (on or off), SWITCHYARD_POOL_GIB and "
        "SWITCHYARD_POOL_RAM_GIB (memory for weights that wait, on each device and in RAM).",
    )
    top.add_argument("--version", action="version", version=f"Switchyard {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Bad input is one line on stderr and 2."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger(__package__.rpartition(".")[0]).setLevel(settings().log_level.upper())
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SwitchyardError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Python would complain once more at its own exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = error.strerror or str(error)
        return _fail(f"{error.filename}: {what}" if error.filename else what)


def _fail(message: str) -> int:
    print(f"accel: {message}", file=sys.stderr)
    return 2
