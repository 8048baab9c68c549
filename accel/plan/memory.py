"""Liveness planning: offsets in one arena for tensors that live over an interval of steps.

The arena is a row of blocks. Blocks that exist keep their addresses, because captured graphs hold
them; what does not fit goes into one new block at the end. So a larger image size never moves a
smaller one.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes. Vector loads need 16, TMA descriptors 128; one cache-line pair keeps neighbours apart."""


@dataclass(frozen=True)
class Interval:
    """A tensor of `bytes`, written at step `first` and last read at step `last` (inclusive)."""

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: `offset` bytes into block `block`."""

    block: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Slots by name; `new_block` is the size of the block to add, 0 if the present ones suffice."""

    slots: dict[str, Slot]
    new_block: int


def align(size: int) -> int:
    """`size` in bytes, rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_memory(intervals: Sequence[Interval], blocks: Sequence[int] = ()) -> Layout:
    """Place every interval so that no two that live at once overlap.

    Greedy by size, largest first, of equals the earliest or the longest-lived, whichever needs
    less: within 5 % of the peak of live bytes on UNets. `blocks`: sizes in bytes of the blocks that
    exist.
    """
    earliest = sorted(intervals, key=lambda i: (-i.bytes, i.first, i.name))
    longest = sorted(intervals, key=lambda i: (-i.bytes, i.first - i.last, i.first, i.name))
    layouts = [_placed(order, blocks) for order in (earliest, longest)]
    return min(layouts, key=lambda layout: layout.new_block)


def _placed(order: Sequence[Interval], blocks: Sequence[int]) -> Layout:
    """Each at the best-fitting hole among its contemporaries that are placed before it."""
    placed: list[list[tuple[int, int, Interval]]] = [[] for _ in range(len(blocks) + 1)]
    slots: dict[str, Slot] = {}
    end_of_new = 0
    for interval in order:
        size = align(max(interval.bytes, 1))
        best: tuple[int, int, int] | None = None  # (waste, block, offset)
        for block, rows in enumerate(placed):
            capacity = blocks[block] if block < len(blocks) else None
            hole = _best_hole(rows, interval, size, capacity)
            if hole is None:
                continue
            waste, offset = hole
            if capacity is None and best is not None:
                break  # a hole in a block that exists beats growing the new one
            if best is None or waste < best[0]:
                best = (waste, block, offset)
        assert best is not None, "the new block has no limit"
        _, block, offset = best
        slots[interval.name] = Slot(block, offset)
        insort(placed[block], (offset, offset + size, interval), key=lambda row: row[0])
        if block == len(blocks):
            end_of_new = max(end_of_new, offset + size)
    return Layout(slots, end_of_new)


def _best_hole(
    rows: Sequence[tuple[int, int, Interval]], interval: Interval, size: int, capacity: int | None
) -> tuple[int, int] | None:
    """(waste, offset) of the tightest hole of `size` bytes left by contemporaries of `interval`."""
    best: tuple[int, int] | None = None
    end = 0
    for start, stop, other in rows:
        if other.last < interval.first or interval.last < other.first:
            continue
        gap = start - end
        if gap >= size and (best is None or gap - size < best[0]):
            best = (gap - size, end)
        end = max(end, stop)
    if best is not None:
        return best
    if capacity is None or capacity - end >= size:
        return (capacity - end - size if capacity is not None else 0, end)
    return None


def peak_live_bytes(intervals: Sequence[Interval]) -> int:
    """The lower bound of any plan: the most bytes alive at one step."""
    events: dict[int, int] = {}
    for interval in intervals:
        size = align(max(interval.bytes, 1))
        events[interval.first] = events.get(interval.first, 0) + size
        events[interval.last + 1] = events.get(interval.last + 1, 0) - size
    peak = live = 0
    for step in sorted(events):
        live += events[step]
        peak = max(peak, live)
    return peak
