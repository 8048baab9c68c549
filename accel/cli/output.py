"""What the commands share: tables, JSON, progress bars, and numbers as people read them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 1000  # in a pipe or file nothing is wrapped or cut: the next program wants it whole

Report = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and what is being done."""


def stdout() -> Console:
    """The console for results; made anew so that it follows a redirected `sys.stdout`."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for progress and remarks, which `--json` must not mix into its output."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    # A character that the terminal lacks must not end the program.
    with contextlib.suppress(AttributeError, ValueError):
        stream.reconfigure(errors="replace")
    width = None if stream.isatty() else PIPE_COLUMNS
    return Console(file=stream, width=width, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Text]], right: Sequence[str] = ()
) -> None:
    """A table on stdout. `right` names the columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        # Text, since file names may hold what rich would take for markup.
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    stdout().print(table)


@contextlib.contextmanager
def progress(title: str, time_left: bool = False) -> Iterator[Report]:
    """A bar on stderr while the block runs; where stderr is no terminal, nothing is shown.

    time_left: say how long it will still take, for what takes minutes at an even pace.
    """
    console = stderr()
    left = (TextColumn("left:"), TimeRemainingColumn()) if time_left else ()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[title]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        *left,
        TextColumn("{task.description}", style="dim"),
        console=console,
        speed_estimate_period=300,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=1.0, title=title)

        def report(fraction: float, text: str) -> None:
            bar.update(task, completed=fraction, description=text)

        yield report


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1: "6.46 GiB"."""
    if count < 1024:
        return f"{count} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(len(units), (count.bit_length() - 1) // 10)
    value = count / 1024**power
    return f"{value:.3g} {units[power - 1]}" if value < 1000 else f"{value:.0f} {units[power - 1]}"


def when(seconds: float) -> str:
    """A time since 1970 as local date and minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def mark(good: bool) -> Text:
    """✓ or ✗, in words where the terminal's encoding lacks them."""
    signs = "✓✗"
    try:
        signs.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return Text("ok" if good else "FAILED")
    return Text(signs[0] if good else signs[1], style="green" if good else "red")
