"""Which images keep their label in semi-supervised evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from byol_fast.evaluate.data import Ids
from pipelines.errors import DataError
from pipelines.scan import printable
from pipelines.stores import Store


def fraction(store: Store, share: float, seed: int = 0) -> Ids:
    """Rows, ascending: of each class the `share`, rounded, and at least one image.

    A pure function of the seed and of the store's order and labels.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of labels must lie in (0, 1], got {share}")
    labels = np.asarray(store.labels)
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))
    counts = np.bincount(labels)
    keep = np.maximum(np.rint(counts * share).astype(np.int64), 1)
    rank_in_class = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[rank_in_class < keep[labels[order]]])


def named(store: Store, path: Path) -> Ids:
    """Rows, ascending, of the images that a file names: one a line, as SimCLR's subsets do.

    A line is a file's name or the end of its path (`n01440764_18.JPEG`,
    `n01440764/n01440764_18.JPEG`); a class number behind it is passed over.

    Raises:
        DataError: the file cannot be read or is empty, or a line names no image or several.
    """
    lines = _lines(path)
    depths = {line.count("/") for line in lines}
    wanted, rows = set(lines), dict[str, int]()
    for row in range(len(store)):
        parts = store.name(row).replace("\\", "/").split("/")
        for depth in depths:
            end = "/".join(parts[-depth - 1 :])
            if end in wanted:
                rows[end] = -1 if end in rows else row
    unknown = [line for line in lines if line not in rows]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} of {len(lines)} lines name no training image (the first: "
            f"{printable(unknown[0])}): is it the list of another data set?"
        )
    if several := [line for line in lines if rows[line] < 0]:
        raise DataError(
            f"{path}: {printable(several[0])} is the name of several images: write more of the path"
        )
    return np.unique(np.array([rows[line] for line in lines], dtype=np.int64))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    lines = list(_names(text))
    if not lines:
        raise DataError(f"{path} names no images: it needs a file name in each line")
    return lines


def _names(text: str) -> Iterator[str]:
    for line in text.splitlines():
        name, _, label = line.strip().rpartition(" ")
        name = name.strip() if name and label.isdecimal() else line.strip()
        if name:
            yield name.replace("\\", "/").removeprefix("./")
