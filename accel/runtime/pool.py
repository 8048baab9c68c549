"""One budget for all memory that can be had again: weights that wait on devices and in pinned RAM.

What waits here is a copy of something, found by what it is. Whatever was not used for longest goes
first: when a budget is reached, when other programs leave too little memory, when an allocation
fails. What finds no room is done without: its reader goes to where it came from.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil
import torch

from ..hardware import available_memory
from ..settings import settings

logger = logging.getLogger(__name__)

Which = Callable[[Any], bool]
"""Of a block by what it is."""


def _any(what: object) -> bool:
    return True


PINNED = "pinned"
"""The tier besides those of devices, which go by the device's name. Below both lie the files, which
are read without being mapped, so that what of them is in RAM is the system's to give and take."""

DEVICE_RESERVE = 2 << 30
"""Bytes that the pool leaves free on a device, for activations and for the host's other models."""

RAM_RESERVE = 2 << 30
"""Bytes of RAM that pinning leaves free: pinned pages cannot be swapped out."""


@dataclass
class Block:
    """`data` of `bytes` bytes; None while it is being made.

    expected: 0, or where it was fetched ahead and has not been used yet: by which request.
    """

    bytes: int
    data: Any = None
    expected: int = 0


PATIENCE = 8
"""Requests to fetch ahead, after which what was fetched before them is not expected any more."""

Key = tuple[str, Hashable, Hashable]
"""Tier, owner, and what it is. An owner's blocks can be counted and given up together."""


class Pool:
    """Blocks of all tiers. Threads may share it.

    budgets: bytes per tier: a device's name or kind ("cuda", "cuda:1", "cpu") and "pinned"; a tier
             that is not named is bounded by the memory that is free alone.
    free:    bytes that a tier could still get from the system, its reserve taken off.

    Who gets a block's data keeps it alive by holding it, though the pool may take the block back.
    """

    def __init__(
        self, budgets: Mapping[str, int] | None = None, free: Callable[[str], int] | None = None
    ) -> None:
        self._budgets = dict(budgets or {})
        self._free = free or _free
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Key, Block] = OrderedDict()  # the least recently used first
        self._gone: deque[tuple[Hashable, Which | None]] = deque()  # None: the owner itself
        self._given_up: list[Any] = []
        self._uses: dict[Hashable, frozenset[Hashable]] = {}
        self._requests = 0
        self._counters: Counter[str] = Counter()

    def budget(self, tier: str) -> int | None:
        """The tier's budget in bytes; that of the device's kind, where it has none of its own."""
        return self._budgets.get(tier, self._budgets.get(tier.partition(":")[0]))

    def set_budget(self, tier: str, size: int) -> None:
        """Change a tier's budget; blocks that exceed it go at once."""
        with self._turn():
            self._budgets[tier] = size
            while self._bytes(tier) > size and self._evict(tier):
                pass

    def get(self, tier: str, owner: Hashable, what: Hashable) -> Any:
        """A block's data, which is now the last to go; None where there is none."""
        with self._turn():
            data = self._touched((tier, owner, what))
            self._counters[f"hits_{tier}" if data is not None else f"misses_{tier}"] += 1
            return data

    def holds(self, tier: str, owner: Hashable, what: Hashable) -> bool:
        """Whether there is such a block; asking is no use of it."""
        with self._turn():
            block = self._blocks.get((tier, owner, what))
            return block is not None and block.data is not None

    def expect(self, tier: str, owner: Hashable, what: Hashable) -> bool:
        """As `holds`, of what will be used next: it stays as if it had just been fetched ahead."""
        with self._turn():
            key = (tier, owner, what)
            if self._touched(key) is None:
                return False
            self._requests += 1
            self._blocks[key].expected = self._requests
            return True

    def use(self, owner: Hashable, what: Collection[Hashable]) -> None:
        """Say what an owner works with now, in place of what it said before.

        Nothing that is fetched ahead takes such a block's place, whoever has it in whatever tier.
        """
        with self._turn():
            self._uses[owner] = uses = frozenset(what)
            for key, block in self._blocks.items():
                if key[2] in uses:
                    block.expected = 0

    def put(
        self,
        tier: str,
        owner: Hashable,
        what: Hashable,
        size: int,
        make: Callable[[], Any],
        instead_of: Which = _any,
        ahead: bool = False,
    ) -> Any:
        """Make room for a block of `size` bytes, make its data and keep it; None without room.

        instead_of: which blocks may go for it; none does where all of them would not be enough.
        ahead: nobody asks for it yet; what is in use, or was fetched ahead as well and has not been
        used, then stays.

        One that is there is kept, and is now the last to go. `make` runs without the pool's lock,
        since pinning memory takes seconds. It may raise `torch.OutOfMemoryError`: the tier then
        shrinks by a block, and it is tried again. Whatever else it raises is raised, and nothing
        is kept.
        """
        key = (tier, owner, what)
        block = Block(size)
        if not self._reserve(key, block, instead_of, ahead):
            with self._turn():
                return self._touched(key)
        while True:
            try:
                block.data = make()
            except torch.OutOfMemoryError:
                with self._turn():
                    self._counters["out_of_memory"] += 1
                    if self._evict(tier, instead_of, ahead):
                        continue
                    self._remove(key, block)
                    self._counters["refused"] += 1
                    return None
            except BaseException:
                with self._turn():
                    self._remove(key, block)
                raise
            return block.data

    def _reserve(self, key: Key, block: Block, instead_of: Which, ahead: bool) -> bool:
        """Count a block that is yet to be made, after others have gone as its size needs it."""
        tier = key[0]
        limit = self.budget(tier)
        if ahead:
            with self._turn():
                self._requests += 1
                block.expected = self._requests
        while True:  # between two turns, memory that was given up comes free
            with self._turn():
                if key in self._blocks:  # made, or being made by somebody else
                    return False
                lacking = self._lacking(tier, block.bytes, limit)
                if lacking <= 0:
                    self._blocks[key] = block
                    return True
                possible = lacking <= self._could_go(tier, instead_of, ahead)
                if not possible or not self._evict(tier, instead_of, ahead):
                    self._counters["refused"] += 1
                    return False

    def _lacking(self, tier: str, size: int, limit: int | None) -> int:
        """Bytes that a tier lacks for a block more."""
        # What is being made has not been taken from what is free yet.
        pending = sum(b.bytes for k, b in self._blocks.items() if k[0] == tier and b.data is None)
        lacking = size + pending - self._free(tier)
        if limit is not None:
            lacking = max(lacking, self._bytes(tier) + size - limit)
        return lacking

    def _could_go(self, tier: str, which: Which, ahead: bool) -> int:
        """Bytes of a tier's blocks that may go."""
        return sum(
            block.bytes
            for key, block in self._blocks.items()
            if key[0] == tier and self._may_go(key, block, which, ahead)
        )

    def trim(self, tier: str) -> int:
        """Give back what other programs need: blocks go until the tier's reserve is free again.

        The bytes given up.
        """
        before = self.bytes(tier)
        while True:
            with self._turn():
                if self._free(tier) >= 0 or not self._evict(tier):
                    return max(0, before - self._bytes(tier))

    def shrink(self, tier: str) -> int:
        """Give up all of a tier, since memory has run out there; the bytes given up."""
        with self._turn():
            before = self._bytes(tier)
            while self._evict(tier):
                pass
            return before - self._bytes(tier)

    def drop(self, owner: Hashable, which: Which = _any) -> None:
        """Give up an owner's blocks of which `which`, asked with what they are, is true.

        A finalizer may call this at any moment, even while its own thread is in the pool.
        """
        self._gone.append((owner, which))
        self._settle()

    def forget(self, owner: Hashable) -> None:
        """Give up all blocks of an owner that is gone, and what it uses; finalizers may, too."""
        self._gone.append((owner, None))
        self._settle()

    def bytes(self, tier: str, owner: Hashable = None) -> int:
        """Bytes of a tier's blocks; of an owner's alone where one is given."""
        with self._turn():
            return self._bytes(tier, owner)

    def note(self, event: str) -> None:
        """Count an event for the report."""
        with self._turn():
            self._counters[event] += 1

    def report(self) -> dict[str, Any]:
        """Blocks, bytes and budget of every tier, and what happened, as plain JSON values."""
        with self._turn():
            tiers = sorted({tier for tier, _, _ in self._blocks} | self._budgets.keys())
            return {
                "tiers": {
                    tier: {
                        "blocks": sum(key[0] == tier for key in self._blocks),
                        "bytes": self._bytes(tier),
                        "budget": self.budget(tier),
                    }
                    for tier in tiers
                },
                "events": dict(sorted(self._counters.items())),
            }

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        given_up: list[Any] = []
        try:
            with self._lock:
                self._sweep()
                try:
                    yield
                finally:
                    given_up, self._given_up = self._given_up, []
        finally:
            given_up.clear()  # without the lock, which others wait for: to unpin memory takes long
            self._settle()

    def _settle(self) -> None:
        """Give up what is gone, unless somebody has the lock, who does so once it is free."""
        while self._gone and self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                given_up, self._given_up = self._given_up, []
                self._lock.release()
            given_up.clear()

    def _sweep(self) -> None:
        while self._gone:
            owner, which = self._gone.popleft()
            if which is None:
                self._uses.pop(owner, None)
            chosen = _any if which is None else which
            for key in [key for key in self._blocks if key[1] is owner and chosen(key[2])]:
                self._given_up.append(self._blocks.pop(key).data)

    def _touched(self, key: Key) -> Any:
        block = self._blocks.get(key)
        if block is None or block.data is None:
            return None
        self._blocks.move_to_end(key)
        block.expected = 0
        return block.data

    def _bytes(self, tier: str, owner: Hashable = None) -> int:
        return sum(
            block.bytes
            for key, block in self._blocks.items()
            if key[0] == tier and (owner is None or key[1] is owner)
        )

    def _evict(self, tier: str, which: Which = _any, ahead: bool = False) -> bool:
        """Give up the tier's least recently used block of those that may go; whether one did.

        Its memory comes free at the end of the turn.
        """
        for key, block in self._blocks.items():
            if key[0] == tier and self._may_go(key, block, which, ahead):
                self._given_up.append(self._blocks.pop(key).data)
                self._counters["evictions"] += 1
                return True
        return False

    def _may_go(self, key: Key, block: Block, which: Which, ahead: bool) -> bool:
        if block.data is None or not which(key[2]):
            return False
        if not ahead:
            return True
        expected = block.expected and self._requests - block.expected < PATIENCE
        return not expected and not any(key[2] in uses for uses in self._uses.values())

    def _remove(self, key: Key, block: Block) -> None:
        if self._blocks.get(key) is block:  # its owner may be gone meanwhile
            del self._blocks[key]


def _free(tier: str) -> int:
    """Bytes that a new block could get without taking them from others."""
    if tier == PINNED:
        return int(psutil.virtual_memory().available) - RAM_RESERVE
    return available_memory(tier) - DEVICE_RESERVE


@lru_cache(maxsize=1)
def process_pool() -> Pool:
    """The pool of the process, with the budgets of the settings."""
    found = settings()
    ram = int(psutil.virtual_memory().total)
    budgets = {PINNED: ram // 4 if found.pool_ram_bytes is None else found.pool_ram_bytes}
    if found.pool_device_bytes is not None:
        budgets |= {"cuda": found.pool_device_bytes, "cpu": found.pool_device_bytes}
    return Pool(budgets)
