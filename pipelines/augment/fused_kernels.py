"""The four Triton kernels of `fused`: means for the contrast, colours, and the blur's two passes.

A program works on one tile of one crop, `[lines, columns]` of pixels with a tensor per channel.
What differs between rows (its parameters, which of the operations, their order) is read from a
table and the same for all threads of a program, so it is a branch and costs only what is taken.
Offsets within a crop are int32, the start of a crop is int64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import enum

import triton
import triton.language as tl


class Row(enum.IntEnum):
    """Columns of the table of rows, `float32 [n, 16]`."""

    FLIP = 0  # 0 or 1
    GREY = 1  # 0 or 1
    BLUR = 2  # which of the blurred rows it is, -1 if none
    LIMIT = 3  # solarize from here on; above 1 to do nothing
    ORDER = 4  # operation at position k in bits 2k and 2k + 1
    STEPS = 5  # jitter operations, 0 or 4
    BEFORE = 6  # jitter operations before the contrast
    BRIGHTNESS = 7
    CONTRAST = 8
    SATURATION = 9
    HUE = 10


ROW_COLUMNS = 16

_LINES = tl.constexpr(4)  # that are blurred at a time: 26 loads make 4 sums of 23 taps, not 92
_LEVELS = tl.constexpr(65535.0)  # of the blur's planes: fixed point, off by 1 / 131070 at most
_COLUMNS = tl.constexpr(ROW_COLUMNS)
_FLIP, _GREY, _BLUR = (tl.constexpr(int(c)) for c in (Row.FLIP, Row.GREY, Row.BLUR))
_LIMIT, _ORDER, _STEPS = (tl.constexpr(int(c)) for c in (Row.LIMIT, Row.ORDER, Row.STEPS))
_BEFORE, _BRIGHTNESS = (tl.constexpr(int(c)) for c in (Row.BEFORE, Row.BRIGHTNESS))
_CONTRAST, _SATURATION = (tl.constexpr(int(c)) for c in (Row.CONTRAST, Row.SATURATION))
_HUE = tl.constexpr(int(Row.HUE))
_TINY = tl.constexpr(1e-12)


@triton.jit
def sums(
    crops,  # uint8 [n,S,S,3]
    rows,  # float32 [n,16]
    jittered,  # float32 [j], which rows
    partial,  # float32 [n,T,3] out: sums over T = ceil(S / TILE) bands of lines
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DEEPMIND: tl.constexpr,
):
    """What the contrast needs the mean of, after the operations that come before it."""
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    band = tl.program_id(0) % TILES
    number = tl.load(jittered + tl.program_id(0) // TILES).to(tl.int32)
    row = rows + number * _COLUMNS
    crop = crops + number.to(tl.int64) * (SIZE * SIZE * 3)
    before = tl.load(row + _BEFORE).to(tl.int32)
    red = tl.zeros([TILE, TILE], tl.float32)
    green = tl.zeros([TILE, TILE], tl.float32)
    blue = tl.zeros([TILE, TILE], tl.float32)
    y = band * TILE + tl.arange(0, TILE)[:, None]
    for column in range(0, SIZE, TILE):
        x = column + tl.arange(0, TILE)[None, :]  # a mean knows no flip
        inside = (y < SIZE) & (x < SIZE)
        r, g, b = _pixels(crop, y, x, inside, SIZE)
        r, g, b = _jitter(r, g, b, row, before, 0.0, 0.0, 0.0, DEEPMIND)
        if not DEEPMIND:
            r = _grey(r, g, b)
            g, b = r, r
        red += tl.where(inside, r, 0.0)
        green += tl.where(inside, g, 0.0)
        blue += tl.where(inside, b, 0.0)
    out = partial + (number * TILES + band) * 3
    tl.store(out, tl.sum(tl.sum(red, axis=1), axis=0))
    tl.store(out + 1, tl.sum(tl.sum(green, axis=1), axis=0))
    tl.store(out + 2, tl.sum(tl.sum(blue, axis=1), axis=0))


@triton.jit
def colour(
    crops,  # uint8 [n,S,S,3]
    norm,  # float32 [6]: scale of each channel, shift of each channel
    rows,  # float32 [n,16]
    partial,  # float32 [n,T,3], of jittered rows
    planes,  # uint16 [m,3,S,S] out, of blurred rows: transposed, as the first pass wants them
    out,  # [n,S,S,3] out, of all other rows
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BANDS: tl.constexpr,  # T, rounded up to a power of 2
    DEEPMIND: tl.constexpr,
):
    """Flip, jitter, grey; and all the rest unless the row is blurred."""
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    tile = tl.program_id(0) % (TILES * TILES)
    number = tl.program_id(0) // (TILES * TILES)
    row = rows + number * _COLUMNS
    y = (tile // TILES) * TILE + tl.arange(0, TILE)[:, None]
    x = (tile % TILES) * TILE + tl.arange(0, TILE)[None, :]
    inside = (y < SIZE) & (x < SIZE)
    flip = tl.load(row + _FLIP) > 0
    start = number.to(tl.int64) * (SIZE * SIZE * 3)
    r, g, b = _pixels(crops + start, y, tl.where(flip, SIZE - 1 - x, x), inside, SIZE)

    steps = tl.load(row + _STEPS).to(tl.int32)
    bands = tl.arange(0, BANDS)
    sums_at = partial + (number * TILES + bands) * 3
    wanted = bands < tl.where(steps > 0, TILES, 0)
    mean_r = tl.sum(tl.load(sums_at, mask=wanted, other=0.0), axis=0) / (SIZE * SIZE)
    mean_g = tl.sum(tl.load(sums_at + 1, mask=wanted, other=0.0), axis=0) / (SIZE * SIZE)
    mean_b = tl.sum(tl.load(sums_at + 2, mask=wanted, other=0.0), axis=0) / (SIZE * SIZE)
    r, g, b = _jitter(r, g, b, row, steps, mean_r, mean_g, mean_b, DEEPMIND)
    if tl.load(row + _GREY) > 0:
        r = _grey(r, g, b)
        g, b = r, r

    blurred = tl.load(row + _BLUR).to(tl.int32)
    if blurred >= 0:
        plane = planes + blurred.to(tl.int64) * (SIZE * SIZE * 3) + (x * SIZE + y)
        tl.store(plane, _level(r * _LEVELS), mask=inside)
        tl.store(plane + SIZE * SIZE, _level(g * _LEVELS), mask=inside)
        tl.store(plane + 2 * SIZE * SIZE, _level(b * _LEVELS), mask=inside)
    else:
        limit = tl.load(row + _LIMIT)
        at = out + start + (y * SIZE + x) * 3
        tl.store(at, _finish(r, limit, norm), mask=inside)
        tl.store(at + 1, _finish(g, limit, norm + 1), mask=inside)
        tl.store(at + 2, _finish(b, limit, norm + 2), mask=inside)


@triton.jit
def blur(
    source,  # uint16 [m,3,S,S]
    target,  # LAST: [n,S,S,3], else uint16 [m,3,S,S] and transposed
    norm,  # float32 [6]
    rows,  # float32 [n,16]
    blurs,  # float32 [m,WIDTH]: which row, how many taps reach each way, taps from the centre
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEPMIND: tl.constexpr,
    LAST: tl.constexpr,
):
    """One pass along the planes' lines, which is the axis that is not contiguous.

    Four sums are kept, for lines l to l + 3 of each group. Each line is loaded once and added to
    all four, with four neighbouring taps, which move on by one for the next line.
    """
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    channel = tl.program_id(0) % 3
    tile = tl.program_id(0) // 3 % (TILES * TILES)
    number = tl.program_id(0) // (3 * TILES * TILES)
    first_line = (tile // TILES) * TILE
    columns = (tile % TILES) * TILE + tl.arange(0, TILE)
    groups = first_line + tl.arange(0, TILE // _LINES) * _LINES
    within = columns < SIZE
    plane = source + (number * 3 + channel).to(tl.int64) * (SIZE * SIZE)
    reach = tl.load(blurs + number * WIDTH + 1).to(tl.int32)
    taps = blurs + number * WIDTH + 2

    sum0 = tl.zeros([TILE // _LINES, TILE], tl.float32)
    sum1 = tl.zeros([TILE // _LINES, TILE], tl.float32)
    sum2 = tl.zeros([TILE // _LINES, TILE], tl.float32)
    sum3 = tl.zeros([TILE // _LINES, TILE], tl.float32)
    tap1 = tl.zeros([], tl.float32)
    tap2 = tl.zeros([], tl.float32)
    tap3 = tl.zeros([], tl.float32)
    for step in range(-reach, reach + _LINES):
        tap0 = tl.load(taps + tl.abs(step), mask=step <= reach, other=0.0)
        line = groups + step
        if not DEEPMIND:  # reflect; with zeros around it otherwise
            line = tl.where(line < 0, -line, line)
            line = tl.where(line >= SIZE, 2 * (SIZE - 1) - line, line)
        known = (line >= 0) & (line < SIZE)
        at = plane + (line[:, None] * SIZE + columns[None, :])
        x = _number(tl.load(at, mask=known[:, None] & within[None, :], other=0))
        sum0 += tap0 * x
        sum1 += tap1 * x
        sum2 += tap2 * x
        sum3 += tap3 * x
        tap3 = tap2
        tap2 = tap1
        tap1 = tap0

    # [groups, columns, high, low] to [lines, columns]; line = 4 group + 2 high + low
    x = tl.join(tl.join(sum0, sum2), tl.join(sum1, sum3))
    x = tl.reshape(tl.permute(x, (0, 2, 3, 1)), [TILE, TILE])
    lines = first_line + tl.arange(0, TILE)
    inside = (lines < SIZE)[:, None] & within[None, :]
    if LAST:
        row = tl.load(blurs + number * WIDTH).to(tl.int32)
        limit = tl.load(rows + row * _COLUMNS + _LIMIT)
        at = target + row.to(tl.int64) * (SIZE * SIZE * 3) + channel
        at += (lines[:, None] * SIZE + columns[None, :]) * 3
        tl.store(at, _finish(x * (1.0 / _LEVELS), limit, norm + channel), mask=inside)
    else:
        at = target + (number * 3 + channel).to(tl.int64) * (SIZE * SIZE)
        at += columns[None, :] * SIZE + lines[:, None]
        tl.store(at, _level(x), mask=inside)


@triton.jit
def _pixels(crop, y, x, inside, SIZE: tl.constexpr):
    """Red, green and blue in [0, 1]."""
    at = crop + (y * SIZE + x) * 3
    r = _number(tl.load(at, mask=inside, other=0)) * (1.0 / 255.0)
    g = _number(tl.load(at + 1, mask=inside, other=0)) * (1.0 / 255.0)
    b = _number(tl.load(at + 2, mask=inside, other=0)) * (1.0 / 255.0)
    return r, g, b


@triton.jit
def _jitter(r, g, b, row, steps, mean_r, mean_g, mean_b, DEEPMIND: tl.constexpr):
    """The first `steps` operations of a row's order, each clipped to [0, 1]."""
    order = tl.load(row + _ORDER).to(tl.int32)
    for step in range(steps):
        operation = (order >> (2 * step)) & 3
        if operation == 0:
            amount = tl.load(row + _BRIGHTNESS)
            if DEEPMIND:
                r, g, b = r + amount, g + amount, b + amount
            else:
                r, g, b = r * amount, g * amount, b * amount
        elif operation == 1:
            amount = tl.load(row + _CONTRAST)
            r = amount * r + (1.0 - amount) * mean_r
            g = amount * g + (1.0 - amount) * mean_g
            b = amount * b + (1.0 - amount) * mean_b
        elif operation == 2:
            amount = tl.load(row + _SATURATION)
            if DEEPMIND:
                r, g, b = _scale_hsv_saturation(r, g, b, amount)
            else:
                grey = (1.0 - amount) * _grey(r, g, b)
                r, g, b = amount * r + grey, amount * g + grey, amount * b + grey
        else:
            r, g, b = _shift_hue(r, g, b, tl.load(row + _HUE))
        r, g, b = _clip(r), _clip(g), _clip(b)
    return r, g, b


@triton.jit
def _scale_hsv_saturation(r, g, b, factor):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    growth = tl.minimum(factor, value / tl.maximum(chroma, _TINY))
    return value + growth * (r - value), value + growth * (g - value), value + growth * (b - value)


@triton.jit
def _shift_hue(r, g, b, turns):
    """As the reference: hue in sixths of the circle, each channel from its distance to it."""
    value = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    chroma = value - low
    over = tl.where(value == g, b - r + 2.0 * chroma, r - g + 4.0 * chroma)
    over = tl.where(value == r, g - b, over)
    hue = over / tl.maximum(chroma, _TINY) + 6.0 * turns
    hue -= 6.0 * tl.floor(hue * (1.0 / 6.0))
    r = low + chroma * _clip(tl.abs(hue - 3.0) - 1.0)
    g = low + chroma * _clip(2.0 - tl.abs(hue - 2.0))
    b = low + chroma * _clip(2.0 - tl.abs(hue - 4.0))
    return r, g, b


@triton.jit
def _grey(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


# A float of 2^23 + k, k < 2^16, holds k in its low 16 bits. That makes conversions additions, which
# run four times as fast as the instructions that convert.
@triton.jit
def _number(level):
    """uint8 or uint16 to float32."""
    return (level.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _level(x):
    """float32 in [0, 65535.4] to the nearest uint16."""
    return (x + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint16)


@triton.jit
def _finish(x, limit, norm):
    """Solarize, clip, normalise; `norm` points to a channel's scale, its shift is 3 further."""
    x = _clip(tl.where(x < limit, x, 1.0 - x))
    return x * tl.load(norm) + tl.load(norm + 3)
