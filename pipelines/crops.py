"""Crop geometry: which window of an image a view shows. Arrays in, arrays out; no pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.rng import CROP_TRIES, F64, Draws, Slot
from pipelines.spec import Semantics, ViewSpec

Windows = npt.NDArray[np.int32]


def draw_windows(draws: Draws, view: ViewSpec, sizes: F64, semantics: Semantics) -> Windows:
    """Random resized crops `[n, 4]` (top, left, height, width) of images of `sizes` `[n, 2]`.

    `deepmind` draws once and clamps to the image (`_decode_and_random_crop` of the authors'
    dataset.py); `torchvision` draws up to ten times until a window fits, else takes a centred one
    with the aspect ratio clamped (`RandomResizedCrop.get_params`).
    """
    if semantics == "deepmind":
        height, width = _box(draws, view, sizes, attempt=0)
        height, width = np.clip(height, 1, sizes[:, 0]), np.clip(width, 1, sizes[:, 1])
        centred = np.zeros(len(sizes), dtype=bool)
    else:
        height, width, centred = _first_fit(draws, view, sizes)
    room_y, room_x = sizes[:, 0] - height, sizes[:, 1] - width
    top = np.where(centred, room_y // 2, np.floor(draws(Slot.TOP) * (room_y + 1)))
    left = np.where(centred, room_x // 2, np.floor(draws(Slot.LEFT) * (room_x + 1)))
    return np.stack([top, left, height, width], axis=1).astype(np.int32)


def _box(draws: Draws, view: ViewSpec, sizes: F64, attempt: int) -> tuple[F64, F64]:
    """Height and width of one draw: area uniform, aspect uniform in log space, rounded."""
    (small, large), (low, high) = view.crop_area, np.log(view.crop_aspect)
    area = sizes[:, 0] * sizes[:, 1] * (small + (large - small) * draws(Slot.AREA + attempt))
    aspect = np.exp(low + (high - low) * draws(Slot.ASPECT + attempt))
    return np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))


def _first_fit(draws: Draws, view: ViewSpec, sizes: F64) -> tuple[F64, F64, npt.NDArray[np.bool_]]:
    """Height, width, and where the centred fallback was needed: each `[n]`."""
    height, width = np.zeros(len(sizes)), np.zeros(len(sizes))
    todo = np.arange(len(sizes))
    for attempt in range(CROP_TRIES):
        h, w = _box(draws.subset(todo), view, sizes[todo], attempt)
        fits = (h > 0) & (h <= sizes[todo, 0]) & (w > 0) & (w <= sizes[todo, 1])
        height[todo[fits]], width[todo[fits]] = h[fits], w[fits]
        todo = todo[~fits]
        if not len(todo):
            break
    h, w = sizes[todo, 0], sizes[todo, 1]
    low, high = view.crop_aspect
    height[todo] = np.clip(np.where(w / h < low, np.rint(w / low), h), 1, h)
    width[todo] = np.clip(np.where(w / h > high, np.rint(h * high), w), 1, w)
    centred = np.zeros(len(sizes), dtype=bool)
    centred[todo] = True
    return height, width, centred


def centre_windows(sizes: npt.ArrayLike, crop_share: float = 0.875) -> Windows:
    """The authors' evaluation crop `[n, 1, 4]`: a centred square of 0.875 of the short side.

    A 375 x 500 image gives 328 pixels at (24, 86).
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    side = np.maximum((crop_share * sizes.min(axis=1)).astype(np.int64), 1)
    top, left = (sizes[:, 0] - side + 1) // 2, (sizes[:, 1] - side + 1) // 2
    return np.stack([top, left, side, side], axis=1).astype(np.int32)[:, None]
