"""Flip, jitter, grey, blur, solarize, normalise: the colour table carried out in plain torch.

Nothing is drawn here. All arithmetic is float32 on [0, 1]. Sources: the authors'
`byol/utils/augmentations.py` ("deepmind" semantics) and torchvision's float operations
("torchvision" semantics).

Rows of the batch are sorted by their order of jitter operations and worked through in chunks that
stay in the cache; an operation runs on the rows that need it and on no others. On a CPU a row's
result does not depend, to the last bit, on the rows beside it: there are only elementwise
operations and sums within a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.spec import JITTER_ORDERS, AugmentSpec, Colour, Semantics

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # they sum to .9999, in both semantics
_TINY = 1e-12  # keeps 0 / 0 out where all channels are equal
# Floats of a chunk. CPU: 2 MB, three rows of 224 pixels; twice or half of it is up to 30% slower.
_CHUNK_CPU, _CHUNK_DEVICE = 1 << 19, 1 << 26

Table = npt.NDArray[np.float32]


@torch.no_grad()
def apply(
    crops: Tensor,  # uint8 [V,B,S,S,3]
    colours: Tensor,  # float32 [B,V,len(Colour)]
    spec: AugmentSpec,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The views as the network gets them: `[V,B,3,S,S]` on the crops' device.

    Order: flip, jitter (each row's own order, clipped to [0, 1] after each operation), grey, blur,
    solarize, clip, normalise by `spec.mean` and `spec.std`, cast to `dtype`. Every `out[v]` is
    channels_last in memory. Below S = 20 the blur's radius is 0: it changes nothing.

    The table steers the work from the host: given there, as the plan makes it, no GPU is waited
    for; a table on the GPU costs one synchronisation.

    Raises:
        ValueError: a shape or dtype differs from the above, or S from `spec.image_size`.
    """
    check_crops(crops, spec)
    table = host_table(colours, crops)
    views, batch, size = crops.shape[:3]
    ranking = np.argsort(np.where(table[:, Colour.JITTER] > 0, table[:, Colour.ORDER], -1))
    table = table[ranking]
    thresholds = np.array([view.solarize_threshold for view in spec.views], dtype=np.float32)
    thresholds = thresholds[ranking // batch]  # row v * B + b belongs to view v

    rows, flat = _to(ranking, crops.device), crops.flatten(0, 1)
    out = torch.empty((views * batch, size, size, 3), dtype=dtype, device=crops.device)
    floats = _CHUNK_CPU if crops.device.type == "cpu" else _CHUNK_DEVICE
    limit = max(1, floats // (3 * size**2))
    for start in range(0, len(table), limit):
        chunk = slice(start, start + limit)
        # one plane per channel: a loop over three interleaved floats would not vectorise
        x = flat.index_select(0, rows[chunk]).permute(0, 3, 1, 2).contiguous().div(255)
        _colour_(x, table[chunk], thresholds[chunk], spec)
        for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
            x[:, channel].sub_(mean).div_(std)
        out.index_copy_(0, rows[chunk], x.to(dtype).permute(0, 2, 3, 1).contiguous())
    return out.view(views, batch, size, size, 3).permute(0, 1, 4, 2, 3)


@torch.no_grad()
def normalise(
    crops: Tensor,  # uint8 [V,B,S,S,3]
    spec: AugmentSpec,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """For evaluation: `[V,B,3,S,S]`, each `out[v]` channels_last, only scaled and normalised.

    Raises:
        ValueError: as `apply`.
    """
    check_crops(crops, spec)
    size = crops.shape[2]
    # constants for a line of pixels at once, again so that the loop vectorises
    mean, std = (
        _to(np.tile(np.array(values, dtype=np.float32), size), crops.device)
        for values in (spec.mean, spec.std)
    )
    x = crops.flatten(-2).to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)
    return x.view(crops.shape).permute(0, 1, 4, 2, 3)


def blur_taps(sigma: Table, radius: int) -> Table:
    """One-sided Gaussian taps `[n, radius + 1]`, centre first; both sides together sum to 1.

    `sigma` is `[n]` in pixels; 0 gives (1, 0, 0, ...). In float64, so exact once rounded.
    """
    scale = np.maximum(sigma.astype(np.float64), 1e-3)[:, None]
    taps = np.exp(-0.5 * (np.arange(radius + 1) / scale) ** 2)
    taps /= 2 * taps.sum(axis=1, keepdims=True) - taps[:, :1]
    return taps.astype(np.float32)


def check_crops(crops: Tensor, spec: AugmentSpec) -> None:
    """Raises ValueError unless crops are uint8 `[V,B,S,S,3]` that `spec` can be applied to."""
    side = spec.image_size
    fits = crops.ndim == 5 and crops.shape[0] <= len(spec.views)
    if not fits or crops.shape[2:] != (side, side, 3) or crops.dtype != torch.uint8:
        raise ValueError(
            f"crops must be uint8 [V,B,S,S,3] with at most {len(spec.views)} views and "
            f"S = image_size = {side}, got {crops.dtype} {list(crops.shape)}"
        )


def host_table(colours: Tensor, crops: Tensor) -> Table:
    """The colour table on the host, `[V * B, len(Colour)]` as the crops lie; else a ValueError."""
    views, batch = crops.shape[:2]
    if colours.shape != (batch, views, len(Colour)):
        raise ValueError(
            f"colours must be [B,V,{len(Colour)}] = {[batch, views, len(Colour)]} for these crops, "
            f"got {list(colours.shape)}"
        )
    table: Table = colours.detach().to("cpu", torch.float32).transpose(0, 1).flatten(0, 1).numpy()
    return table


def _to(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _colour_(x: Tensor, table: Table, thresholds: Table, spec: AugmentSpec) -> None:
    """Everything but normalisation, in place, on rows x `[n,3,S,S]`; table `[n,len(Colour)]`."""
    amounts = _to(table, x.device)[:, :, None, None, None]  # amounts[:, column] is [n,1,1,1]
    orders = np.array(JITTER_ORDERS)[table[:, Colour.ORDER].astype(np.int64)]
    orders[table[:, Colour.JITTER] == 0] = -1

    _at(table[:, Colour.FLIP] > 0, x, _flip_)
    for position in range(orders.shape[1]):
        for operation in range(orders.shape[1]):
            jitter = partial(_jitter_, operation=operation, semantics=spec.semantics)
            column = Colour.BRIGHTNESS + operation
            _at(orders[:, position] == operation, x, jitter, amounts[:, column])
    _at(table[:, Colour.GREY] > 0, x, _to_grey_)
    if spec.blur_radius:
        blur = partial(_blur_, pad="constant" if spec.semantics == "deepmind" else "reflect")
        taps = _to(blur_taps(table[:, Colour.SIGMA], spec.blur_radius), x.device)
        _at(table[:, Colour.SIGMA] > 0, x, blur, taps[:, :, None, None, None])
    limits = _to(thresholds, x.device)[:, None, None, None]
    _at(table[:, Colour.SOLARIZE] > 0, x, _solarize_, limits)
    x.clamp_(0, 1)


def _at(
    chosen: npt.NDArray[np.bool_],  # [n], known on the host
    x: Tensor,
    operation: Callable[..., None],
    *values: Tensor,  # [n, ...]
) -> None:
    """`operation(x, *values)`, which works in place, on the chosen rows only."""
    index = np.flatnonzero(chosen)
    if not len(index):
        return
    if index[-1] - index[0] + 1 == len(index):  # neighbours, thanks to the sort: no copies
        part = slice(int(index[0]), int(index[-1]) + 1)
        operation(x[part], *(value[part] for value in values))
        return
    rows = _to(index, x.device)
    copy = x.index_select(0, rows)
    operation(copy, *(value.index_select(0, rows) for value in values))
    x.index_copy_(0, rows, copy)


def _flip_(x: Tensor) -> None:
    x.copy_(x.flip(-1))


def _jitter_(x: Tensor, amount: Tensor, *, operation: int, semantics: Semantics) -> None:
    """One of the operations of `JITTER_ORDERS`, clipped; x `[n,3,S,S]`, amount `[n,1,1,1]`."""
    match operation, semantics:
        case 0, "deepmind":
            x.add_(amount)
        case 0, "torchvision":
            x.mul_(amount)
        case 1, "deepmind":
            _blend_(x, _mean(x), amount)
        case 1, "torchvision":
            _blend_(x, _mean(_grey(x)), amount)
        case 2, "deepmind":
            _scale_hsv_saturation_(x, amount)
        case 2, "torchvision":
            _blend_(x, _grey(x), amount)
        case _:
            _shift_hue_(x, amount)
    x.clamp_(0, 1)


def _blend_(x: Tensor, other: Tensor, factor: Tensor) -> None:
    """factor * x + (1 - factor) * other: away from `other` where factor > 1."""
    x.mul_(factor).add_(other * (1 - factor))


def _mean(x: Tensor) -> Tensor:
    """Mean over the pixels, `[n,C,1,1]`.

    In two steps: torch cuts one long sum between its threads, but a sum of many not.
    """
    return x.mean(-1, keepdim=True).mean(-2, keepdim=True)


def _grey(x: Tensor) -> Tensor:
    """Weighted sum of the channels, `[n,1,S,S]`."""
    red, green, blue = (c * weight for c, weight in zip(_planes(x), _GREY_WEIGHTS, strict=True))
    return red.add_(green).add_(blue)


def _planes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Red, green and blue, `[n,1,S,S]` each, as views."""
    return x[:, 0:1], x[:, 1:2], x[:, 2:3]


def _to_grey_(x: Tensor) -> None:
    x.copy_(_grey(x).expand_as(x))


def _value_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest channel, and largest minus smallest: HSV's value and its saturation * value."""
    red, green, blue = _planes(x)
    value = torch.maximum(red, green).clamp_min_(blue)
    return value, value - torch.minimum(red, green).clamp_max_(blue)


def _scale_hsv_saturation_(x: Tensor, factor: Tensor) -> None:
    """S := clip(factor * S, 0, 1), with S = chroma / value.

    Hue and value stay, so each channel's distance from the value grows as S does: the same as the
    way to HSV and back, without a hue.
    """
    value, chroma = _value_and_chroma(x)
    growth = torch.minimum(factor, value / chroma.clamp_min_(_TINY))
    x.sub_(value).mul_(growth).add_(value)


def _shift_hue_(x: Tensor, turns: Tensor) -> None:
    """H := (H + turns) mod 1, S and V stay.

    Hue is counted in sixths of the circle: red 0, green 2, blue 4. A channel is full within one
    sixth of its own hue and lowest from two sixths on, so it follows from that distance alone.
    """
    red, green, blue = _planes(x)
    value, chroma = _value_and_chroma(x)
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue.div_(chroma.clamp_min(_TINY)).add_(6 * turns)
    hue.sub_((hue / 6).floor_().mul_(6))  # into [0, 6]
    low = value.sub_(chroma)
    # 2 - distance; red lies at both ends of the scale
    red.copy_((hue - 3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low))
    green.copy_((hue - 2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low))
    blue.copy_((hue - 4).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low))


def _blur_(x: Tensor, taps: Tensor, *, pad: str) -> None:
    """Separable blur; taps `[n,radius + 1,1,1,1]` from the centre outwards.

    A loop over taps: 0.7 ms per row of 224 pixels on two cores, where a grouped convolution takes
    0.9 to 2 ms and a product with band matrices 0.9.
    """
    radius, size = taps.shape[1] - 1, x.shape[-1]
    blurred = x
    for axis in (-1, -2):
        sides = (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius)
        padded = F.pad(blurred, sides, mode=pad)
        blurred = padded.narrow(axis, radius, size) * taps[:, 0]
        for tap in range(1, radius + 1):
            pair = padded.narrow(axis, radius - tap, size) + padded.narrow(axis, radius + tap, size)
            blurred.addcmul_(pair, taps[:, tap])
    x.copy_(blurred)


def _solarize_(x: Tensor, threshold: Tensor) -> None:
    x.copy_(torch.where(x < threshold, x, 1 - x))
