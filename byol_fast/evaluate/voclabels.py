"""Image-level labels of a Pascal VOC folder: which classes an image shows, from its annotation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from byol_fast.evaluate.data import Labelled, Subset
from byol_fast.evaluate.vocxml import parse_xml
from pipelines.errors import DataError
from pipelines.stores import Store, open_store

PRESENT, ABSENT, DIFFICULT = 1, 0, -1
Targets = npt.NDArray[np.int8]  # [n, C] of PRESENT, ABSENT and DIFFICULT

_BELOW = ("", "VOC2007", "VOCdevkit/VOC2007")


@dataclass(frozen=True, kw_only=True)
class MultiLabelled(Labelled):
    """Images that may show several classes at once. The stores' own labels say nothing."""

    train_targets: Targets
    test_targets: Targets
    validation: npt.NDArray[np.bool_]  # [train images]: those of the data set's `val` list


def voc_root(path: str | Path) -> Path | None:
    """The folder with `Annotations`, `ImageSets` and `JPEGImages` in or at `path`; None if none."""
    for below in _BELOW:
        folder = Path(path).expanduser() / below
        if all((folder / part).is_dir() for part in ("Annotations", "ImageSets", "JPEGImages")):
            return folder
    return None


def open_voc(train_root: Path, test_root: Path | None = None) -> MultiLabelled:
    """VOC07's `trainval` to learn from and `test` to be tested on.

    Args:
        train_root: as `voc_root` finds it; both lists may be in it.
        test_root: where `test` is, if it was unpacked elsewhere.

    Raises:
        DataError: a list, an image or an annotation is missing or broken.
    """
    train_names = read_list(train_root, "trainval")
    test_root = test_root or train_root
    test_names = read_list(test_root, "test")
    train_seen = [read_annotation(train_root, name) for name in train_names]
    test_seen = [read_annotation(test_root, name) for name in test_names]
    classes = tuple(sorted({name for seen in (*train_seen, *test_seen) for name in seen}))
    if len(classes) < 2:
        raise DataError(f"{train_root}/Annotations name {len(classes)} class: two are needed")
    held = _validation(train_root, train_names)
    return MultiLabelled(
        train=_images(train_root, train_names),
        test=_images(test_root, test_names),
        classes=classes,
        source=f"the {len(test_names)} images of {test_root}/ImageSets/Main/test.txt",
        train_targets=_targets(train_seen, classes),
        test_targets=_targets(test_seen, classes),
        validation=held,
    )


def read_list(root: Path, split: str) -> list[str]:
    """Image names of `ImageSets/Main/<split>.txt`."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        more = ", or name the folder that has it with --test-data" if split == "test" else ""
        raise DataError(
            f"{path} cannot be read ({error}): unpack VOC2007's {split} part there{more}"
        ) from error
    if not names:
        raise DataError(f"{path} is empty: unpack VOC2007 again")
    return names


def read_annotation(root: Path, name: str) -> dict[str, bool]:
    """Class -> whether the image shows it plainly; False where all its objects are `difficult`."""
    path = root / "Annotations" / f"{name}.xml"
    seen: dict[str, bool] = {}
    try:
        tree = parse_xml(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): unpack VOC2007 again") from error
    for found in tree.iter("object"):
        class_name = (found.findtext("name") or "").strip()
        if not class_name:
            raise DataError(f"{path} has an object without a name: unpack VOC2007 again")
        plain = (found.findtext("difficult") or "0").strip() != "1"
        seen[class_name] = seen.get(class_name, False) or plain
    return seen


def _targets(seen: list[dict[str, bool]], classes: tuple[str, ...]) -> Targets:
    out = np.full((len(seen), len(classes)), ABSENT, dtype=np.int8)
    column = {name: i for i, name in enumerate(classes)}
    for row, objects in enumerate(seen):
        for name, plain in objects.items():
            out[row, column[name]] = PRESENT if plain else DIFFICULT
    return out


def _validation(root: Path, names: list[str]) -> npt.NDArray[np.bool_]:
    """Which of `names` are in the `val` list; none where there is no such list."""
    path = root / "ImageSets" / "Main" / "val.txt"
    held = set(read_list(root, "val")) if path.is_file() else set()
    return np.array([name in held for name in names], dtype=bool)


def _images(root: Path, names: list[str]) -> Store:
    """The rows of `JPEGImages` that `names` lists, in that order."""
    folder = root / "JPEGImages"
    store = open_store(folder, verify=False)
    row_of = {os.path.splitext(os.path.basename(store.name(i)))[0]: i for i in range(len(store))}
    if missing := [name for name in names if name not in row_of]:
        raise DataError(
            f"{folder} lacks {len(missing)} listed images, the first is {missing[0]}: "
            "unpack VOC2007 again"
        )
    rows = np.array([row_of[name] for name in names], dtype=np.int64)
    return Subset(store, rows, labels=np.full(len(rows), -1), classes=())
