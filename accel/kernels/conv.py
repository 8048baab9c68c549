"""Convolutions in Triton: implicit matrix products over channels-last images.

The product's rows are the output's pixels, its columns the output channels, and it sums over
taps x input channels; the matrix that this stands for is never written. Four kernels:

- `triton.conv2d` reads pixels through pointers: any size, stride 1 or 2, odd up-sampling.
- `triton.conv2d_tma` reads boxes of pixels by TMA (sm_90 on), which fills with zeros what lies
  outside of the image: that is the padding. Nothing but the copy engine and the tensor cores works
  in its loop.
- `triton.conv2d_few_in`, for a latent's 4 channels: all taps x channels in one tile, gathered once.
- `triton.conv2d_few_out`, for a network's last convolution: a product with all taps' weights at
  once, which reads the image once and not nine times, then a sum over neighbouring pixels.

A small image has few tiles and much to sum over (8x8 pixels: 11520 terms), so both implicit
products can split the sum over blocks: parts go to a workspace in float32 and are added in order,
by the pass that also adds bias, time embedding and residual. Every result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..hardware import Hardware
from . import overlap
from .conv_device import (
    add_parts,
    gathered_product,
    implicit_product,
    implicit_product_tma,
    sum_of_taps,
    tap_products,
)
from .launch import Launch, interpreted
from .registry import Call, Config, TensorSpec, compiled_kernel

HALVES = (torch.float16, torch.bfloat16)
MOST_CONFIGS = 9
PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
"""Into how many parts a sum may be split. Few, so that image sizes near by offer the same."""

GROUP = 8
"""Rows of tiles whose tiles run side by side, so that they share weights and pixels in the L2."""


@dataclass(frozen=True)
class Shape:
    """A convolution's sizes. `double`: x is up-sampled by two, to `wide`, before it."""

    images: int
    in_height: int
    in_width: int
    channels_in: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    double: bool
    wide: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Of all outputs."""
        return self.images * self.height * self.width

    @property
    def taps(self) -> int:
        """Pixels of a window."""
        return prod(self.kernel)

    @property
    def grid(self) -> tuple[int, int]:
        """Pixels an image that tiles of boxes cover."""
        return (self.in_height, self.in_width) if self.double else (self.height, self.width)


def shape_of(
    x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...], attrs: Any
) -> Shape | None:
    """The sizes, unless the kernels here know no such convolution."""
    stride, dilation, upsample = attrs["stride"], attrs["dilation"], attrs.get("upsample")
    if attrs["groups"] != 1 or tuple(dilation) != (1, 1) or stride[0] != stride[1]:
        return None
    if stride[0] not in (1, 2) or prod(weight[1:3]) > 31 or 0 in out:
        return None
    images, in_height, in_width, channels_in = x
    if upsample is not None:
        # At twice the size, or one row less, PyTorch's scale in float32 gives exactly i // 2.
        for size, wide in zip((in_height, in_width), upsample, strict=True):
            if wide not in (2 * size - 1, 2 * size):
                return None
    return Shape(
        images=images,
        in_height=in_height,
        in_width=in_width,
        channels_in=channels_in,
        height=out[1],
        width=out[2],
        channels=out[3],
        kernel=(weight[1], weight[2]),
        stride=stride[0],
        padding=(attrs["padding"][0], attrs["padding"][1]),
        double=upsample is not None,
        wide=(in_height, in_width) if upsample is None else (upsample[0], upsample[1]),
    )


def _shape(call: Call) -> Shape | None:
    """The sizes of a call whose operands all kernels here can read."""
    x, weight, bias, embedding, residual = call.tensors
    assert x is not None and weight is not None
    if x.dtype not in HALVES or any(t is not None and t.dtype != x.dtype for t in call.tensors):
        return None
    if not (weight.contiguous and call.out.contiguous):
        return None
    if any(t is not None and t.stride[-1] != 1 for t in (bias, embedding)):
        return None
    for image in (x, residual):
        if image is not None and (image.row_stride() is None or image.stride[-1] != 1):
            return None
        if image is not None and image.rows * (image.row_stride() or 0) >= 2**31:
            return None
    if prod(call.out.shape) >= 2**31:
        return None
    return shape_of(x.shape, weight.shape, call.out.shape, call.attrs)


def _pitch(image: torch.Tensor | None) -> int:
    """Elements from one pixel to the next."""
    return 0 if image is None else TensorSpec.of(image).row_stride() or 0


def _capable(hardware: Hardware, least: tuple[int, int]) -> bool:
    return hardware.capability is not None and hardware.capability >= least


# How long a tile of a given size may take: enough of a model to drop what cannot win.


@dataclass(frozen=True)
class _Rates:
    """What one SM does in a cycle: multiply-adds in half precision, bytes from L2, from DRAM."""

    products: float
    l2: float
    dram: float


_RATES = {
    (8, 0): _Rates(1024, 32, 10),
    (8, 6): _Rates(256, 20, 6),
    (8, 7): _Rates(512, 20, 8),
    (8, 9): _Rates(256, 16, 3),
    (9, 0): _Rates(2048, 32, 13),
    (10, 0): _Rates(4096, 40, 28),
    (10, 3): _Rates(4096, 40, 28),
}
_OTHER_RATES = _Rates(256, 16, 4.5)
_LATENCY = 900  # cycles from asking for bytes in the L2 or beyond until they are there
_LAUNCH = 3500  # cycles that one more kernel costs
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB a block


@dataclass(frozen=True)
class _Tile:
    """Pixels x channels of a tile, its depth a step, and the threads that make it.

    tail: further channels, since 192 = 128 + 64 suits 320, 640 and 1280 and is no power of two.
    """

    pixels: int
    channels: int
    depth: int
    warps: int
    tail: int = 0

    @property
    def width(self) -> int:
        """All of its channels."""
        return self.channels + self.tail


def _shared_bytes(hardware: Hardware) -> int:
    assert hardware.capability is not None
    return hardware.shared_bytes or _SHARED.get(hardware.capability, 99) << 10


def _ranked(
    shape: Shape, hardware: Hardware, tiles: list[tuple[_Tile, int]]
) -> Iterator[tuple[float, _Tile, int, int]]:
    """(estimated cycles, tile, parts, stages), unsorted. `tiles`: with how many cover the pixels.

    Left out: clocks, how full the tensor cores run, hits in the L2 beyond one kernel's own.
    """
    rates = _RATES.get(hardware.capability or (0, 0), _OTHER_RATES)
    cores, room = hardware.multiprocessors, _shared_bytes(hardware)
    for tile, down in tiles:
        across = -(-shape.channels // tile.width)
        steps = shape.taps * -(-shape.channels_in // tile.depth)
        stage = (tile.pixels + tile.width) * tile.depth * 2
        deep, half = (room - 2048) // stage, (room // 2 - 2048) // stage
        if deep < 3:
            continue
        weights = shape.channels * shape.taps * shape.channels_in * 2
        step = max(
            tile.pixels * tile.width * tile.depth / rates.products,
            (tile.pixels + tile.width) * tile.depth * 2 / rates.l2,
        )
        # Smaller products fill the tensor cores less.
        step *= 1 + 0.12 * max(0, 14 - (tile.pixels * tile.width).bit_length() + 1)
        for parts in PARTS:
            if parts > 1 and (steps // parts < 4 or down * across * (parts - 1) >= 2.1 * cores):
                break
            blocks = down * across * parts
            rounds = -(-blocks // cores)
            # Two blocks on an SM hide each other's beginning and end; one alone has all memory.
            together = 2 if blocks > cores and half >= 3 and tile.warps <= 8 else 1
            stages = min(half, 4) if together == 2 else min(deep, 6)
            alone = max(step, _LATENCY / (stages - 1)) if together == 1 else step
            cycles = rounds * (-(-steps // parts)) * alone
            cycles += -(-rounds // together) * (2 * _LATENCY + tile.pixels * tile.width / 16)
            cycles = max(cycles, weights / (rates.dram * cores) + 2 * _LATENCY)
            if parts > 1:
                moved = parts * shape.pixels * shape.channels * 8
                cycles += _LAUNCH + moved / (rates.l2 * cores)
            yield cycles, tile, parts, stages


def _best(
    found: Iterator[tuple[float, _Tile, int, int]], most: int
) -> list[tuple[_Tile, int, int]]:
    """The best by estimate: of one tile size two that differ much, and one that is not split."""
    chosen: list[tuple[_Tile, int, int]] = []
    ranked = sorted(found, key=lambda entry: entry[0])
    whole = next((entry for entry in ranked if entry[2] == 1 and entry[0] < 2 * ranked[0][0]), None)
    for _, tile, parts, stages in ranked:
        same = [
            (other.depth == tile.depth and 2 * parts < 3 * n and 2 * n < 3 * parts)
            for other, n, _ in chosen
            if (other.pixels, other.width) == (tile.pixels, tile.width)
        ]
        if len(chosen) < most and len(same) < 2 and not any(same):
            chosen.append((tile, parts, stages))
    if whole is not None and all(parts > 1 for _, parts, _ in chosen):
        chosen[-1] = whole[1:]
    return chosen


def _config(tile: _Tile, parts: int, stages: int, early: bool) -> dict[str, int | str | bool]:
    return {
        "block_m": tile.pixels,
        "block_n": tile.channels,
        "block_k": tile.depth,
        "parts": parts,
        "warps": tile.warps,
        "stages": stages,
        "early": early and parts > 1,
    }


def _part_bytes(call: Call, config: Config) -> int:
    parts = int(config["parts"])
    return parts * prod(call.out.shape) * 4 if parts > 1 else 0


# triton.conv2d


def _pointer_supports(call: Call, hardware: Hardware) -> bool:
    shape = _shape(call)
    return (
        shape is not None
        and _capable(hardware, (8, 0))
        and shape.channels_in % 8 == 0
        and shape.channels_in >= 16
    )


def _depths(channels: int, least: int) -> list[int]:
    """Channels that one step takes: such that steps end where a tap does, if any do."""
    return [depth for depth in (128, 64, 32, 16) if depth >= least and channels % depth == 0]


def _pointer_configs(call: Call, hardware: Hardware) -> list[Config]:
    """Only one beside `conv2d_tma` on the chips whose tensor cores read what it brings."""
    shape = _shape(call)
    assert shape is not None and hardware.capability is not None
    hopper = hardware.capability[0] in (9, 10)
    depths = [d for d in _depths(shape.channels_in, 16) if d <= 64][:2] or [32]
    if hopper:
        depths = depths[:1]
    narrow = max(16, triton.next_power_of_2(shape.channels))
    tiles = []
    for pixels, channels in product((64, 128, 256), (16, 32, 64, 128, 256)):
        size = pixels * channels
        if channels > narrow or size > 128 * 256 or (channels < 64 and channels < narrow):
            continue
        if size > 128 * 128 and (not hopper or call.tensors[4] is not None):
            continue
        warps = 8 if size > (128 * 128 if hopper else 128 * 64) else 4
        if pixels == 256 and channels < 64:
            continue
        tiles += [
            (_Tile(pixels, channels, depth, warps), -(-shape.pixels // pixels)) for depth in depths
        ]
    early = overlap.can_overlap(hardware)
    whole = shape.channels_in % depths[0] == 0
    aligned = all(t is None or t.aligned for t in call.tensors)
    tma = hardware.capability >= (9, 0) and whole and aligned and shape.channels >= 64
    configs: list[Config] = []
    most = MOST_CONFIGS - (2 if early else 0)
    for tile, parts, stages in _best(_ranked(shape, hardware, tiles), most):
        configs.append({**_config(tile, parts, stages, early), "weight_tma": tma})
    if hopper and _tma_supports(call, hardware):  # pointers never won on an H100
        return configs[:1]
    # The same with the other way to read weights, and without the early start.
    if tma and configs:
        configs.append({**configs[0], "weight_tma": False})
    split = next((config for config in configs if config["early"]), None)
    if split is not None:
        configs.append({**split, "early": False})
    return configs


@compiled_kernel(
    "conv2d",
    name="triton.conv2d",
    priority=3,
    supports=_pointer_supports,
    configs=_pointer_configs,
    fits=overlap.fits,
    workspace=_part_bytes,
)
def conv2d(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    config: Config,
    workspace: torch.Tensor | None,
    **attrs: Any,
) -> list[Launch]:
    """An implicit product that reads x [B, H, W, C] through pointers."""
    shape = _known(x, weight, out, attrs)
    block_m, block_n, block_k = (int(config[f"block_{name}"]) for name in "mnk")
    parts = int(config["parts"])
    matrix: Any = weight
    if config["weight_tma"]:
        matrix = _matrix(weight, (block_n, block_k))
    early = bool(config["early"]) and not interpreted(implicit_product)
    tiles = -(-shape.pixels // block_m) * -(-shape.channels // block_n)
    return _with_parts(
        Launch(
            implicit_product,
            (tiles, parts, 1),
            {
                "x": x,
                "weight": matrix,
                **_epilogue(bias, embedding, residual, out),
                "pixels": shape.pixels,
                "height": shape.height,
                "width": shape.width,
                "in_height": shape.in_height,
                "in_width": shape.in_width,
                "wide_height": shape.wide[0],
                "wide_width": shape.wide[1],
                "IN": shape.channels_in,
                **_window(shape),
                "DOUBLE": shape.double,
                "X_PITCH": _pitch(x),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
                "PARTS": parts,
                "GROUP": GROUP,
                "WEIGHT_TMA": bool(config["weight_tma"]),
                "EARLY": early,
            },
            _options(config),
        ),
        shape,
        parts,
        workspace,
        early,
    )


# triton.conv2d_tma


def _tma_supports(call: Call, hardware: Hardware) -> bool:
    shape, x, weight = _shape(call), call.tensors[0], call.tensors[1]
    assert x is not None and weight is not None
    if shape is None or not _capable(hardware, (9, 0)):
        return False
    if shape.channels_in % 16 or shape.channels < 32:
        return False
    if not (x.aligned and weight.aligned) or (x.row_stride() or 0) % 8:
        return False
    if shape.double:
        # Boxes cover twice the image, in and out: a row that is cut off would be read where there
        # should be a zero, and one more than the result has would be written outside of it.
        twice = (2 * shape.in_height, 2 * shape.in_width)
        return shape.stride == 1 and shape.wide == twice == (shape.height, shape.width)
    # Pairs of rows: the last of an odd number would read the next image's first.
    return shape.stride == 1 or (shape.in_height % 2 == 0 and shape.in_width % 2 == 0)


def _box(shape: Shape, pixels: int) -> tuple[int, tuple[int, int, int]]:
    """(how many cover the images, images x rows x columns of so many pixels): the least waste.

    Of equals the one whose nine taps read the fewest different pixels.
    """
    sizes = (shape.images, *shape.grid)
    found = []
    for log_b, log_h in product(range(pixels.bit_length()), repeat=2):
        box = (1 << log_b, 1 << log_h, pixels >> log_b >> log_h)
        if box[2] > 0:
            count = prod(-(-size // side) for side, size in zip(box, sizes, strict=True))
            found.append((count, box[0] * (box[1] + 2) * (box[2] + 2), box))
    count, _, box = min(found)
    return count * (4 if shape.double else 1), box


def _tma_configs(call: Call, hardware: Hardware) -> list[Config]:
    shape = _shape(call)
    assert shape is not None and hardware.capability is not None
    hopper = hardware.capability[0] in (9, 10)
    depths = _depths(shape.channels_in, 16)
    small = shape.pixels <= 1024  # bound by its weights: deeper steps have more bytes on the way
    depths = depths[:2] if small and depths[0] == 128 and hopper else [d for d in depths if d <= 64]
    tiles = []
    for pixels, channels in product((32, 64, 128, 256), (64, 128, 256)):
        size = pixels * channels
        if size > (128 * 256 if hopper else 128 * 128) or (pixels == 32 and channels > 128):
            continue
        if channels > 64 and channels > triton.next_power_of_2(shape.channels):
            continue
        warps = 8 if size > (128 * 128 if hopper else 128 * 64) else 4
        count, _ = _box(shape, pixels)
        for depth in depths[: 2 if small else 1]:
            tiles.append((_Tile(pixels, channels, depth, warps), count))
            if (pixels, channels) == (128, 128) and shape.channels > 128 and hopper:
                tiles.append((_Tile(pixels, channels, depth, 8, 64), count))
    configs: list[Config] = []
    for tile, parts, stages in _best(_ranked(shape, hardware, tiles), MOST_CONFIGS - 1):
        config = _config(tile, parts, stages, overlap.can_overlap(hardware))
        # The box and not the pixels in it, so that a size near by can run the same code.
        box = "x".join(map(str, _box(shape, int(config.pop("block_m")))[1]))
        configs.append({"box": box, **config, "tail_n": tile.tail})
    split = next((config for config in configs if config["early"]), None)
    if split is not None:
        configs.append({**split, "early": False})
    return configs


@compiled_kernel(
    "conv2d",
    name="triton.conv2d_tma",
    priority=2,
    supports=_tma_supports,
    configs=_tma_configs,
    fits=overlap.fits,
    workspace=_part_bytes,
)
def conv2d_tma(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    config: Config,
    workspace: torch.Tensor | None,
    **attrs: Any,
) -> list[Launch]:
    """An implicit product that reads boxes of x [B, H, W, C] by TMA."""
    shape = _known(x, weight, out, attrs)
    block_n, block_k, tail_n = (int(config[name]) for name in ("block_n", "block_k", "tail_n"))
    parts, box = int(config["parts"]), [int(side) for side in str(config["box"]).split("x")]
    pitch, (height, width) = _pitch(x), shape.grid
    row, image = shape.in_width * pitch, shape.in_height * shape.in_width * pitch
    if shape.stride == 2:
        pixels = TensorDescriptor(
            x,
            [shape.images, *(shape.in_height // 2, shape.in_width // 2), shape.in_width + 2]
            + [shape.channels_in],
            [image, 2 * row, 2 * pitch, pitch, 1],
            [*box, 1, block_k],
        )
    else:
        pixels = TensorDescriptor(
            x,
            [shape.images, shape.in_height, shape.in_width, shape.channels_in],
            [image, row, pitch, 1],
            [*box, block_k],
        )
    counts = [
        -(-size // side) for side, size in zip(box, (shape.images, height, width), strict=True)
    ]
    tiles = prod(counts) * (4 if shape.double else 1)
    early = bool(config["early"]) and not interpreted(implicit_product_tma)
    return _with_parts(
        Launch(
            implicit_product_tma,
            (tiles * -(-shape.channels // (block_n + tail_n)), parts, 1),
            {
                "x": pixels,
                "weight": _matrix(weight, (block_n, block_k)),
                "tail": _matrix(weight, (tail_n, block_k)) if tail_n else None,
                **_epilogue(bias, embedding, residual, out),
                "images": shape.images,
                "height": shape.height,
                "width": shape.width,
                "grid_height": height,
                "grid_width": width,
                "in_width": shape.in_width,
                "tiles": tiles,
                "tiles_y": counts[1],
                "tiles_x": counts[2],
                "IN": shape.channels_in,
                **_window(shape),
                "DOUBLE": shape.double,
                "BOX_B": box[0],
                "BOX_H": box[1],
                "BOX_W": box[2],
                "BLOCK_N": block_n,
                "TAIL_N": tail_n,
                "BLOCK_K": block_k,
                "PARTS": parts,
                "GROUP": GROUP,
                "EARLY": early,
            },
            _options(config),
        ),
        shape,
        parts,
        workspace,
        early,
    )


# What the launches of both have in common.


def _known(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, attrs: dict[str, Any]
) -> Shape:
    shape = shape_of(tuple(x.shape), tuple(weight.shape), tuple(out.shape), attrs)
    assert shape is not None, "the kernel does not support the call"
    return shape


def _epilogue(
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> dict[str, Any]:
    """The arguments of `_finish`."""
    return {
        "bias": bias,
        "embedding": embedding,
        "residual": residual,
        "out": out,
        "embedding_pitch": 0 if embedding is None else embedding.stride(0),
        "CHANNELS": out.shape[-1],
        "RESIDUAL_PITCH": _pitch(residual),
    }


def _window(shape: Shape) -> dict[str, int]:
    """The arguments that say where an output pixel's taps lie."""
    return {
        "KERNEL_W": shape.kernel[1],
        "TAPS": shape.taps,
        "STRIDE": shape.stride,
        "PADDING_H": shape.padding[0],
        "PADDING_W": shape.padding[1],
    }


def _options(config: Config) -> dict[str, Any]:
    return {
        "num_warps": int(config["warps"]),
        "num_stages": int(config["stages"]),
        "enable_fp_fusion": True,
    }


def _pdl(early: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if early else {}


def _matrix(weight: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The weight [O, kh, kw, C] as a descriptor of [O, kh * kw * C]."""
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    return TensorDescriptor(weight, [rows, columns], [columns, 1], list(block))


def _with_parts(
    launch: Launch, shape: Shape, parts: int, workspace: torch.Tensor | None, early: bool
) -> list[Launch]:
    """The launch, or with several parts it and the one that adds them up."""
    if parts == 1:
        return [launch]
    assert workspace is not None
    sums = workspace[: parts * shape.pixels * shape.channels * 4].view(torch.float32)
    made = launch.args
    bare = {"bias": None, "embedding": None, "residual": None, "out": sums}
    riders = (made[name] for name in ("bias", "embedding", "residual"))
    added = _addition(parts, sums, made["out"], *riders)
    options = {**added.options, **_pdl(early)}
    return [
        replace(launch, args={**made, **bare}),
        replace(added, args={**added.args, "EARLY": early}, options=options),
    ]


def _addition(
    parts: int,
    sums: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> Launch:
    channels = out.shape[-1]
    pixels = out.numel() // channels
    columns = 64 if channels % 64 == 0 or channels > 64 else triton.next_power_of_2(channels)
    rows = max(1, (512 if parts > 1 else 1024) // columns)
    return Launch(
        add_parts,
        (-(-pixels // rows), -(-channels // columns), 1),
        {
            "parts": sums,
            **_epilogue(bias, embedding, residual, out),
            "pixels": pixels,
            "pixels_per_image": pixels // out.shape[0],
            "PARTS": parts,
            "ROWS": rows,
            "COLUMNS": columns,
            "EARLY": False,
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )


def addition(
    out: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> Launch | None:
    """`out += bias + embedding + residual` in one pass, for a library that can add none of them.

    out [B, H, W, O] contiguous, bias [O], embedding [B, O], residual [B, H, W, O]. None where the
    kernel cannot read an operand.
    """
    if any(t is not None and t.stride(-1) != 1 for t in (bias, embedding, residual)):
        return None
    if residual is not None and not 0 < residual[..., 0].numel() * _pitch(residual) < 2**31:
        return None
    return _addition(1, out, out, bias, embedding, residual) if 0 < out.numel() < 2**31 else None


# triton.conv2d_few_in


def _few_in_supports(call: Call, hardware: Hardware) -> bool:
    shape = _shape(call)
    return (
        shape is not None
        and _capable(hardware, (8, 0))
        and not shape.double
        and shape.channels_in <= 16
        and shape.taps * shape.channels_in <= 256
    )


def _few_in_configs(call: Call, hardware: Hardware) -> list[Config]:
    shape = _shape(call)
    assert shape is not None
    widest = max(16, min(64, triton.next_power_of_2(shape.channels)))
    tiles = -(-shape.channels // widest)
    # A wide gather (inpainting's 9 channels) lies in registers: fewer pixels, more threads.
    wide = shape.taps * shape.channels_in > 64
    warps = 8 if wide else 4
    found: list[Config] = [
        {"block_m": block_m, "block_n": widest, "tiles": count, "warps": warps, "stages": 2}
        for block_m in ((32, 64) if wide else (64, 128))
        for count in sorted({tiles, 1})
    ]
    if shape.channels > 64 and not wide:
        found += [
            {"block_m": block_m, "block_n": 128, "tiles": 1, "warps": 4, "stages": 2}
            for block_m in (64, 32)
        ]
    return found


@compiled_kernel(
    "conv2d",
    name="triton.conv2d_few_in",
    unmeasured=True,
    priority=2,
    supports=_few_in_supports,
    configs=_few_in_configs,
)
def conv2d_few_in(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    config: Config,
    workspace: torch.Tensor | None,
    **attrs: Any,
) -> list[Launch]:
    """A convolution of few input channels: bound by what it writes."""
    shape = _known(x, weight, out, attrs)
    block_m, block_n, tiles = (int(config[name]) for name in ("block_m", "block_n", "tiles"))
    return [
        Launch(
            gathered_product,
            (-(-shape.pixels // block_m), -(-shape.channels // (block_n * tiles)), 1),
            {
                "x": x,
                "weight": weight,
                **_epilogue(bias, embedding, residual, out),
                "pixels": shape.pixels,
                "height": shape.height,
                "width": shape.width,
                "in_height": shape.in_height,
                "in_width": shape.in_width,
                "IN": shape.channels_in,
                **_window(shape),
                "X_PITCH": _pitch(x),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": max(16, triton.next_power_of_2(shape.taps * shape.channels_in)),
                "TILES": tiles,
            },
            _options(config),
        )
    ]


# triton.conv2d_few_out


def _few_out_supports(call: Call, hardware: Hardware) -> bool:
    shape = _shape(call)
    return (
        shape is not None
        and _capable(hardware, (8, 0))
        and not shape.double
        and shape.taps * shape.channels <= 128
        and shape.channels_in % 8 == 0
        and shape.channels_in >= 16
        and shape.images * shape.in_height * shape.in_width * shape.taps * shape.channels < 2**31
    )


def _few_out_configs(call: Call, hardware: Hardware) -> list[Config]:
    shape = _shape(call)
    assert shape is not None
    depth = next(iter([d for d in _depths(shape.channels_in, 16) if d <= 64]), 32)
    early = overlap.can_overlap(hardware)
    found: list[Config] = [
        {"block_m": block_m, "block_k": depth, "warps": 4, "stages": stages, "early": early}
        for block_m, stages in ((64, 4), (128, 3), (32, 4))
    ]
    return [*found, {**found[0], "early": False}] if early else found


@compiled_kernel(
    "conv2d",
    name="triton.conv2d_few_out",
    unmeasured=True,
    priority=2,
    supports=_few_out_supports,
    configs=_few_out_configs,
    fits=overlap.fits,
    workspace=lambda call, config: _product_bytes(call),
)
def conv2d_few_out(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    config: Config,
    workspace: torch.Tensor | None,
    **attrs: Any,
) -> list[Launch]:
    """A convolution to few channels: bound by one reading of x."""
    assert workspace is not None
    shape = _known(x, weight, out, attrs)
    block_m, block_k = int(config["block_m"]), int(config["block_k"])
    rows, in_pixels = shape.channels * shape.taps, shape.images * shape.in_height * shape.in_width
    products = workspace[: rows * in_pixels * 4].view(torch.float32)
    early = bool(config["early"]) and not interpreted(tap_products)
    return [
        Launch(
            tap_products,
            (-(-in_pixels // block_m), 1, 1),
            {
                "x": x,
                "weight": weight,
                "products": products,
                "pixels": in_pixels,
                "IN": shape.channels_in,
                "ROWS": rows,
                "X_PITCH": _pitch(x),
                "BLOCK_R": max(16, triton.next_power_of_2(rows)),
                "BLOCK_M": block_m,
                "BLOCK_K": block_k,
                "EARLY": early,
            },
            _options(config),
        ),
        Launch(
            sum_of_taps,
            (-(-shape.pixels // 128), 1, 1),
            {
                "products": products,
                **_epilogue(bias, embedding, residual, out),
                "pixels": shape.pixels,
                "height": shape.height,
                "width": shape.width,
                "in_pixels": in_pixels,
                "in_height": shape.in_height,
                "in_width": shape.in_width,
                **_window(shape),
                "BLOCK_M": 128,
                "BLOCK_N": triton.next_power_of_2(shape.channels),
                "EARLY": early,
            },
            {"num_warps": 4, "enable_fp_fusion": True, **_pdl(early)},
        ),
    ]


def _product_bytes(call: Call) -> int:
    x, weight = call.tensors[0], call.tensors[1]
    assert x is not None and weight is not None
    return x.rows * prod(weight.shape[:3]) * 4
