"""The two views as data: what is drawn for a view, and with which meaning.

Every backend reads these values; none owns a probability. Source: BYOL paper, appendix B, table 6,
and the authors' `byol/utils/augmentations.py` and `dataset.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

Semantics = Literal["deepmind", "torchvision"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Ranges and probabilities of one view. Probabilities in [0, 1]; strengths are half-widths."""

    crop_area: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, uniform in log space
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # in turns of the colour circle
    grey: float = 0.2
    blur: float
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop
    solarize: float
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarize"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")
        low, high = self.crop_area
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"crop_area must satisfy 0 < low <= high <= 1, got {self.crop_area}")
        if not 0.0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ValueError(f"crop_aspect must satisfy 0 < low <= high, got {self.crop_aspect}")
        if not 0.0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must satisfy 0 < low <= high, got {self.blur_sigma}")
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            raise ValueError("jitter strengths must be >= 0, and hue in [0, 0.5]")


# The two views differ in two entries.
VIEW1 = ViewSpec(blur=1.0, solarize=0.0)
VIEW2 = ViewSpec(blur=0.1, solarize=0.2)


@dataclass(frozen=True, kw_only=True)
class AugmentSpec:
    """Everything that turns one image into its two views."""

    image_size: int = 224  # S, pixels
    views: tuple[ViewSpec, ViewSpec] = (VIEW1, VIEW2)
    semantics: Semantics = "deepmind"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, got {self.image_size}")
        if self.semantics not in get_args(Semantics):
            raise ValueError(f"semantics is deepmind or torchvision, got {self.semantics!r}")

    @property
    def blur_radius(self) -> int:
        """Taps on each side of the blur's centre: int(S / 10 / 2), so 23 taps at S = 224."""
        return int(self.image_size / 10 / 2)


class Colour(IntEnum):
    """Columns of the plan's colour table `[n, 2, len(Colour)]` (float32).

    BRIGHTNESS is added under `deepmind` semantics and multiplied under `torchvision`; CONTRAST and
    SATURATION are factors, HUE a shift in turns, ORDER an index into JITTER_ORDERS, SIGMA the
    blur's standard deviation in pixels with 0 for "no blur"; FLIP, JITTER, GREY, SOLARIZE are 0/1.
    """

    FLIP = 0
    JITTER = 1
    ORDER = 2
    BRIGHTNESS = 3
    CONTRAST = 4
    SATURATION = 5
    HUE = 6
    GREY = 7
    SIGMA = 8
    SOLARIZE = 9


# 0 brightness, 1 contrast, 2 saturation, 3 hue
JITTER_ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))
