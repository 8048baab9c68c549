"""Whether a model's parameters are still its file's, bit for bit.

Hosts and packs may write into parameters in place, and PyTorch counts no writes in inference mode
or through `.data`. So bytes are compared. Of parameters that are the mapped file itself only those
pages need it that were written to, which have become the process's own: Linux tells which those
are, in some 10 ms for SDXL. What was copied or cast is compared whole, which takes as long as
reading it does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from mmap import PAGESIZE
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from ...errors import InvalidFile
from ...tensorfile import TensorFile

THREADS = min(8, os.cpu_count() or 1)
BLOCK_BYTES = 1 << 20
"""That are compared at once, and so stay in a core's cache meanwhile."""

WINDOW_BYTES = 256 << 20
"""Of memory whose pages a thread asks for at once."""

# Of a page in /proc/self/pagemap: it is in memory or swapped out; it is a file's, or shared.
_IN_USE, _OF_FILE = np.uint64(3 << 62), np.uint64(1 << 61)


class Part(NamedTuple):
    """Bytes of a tensor that have to be compared, from `begin` to `end` of those in the file."""

    name: str
    tensor: Tensor
    begin: int
    end: int


def parts_to_compare(file: TensorFile, values: Mapping[str, Tensor]) -> list[Part]:
    """What of tensors may differ from the file's.

    values: by the name in the file, in RAM and in one piece, with as many numbers as there.
    """
    mapped: list[tuple[int, str]] = []
    parts = []
    spans = _spans(file.real)
    for name, tensor in values.items():
        info, address = file.tensors[name], tensor.data_ptr()
        at = file.offset(name)
        if info.dtype == tensor.dtype and any(
            start <= address and address + info.bytes <= end and address - start == at - offset
            for start, end, offset in spans
        ):
            mapped.append((address, name))
        else:
            parts.append(Part(name, tensor, 0, info.bytes))
    for address, name, written in _written(
        sorted(mapped), {name: file.tensors[name].bytes for name in values}
    ):
        size = file.tensors[name].bytes
        for first, last in written:
            begin, end = first * PAGESIZE - address, last * PAGESIZE - address
            parts.append(Part(name, values[name], max(0, begin), min(size, end)))
    return parts


def equal(file: TensorFile, parts: Iterable[Part]) -> bool:
    """Whether the bytes are the file's, cast as the tensor was."""
    pieces = list(_in_blocks(parts))
    try:
        return all(_threads().map(lambda part: _equal(file, part), pieces))
    except (OSError, InvalidFile):
        return False


def digest(file: TensorFile, parts: Iterable[Part]) -> str:
    """What the tensors' own bytes there are known by; of those that were cast, all of them."""
    found = xxhash.xxh3_128()
    for part in parts:
        raw = _raw(part.tensor)
        if file.tensors[part.name].dtype == part.tensor.dtype:
            raw = raw[part.begin : part.end]
        found.update(f"{part.name} {part.begin} {part.end}".encode())
        found.update(memoryview(raw.numpy()))  # type: ignore[arg-type]
    return found.hexdigest()


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _in_blocks(parts: Iterable[Part], size: int = 32 * BLOCK_BYTES) -> Iterator[Part]:
    """The same in pieces, so that large ones keep all threads busy."""
    for part in parts:
        for begin in range(part.begin, part.end, size):
            yield part._replace(begin=begin, end=min(begin + size, part.end))


def _equal(file: TensorFile, part: Part) -> bool:
    kind, own = file.tensors[part.name].dtype, part.tensor.dtype
    with torch.inference_mode(False), torch.no_grad():
        raw = _raw(part.tensor)
        for begin, block in file.blocks(part.name, part.begin, part.end, BLOCK_BYTES):
            first, count = begin, block.numel()
            if kind != own:
                block = block.view(kind).to(own).view(torch.uint8)
                first = begin // kind.itemsize * own.itemsize
                count = block.numel()
            if not torch.equal(block, raw[first : first + count]):
                return False
    return True


def _spans(path: Path) -> list[tuple[int, int, int]]:
    """Where this process has a file mapped: first and last address, and offset in the file."""
    found: list[tuple[int, int, int]] = []
    if sys.platform != "linux":
        return found
    name = str(path)
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        if line.endswith(name):  # one that was replaced ends in "(deleted)"
            addresses, _, offset, _, _, whose = line.split(maxsplit=5)
            if whose == name:
                start, end = (int(address, 16) for address in addresses.split("-"))
                found.append((start, end, int(offset, 16)))
    return found


def _written(
    mapped: list[tuple[int, str]], sizes: Mapping[str, int]
) -> Iterator[tuple[int, str, list[tuple[int, int]]]]:
    """Of tensors in mapped files, in order of address: runs of pages that are not the file's."""
    windows: list[list[tuple[int, str]]] = []
    end = 0
    for address, name in mapped:
        if not windows or address - end > PAGESIZE or address - windows[-1][0][0] > WINDOW_BYTES:
            windows.append([])
        windows[-1].append((address, name))
        end = address + sizes[name]

    def pages(window: list[tuple[int, str]]) -> tuple[int, np.ndarray]:
        last, name = window[-1]
        return _own_pages(window[0][0], last + sizes[name])

    for window, (first, own) in zip(windows, _threads().map(pages, windows), strict=True):
        if not own.any():
            continue
        for address, name in window:
            begin = address // PAGESIZE
            until = (address + sizes[name] - 1) // PAGESIZE + 1
            runs = _runs(own[begin - first : until - first], begin)
            if runs:
                yield address, name, runs


def _own_pages(start: int, end: int) -> tuple[int, np.ndarray]:
    """The number of the first page of a range, and which pages are the process's own."""
    first, last = start // PAGESIZE, (end - 1) // PAGESIZE + 1
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            raw = os.pread(table.fileno(), (last - first) * 8, first * 8)
    except OSError:
        raw = b""
    if len(raw) != (last - first) * 8:  # it cannot be known
        return first, np.ones(last - first, dtype=bool)
    pages = np.frombuffer(raw, dtype=np.uint64)
    return first, ((pages & _IN_USE) != 0) & ((pages & _OF_FILE) == 0)


def _runs(own: np.ndarray, begin: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(own.astype(np.int8), prepend=0, append=0)) + begin
    return [(int(a), int(b)) for a, b in list(pairwise(edges.tolist()))[::2]]


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "switchyard-compare")
