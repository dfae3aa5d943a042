"""Boxes and masks in COCO's layout: `annotations/instances_NAME.json` and images in `NAME/`.

pycocotools decodes masks and counts the metric; the extra `evaluate` brings it.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byol_fast.evaluate.dense.boxes import Annotated, DetectionSet, fit_box
from byol_fast.evaluate.dense.images import fingerprint, read_bytes, refuse
from pipelines.errors import DataError, import_problem

FIGURES = ("AP", "AP50", "AP75")  # the first three of pycocotools' twelve


def need_pycocotools() -> None:
    """Raises MissingBackend with the cause and the command that installs it."""
    try:
        import pycocotools.mask  # noqa: F401
    except Exception as error:
        install = "pip install '.[evaluate]' in the checkout"
        raise import_problem("pycocotools", "pycocotools", error, install) from error


def read(root: Path | str, sets: tuple[str, ...]) -> DetectionSet:
    """The annotated images of sets such as `train2017`.

    Crowds are not trained on (pycocotools ignores them in the test). Boxes that are empty or
    outside their image are left out and listed; those that reach beyond it are cut.

    Raises:
        DataError: a file is missing or no instance annotation, an image is missing, or an
            annotation names an unknown image or class; or the sets differ in their classes.
    """
    images: list[Annotated] = []
    left_out: list[str] = []
    marks: list[bytes | str] = []
    classes: dict[int, str] | None = None
    source = Path(root)
    for name in sets:
        source = annotation_file(root, name)
        data = read_bytes(source, f"the annotations of {name}")
        content = _content(data, source)
        try:
            ours = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            read_images, dropped = _images(content, Path(root) / name, source, sorted(ours))
        except (KeyError, TypeError) as error:
            raise DataError(f"{source} is no COCO instance file: {error!r}") from error
        if classes is not None and ours != classes:
            raise DataError(f"{source} has other categories than {annotation_file(root, sets[0])}")
        classes = ours
        images += read_images
        left_out += dropped
        marks.append(data)
    return DetectionSet(
        images=tuple(images),
        classes=tuple((classes or {})[key] for key in sorted(classes or {})),
        fingerprint=fingerprint(marks),
        left_out=tuple(left_out),
        source=source if len(sets) == 1 else None,
    )


def annotation_file(root: Path | str, name: str) -> Path:
    """Where the boxes of a set are."""
    return Path(root) / "annotations" / f"instances_{name}.json"


def _content(data: bytes, source: Path) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{source} is no JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise DataError(f"{source} is no COCO instance file: images, annotations, categories")
    return content


def _images(
    content: dict[str, Any], folder: Path, source: Path, numbers: list[int]
) -> tuple[list[Annotated], list[str]]:
    labels = {number: label for label, number in enumerate(numbers, start=1)}
    infos = {info["id"]: info for info in content["images"]}
    things: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    problems, left_out = [], []
    for thing in content["annotations"]:
        at = f"annotation {thing.get('id')}"
        if thing.get("image_id") not in infos:
            problems.append(f"{at}: image_id {thing.get('image_id')!r} is not among the images")
        elif thing.get("category_id") not in labels:
            problems.append(f"{at}: category_id {thing.get('category_id')!r} is unknown")
        elif not isinstance(thing.get("bbox"), list) or len(thing["bbox"]) != 4:
            problems.append(f"{at}: bbox is {thing.get('bbox')!r}, not left, top, width, height")
        elif not thing.get("iscrowd"):
            things[thing["image_id"]].append(thing)
    images = []
    for identity, info in infos.items():
        path = folder / info["file_name"]
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"image {identity}: {info['file_name']!r} leads out of {folder}")
            continue
        if not path.is_file():
            problems.append(f"image {path} is missing")
            continue
        image, dropped = _annotated(identity, path, info, things[identity], labels)
        images.append(image)
        left_out += [f"{source}: {reason}" for reason in dropped]
    refuse(problems, source)
    return images, left_out


def _annotated(
    identity: int,
    path: Path,
    info: dict[str, Any],
    things: list[dict[str, Any]],
    labels: dict[int, int],
) -> tuple[Annotated, list[str]]:
    height, width = int(info["height"]), int(info["width"])
    boxes, kept, dropped = [], [], []
    for thing in things:
        left, top, wide, high = map(float, thing["bbox"])
        box = np.array([left, top, left + wide, top + high], np.float32)
        fitted, reason = fit_box(box, height, width)
        if fitted is None:
            dropped.append(f"annotation {thing['id']} of {path.name}: {reason}")
            continue
        boxes.append(fitted)
        kept.append(thing)
    annotated = Annotated(
        id=identity,
        image=path,
        height=height,
        width=width,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array([labels[thing["category_id"]] for thing in kept], np.int64),
        difficult=np.zeros(len(kept), np.bool_),
        segments=tuple(thing.get("segmentation") for thing in kept),
    )
    return annotated, dropped


def masks(image: Annotated) -> npt.NDArray[np.uint8]:
    """The objects' masks `[n, H, W]` of 0 and 1.

    Raises:
        DataError: a segmentation is missing or neither polygons nor run lengths.
    """
    from pycocotools import mask

    out = np.zeros((len(image.segments), image.height, image.width), np.uint8)
    for place, segment in enumerate(image.segments):
        try:
            if isinstance(segment, list):
                codes = mask.merge(mask.frPyObjects(segment, image.height, image.width))
            elif isinstance(segment["counts"], list):
                codes = mask.frPyObjects(segment, image.height, image.width)
            else:
                codes = segment
            out[place] = mask.decode(codes)
        except Exception as error:  # pycocotools raises plain Exception, TypeError and others
            raise DataError(
                f"{image.image}: object {place + 1} has a segmentation that cannot be read: {error}"
            ) from error
    return out


def run_length(binary: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's code of one mask `[H, W]`."""
    from pycocotools import mask

    code: dict[str, Any] = mask.encode(np.asfortranarray(binary.astype(np.uint8)))
    return code


def evaluate(
    source: Path, found: Sequence[dict[str, Any]], kind: str, image_ids: Sequence[str | int]
) -> dict[str, float]:
    """AP, AP50 and AP75 by pycocotools, shares of 1.

    Args:
        source: the annotations of the test set.
        found: image_id, category_id, score and bbox (`bbox`) or segmentation (`segm`) each.
        kind: `bbox` or `segm`.
    """
    need_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:  # loadRes cannot take an empty list
        return dict.fromkeys(FIGURES, 0.0)
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(source))
        counted = COCOeval(truth, truth.loadRes([dict(one) for one in found]), kind)
        counted.params.imgIds = list(image_ids)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    # pycocotools gives −1 where there is nothing to measure.
    return {
        name: max(0.0, float(value)) for name, value in zip(FIGURES, counted.stats, strict=False)
    }


def category_numbers(source: Path) -> list[int]:
    """The category of each label, label 1 first."""
    content = _content(read_bytes(source, "the annotations"), source)
    return sorted(int(category["id"]) for category in content["categories"])
