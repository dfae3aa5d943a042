"""Images with a class for each pixel: VOC 2012 with the extra annotations, and Cityscapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from byol_fast.evaluate.dense.images import Pixels, fingerprint, read_image, read_lines, refuse
from byol_fast.evaluate.dense.voc import CLASSES as VOC_THINGS
from byol_fast.evaluate.dense.voc import devkit
from pipelines.errors import DataError

IGNORE = 255
_UNKNOWN = 254
VOC_CLASSES = ("background", *VOC_THINGS)
# Cityscapes' labels that are evaluated, in the order of their training numbers.
CITYSCAPES = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17},
    **{"traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23},
    **{"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31},
    **{"motorcycle": 32, "bicycle": 33},
}
_CITYSCAPES_LABELS = 34  # 0 … 33; −1, a licence plate, is stored as 255


@dataclass(frozen=True)
class Pair:
    """An image and its labels."""

    id: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True)
class SegmentationSet:
    """Pairs of one or more sets."""

    pairs: tuple[Pair, ...]
    classes: tuple[str, ...]
    numbers: npt.NDArray[np.uint8]  # [256]: stored label -> class, IGNORE or _UNKNOWN
    fingerprint: str


def read(data: str, root: Path | str, sets: tuple[str, ...]) -> SegmentationSet:
    """The sets of `voc12aug` or `cityscapes`; raises as `read_voc` and `read_cityscapes`."""
    return read_voc(root, sets) if data == "voc12aug" else read_cityscapes(root, sets)


def read_voc(root: Path | str, sets: tuple[str, ...]) -> SegmentationSet:
    """Sets of `VOC2012/ImageSets/Segmentation`, such as `train`, `aug` or `val`.

    Labels are taken from `SegmentationClass`, else from `SegmentationClassAug`, where the extra
    annotations lie.

    Raises:
        DataError: a list, an image or a label is missing, or the lists are empty.
    """
    base = devkit(root) / "VOC2012"
    pairs: dict[str, Pair] = {}
    problems = []
    for name in sets:
        listing = base / "ImageSets" / "Segmentation" / f"{name}.txt"
        for identity in read_lines(listing, f"the image list of {name}"):
            image = base / "JPEGImages" / f"{identity}.jpg"
            labels = [base / f"SegmentationClass{x}" / f"{identity}.png" for x in ("", "Aug")]
            found = [label for label in labels if label.is_file()]
            if not image.is_file():
                problems.append(f"image {image} is missing, {listing.name} lists it")
            elif not found:
                problems.append(f"label {labels[0]} is missing, and in SegmentationClassAug too")
            else:
                pairs[identity] = Pair(identity, image, found[0])
    numbers = np.full(256, _UNKNOWN, np.uint8)
    numbers[: len(VOC_CLASSES)] = np.arange(len(VOC_CLASSES))
    return _complete(base, list(pairs.values()), problems, VOC_CLASSES, numbers)


def read_cityscapes(root: Path | str, sets: tuple[str, ...]) -> SegmentationSet:
    """Sets of Cityscapes, `train` and `val`, with the labels as `gtFine/*_labelIds.png`.

    Raises:
        DataError: a set has no images, or a label is missing.
    """
    base = Path(root)
    pairs, problems = [], []
    for name in sets:
        images = sorted((base / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))
        if not images:
            raise DataError(
                f"{base / 'leftImg8bit' / name} holds no CITY/*_leftImg8bit.png: name the folder "
                "that has leftImg8bit and gtFine with --data"
            )
        for image in images:
            identity = image.name.removesuffix("_leftImg8bit.png")
            label = base / "gtFine" / name / image.parent.name / f"{identity}_gtFine_labelIds.png"
            if label.is_file():
                pairs.append(Pair(identity, image, label))
            else:
                problems.append(f"label {label} is missing")
    numbers = np.full(256, _UNKNOWN, np.uint8)
    numbers[:_CITYSCAPES_LABELS] = IGNORE
    for number, stored in enumerate(CITYSCAPES.values()):
        numbers[stored] = number
    return _complete(base, pairs, problems, tuple(CITYSCAPES), numbers)


def read_label(pair: Pair, data: SegmentationSet) -> Pixels:
    """The classes of an image's pixels `[H, W]`, IGNORE where there is none.

    Raises:
        DataError: it is no single-channel PNG, or has a label that is no class.
    """
    try:
        with Image.open(pair.label, formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise DataError(
                    f"label {pair.label} is stored as {image.mode}: class numbers need a palette "
                    "or one grey channel of 8 bits"
                )
            stored = np.asarray(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"label {pair.label} cannot be decoded: {error}") from error
    classes: Pixels = data.numbers[stored]
    if (classes == _UNKNOWN).any():
        wrong = int(stored[classes == _UNKNOWN][0])
        raise DataError(f"label {pair.label} has the value {wrong}, which is no class")
    return classes


def read_pair(pair: Pair, data: SegmentationSet) -> tuple[Pixels, Pixels]:
    """Pixels `[H, W, 3]` and their classes `[H, W]`; raises DataError naming the file."""
    label = read_label(pair, data)
    return read_image(pair.image, (label.shape[0], label.shape[1])), label


def apart(train: SegmentationSet, test: SegmentationSet) -> None:
    """Raises DataError if an image is in both: trained on, it measures nothing."""
    both = sorted({pair.image for pair in train.pairs} & {pair.image for pair in test.pairs})
    if both:
        raise DataError(f"{len(both)} test images are in the training sets too, {both[0]} first")


def _complete(
    base: Path,
    pairs: list[Pair],
    problems: list[str],
    classes: tuple[str, ...],
    numbers: npt.NDArray[np.uint8],
) -> SegmentationSet:
    refuse(problems, base)
    if not pairs:
        raise DataError(f"{base}: the lists of the sets name no images")
    numbers[IGNORE] = IGNORE
    marks = (f"{pair.id} {pair.label.parent.name} {pair.label.stat().st_size}" for pair in pairs)
    return SegmentationSet(
        pairs=tuple(pairs), classes=classes, numbers=numbers, fingerprint=fingerprint(marks)
    )
