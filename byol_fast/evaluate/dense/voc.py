"""Boxes in Pascal VOC's layout: `VOC2007/{Annotations,ImageSets/Main,JPEGImages}`."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from byol_fast.evaluate.dense.boxes import Annotated, DetectionSet, fit_box
from byol_fast.evaluate.dense.images import fingerprint, read_bytes, read_lines, refuse
from byol_fast.evaluate.vocxml import parse_xml
from pipelines.errors import DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_NUMBERS = {name: number for number, name in enumerate(CLASSES, start=1)}


def devkit(root: Path | str) -> Path:
    """The folder that holds VOC2007, VOC2012, …: `root`, or VOCdevkit below it.

    Raises:
        DataError: neither holds one.
    """
    for folder in (Path(root), Path(root) / "VOCdevkit"):
        if any(folder.glob("VOC20*/JPEGImages")):
            return folder
    raise DataError(f"{root} holds no VOC20xx/JPEGImages: name the VOCdevkit folder with --data")


def read(root: Path | str, sets: tuple[str, ...]) -> DetectionSet:
    """The annotated images of sets such as `VOC2007/trainval`.

    Boxes that are empty or outside their image are left out and listed; those that reach beyond
    it are cut.

    Raises:
        DataError: a list, an image or an annotation is missing, an annotation is no plain XML, or
            a class is not one of the twenty.
    """
    base = devkit(root)
    images: list[Annotated] = []
    problems: list[str] = []
    left_out: list[str] = []
    marks: list[bytes | str] = []
    for name in sets:
        year, _, split = name.partition("/")
        listing = base / year / "ImageSets" / "Main" / f"{split}.txt"
        ids = [line.split()[0] for line in read_lines(listing, f"the image list of {name}")]
        for identity in ids:
            source = base / year / "Annotations" / f"{identity}.xml"
            try:
                data = read_bytes(source, "annotation")
                image, dropped = _annotated(base / year, identity, source, data)
            except DataError as error:
                problems.append(str(error))
                continue
            images.append(image)
            left_out += dropped
            marks += [f"{year}/{identity}", data]
    refuse(problems, base)
    return DetectionSet(
        images=tuple(images),
        classes=CLASSES,
        fingerprint=fingerprint(marks),
        left_out=tuple(left_out),
    )


def _annotated(
    folder: Path, identity: str, source: Path, data: bytes
) -> tuple[Annotated, list[str]]:
    tree = parse_xml(data, source)
    image = folder / "JPEGImages" / f"{identity}.jpg"
    if not image.is_file():
        raise DataError(f"image {image} is missing, {source} describes it")
    width, height = (int(_number(tree, f"size/{axis}", source)) for axis in ("width", "height"))
    boxes, labels, difficult, dropped = [], [], [], []
    for thing in tree.findall("object"):
        name = (thing.findtext("name") or "").strip()
        if name not in _NUMBERS:
            raise DataError(f"{source}: {name!r} is none of VOC's twenty classes")
        sides = ("xmin", "ymin", "xmax", "ymax")
        box = np.array([_number(thing, f"bndbox/{side}", source) for side in sides], np.float32)
        box[:2] -= 1  # VOC counts pixels from 1 and includes the last one
        fitted, reason = fit_box(box, height, width)
        if fitted is None:
            dropped.append(f"{source}: {name}: {reason}")
            continue
        boxes.append(fitted)
        labels.append(_NUMBERS[name])
        difficult.append((thing.findtext("difficult") or "0").strip() == "1")
    annotated = Annotated(
        id=f"{folder.name}/{identity}",
        image=image,
        height=height,
        width=width,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        difficult=np.array(difficult, np.bool_),
    )
    return annotated, dropped


def _number(element: ET.Element, path: str, source: Path) -> float:
    text = element.findtext(path)
    try:
        return float(text or "")
    except ValueError as error:
        raise DataError(f"{source}: {path} is {text!r}, not a number") from error
