"""A training crop for segmentation, as MMSegmentation's pipeline makes it.

Resize by a random factor, crop, flip, distort the colours, normalise, pad.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from byol_fast.evaluate.dense.images import Pixels
from byol_fast.evaluate.dense.masks import IGNORE
from byol_fast.evaluate.dense.recipes import SegmentationRecipe

_TRIES = 10


def training_crop(
    pixels: Pixels,
    label: Pixels,
    recipe: SegmentationRecipe,
    random: np.random.Generator,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Normalised pixels `[3, S, S]` and classes `[S, S]` (int64) with S = `recipe.crop`.

    Pixels beyond the image are 0 after normalisation, and IGNORE.
    """
    factor = random.uniform(*recipe.scales)
    height, width = scaled_size(label.shape[0], label.shape[1], recipe.resize_to, factor)
    label = _nearest(label, height, width)
    top, left = _window(label, recipe, random)
    side = recipe.crop
    label = label[top : top + side, left : left + side]
    x = resize(torch.from_numpy(pixels).permute(2, 0, 1), height, width)
    x = x[:, top : top + side, left : left + side]
    if random.random() < 0.5:
        x, label = x.flip(-1), label[:, ::-1]
    x = normalise(distort(x.float(), random) / 255, mean, std)
    padding = (0, side - x.shape[2], 0, side - x.shape[1])
    classes = torch.from_numpy(label.astype(np.int64))
    return F.pad(x, padding), F.pad(classes, padding, value=IGNORE)


def scaled_size(
    height: int, width: int, to: tuple[int, int], factor: float = 1.0
) -> tuple[int, int]:
    """Height and width once fitted into `to` (longest, shortest side) times `factor`."""
    scale = min(
        int(max(to) * factor) / max(height, width), int(min(to) * factor) / min(height, width)
    )
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """uint8 `[3, H, W]` to another size, bilinear without antialiasing."""
    size = (height, width)
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`[3, H, W]` in 0…1 to what the network was trained on."""
    shift, scale = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (mean, std))
    return (x - shift) / scale


def distort(x: Tensor, random: np.random.Generator) -> Tensor:
    """Colours of `[3, H, W]` in 0…255 changed, each of the four with probability ½.

    Brightness ±32; contrast, saturation (S of HSV) ×(.5 … 1.5); hue ±18 of 180. Contrast comes
    either before or after saturation and hue.
    """
    changes = random.random(4) < 0.5
    early = random.random() < 0.5
    brightness, contrast = random.uniform(-32, 32), random.uniform(0.5, 1.5)
    saturation, hue = random.uniform(0.5, 1.5), int(random.integers(-18, 18)) / 180
    if changes[0]:
        x = (x + brightness).clamp(0, 255)
    if changes[1] and early:
        x = (x * contrast).clamp(0, 255)
    if changes[2]:
        x = _saturate(x, saturation)
    if changes[3]:
        x = colour.adjust_hue(x / 255, hue) * 255
    if changes[1] and not early:
        x = (x * contrast).clamp(0, 255)
    return x


def _saturate(x: Tensor, factor: float) -> Tensor:
    """S := min(factor · S, 1) with hue and value kept: channels move from the largest."""
    value = x.amax(0, keepdim=True)
    chroma = value - x.amin(0, keepdim=True)
    growth = torch.clamp_max(value / chroma.clamp_min(1e-6), factor)
    return value - (value - x) * growth


def _window(
    label: Pixels, recipe: SegmentationRecipe, random: np.random.Generator
) -> tuple[int, int]:
    """Top and left of a crop in which no class has nearly everything, if ten tries find one."""
    side = recipe.crop
    top = left = 0
    for _ in range(_TRIES):
        top = int(random.integers(max(label.shape[0] - side, 0) + 1))
        left = int(random.integers(max(label.shape[1] - side, 0) + 1))
        counts = np.bincount(label[top : top + side, left : left + side].ravel(), minlength=256)
        counts = counts[:IGNORE][counts[:IGNORE] > 0]
        if len(counts) > 1 and counts.max() / counts.sum() < recipe.most_of_one_class:
            break
    return top, left


def _nearest(label: Pixels, height: int, width: int) -> Pixels:
    rows = ((np.arange(height) + 0.5) * label.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * label.shape[1] / width).astype(np.int64)
    picked: Pixels = label[rows[:, None], columns[None]]
    return picked
