"""The device's side of `conv.py`: kernels that multiply windows of pixels with weights.

Common names: a pixel is one of all images' output pixels, [B, H, W] flattened, and an image's
number is that of a pixel over its size; IN and CHANNELS are the input's and output's channels;
pitches are elements from one pixel, or one row of the embedding, to the next; EARLY means that one
of two kernels in a row is launched before the other has ended.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's language is untyped: its compiler gives every value a type of its own.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(program, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP tiles down, then the next column."""
    group = program // (GROUP * TILES_N)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = program - group * (GROUP * TILES_N)
    return first + inside % size, inside // size


@triton.jit
def _finish(
    y,
    pixel,
    channel,
    image,
    first_image,
    last_image,
    valid,
    bias,
    embedding,
    residual,
    out,
    embedding_pitch,
    CHANNELS: tl.constexpr,
    RESIDUAL_PITCH: tl.constexpr,
):
    """Add to y [pixels, channels] what rides along, and store it in the output's dtype.

    image: that each pixel belongs to, from first_image to last_image, of which there is mostly one:
    its row of the embedding costs a register for each channel, a gather one for each element.
    """
    mask = valid[:, None] & (channel < CHANNELS)[None, :]
    if bias is not None:
        y += tl.load(bias + channel, channel < CHANNELS, 0.0).to(tl.float32)[None, :]
    if embedding is not None:
        for index in range(first_image, last_image + 1):
            row = embedding + index * embedding_pitch
            added = tl.load(row + channel, channel < CHANNELS, 0.0).to(tl.float32)
            y += tl.where((image == index)[:, None], added[None, :], 0.0)
    if residual is not None:
        added = residual + pixel[:, None] * RESIDUAL_PITCH + channel[None, :]
        y += tl.load(added, mask, 0.0).to(tl.float32)
    tl.store(
        out + pixel[:, None] * CHANNELS + channel[None, :], y.to(out.dtype.element_ty), mask=mask
    )


@triton.jit
def _store_part(y, part, pixels, pixel, channel, valid, out, CHANNELS: tl.constexpr):
    """Store part number `part` of the sums, [parts, pixels, channels] in float32."""
    mask = valid[:, None] & (channel < CHANNELS)[None, :]
    place = out + part.to(tl.int64) * pixels * CHANNELS
    tl.store(place + pixel[:, None] * CHANNELS + channel[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["pixels", "pixels_per_image"])
def add_parts(
    parts,
    bias,
    embedding,
    residual,
    out,
    pixels,
    pixels_per_image,
    embedding_pitch,
    CHANNELS: tl.constexpr,
    RESIDUAL_PITCH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`out = sum(parts) + bias + embedding + residual`; parts [PARTS, pixels, CHANNELS].

    `out` may be the only part. EARLY: launched before the kernel that makes the parts has ended.
    """
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = pixel < pixels
    mask = valid[:, None] & (channel < CHANNELS)[None, :]
    place = parts + pixel[:, None] * CHANNELS + channel[None, :]
    step = pixels.to(tl.int64) * CHANNELS
    if EARLY:
        tl.extra.cuda.gdc_wait()
    y = tl.load(place, mask, 0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        y += tl.load(place + part * step, mask, 0.0).to(tl.float32)
    _finish(
        y,
        pixel,
        channel,
        pixel // pixels_per_image,
        tl.program_id(0) * ROWS // pixels_per_image,
        (tl.minimum((tl.program_id(0) + 1) * ROWS, pixels) - 1) // pixels_per_image,
        valid,
        bias,
        embedding,
        residual,
        out,
        embedding_pitch,
        CHANNELS,
        RESIDUAL_PITCH,
    )


@triton.jit(
    do_not_specialize=[
        *("pixels", "height", "width", "in_height", "in_width", "wide_height", "wide_width")
    ]
)
def implicit_product(
    x,
    weight,
    bias,
    embedding,
    residual,
    out,
    pixels,
    height,
    width,
    in_height,
    in_width,
    wide_height,
    wide_width,
    embedding_pitch,
    IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DOUBLE: tl.constexpr,
    X_PITCH: tl.constexpr,
    RESIDUAL_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile of pixels x channels, over one part of the sum; x is read through pointers.

    pixels: of all outputs, height and width of one. The window moves over wide_height x wide_width:
    x itself, or x up-sampled by two (DOUBLE; the last row or column may be cut off).
    """
    STEPS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K  # of one tap
    tile_m, tile_n = _tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(CHANNELS, BLOCK_N), GROUP
    )
    pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = pixel < pixels
    image = pixel // (height * width)
    row = (pixel // width) % height * STRIDE - PADDING_H
    column = pixel % width * STRIDE - PADDING_W

    # One bit for each tap: whether it reads inside of the image. The loop then needs no compares.
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for bit in tl.static_range(TAPS):
        y = row + bit // KERNEL_W
        z = column + bit % KERNEL_W
        hit = valid & (y >= 0) & (y < wide_height) & (z >= 0) & (z < wide_width)
        inside |= hit.to(tl.int32) << bit
    if DOUBLE:
        first = (image * in_height + (row >> 1)) * in_width + (column >> 1)
    else:
        first = (image * in_height + row) * in_width + column
    k = tl.arange(0, BLOCK_K)
    starts = x + first[:, None] * X_PITCH + k[None, :]
    if not WEIGHT_TMA:  # rows beyond the last read the last: their results are not stored
        weights = weight + tl.minimum(channel, CHANNELS - 1)[:, None] * (TAPS * IN) + k[None, :]

    part = tl.program_id(1)
    begin = TAPS * STEPS * part // PARTS
    end = TAPS * STEPS * (part + 1) // PARTS
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(begin, end):
        tap = step // STEPS
        c = (step - tap * STEPS) * BLOCK_K
        tap_y = tap // KERNEL_W
        tap_x = tap - tap_y * KERNEL_W
        if DOUBLE:  # two neighbours of an up-sampled row may be one pixel of x
            moved = (((row & 1) + tap_y) >> 1) * in_width + (((column & 1) + tap_x) >> 1)
            place = starts + (moved * X_PITCH)[:, None] + c
        else:
            place = starts + ((tap_y * in_width + tap_x) * X_PITCH + c)
        mask = (((inside >> tap) & 1) != 0)[:, None]
        if IN % BLOCK_K != 0:
            mask = mask & (c + k < IN)[None, :]
        a = tl.load(place, mask=mask, other=0.0)
        if WEIGHT_TMA:
            b = weight.load([tile_n * BLOCK_N, tap * IN + c])
        elif IN % BLOCK_K != 0:
            b = tl.load(weights + (tap * IN + c), mask=(c + k < IN)[None, :], other=0.0)
        else:
            b = tl.load(weights + (tap * IN + c))
        total = tl.dot(a, b.T, total)

    if PARTS > 1:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        _store_part(total, part, pixels, pixel, channel, valid, out, CHANNELS)
    else:
        _finish(
            total,
            pixel,
            channel,
            image,
            tile_m * BLOCK_M // (height * width),
            (tl.minimum((tile_m + 1) * BLOCK_M, pixels) - 1) // (height * width),
            valid,
            bias,
            embedding,
            residual,
            out,
            embedding_pitch,
            CHANNELS,
            RESIDUAL_PITCH,
        )


@triton.jit(
    do_not_specialize=[
        *("images", "height", "width", "grid_height", "grid_width", "in_width"),
        *("tiles", "tiles_y", "tiles_x"),
    ]
)
def implicit_product_tma(
    x,
    weight,
    tail,
    bias,
    embedding,
    residual,
    out,
    images,
    height,
    width,
    grid_height,
    grid_width,
    in_width,
    tiles,
    tiles_y,
    tiles_x,
    embedding_pitch,
    IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DOUBLE: tl.constexpr,
    RESIDUAL_PITCH: tl.constexpr,
    BOX_B: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile of BOX_B x BOX_H x BOX_W pixels x channels, over one part of the sum.

    x, weight and tail are tensor descriptors; weight and tail are both [CHANNELS, TAPS * IN], in
    blocks of BLOCK_N and TAIL_N rows, which a tile has one after the other. A tap moves the box of
    pixels that is read; pixels outside of the image come as zeros. Tiles lie on a grid of
    grid_height x grid_width pixels an image, which is

    - the output itself, x being [B, H, W, IN];
    - STRIDE 2: the output, x being [B, H/2, W/2, W + 2, IN]: rows and columns by pairs, and the
      one of a pair as an offset of 0, 1, W or W + 1 pixels;
    - DOUBLE (x up-sampled by two): x's own pixels, for each of the output's four, which tiles
      take in turn: those at one place of a pair read boxes of x.

    The product is transposed, weights x pixels: as the right operand the box, flattened in place,
    goes to the tensor cores from shared memory; as the left it would pass through registers.
    """
    BLOCK_M: tl.constexpr = BOX_B * BOX_H * BOX_W
    STEPS: tl.constexpr = IN // BLOCK_K
    tile_m, tile_n = _tile(tl.program_id(0), tiles, tl.cdiv(CHANNELS, BLOCK_N + TAIL_N), GROUP)
    first = tile_n * (BLOCK_N + TAIL_N)
    place_y = 0
    place_x = 0
    tile = tile_m
    if DOUBLE:
        place_y = tile // 2 % 2
        place_x = tile % 2
        tile = tile // 4
    first_x = tile % tiles_x * BOX_W
    first_y = tile // tiles_x % tiles_y * BOX_H
    first_b = tile // (tiles_x * tiles_y) * BOX_B

    part = tl.program_id(1)
    begin = TAPS * STEPS * part // PARTS
    end = TAPS * STEPS * (part + 1) // PARTS
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if TAIL_N:
        second = tl.zeros((TAIL_N, BLOCK_M), tl.float32)
    for step in range(begin, end):
        tap = step // STEPS
        c = (step - tap * STEPS) * BLOCK_K
        tap_y = tap // KERNEL_W
        tap_x = tap - tap_y * KERNEL_W
        y = place_y + tap_y - PADDING_H
        z = place_x + tap_x - PADDING_W
        if STRIDE == 2:
            other = (y & 1) * in_width + (z & 1)
            b = x.load([first_b, first_y + (y >> 1), first_x + (z >> 1), other, c])
        elif DOUBLE:
            b = x.load([first_b, first_y + (y >> 1), first_x + (z >> 1), c])
        else:
            b = x.load([first_b, first_y + y, first_x + z, c])
        b = b.reshape(BLOCK_M, BLOCK_K)
        a = weight.load([first, tap * IN + c])
        total = tl.dot(a, b.T, total)
        if TAIL_N:
            a = tail.load([first + BLOCK_N, tap * IN + c])
            second = tl.dot(a, b.T, second)

    m = tl.arange(0, BLOCK_M)
    image = first_b + m // (BOX_W * BOX_H)
    row = first_y + m // BOX_W % BOX_H
    column = first_x + m % BOX_W
    valid = (image < images) & (row < grid_height) & (column < grid_width)
    if DOUBLE:
        row = row * 2 + place_y
        column = column * 2 + place_x
    pixel = (image * height + row) * width + column
    last_b = tl.minimum(first_b + BOX_B, images) - 1
    channel = first + tl.arange(0, BLOCK_N)
    if TAIL_N:
        rest = first + BLOCK_N + tl.arange(0, TAIL_N)
    if PARTS > 1:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        pixels = images * height * width
        _store_part(total.T, part, pixels, pixel, channel, valid, out, CHANNELS)
        if TAIL_N:
            _store_part(second.T, part, pixels, pixel, rest, valid, out, CHANNELS)
    else:
        _finish(
            *(total.T, pixel, channel, image, first_b, last_b, valid, bias, embedding, residual),
            *(out, embedding_pitch, CHANNELS, RESIDUAL_PITCH),
        )
        if TAIL_N:
            _finish(
                *(second.T, pixel, rest, image, first_b, last_b, valid, bias, embedding, residual),
                *(out, embedding_pitch, CHANNELS, RESIDUAL_PITCH),
            )


@triton.jit(do_not_specialize=["pixels", "height", "width", "in_height", "in_width"])
def gathered_product(
    x,
    weight,
    bias,
    embedding,
    residual,
    out,
    pixels,
    height,
    width,
    in_height,
    in_width,
    embedding_pitch,
    IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    RESIDUAL_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Few input channels: one gather holds all terms of the sum, for TILES tiles of channels."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = pixel < pixels
    image = pixel // (height * width)
    row = (pixel // width) % height * STRIDE - PADDING_H
    column = pixel % width * STRIDE - PADDING_W
    k = tl.arange(0, BLOCK_K)
    y = row[:, None] + (k // IN // KERNEL_W)[None, :]
    z = column[:, None] + (k // IN % KERNEL_W)[None, :]
    term = (k < TAPS * IN)[None, :]
    mask = valid[:, None] & term & (y >= 0) & (y < in_height) & (z >= 0) & (z < in_width)
    place = ((image * in_height)[:, None] + y) * in_width + z
    a = tl.load(x + place * X_PITCH + (k % IN)[None, :], mask=mask, other=0.0)
    for tile in range(TILES):
        channel = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        b = tl.load(
            weight + channel[:, None] * (TAPS * IN) + k[None, :],
            mask=(channel < CHANNELS)[:, None] & term,
            other=0.0,
        )
        _finish(
            tl.dot(a, b.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)),
            pixel,
            channel,
            image,
            tl.program_id(0) * BLOCK_M // (height * width),
            (tl.minimum((tl.program_id(0) + 1) * BLOCK_M, pixels) - 1) // (height * width),
            valid,
            bias,
            embedding,
            residual,
            out,
            embedding_pitch,
            CHANNELS,
            RESIDUAL_PITCH,
        )


@triton.jit(do_not_specialize=["pixels"])
def tap_products(
    x,
    weight,
    products,
    pixels,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    X_PITCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`products = weight @ x^T`: weight [ROWS, IN], x [pixels, IN], products float32."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    weights = weight + tl.minimum(row, ROWS - 1)[:, None] * IN + k[None, :]
    places = x + tl.minimum(pixel, pixels - 1)[:, None] * X_PITCH + k[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for c in range(0, IN, BLOCK_K):
        if IN % BLOCK_K != 0:
            a = tl.load(weights + c, mask=(c + k < IN)[None, :], other=0.0)
            b = tl.load(places + c, mask=(c + k < IN)[None, :], other=0.0)
        else:
            a = tl.load(weights + c)
            b = tl.load(places + c)
        total = tl.dot(a, b.T, total)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    mask = (row < ROWS)[:, None] & (pixel < pixels)[None, :]
    tl.store(products + row[:, None] * pixels + pixel[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["pixels", "height", "width", "in_pixels", "in_height", "in_width"])
def sum_of_taps(
    products,
    bias,
    embedding,
    residual,
    out,
    pixels,
    height,
    width,
    in_pixels,
    in_height,
    in_width,
    embedding_pitch,
    CHANNELS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    RESIDUAL_PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Every output pixel's sum over its neighbours' products [CHANNELS * TAPS, in_pixels]."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_N)
    valid = pixel < pixels
    image = pixel // (height * width)
    row = (pixel // width) % height * STRIDE - PADDING_H
    column = pixel % width * STRIDE - PADDING_W
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.static_range(TAPS):
        y = row + tap // KERNEL_W
        z = column + tap % KERNEL_W
        hit = valid & (y >= 0) & (y < in_height) & (z >= 0) & (z < in_width)
        place = (image * in_height + y) * in_width + z
        total += tl.load(
            products + (channel * TAPS + tap)[None, :] * in_pixels + place[:, None],
            mask=hit[:, None] & (channel < CHANNELS)[None, :],
            other=0.0,
        )
    _finish(
        total,
        pixel,
        channel,
        image,
        tl.program_id(0) * BLOCK_M // (height * width),
        (tl.minimum((tl.program_id(0) + 1) * BLOCK_M, pixels) - 1) // (height * width),
        valid,
        bias,
        embedding,
        residual,
        out,
        embedding_pitch,
        CHANNELS,
        RESIDUAL_PITCH,
    )
