"""Room on Python's stack for calls that are made thousands of times a step.

Since 3.11 CPython keeps the frames of Python functions in chunks of 16 KiB, takes another chunk
from the system when one is full, and gives it back when the call that began it returns. A function
that happens to begin a chunk pays for both at every call, 10 to 20 µs where a call takes 0.1; and
whether one of a network's innermost functions does is an accident of how deep its caller is. A few
more frames on the way to a network can make all of it a third slower, or faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SLOTS = 1 << 14
"""Of 8 bytes. CPython rounds the chunk up to 256 KiB, of which about half is left for callees: some
400 frames. Pages that nobody touches cost nothing."""


def with_room(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args, **kwargs)`, whose frames, and those of its callees, share one chunk."""
    return function(*args, **kwargs)


# A frame that says that it needs so much begins a chunk of that size, and keeps it.
with_room.__code__ = with_room.__code__.replace(co_stacksize=SLOTS)
