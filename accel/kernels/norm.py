"""GroupNorm of channels-last images and LayerNorm, with what surrounds them in one pass.

A norm only moves bytes, so everything here is about keeping every multiprocessor loading: sixteen
bytes a thread and access, full lines of 128 bytes, and enough blocks for the smallest image.

GroupNorm comes in two schemes. `split`: a first launch leaves mean and squared deviation of blocks
of [pixels x channels] in the workspace, a second merges them and normalises. `whole`: one block
holds whole groups of one image in its registers, for images of which these are small. Within a
block, squares are of distances from one of its pixels, and blocks merge by the distances of their
means: so a mean far from zero keeps its digits.

Groups of 10, 20 or 30 channels fit no power of two. So statistics are made per channel first, and
channels are summed to groups by comparing indices; a group that lies in several blocks' channels
has a share of its own in each.

The image may be made on the way, of one part or two side by side, each with or without a residual:
what reads it for the statistics then reads the parts, and stores their sums. That is one pass
less; a block of channels must lie in one part.

From Hopper on the launches may overlap (programmatic dependent launch, `pdl`): a launch starts
while the one before still runs and waits where it needs the other's results. That hides the launch
itself, and the second launch of `split` reads its part of the image while the statistics are made,
unless they come with the image.

Widths and strides come in units of VEC elements, so that the compiler knows that addresses are
multiples of it without compiling each width anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import gcd, prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..hardware import Hardware
from . import overlap
from .launch import Launch, cdiv, interpreted, next_power_of_2
from .registry import Call, Config, TensorSpec, compiled_kernel

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_VECTOR = 8
"""Elements that are loaded together where width and strides allow: 16 bytes of half precision."""

_WHOLE = 16384
"""Elements that one block holds in registers: 32 for each of 512 threads."""

_PARTS = 64
"""Blocks of pixels that the statistics of an image are made of, at most."""

_PARTIALS = 8192
"""Partial statistics that one block merges at most."""

_GRID_Y = 65535
"""Blocks that CUDA launches at most in a grid's second dimension."""


# What the kernels share.


@triton.jit
def _silu(y, FAST: tl.constexpr):
    """y * sigmoid(y) in float32; FAST: without care for subnormal intermediates (2 ulp)."""
    if FAST:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [y * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        s = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [1.0 + e],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        s = 1.0 / (1.0 + tl.exp(-y))
    return y * s


@triton.jit
def _addend(shift, offset, image, shift_stride, channel, inside, VEC: tl.constexpr):
    """What is added to each channel [CHANNELS] of an image before its statistics, in float32."""
    added = tl.zeros_like(channel).to(tl.float32)
    # These and other reads ahead of a wait pass by L1, which may hold what was there before.
    if offset is not None:
        added += tl.load(offset + channel, inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    if shift is not None:
        place = image * (shift_stride * VEC) + channel
        added += tl.load(shift + place, inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    return added


@triton.jit
def _finish(value, centre, scale, base, target, mask, SILU: tl.constexpr, FAST: tl.constexpr):
    """Store (value - centre) * scale + base of a tile [rows, channels], then SiLU."""
    y = value.to(tl.float32)
    if value.dtype == tl.float32:
        y = (y - centre[None, :]) * scale[None, :] + base[None, :]
    else:  # of a mean that drowns the rest these inputs have lost far more digits than this
        y = y * scale[None, :] + (base - centre * scale)[None, :]
    if SILU:
        y = _silu(y, FAST)
    tl.store(target, y.to(target.dtype.element_ty), mask)


@triton.jit
def _side(x, y, x_stride, y_stride, pixel, split, second, ADDED: tl.constexpr):
    """Where a block of channels of one pixel is read: in x, or of two parts in the `second`, y.

    As pointer to channel 0 of both together, and elements from one pixel to the next.
    """
    if len(ADDED) == 1:
        return x + pixel * x_stride, x_stride
    else:
        stride = tl.where(second, y_stride, x_stride)
        return tl.where(second, y - split, x) + pixel * stride, stride


@triton.jit
def _has_residual(inside, channel, split, ADDED: tl.constexpr):
    """Of the channels that are `inside` those to which a residual is added."""
    if len(ADDED) == 1 or (ADDED[0] and ADDED[len(ADDED) - 1]):
        return inside
    elif ADDED[0]:
        return inside & (channel < split)
    else:
        return inside & (channel >= split)


@triton.jit
def _load_sum(x, residual, place, residual_place, mask, added, ADDED: tl.constexpr):
    """Values of x, where `added` with those of the residual: rounded, as the concatenation is."""
    value = tl.load(x + place, mask, other=0.0)
    if ADDED[0] or ADDED[len(ADDED) - 1]:
        more = tl.load(residual + residual_place, mask & added, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _start(PDL: tl.constexpr):
    """Wait for the launch before this one, and let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _overlap(left, width, other, other_width):
    """How many whole numbers two ranges have in common, each given by its start and width."""
    return tl.minimum(left + width, other + other_width) - tl.maximum(left, other)


# GroupNorm in two launches.


@triton.jit
def _load_rows(
    source,
    residual,
    total,
    start,
    limit,
    stride,
    residual_stride,
    total_stride,
    channel,
    inside,
    added,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """DEPTH tiles of ROWS pixels each from `start` on, up to `limit`, all in flight together.

    Then they are stored to `total`, if that is given.
    """
    values = ()
    for index in tl.static_range(DEPTH):
        row = start + index * ROWS + tl.arange(0, ROWS)[:, None]
        place = row * stride + channel[None, :]
        residual_place = row * residual_stride + channel[None, :]
        mask = (row < limit) & inside[None, :]
        value = _load_sum(source, residual, place, residual_place, mask, added[None, :], ADDED)
        values = values + (value,)  # type: ignore[assignment]
    if total is not None:
        for index in tl.static_range(DEPTH):
            row = start + index * ROWS + tl.arange(0, ROWS)[:, None]
            mask = (row < limit) & inside[None, :]
            tl.store(total + row * total_stride + channel[None, :], values[index], mask)
    return values


@triton.jit
def _add_rows(
    sums,
    squares,
    values,
    pivot,
    start,
    limit,
    inside,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add the tiles' distances from `pivot` and their squares to sums and squares."""
    for index in tl.static_range(DEPTH):
        row = start + index * ROWS + tl.arange(0, ROWS)[:, None]
        value = values[index].to(tl.float32) - pivot[None, :]
        value = tl.where((row < limit) & inside[None, :], value, 0.0)
        sums += value
        squares += value * value
    return sums, squares


@triton.jit(
    do_not_specialize=[
        "pixels",
        "x_stride",
        "y_stride",
        "residual_stride",
        "y_residual_stride",
        "split",
        "shift_stride",
        "width",
        "groups",
        "span",
        "shares",
        "blocks",
    ]
)
def _group_statistics(
    x,
    y,
    residual,
    y_residual,
    total,
    shift,
    offset,
    partials,
    pixels,
    x_stride,
    y_stride,
    residual_stride,
    y_residual_stride,
    split,
    shift_stride,
    width,
    groups,
    span,
    shares,
    blocks,
    ADDED: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mean and sum of squared deviations of `span` pixels x CHANNELS channels, group by group.

    The channels are those of x, or of x and y side by side, y from channel `split` on, and what is
    added to them before all else, in the image's dtype: ADDED says for each whether it has a
    residual. `total`, if given, receives the image so made.

    Grid: (blocks of channels, of pixels, images). partials: float32
    [2, images, groups, shares, blocks of pixels]; share j of a group is what the j-th block of
    channels that it reaches into has of it.
    """
    _start(PDL)
    block_c = tl.program_id(0)
    block_p = tl.program_id(1)
    image = tl.program_id(2)
    channel = block_c * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width * VEC
    first = block_p * span
    limit = min(span, pixels - first)
    pixel = image.to(tl.int64) * pixels + first
    second = block_c * CHANNELS >= split * VEC
    source, stride = _side(x, y, x_stride * VEC, y_stride * VEC, pixel, split * VEC, second, ADDED)
    other, other_stride = _side(
        residual,
        y_residual,
        residual_stride * VEC,
        y_residual_stride * VEC,
        pixel,
        split * VEC,
        second,
        ADDED,
    )
    has = _has_residual(inside, channel, split * VEC, ADDED)
    target_stride = width * VEC
    if total is not None:
        total += pixel * target_stride
    values = _load_rows(
        source,
        other,
        total,
        0,
        limit,
        stride,
        other_stride,
        target_stride,
        channel,
        inside,
        has,
        ADDED,
        ROWS,
        DEPTH,
    )
    pivot = _load_sum(source, other, channel, channel, inside, has, ADDED).to(tl.float32)
    added = _addend(shift, offset, image, shift_stride, channel, inside, VEC)

    # Sums of distances from the block's first pixel. Whatever that pixel is, its own square is in
    # the sum, which so keeps its digits.
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    sums, squares = _add_rows(sums, squares, values, pivot, 0, limit, inside, ROWS, DEPTH)
    for start in range(DEPTH * ROWS, limit, DEPTH * ROWS):
        values = _load_rows(
            source,
            other,
            total,
            start,
            limit,
            stride,
            other_stride,
            target_stride,
            channel,
            inside,
            has,
            ADDED,
            ROWS,
            DEPTH,
        )
        sums, squares = _add_rows(sums, squares, values, pivot, start, limit, inside, ROWS, DEPTH)

    # Rows to channels. An addend that is the same for all pixels only moves the mean.
    height = limit.to(tl.float32)
    further = tl.sum(sums, axis=0)
    channel_squares = tl.sum(squares, axis=0)
    channel_squares -= further * further * (1.0 / height)
    channel_mean = pivot + further * (1.0 / height) + added

    # Channels to groups.
    group = (block_c * CHANNELS) // GROUP + tl.arange(0, SLOTS)
    member = (channel // GROUP)[None, :] == group[:, None]
    members = _overlap(group * GROUP, GROUP, block_c * CHANNELS, CHANNELS)
    members = tl.where(group < groups, members, 0)
    group_mean = tl.sum(tl.where(member, channel_mean[None, :], 0.0), axis=1)
    group_mean = group_mean / tl.maximum(members, 1).to(tl.float32)
    further = channel_mean[None, :] - group_mean[:, None]
    group_squares = channel_squares[None, :] + further * further * height
    group_squares = tl.sum(tl.where(member, group_squares, 0.0), axis=1)

    share = block_c - (group * GROUP) // CHANNELS
    place = ((image * groups + group) * shares + share) * (blocks * 4) + block_p
    plane = tl.num_programs(2) * groups * shares * (blocks * 4)
    tl.store(partials + place, group_mean, members > 0)
    tl.store(partials + plane + place, group_squares, members > 0)


@triton.jit(
    do_not_specialize=[
        "pixels",
        "x_stride",
        "shift_stride",
        "width",
        "groups",
        "span",
        "shares",
        "blocks",
        "tiles",
        "eps",
    ]
)
def _group_apply(
    x,
    shift,
    offset,
    weight,
    bias,
    partials,
    out,
    pixels,
    x_stride,
    shift_stride,
    width,
    groups,
    span,
    shares,
    blocks,
    tiles,
    eps,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    LOOP: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    FRESH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the partials of the groups in CHANNELS channels, then normalise `tiles` x ROWS pixels.

    Grid: (blocks of channels, of pixels, images). SHARES and BLOCKS: powers of two that hold
    `shares` and `blocks`. LOOP: whether `tiles` is more than 1. FRESH: whether x too was made by
    the launch before.
    """
    block_c = tl.program_id(0)
    # From the image's end, which the statistics read last, so that it is in the cache.
    block_p = tl.num_programs(1) - 1 - tl.program_id(1)
    image = tl.program_id(2)
    channel = block_c * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width * VEC

    # The launch before made the statistics, the image too if it is FRESH: all else may be read
    # before it is done.
    first = block_p * tiles * ROWS
    limit = min(tiles * ROWS, pixels - first)
    start = image.to(tl.int64) * pixels + first
    row = tl.arange(0, ROWS)
    source = x + start * (x_stride * VEC)
    source += row[:, None] * (x_stride * VEC) + channel[None, :]
    target = out + start * (width * VEC) + row[:, None] * (width * VEC) + channel[None, :]
    mask = (row < limit)[:, None] & inside[None, :]
    if not FRESH:
        value = tl.load(source, mask, other=0.0, cache_modifier=".cg")
    added = _addend(shift, offset, image, shift_stride, channel, inside, VEC)
    scale = tl.load(weight + channel, inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    base = tl.load(bias + channel, inside, other=0.0, cache_modifier=".cg").to(tl.float32)

    # How many elements each partial [SLOTS, SHARES, BLOCKS] stands for.
    group = (block_c * CHANNELS) // GROUP + tl.arange(0, SLOTS)[:, None, None]
    left = group * GROUP
    share = tl.arange(0, SHARES)[None, :, None]
    block = tl.arange(0, BLOCKS)[None, None, :]
    channels = _overlap(left, GROUP, (left // CHANNELS + share) * CHANNELS, CHANNELS)
    here = (group < groups) & (left < (block_c + 1) * CHANNELS) & (share < shares)
    channels = tl.where(here, tl.maximum(channels, 0), 0)
    height = tl.maximum(tl.minimum(span, pixels - block * span), 0)
    count = channels.to(tl.float32) * height.to(tl.float32)
    place = ((image * groups + group) * shares + share) * (blocks * 4) + block
    plane = tl.num_programs(2) * groups * shares * (blocks * 4)
    stored = (channels > 0) & (block < blocks * 4)

    _start(PDL)
    if FRESH:
        value = tl.load(source, mask, other=0.0, cache_modifier=".cg")
    part_mean = tl.load(partials + place, stored, other=0.0)
    part_squares = tl.load(partials + plane + place, stored, other=0.0)
    part_mean = tl.where(count > 0, part_mean, 0.0)
    part_squares = tl.where(count > 0, part_squares, 0.0)
    total = pixels.to(tl.float32) * GROUP
    mean = tl.sum(tl.sum(part_mean * count, axis=2), axis=1) / total
    further = part_mean - mean[:, None, None]
    squares = tl.sum(tl.sum(part_squares + further * further * count, axis=2), axis=1)
    rstd = tl.rsqrt(squares / total + eps)

    # Groups to channels.
    slot = channel // GROUP - (block_c * CHANNELS) // GROUP
    slot = tl.minimum(slot, SLOTS - 1)
    centre = tl.gather(mean, slot, axis=0) - added
    scale = tl.gather(rstd, slot, axis=0) * scale

    if LOOP:
        for tile in range(tiles):
            mask = (row + (tile + 1) * ROWS < limit)[:, None] & inside[None, :]
            source += ROWS * (x_stride * VEC)
            ahead = tl.load(source, mask, other=0.0, cache_modifier=".cg")
            mask = (row + tile * ROWS < limit)[:, None] & inside[None, :]
            _finish(value, centre, scale, base, target, mask, SILU, FAST)
            target += ROWS * (width * VEC)
            value = ahead
    else:
        _finish(value, centre, scale, base, target, mask, SILU, FAST)


# GroupNorm in one launch.


@triton.jit
def _of_group(channels, index, inside, GROUP: tl.constexpr, SLOTS: tl.constexpr):
    """For each channel the sum over all channels of its group; SLOTS: groups there are, or more."""
    if SLOTS == 1:
        return tl.zeros_like(channels) + tl.sum(tl.where(inside, channels, 0.0), axis=0)
    else:
        group = index // GROUP
        member = (group[None, :] == tl.arange(0, SLOTS)[:, None]) & inside[None, :]
        sums = tl.sum(tl.where(member, channels[None, :], 0.0), axis=1)
        return tl.gather(sums, tl.minimum(group, SLOTS - 1), axis=0)


@triton.jit(
    do_not_specialize=[
        "pixels",
        "x_stride",
        "y_stride",
        "residual_stride",
        "y_residual_stride",
        "split",
        "shift_stride",
        "width",
        "part_width",
        "eps",
    ]
)
def _group_whole(
    x,
    y,
    residual,
    y_residual,
    total,
    shift,
    offset,
    weight,
    bias,
    out,
    pixels,
    x_stride,
    y_stride,
    residual_stride,
    y_residual_stride,
    split,
    shift_stride,
    width,
    part_width,
    eps,
    ADDED: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Whole groups of an image, all pixels at once: `part_width` channels, SLOTS groups or fewer.

    x to `total`, split, ADDED: as in `_group_statistics`. Grid: (parts of the channels, images).
    """
    _start(PDL)
    image = tl.program_id(1)
    start = tl.program_id(0) * (part_width * VEC)
    index = tl.arange(0, CHANNELS)
    inside = index < part_width * VEC
    channel = start + index
    row = tl.arange(0, ROWS)
    mask = (row < pixels)[:, None] & inside[None, :]
    pixel = image.to(tl.int64) * pixels
    second = start >= split * VEC
    source, stride = _side(x, y, x_stride * VEC, y_stride * VEC, pixel, split * VEC, second, ADDED)
    other, other_stride = _side(
        residual,
        y_residual,
        residual_stride * VEC,
        y_residual_stride * VEC,
        pixel,
        split * VEC,
        second,
        ADDED,
    )
    has = _has_residual(inside, channel, split * VEC, ADDED)
    place = row[:, None] * stride + channel[None, :]
    other_place = row[:, None] * other_stride + channel[None, :]
    value = _load_sum(source, other, place, other_place, mask, has[None, :], ADDED)
    pivot = _load_sum(source, other, channel, channel, inside, has, ADDED).to(tl.float32)
    scale = tl.load(weight + channel, inside, other=0.0).to(tl.float32)
    base = tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    added = _addend(shift, offset, image, shift_stride, channel, inside, VEC)

    target = row[:, None] * (width * VEC) + channel[None, :]
    if total is not None:
        tl.store(total + pixel * (width * VEC) + target, value, mask)

    height = pixels.to(tl.float32)
    value = tl.where(mask, value.to(tl.float32) - pivot[None, :], 0.0)
    sums = tl.sum(value, axis=0)
    squares = tl.sum(value * value, axis=0) - sums * sums * (1.0 / height)
    mean = pivot + sums * (1.0 / height) + added
    centre = _of_group(mean, index, inside, GROUP, SLOTS) * (1.0 / GROUP)
    further = mean - centre
    squares += further * further * height
    variance = _of_group(squares, index, inside, GROUP, SLOTS) * (1.0 / (height * GROUP))
    scale *= tl.rsqrt(variance + eps)

    result = value * scale[None, :] + (base - (centre - added - pivot) * scale)[None, :]
    if SILU:
        result = _silu(result, FAST)
    tl.store(out + pixel * (width * VEC) + target, result.to(out.dtype.element_ty), mask)


class _Image:
    """The sizes of a GroupNorm call, and what follows from them for a configuration.

    parts: what makes the image, x, its residual, y and its residual, as far as they are there.
    split: the channel at which y begins, 0 without one.
    """

    def __init__(
        self, parts: Sequence[TensorSpec | None], shift: TensorSpec | None, groups: int
    ) -> None:
        x, _, y, _ = self.parts = (*parts, None, None, None)[:4]
        assert x is not None
        self.split = 0 if y is None else x.shape[-1]
        self.batch, self.width = x.shape[0], x.shape[-1] + (0 if y is None else y.shape[-1])
        self.pixels = prod(x.shape[1:-1])
        self.strides = [0 if part is None else part.row_stride() or 0 for part in self.parts]
        self.shift_stride = 0 if shift is None or self.batch == 1 else shift.stride[0]
        self.groups, self.group_width = groups, self.width // groups

    @staticmethod
    def of(call: Call) -> _Image:
        """The sizes of a call that is supported."""
        if call.op == "concat_group_norm":
            return _Image(call.tensors[:-2], None, call.attrs["groups"])
        return _Image(call.tensors[:1], (*call.tensors, None)[3], call.attrs["groups"])

    def vector(self, part: int) -> int:
        """Elements that every address is a multiple of, in parts of that many channels."""
        return gcd(_VECTOR, self.width, self.split, *self.strides, self.shift_stride, part)

    def distances(self, vector: int) -> dict[str, int]:
        """All widths and strides in units of that many elements."""
        names = ("x_stride", "residual_stride", "y_stride", "y_residual_stride")
        found = dict(zip(names, self.strides, strict=True))
        found |= {"shift_stride": self.shift_stride, "width": self.width, "split": self.split}
        return {name: distance // vector for name, distance in found.items()}

    def strips(self, config: Config) -> int:
        """Blocks of pixels in one block of channels that make up the configuration's grid."""
        columns = self.batch * self.columns(int(config["channels"]))
        return max(1, min(int(config["grid"]) // columns, self.tiles(config)))

    def tiles(self, config: Config) -> int:
        """How many tiles of the configuration's rows the pixels make."""
        return cdiv(self.pixels, int(config["rows"]))

    def tiles_each(self, config: Config) -> int:
        """Tiles that a block of the second launch normalises.

        Eight at most: of a large image, the blocks that are left over at the end shall be short.
        """
        return min(cdiv(self.tiles(config), self.strips(config)), 8)

    def span(self, config: Config) -> int:
        """Pixels of a block that makes statistics: whole tiles, few enough blocks to merge."""
        parts = min(self.strips(config), _PARTS)
        return cdiv(self.tiles(config), parts) * int(config["rows"])

    def blocks(self, config: Config) -> int:
        """Blocks of pixels that statistics are made of."""
        return cdiv(self.pixels, self.span(config))

    def columns(self, channels: int) -> int:
        """Blocks of that many channels."""
        return cdiv(self.width, channels)

    def shares(self, channels: int) -> int:
        """In how many blocks of channels a group lies at most."""
        return _most_reached(self.width, self.group_width, channels)

    def slots(self, channels: int) -> int:
        """Places for the groups that reach into a block of channels: a power of two."""
        return max(2, next_power_of_2(_most_reached(self.width, channels, self.group_width)))

    def launched(self, config: Config) -> int:
        """Blocks that the second launch has for one block of channels of an image."""
        return cdiv(self.tiles(config), self.tiles_each(config))

    def fits(self, config: Config) -> bool:
        """Whether registers and grid hold what the configuration makes of the image.

        And whether no block of channels lies in both x and y.
        """
        if config["scheme"] == "whole":
            part = int(config["groups"]) * self.group_width
            whole = self.groups % int(config["groups"]) == 0 and self.split % part == 0
            return whole and self.tall * next_power_of_2(part) <= _WHOLE
        return (
            self.split % int(config["channels"]) == 0
            and self.merged(config) <= _PARTIALS
            and self.launched(config) <= _GRID_Y
        )

    @property
    def tall(self) -> int:
        """Rows of a tile that holds all pixels."""
        return max(16, next_power_of_2(self.pixels))

    def merged(self, config: Config) -> int:
        """Partials that a block of the second launch holds at a time."""
        channels = int(config["channels"])
        sizes = (self.shares(channels), self.blocks(config))
        return self.slots(channels) * prod(map(next_power_of_2, sizes))


@lru_cache(maxsize=1 << 10)
def _most_reached(width: int, part: int, other: int) -> int:
    """Of `width` channels cut into parts, and into others: how many others a part reaches into."""
    starts = range(0, width, part)
    ends = [min(start + part, width) - 1 for start in starts]
    return max(end // other - start // other + 1 for start, end in zip(starts, ends, strict=True))


def _affine(spec: TensorSpec | None, width: int) -> bool:
    """Whether it is a vector of the channels."""
    return spec is not None and spec.shape == (width,) and spec.contiguous and spec.dtype in _FLOATS


def _rows_supported(call: Call, hardware: Hardware) -> bool:
    """Whether the input has rows at one distance and the output is dense, both aligned."""
    x, out = call.tensors[0], call.out
    if x is not None and x.dtype == torch.bfloat16 and (hardware.capability or (0, 0)) < (8, 0):
        return False
    return (
        x is not None
        and x.dtype in _FLOATS
        and out.dtype == x.dtype
        and out.shape == x.shape
        and min(x.shape) > 0
        and x.stride[-1] == 1
        and (x.row_stride() or 0) >= x.shape[-1]
        and out.contiguous
        and x.aligned
        and out.aligned
    )


def _short(x: TensorSpec) -> bool:
    """Whether offsets within an image have 32 bits, also those of a tile beyond its end."""
    return (prod(x.shape[1:-1]) + 4096) * (x.row_stride() or 0) < 1 << 31


def _group_norm_supported(call: Call, hardware: Hardware) -> bool:
    x, weight, bias, shift, offset = (*call.tensors, None, None)[:5]
    if not _rows_supported(call, hardware) or x is None or len(x.shape) < 3:
        return False
    batch, width = x.shape[0], x.shape[-1]
    shifted = shift is None or (
        shift.shape == (batch, width) and shift.stride[-1] == 1 and shift.dtype in _FLOATS
    )
    return (
        width % call.attrs["groups"] == 0
        and call.attrs.get("activation", "none") in ("none", "silu")
        and _affine(weight, width)
        and _affine(bias, width)
        and shifted
        and (offset is None or _affine(offset, width))
        and batch < 1 << 16
        and _short(x)
        and bool(_group_norm_configs(call, hardware))
    )


def _split_configs(image: _Image, multiprocessors: int) -> list[dict[str, Any]]:
    """Tiles of [rows x channels] for two launches, the likeliest first.

    Channels are full lines of 128 bytes where the width has them. grid: about how many blocks a
    launch shall have; an image with more tiles than that gives each several.
    """
    common = gcd(image.width, image.split)
    whole = common & -common  # the largest power of two that divides the widths
    line = min(whole, 64) if whole >= 16 else min(next_power_of_2(image.width), 64)
    wide = 128 if whole >= 128 else line
    shapes = [  # channels, rows, warps, blocks for each multiprocessor
        (line, 64, 4, 3),
        (line, 32, 4, 8),
        (line, 64, 4, 5),
        (line, 128, 8, 6),
        (wide, 64, 8, 3),
        (line, 128, 8, 3),
        (wide, 32, 4, 5),
    ]
    names = ("scheme", "channels", "rows", "warps", "grid")
    found: list[dict[str, Any]] = [
        dict(zip(names, ("split", *shape, each * multiprocessors), strict=True))
        for *shape, each in dict.fromkeys(shapes)
    ]
    return [config for config in found if image.fits(config)]


def _whole_configs(image: _Image) -> list[dict[str, Any]]:
    """Whole groups in a block: the fewest that can be loaded by sixteen bytes, or else by eight.

    None if the image is too large, or if a group lies in both x and y.
    """
    counts = [
        n
        for n in range(1, image.groups + 1)
        if image.groups % n == 0 and image.split % (n * image.group_width) == 0
    ]
    if not counts:
        return []
    best = max(image.vector(n * image.group_width) for n in counts)
    chosen = [
        next(n for n in counts if image.vector(n * image.group_width) >= min(vector, best))
        for vector in (8, 4)
    ]
    found: list[dict[str, Any]] = []
    for each in (32, 16, 64):  # elements of a thread
        for count in dict.fromkeys(chosen):
            size = image.tall * next_power_of_2(count * image.group_width)
            warps = min(16, next_power_of_2(cdiv(size, 32 * each)))
            config: dict[str, Any] = {"scheme": "whole", "groups": count, "warps": warps}
            if image.fits(config) and config not in found:
                found.append(config)
    return found


def _group_norm_configs(call: Call, hardware: Hardware) -> list[Config]:
    image = _Image.of(call)
    split = _split_configs(image, hardware.multiprocessors)
    whole = _whole_configs(image)
    if image.pixels > 256:
        return _overlapped([*split[:5], *whole[:1], *split[5:]], hardware)
    split.sort(key=lambda config: config["rows"] * config["channels"])  # small tiles: more blocks
    return _overlapped([*whole[:3], *split[:3], *whole[3:], *split[3:]], hardware)


def _overlapped(configs: Sequence[dict[str, Any]], hardware: Hardware) -> list[Config]:
    """The first eight; where launches can overlap, six that do and two of them that do not."""
    if not overlap.can_overlap(hardware):
        return [*(config | {"pdl": False} for config in configs[:8])]
    return [
        *(config | {"pdl": True} for config in configs[:6]),
        *(config | {"pdl": False} for config in configs[:2]),
    ]


def _group_norm_fits(call: Call, config: Config, hardware: Hardware) -> bool:
    return _Image.of(call).fits(config) and overlap.fits(call, config, hardware)


def _group_norm_workspace(call: Call, config: Config) -> int:
    if config["scheme"] == "whole":
        return 0
    image = _Image.of(call)
    shares, blocks = image.shares(int(config["channels"])), image.blocks(config)
    return int(8 * image.batch * image.groups * shares * 4 * cdiv(blocks, 4))


@compiled_kernel(
    "group_norm",
    name="triton.group_norm",
    unmeasured=True,
    priority=0,
    supports=_group_norm_supported,
    configs=_group_norm_configs,
    fits=_group_norm_fits,
    workspace=_group_norm_workspace,
)
def group_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    groups: int,
    eps: float,
    activation: str = "none",
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    """Statistics in float32 of `x + shift + offset`, unrounded; one rounding at the end.

    x [B, ..., C] with rows at one distance; shift [B, C] with any distance between its rows.
    """
    return _group_norm_launches(
        None, out, (x,), weight, bias, shift, offset, groups, eps, activation, config, workspace
    )


def _group_norm_launches(
    total: torch.Tensor | None,
    out: torch.Tensor,
    parts: Sequence[torch.Tensor | None],
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    offset: torch.Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    """parts: as those of `_Image`; total: where the image goes that they make, if it shall."""
    specs = [None if part is None else TensorSpec.of(part) for part in parts]
    image = _Image(specs, None if shift is None else TensorSpec.of(shift), groups)
    x, residual, y, y_residual = (*parts, None, None, None)[:4]
    pdl = bool(config["pdl"]) and not interpreted(_group_apply)
    options = {"num_warps": config["warps"], "num_stages": 1, "enable_fp_fusion": True}
    if pdl:
        options["launch_pdl"] = True
    common = {
        "shift": shift,
        "offset": offset,
        "pixels": image.pixels,
        "GROUP": image.group_width,
        "PDL": pdl,
    }
    made = {
        "x": x,
        # What is not there is not read, but must be a pointer.
        "y": x if y is None else y,
        "residual": x if residual is None else residual,
        "y_residual": x if y_residual is None else y_residual,
        "total": total,
        "ADDED": tuple(int(r is not None) for r in (residual, y_residual)[: 1 if y is None else 2]),
    }
    finish = {
        "weight": weight,
        "bias": bias,
        "out": out,
        "eps": eps,
        "SILU": activation == "silu",
        "FAST": not interpreted(_group_apply),
    }
    if config["scheme"] == "whole":
        part = int(config["groups"]) * image.group_width
        vector = image.vector(part)
        args = image.distances(vector) | {
            "part_width": part // vector,
            "VEC": vector,
            "ROWS": image.tall,
            "CHANNELS": next_power_of_2(part),
            "SLOTS": next_power_of_2(int(config["groups"])),
        }
        grid = (image.width // part, image.batch)
        return [Launch(_group_whole, grid, common | made | finish | args, options)]

    assert workspace is not None
    channels, rows = int(config["channels"]), int(config["rows"])
    vector = image.vector(channels)
    shares, blocks = image.shares(channels), image.blocks(config)
    tiles = image.tiles_each(config)
    distances = image.distances(vector)
    common |= {
        "partials": workspace.view(torch.float32),
        "groups": groups,
        "span": image.span(config),
        "shares": shares,
        "blocks": cdiv(blocks, 4),
        "VEC": vector,
        "CHANNELS": channels,
        "SLOTS": image.slots(channels),
    }
    at_once = min(rows, max(1, 32 * int(config["warps"]) * _VECTOR // channels))
    statistics = common | made | distances | {"ROWS": at_once, "DEPTH": rows // at_once}
    apply = common | finish | {name: distances[name] for name in ("shift_stride", "width")}
    apply |= {"tiles": tiles, "ROWS": rows, "LOOP": tiles > 1}
    apply |= {"SHARES": next_power_of_2(shares), "BLOCKS": max(4, next_power_of_2(blocks))}
    apply |= {"x": x, "x_stride": distances["x_stride"], "FRESH": total is not None}
    if total is not None:
        apply |= {"x": total, "x_stride": distances["width"]}
    columns = image.columns(channels)
    return [
        Launch(_group_statistics, (columns, blocks, image.batch), statistics, options),
        Launch(_group_apply, (columns, image.launched(config), image.batch), apply, options),
    ]


def _concat_group_norm_supported(call: Call, hardware: Hardware) -> bool:
    *pairs, weight, bias = call.tensors
    parts, residuals, out = pairs[::2], pairs[1::2], call.out
    if len(parts) > 2 or None in parts or out.shape[:1] != (2,) or not out.contiguous:
        return False
    image = _dense(out.shape[1:], out.dtype)
    if prod(image.shape) * out.dtype.itemsize % 16:  # where the second half starts
        return False
    for part, residual in zip(parts, residuals, strict=True):
        assert part is not None
        dense = _dense(part.shape, out.dtype)
        for spec in (part, part if residual is None else residual):
            one = Call("group_norm", dense, (spec,))
            if not _rows_supported(one, hardware) or not _short(spec):
                return False
    plain = Call("group_norm", image, (image, weight, bias), call.attrs)
    return (
        out.aligned
        and _group_norm_supported(plain, hardware)
        and bool(_group_norm_configs(call, hardware))
    )


def _dense(shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
    return TensorSpec.of(torch.empty(shape, dtype=dtype, device="meta"))


@compiled_kernel(
    "concat_group_norm",
    name="triton.concat_group_norm",
    unmeasured=True,
    priority=0,
    supports=_concat_group_norm_supported,
    configs=_group_norm_configs,
    fits=_group_norm_fits,
    workspace=_group_norm_workspace,
)
def concat_group_norm(
    out: torch.Tensor,
    *tensors: torch.Tensor,
    groups: int,
    eps: float,
    activation: str = "none",
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    """As `group_norm`, of an image that it makes on the way, out[0]: no pass of its own.

    Of one part or two, rows of all at one distance. What is read for the statistics is stored as
    it was rounded, and the second launch finds it in the cache.
    """
    *parts, weight, bias = tensors
    return _group_norm_launches(
        out[0], out[1], parts, weight, bias, None, None, groups, eps, activation, config, workspace
    )


# LayerNorm.


@triton.jit(do_not_specialize=["rows", "x_stride", "residual_stride", "eps"])
def _layer_norm(
    x,
    residual,
    weight,
    bias,
    total,
    out,
    rows,
    x_stride,
    residual_stride,
    eps,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows at once, in registers between the statistics and the result.

    With a residual, of the sum, which is stored to `total` first: as it was rounded for that.
    A row is HEAD columns and, unless TAIL is 0, up to TAIL more, both powers of two: 320 is
    256 + 64, where a single power of two would leave three eighths of the threads idle.
    """
    _start(PDL)
    start = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    valid = start + row < rows
    source = x + start * (x_stride * VEC) + row * (x_stride * VEC)
    target = out + start * WIDTH + row * WIDTH

    # All loads come first, so that they are in flight together.
    head = tl.arange(0, HEAD)
    mask = _row_mask(valid, head, HEAD - 1, WIDTH)
    value = tl.load(source + head[None, :], mask, other=0.0)
    if residual is not None:
        other = residual + start * (residual_stride * VEC) + row * (residual_stride * VEC)
        added = tl.load(other + head[None, :], mask, other=0.0)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        tail_mask = _row_mask(valid, tail, HEAD + TAIL - 1, WIDTH)
        rest = tl.load(source + tail[None, :], tail_mask, other=0.0)
        if residual is not None:
            rest_added = tl.load(other + tail[None, :], tail_mask, other=0.0)
        rest_scale = _parameter(weight, tail, 1.0, WIDTH)
        rest_base = _parameter(bias, tail, 0.0, WIDTH)
    scale = _parameter(weight, head, 1.0, WIDTH)
    base = _parameter(bias, head, 0.0, WIDTH)

    if residual is not None:
        sum_target = total + start * WIDTH + row * WIDTH
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(sum_target + head[None, :], value, mask)
        if TAIL > 0:
            rest = (rest.to(tl.float32) + rest_added.to(tl.float32)).to(rest.dtype)
            tl.store(sum_target + tail[None, :], rest, tail_mask)

    value = value.to(tl.float32)
    sums = tl.sum(value, axis=1)
    if TAIL > 0:
        rest = rest.to(tl.float32)
        sums += tl.sum(rest, axis=1)
    mean = (sums / WIDTH)[:, None]
    value = _centred(value, mean, head, HEAD - 1, WIDTH)
    squares = tl.sum(value * value, axis=1)
    if TAIL > 0:
        rest = _centred(rest, mean, tail, HEAD + TAIL - 1, WIDTH)
        squares += tl.sum(rest * rest, axis=1)
    rstd = tl.rsqrt(squares / WIDTH + eps)[:, None]

    y = value * rstd * scale.to(tl.float32)[None, :] + base.to(tl.float32)[None, :]
    tl.store(target + head[None, :], y.to(out.dtype.element_ty), mask)
    if TAIL > 0:
        y = rest * rstd * rest_scale.to(tl.float32)[None, :] + rest_base.to(tl.float32)[None, :]
        tl.store(target + tail[None, :], y.to(out.dtype.element_ty), tail_mask)


@triton.jit
def _parameter(pointer, column, missing: tl.constexpr, WIDTH: tl.constexpr):
    """Values of a vector at `column`, or `missing` if there is no vector."""
    if pointer is None:
        return tl.full(column.shape, missing, tl.float32)
    else:
        return tl.load(pointer + column, column < WIDTH, other=0.0)


@triton.jit
def _row_mask(valid, column, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """Of valid rows [rows, 1] the columns of the row; LAST: the last of `column`."""
    if LAST < WIDTH:
        return valid
    else:
        return valid & (column < WIDTH)[None, :]


@triton.jit
def _centred(value, mean, column, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """value - mean [rows, 1], and 0 beyond the row's end."""
    if LAST < WIDTH:
        return value - mean
    else:
        return tl.where((column < WIDTH)[None, :], value - mean, 0.0)


def _layer_norm_supported(call: Call, hardware: Hardware) -> bool:
    x, weight, bias = call.tensors
    if not _rows_supported(call, hardware) or x is None:
        return False
    width = x.shape[-1]
    return (
        width <= 8192
        and (weight is None or _affine(weight, width))
        and (bias is None or _affine(bias, width))
        and x.rows < 1 << 31
    )


def _layer_norm_configs(call: Call, hardware: Hardware) -> list[Config]:
    """Rows and warps of a block, such that a thread has a few vectors of sixteen bytes in flight.

    Fewer warps to a row mean less waiting for each other, more that a short input fills the chip.
    """
    x = call.tensors[0]
    assert x is not None
    width = x.shape[-1]
    full = next_power_of_2(width)
    bases = [(full, False)]
    if width > full // 2 >= 64 and full // 2 + next_power_of_2(width - full // 2) < full:
        bases = [(full // 2, True), (full, False)]
    busy = x.rows * width >= 32 * 256 * hardware.multiprocessors
    found: list[dict[str, Any]] = []
    for each in (32, 16, 64) if busy else (16, 8, 32):  # elements of a thread
        for base, halves in bases:
            least = max(1, base // (32 * each))
            for warps in dict.fromkeys((least, max(least, 4))):
                rows = max(1, 32 * warps * each // base)
                if warps <= 16 and rows <= min(16, next_power_of_2(x.rows)):
                    found.append({"rows": rows, "warps": warps, "halves": halves})
    return _overlapped(found or [{"rows": 1, "warps": 4, "halves": False}], hardware)


@compiled_kernel(
    "layer_norm",
    name="triton.layer_norm",
    unmeasured=True,
    priority=0,
    supports=_layer_norm_supported,
    configs=_layer_norm_configs,
    fits=overlap.fits,
)
def layer_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    """Two passes over a row in registers, in float32; x [..., C] with rows at one distance."""
    return [_layer_norm_launch(None, out, x, None, weight, bias, eps, config)]


def _layer_norm_launch(
    total: torch.Tensor | None,
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    config: Config,
) -> Launch:
    spec, width, rows = TensorSpec.of(x), x.shape[-1], int(config["rows"])
    stride = spec.row_stride() or 0
    residual_stride = 0 if residual is None else TensorSpec.of(residual).row_stride() or 0
    vector = gcd(_VECTOR, width, stride, residual_stride)
    full = next_power_of_2(width)
    head = full // 2 if config["halves"] else full
    pdl = bool(config["pdl"]) and not interpreted(_layer_norm)
    options = {"num_warps": config["warps"], "num_stages": 1, "enable_fp_fusion": True}
    if pdl:
        options["launch_pdl"] = True
    args = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "bias": bias,
        "total": total,
        "out": out,
        "rows": spec.rows,
        "x_stride": stride // vector,
        "residual_stride": residual_stride // vector,
        "eps": eps,
        "VEC": vector,
        "WIDTH": width,
        "HEAD": head,
        "TAIL": next_power_of_2(width - head) if width > head else 0,
        "ROWS": rows,
        "PDL": pdl,
    }
    return Launch(_layer_norm, (cdiv(spec.rows, rows),), args, options)


def _add_layer_norm_supported(call: Call, hardware: Hardware) -> bool:
    x, residual, weight, bias = call.tensors
    if x is None or residual is None or residual.shape != x.shape or call.out.shape[0] != 2:
        return False
    half = _dense(x.shape, call.out.dtype)
    size = prod(x.shape) * call.out.dtype.itemsize
    same = (replace(call, tensors=(operand, weight, bias), out=half) for operand in (x, residual))
    return (
        all(_layer_norm_supported(one, hardware) for one in same)
        and residual.dtype == x.dtype
        and call.out.contiguous
        and call.out.aligned
        and size % 16 == 0  # where the second half starts
    )


@compiled_kernel(
    "add_layer_norm",
    name="triton.add_layer_norm",
    unmeasured=True,
    priority=0,
    supports=_add_layer_norm_supported,
    configs=_layer_norm_configs,
    fits=overlap.fits,
)
def add_layer_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    config: Config,
    workspace: torch.Tensor | None,
) -> list[Launch]:
    """As `layer_norm`, of `x + residual`, whose rows are at one distance too; out[0] is the sum."""
    return [_layer_norm_launch(out[0], out[1], x, residual, weight, bias, eps, config)]
