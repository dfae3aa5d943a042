"""Images with boxes, as both formats are read into; a sample for the detector made of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byol_fast.evaluate.dense.images import read_image
from byol_fast.evaluate.dense.stream import generator

F32 = npt.NDArray[np.float32]
Sample = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One image and its objects."""

    id: str | int
    image: Path
    height: int
    width: int
    boxes: F32  # [n, 4]: left, top, right, bottom in pixels, right and bottom exclusive
    labels: npt.NDArray[np.int64]  # [n], from 1 on
    difficult: npt.NDArray[np.bool_]  # [n]; trained on, and neither hit nor miss in the test
    segments: tuple[Any, ...] = ()  # COCO polygons or run lengths, one for each box


@dataclass(frozen=True, kw_only=True)
class DetectionSet:
    """Annotated images of one or more sets."""

    images: tuple[Annotated, ...]
    classes: tuple[str, ...]  # label 1 is the first
    fingerprint: str
    left_out: tuple[str, ...] = ()  # annotations that were dropped, each with file and reason
    source: Path | None = None  # the annotation file, where there is one


def fit_box(box: F32, height: int, width: int) -> tuple[F32 | None, str]:
    """The part of a box inside the image, or None and what is wrong with it."""
    if not np.isfinite(box).all():
        return None, "a coordinate is no number"
    if box[2] <= box[0] or box[3] <= box[1]:
        return None, "the box is empty"
    inside = np.clip(box, 0, np.array([width, height, width, height], np.float32))
    if inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1:
        return None, f"the box has less than a pixel inside the image ({width}×{height})"
    return inside.astype(np.float32), ""


def training_images(data: DetectionSet) -> list[Annotated]:
    """Those with at least one object, as detectron2 and MMDetection take them."""
    return [image for image in data.images if len(image.boxes)]


def training_sample(
    image: Annotated,
    place: int,
    seed: int,
    masks: Callable[[Annotated], npt.NDArray[np.uint8]] | None = None,
) -> Sample:
    """Pixels `[3, H, W]` uint8 and targets, flipped in half of the cases.

    The detector itself resizes and normalises.

    Args:
        masks: gives `[n, H, W]` of 0 and 1 for the image's objects.
    """
    pixels = torch.from_numpy(read_image(image.image, (image.height, image.width)))
    x = pixels.permute(2, 0, 1)
    target = {"boxes": torch.from_numpy(image.boxes), "labels": torch.from_numpy(image.labels)}
    if masks is not None:
        target["masks"] = torch.from_numpy(masks(image))
    if generator(seed, place).random() < 0.5:
        x = x.flip(-1)
        left, top, right, bottom = target["boxes"].unbind(1)
        target["boxes"] = torch.stack((image.width - right, top, image.width - left, bottom), 1)
        if masks is not None:
            target["masks"] = target["masks"].flip(-1)
    return x.contiguous(), target
