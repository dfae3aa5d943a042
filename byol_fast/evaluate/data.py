"""What is trained and tested on: parts of a store, a fixed split, classes matched by name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.stores import Store

Ids = npt.NDArray[np.int64]


class Subset:
    """Some rows of a store, in the order of `ids`, with their labels or with others.

    Row i of the subset is row ids[i] of `store`; everything else a Store promises holds.
    """

    def __init__(
        self,
        store: Store,
        ids: Ids,
        *,
        labels: npt.NDArray[Any] | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self._store, self._ids = store, np.asarray(ids, dtype=np.int64)
        self.encoded, self.verified = store.encoded, getattr(store, "verified", False)
        self.sizes = np.asarray(store.sizes)[self._ids]
        self.labels = np.asarray(store.labels[self._ids] if labels is None else labels, np.int32)
        self.classes = store.classes if classes is None else classes
        self.quarantined = store.quarantined
        digest = hashlib.sha256(store.fingerprint.encode() + self._ids.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, row: int) -> bytes | npt.NDArray[np.uint8]:
        return self._store.read(int(self._ids[row]))

    def name(self, row: int) -> str:
        return self._store.name(int(self._ids[row]))


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A training and a test part with the same classes, and how they came about."""

    train: Store
    test: Store
    classes: tuple[str, ...]
    source: str  # in words, for the output
    numbers: Ids | None = None  # [C] labels of the classes in the store given, if others than here


def prepare(
    train: Store, test: Store | None = None, *, where: str = "--data", share: float = 0.2
) -> Labelled:
    """Pairs a training with a test set; without a test set, holds out `share` of the training set.

    Test classes are matched to training classes by name, so a test folder may hold fewer classes,
    or number them differently. Images without a label are left out. Where classes have numbers
    alone, only those with a training image are classes: numbers may have gaps (taxa, products).

    Raises:
        DataError: no labels, a single class, a test class the training set lacks, nothing to hold
            out, or the same images on both sides.
    """
    same = test is not None and test.fingerprint == train.fingerprint  # before rows are left out
    train, note = _labelled_part(train, where)
    train, classes, numbers = _without_gaps(train)
    if numbers is not None:
        note += f"; class numbers from {numbers[0]} to {numbers[-1]} have gaps"
    if len(present := np.unique(train.labels)) < 2:
        raise DataError(
            f"{where} holds one class only ({classes[present[0]]!r}): at least two are needed to "
            "measure accuracy. A labelled set is a folder with one sub-folder per class"
        )
    if test is None:
        train_ids, test_ids = stratified_split(train, share)
        if not len(test_ids):
            raise DataError(
                f"{where} has one image per class, so nothing can be held out for testing: "
                "give a test set (--test-data DIR)"
            )
        return Labelled(
            train=Subset(train, train_ids, classes=classes),
            test=Subset(train, test_ids, classes=classes),
            classes=classes,
            source=f"{len(test_ids)} images, a held-out {share:.0%} of {where} stratified by class "
            f"and chosen by a hash of the file names{note}",
            numbers=numbers,
        )
    if same:
        raise DataError(
            f"{where} and the test set hold the same images, which would measure memory: leave "
            "the test set out and a part is held out, or name another"
        )
    test, test_note = _labelled_part(test, "the test set")
    return Labelled(
        train=_whole(train, np.asarray(train.labels), classes),
        test=_whole(test, _matched(test, classes, where), classes),
        classes=classes,
        source=f"the {len(test)} images of the test set{note}{test_note}",
        numbers=numbers,
    )


def stratified_split(store: Store, share: float = 0.2) -> tuple[Ids, Ids]:
    """Row ids `(train, test)`, both ascending: of each class the `share` with the lowest name hash.

    A pure function of names and labels: no seed, the same on every machine. A class with one image
    keeps it for training; any larger class gives at least one image to each side.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    labels = np.asarray(store.labels)
    names = store.classes or ("",) * (int(labels.max()) + 1)
    hashes = np.fromiter(
        (_hash(store.name(row), names[label]) for row, label in enumerate(labels.tolist())),
        dtype=np.uint64,
        count=len(store),
    )
    order = np.lexsort((hashes, labels))
    counts = np.bincount(labels, minlength=1)
    most = np.maximum(counts - 1, 0)  # wins over the least, so a single image is not held out
    held = np.clip(np.rint(counts * share).astype(np.int64), 1, most)
    rank_in_class = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_test = np.zeros(len(store), dtype=bool)
    is_test[order] = rank_in_class < held[labels[order]]
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def spread(store: Store, most: int) -> Store:
    """At most `most` images, evenly spread over the store."""
    if len(store) <= most:
        return store
    return Subset(store, np.linspace(0, len(store) - 1, most).astype(np.int64))


def _hash(name: str, class_name: str) -> int:
    """Of the class and the path below its folder, so that it matters not where the data lies."""
    head, _, tail = name.replace("\\", "/").rpartition(f"/{class_name}/")
    text = f"{class_name}/{tail}" if head else f"{class_name}/{tail.rpartition('/')[2]}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _labelled_part(store: Store, where: str) -> tuple[Store, str]:
    """The rows that have a label, and a remark where that is not all of them."""
    rows = np.flatnonzero(np.asarray(store.labels) >= 0)
    if not len(rows):
        raise DataError(
            f"{where} has no labels, and accuracy needs them: sort the images into one sub-folder "
            "per class (DIR/cat/1.jpg, DIR/dog/2.jpg), or give an .npz with labels"
        )
    if len(rows) == len(store):
        return store, ""
    left_out = len(store) - len(rows)
    return Subset(store, rows), f"; {left_out} images of {where} without a label are left out"


def _without_gaps(store: Store) -> tuple[Store, tuple[str, ...], Ids | None]:
    """The store with labels from 0, the names of its classes, and what their labels were."""
    names, labels = store.classes, np.asarray(store.labels)
    if names and names != tuple(map(str, range(len(names)))):
        return store, names, None  # each is a class, with or without an image
    present = np.unique(labels).astype(np.int64)
    if len(present) == max(int(present[-1]) + 1, len(names)):
        return store, names or tuple(map(str, present)), None
    told = tuple(map(str, present))
    labels = np.searchsorted(present, labels)
    # Without names it stays without: the split is then by file names alone.
    whole = Subset(store, np.arange(len(store)), labels=labels, classes=told if names else ())
    return whole, told, present


def _class_names(store: Store) -> tuple[str, ...]:
    """Arrays may come with labels but without names: then the number is the name."""
    return store.classes or tuple(str(i) for i in range(int(np.max(store.labels)) + 1))


def _matched(test: Store, classes: tuple[str, ...], where: str) -> npt.NDArray[np.int32]:
    """The test set's labels in the numbering of the training classes."""
    names, labels = _class_names(test), np.asarray(test.labels)
    used = [names[i] for i in np.unique(labels)]
    if unknown := sorted(set(used) - set(classes)):
        raise DataError(
            f"the test set has {len(unknown)} classes that {where} lacks ({_some(unknown)}), while "
            f"{where} has {_some(list(classes))}: classes are matched by name, so rename the "
            "folders or take both sets from one source"
        )
    number = {name: i for i, name in enumerate(classes)}
    table = np.array([number.get(name, -1) for name in names], dtype=np.int32)
    return table[labels]


def _whole(store: Store, labels: npt.NDArray[Any], classes: tuple[str, ...]) -> Store:
    return Subset(store, np.arange(len(store)), labels=labels, classes=classes)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
