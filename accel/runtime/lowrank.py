"""Low-rank changes of many parameters at once, where a GPU and Triton are.

A LoRA of SDXL has some 700 layers: one at a time, a GPU waits for the host between their small
operations. All parameters whose changes are products of factors, and whose places in the arena the
kernel can write, are one launch. What comes out for one depends on its own changes alone.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import kernels
from ..plan.memory import align

logger = logging.getLogger(__name__)


class LowRankPatch(Protocol):
    """A patch whose change may be the elementwise product of products of factors, times a scale."""

    @property
    def products(self) -> Sequence[tuple[Tensor, Tensor]] | None:
        """One or two pairs of left [O, r] and right [r, I * prod(k)], of one floating dtype each
        pair and on any device; None if the change is something else.
        """

    @property
    def scale(self) -> float:
        """What strength 1 multiplies the change by."""


class Place(NamedTuple):
    """Where a parameter lies in the arena, as the kernel's table has it; in elements."""

    offset: int
    rows: int
    columns: int
    stride: int
    taps: int


class Change(NamedTuple):
    """The elementwise product of left @ right of one pair or two, times a scale."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    scale: float

    @property
    def factors(self) -> list[Tensor]:
        """All of them."""
        return [factor for pair in self.pairs for factor in pair]

    @property
    def row(self) -> tuple[int, ...]:
        """As the kernel's table has it."""
        row: tuple[int, ...] = ()
        for left, right in self.pairs:
            row += (left.data_ptr(), right.data_ptr(), right.shape[0], _kinds()[left.dtype])
        return (*row, 0, 0, 0, 0)[:8]

    def with_factors(self, moved: Mapping[int, Tensor]) -> Change:
        """The same with other factors in place of those whose `id` is in `moved`."""
        pairs = [(moved.get(id(a), a), moved.get(id(b), b)) for a, b in self.pairs]
        return Change(pairs, self.scale)


@lru_cache(maxsize=16)
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for weights of that dtype there, that is right where it is tried.

    Compiles it, once a machine.
    """
    if device.type != "cuda" or not kernels.load_triton():
        return False
    try:
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            problem = None if is_right(device, dtype) else "the kernel's results are wrong here"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a GPU or a Triton that it was not made for
        problem = str(error)
    if problem:
        logger.warning("LoRAs are put on parameter by parameter: %s", problem)
    return problem is None


def is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel changes a matrix and an image kernel as float64 does, rounded once."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    arena = random(72 * 136 + 40 * 9 * 72).to(dtype)
    views = [
        arena[: 72 * 136].view(72, 136),
        arena[72 * 136 :].view(40, 3, 3, 72).movedim(-1, 1),
    ]
    changes = [
        [Change([(random(72, 20), random(20, 136))], 0.7)],
        [
            Change([(random(40, 4).to(dtype), random(4, 648).to(dtype))], -0.4),
            Change([(random(40, 5), random(5, 648)), (random(40, 5), random(5, 648))], 0.2),
        ],
    ]
    out = torch.zeros_like(arena)
    places = [place_of(view) for view in views]
    add(arena, out, [(p, own) for p, own in zip(places, changes, strict=True) if p is not None])
    for view, own in zip(views, changes, strict=True):
        want = view.double()
        for change in own:
            factors = [left.double() @ right.double() for left, right in change.pairs]
            want = want + (torch.stack(factors).prod(0) * change.scale).view(view.shape)
        have = out.as_strided(view.shape, view.stride(), view.storage_offset()).double()
        bound = torch.finfo(dtype).eps * want.abs() + 1e-5 * want.abs().max()
        if not bool(((have - want).abs() <= bound).all()):
            return False
    return True


def place_of(view: Tensor) -> Place | None:
    """What the kernel needs to know of a parameter's place; None if it cannot write there.

    view: the place, of the parameter's shape, in the arena as elements of its dtype.
    """
    if view.dim() < 2:
        return None
    taps = prod(map(int, view.shape[2:]))
    if view[0].is_contiguous():
        order = 1
    elif view[0].movedim(0, -1).is_contiguous():
        order = taps
    else:
        return None
    rows, inputs = int(view.shape[0]), int(view.shape[1])
    place = Place(int(view.storage_offset()), rows, inputs * taps, view.stride(0), order)
    aligned = (place.offset, place.columns, place.stride)
    return None if any(number % _kernel().ALIGNED for number in aligned) else place


def change_of(patch: Any, strength: float, device: torch.device) -> Change | None:
    """A patch's change; None if the kernel cannot make it. Its factors may be in RAM as yet."""
    pairs = getattr(patch, "products", None)
    if not pairs or len(pairs) > 2:
        return None
    for left, right in pairs:
        alike = left.dtype == right.dtype and left.dtype in _kinds()
        whole = left.is_contiguous() and right.is_contiguous()
        reached = all(one.device == device or one.device.type == "cpu" for one in (left, right))
        if not (alike and whole and reached):
            return None
    return Change(pairs, patch.scale * strength)


class Regions:
    """Bytes of pinned RAM in which factors lie, of which parts are lent to the device.

    lend: makes a copy there, which has been asked for when it returns.
    """

    def __init__(self, regions: Iterable[Tensor], lend: Callable[[Tensor], Tensor]) -> None:
        self._regions = sorted(regions, key=lambda region: region.data_ptr())
        self._begins = [region.data_ptr() for region in self._regions]
        self.lend = lend

    def hold(self, factor: Tensor) -> bool:
        """Whether a factor lies in one of them."""
        address = factor.data_ptr()
        place = bisect_right(self._begins, address) - 1
        return place >= 0 and address < self._begins[place] + self._regions[place].numel()

    def lent(self, rows: NDArray[np.int64], where: NDArray[np.int64]) -> list[Tensor]:
        """Let what points into a region point to a copy of that part of it; the copies.

        rows: of changes, as the kernel's table has them. where: the place of each.
        """
        if not self._regions:
            return []
        sizes = np.array([kind.itemsize for kind in _kinds()], dtype=np.int64)
        ends = np.zeros_like(rows)
        for pair in (0, 4):
            width = rows[:, pair + 2] * sizes[rows[:, pair + 3]]
            ends[:, pair] = rows[:, pair] + where[:, 1] * width
            ends[:, pair + 1] = rows[:, pair + 1] + where[:, 2] * width
        ends[:, [2, 3, 6, 7]] = 0
        region = np.searchsorted(np.array(self._begins), rows, side="right") - 1
        limits = [begin + r.numel() for begin, r in zip(self._begins, self._regions, strict=True)]
        inside = (region >= 0) & (ends > 0) & (ends <= np.array(limits)[region])
        copies: list[Tensor] = []
        for number in np.unique(region[inside]):
            these, begin = inside & (region == number), self._begins[number]
            first, last = int(rows[these].min()), int(ends[these].max())
            copies.append(self.lend(self._regions[number][first - begin : last - begin]))
            rows[these] += copies[-1].data_ptr() - first
        return copies


def add(
    base: Tensor,
    out: Tensor,
    parameters: Sequence[tuple[Place, Sequence[Change]]],
    pinned: Regions | None = None,
) -> None:
    """out = base + changes at the place of each parameter.

    base, out: arenas as elements of the places' dtype; may be the same. pinned: where factors may
    lie that are not on the device. On a GPU the work has only been asked for, and the factors must
    stay until it is done.
    """
    kernel = _kernel()
    where = np.array([place for place, _ in parameters], dtype=np.int64)
    counts = np.array([len(changes) for _, changes in parameters], dtype=np.int64)
    tiles = -(-where[:, 1] // kernel.ROWS) * -(-where[:, 2] // kernel.COLUMNS)
    begins = [(np.cumsum(numbers) - numbers)[:, None] for numbers in (tiles, counts)]
    places = np.concatenate([where, *begins, counts[:, None]], axis=1)
    all_changes = [change for _, changes in parameters for change in changes]
    rows = np.array([change.row for change in all_changes], dtype=np.int64).reshape(-1, 8)
    scales = np.array([change.scale for change in all_changes], dtype=np.float32)
    copies = [] if pinned is None else pinned.lent(rows, np.repeat(where, counts, axis=0))
    tables = _sent(
        [
            np.repeat(np.arange(len(tiles), dtype=np.int32), tiles),
            *(places, rows if len(rows) else np.zeros((1, 8), np.int64)),
            scales if len(scales) else np.zeros(1, np.float32),
        ],
        out.device,
        None if pinned is None else pinned.lend,
    )
    exact = out.device.type == "cuda" and torch.cuda.get_device_capability(out.device) < (8, 0)
    with torch.cuda.device_of(out):  # Triton launches on the GPU that is current
        kernel.add_products(*tables, base, out, exact).run()
    del copies  # till here


def _sent(
    tables: Sequence[NDArray[Any]], device: torch.device, lend: Callable[[Tensor], Tensor] | None
) -> list[Tensor]:
    """Tables on the device, in one copy. From pinned RAM: the host need not wait for it.

    lend: makes that copy where large ones are under way, which others would have to wait for.
    """
    ends = np.cumsum([align(table.nbytes) for table in tables])
    together = torch.empty(int(ends[-1]), dtype=torch.uint8)
    begins = [0, *map(int, ends[:-1])]
    for begin, table in zip(begins, tables, strict=True):
        together[begin : begin + table.nbytes].numpy()[:] = table.view(np.uint8).reshape(-1)
    if device.type != "cpu":
        try:
            together = together.pin_memory()
        except RuntimeError:  # no more can be pinned: slower, and right
            together = together.to(device)
        else:
            together = together.to(device, non_blocking=True) if lend is None else lend(together)
    return [
        together[begin : begin + table.nbytes]
        .view(torch.from_numpy(table[:0]).dtype)
        .view(table.shape)
        for begin, table in zip(begins, tables, strict=True)
    ]


def _kernel() -> Any:
    from ..kernels import lowrank

    return lowrank


@lru_cache(maxsize=1)
def _kinds() -> dict[torch.dtype, int]:
    return {dtype: number for number, dtype in enumerate(_kernel().KINDS)}
