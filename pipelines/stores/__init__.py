"""Where images live: one protocol, and `open_store`, which picks the store a data set needs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Protocol, TypeAlias, TypedDict, runtime_checkable

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError

log = logging.getLogger(__name__)

Images: TypeAlias = npt.NDArray[np.uint8]
ArrayData: TypeAlias = Images | tuple[Images, npt.ArrayLike | None]  # images, or (images, labels)

MOST_CLASSES = 1_000_000  # a larger number is taken to count something else
MEND = (
    "name a folder of images, a .beton file, tar shards, a list of images (.txt, .csv, .json), an "
    ".npz or .npy file of uint8 images, or synthetic:N"
)


@runtime_checkable
class Store(Protocol):
    """A fixed table of images; row numbers are what a plan orders. Read from any thread.

    It may also have `notes`, what is left out or in doubt, and, if it is a selection of another's
    rows, `selected_from`, that store.
    """

    @property
    def encoded(self) -> bool:
        """Whether `read` gives bytes for any row; for the others it gives uint8 `[H, W, 3]`."""
        ...

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """`[n, 2]` heights and widths in pixels, as `pipelines.decode` sees them."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """`[n]` class numbers, -1 where unlabelled."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, () where there are none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of what the rows are: names and byte sizes, or content."""
        ...

    @property
    def quarantined(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of files that are not rows because they cannot be read as images."""
        ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes | Images:
        """The image of one row.

        Raises:
            BadImage: the file cannot be read (any more).
        """
        ...

    def name(self, row: int) -> str:
        """A printable name of one row: a path, or `images[12]`."""
        ...


def open_store(
    data: str | Path | ArrayData,
    *,
    root: str | Path | None = None,
    verify: bool = True,
    workers: int | None = None,
    progress: bool = True,
    max_bad_share: float = 0.05,
    quiet: bool = False,
) -> Store:
    """The store behind `data`. What is odd about it is logged; see `tell`.

    Args:
        data: a folder of images or tar shards (a folder of them, one, or a pattern such as
            `train-{000..012}.tar`), both indexed on first use; a `.beton` file; an `.npz` file
            (`images`, and optionally `labels` and `classes`), an `.npy` file, `synthetic:N`, uint8
            arrays `[N, H, W, 3]` or `[N, H, W]`, or a pair (images, labels); or a list of images,
            `path label` lines in a `.txt` or `.csv` file or iNaturalist's `.json`.
        root: the folder that a list's paths lie below; by default the list's own.
        verify: decode every image strictly when a folder or shards are indexed; otherwise only
            headers are read, and a broken image shows itself while training. What
            `pipelines.convert` wrote was verified then, and its `--check` does it for any `.beton`.
        workers: threads that index; by default every core this process may use.
        progress: show how far indexing is, on stderr.
        max_bad_share: the largest share in [0, 1] of unreadable images that is put up with.
        quiet: leave that to the caller.

    Raises:
        DataError: nothing usable there; the message gives cause, path and mend.
    """
    if isinstance(data, tuple | np.ndarray):
        from pipelines.stores.arrays import ArrayStore

        images, labels = data if isinstance(data, tuple) else (data, None)
        return ArrayStore(images, labels)
    text = str(data)
    if not text:
        raise DataError(f"no data set was named: {MEND}")
    if text.startswith("synthetic:"):
        from pipelines.stores.synthetic import SyntheticStore

        return SyntheticStore.parse(text)
    from pipelines.scan import expanded, refuse_hidden

    path = expanded(data)
    refuse_hidden(path)
    indexing = Indexing(
        verify=verify, workers=workers, progress=progress, max_bad_share=max_bad_share
    )
    store = _indexed(path, root, indexing)
    store = _as_it_is(path) if store is None else store
    if store is None:
        if os.path.exists(path):
            raise DataError(f"{path} is not a data set this version reads: {MEND}")
        raise DataError(f"{path} does not exist: check the path, or {MEND}")
    if not quiet:
        tell(text, store)
    return store


def tell(data: str, store: Store) -> None:
    """Logs what is left out of the data or in doubt, and how many images cannot be used."""
    from pipelines import notes
    from pipelines.scan import printable

    notes.tell(data, notes.notes_of(store))
    if bad := store.quarantined:
        name, reason = bad[0]
        log.warning(
            "%s: %d of %d images cannot be used and are left out (the first: %s: %s); "
            "python -m pipelines.index names them all",
            *(printable(data), len(bad), len(store) + len(bad), name, reason),
        )


def underlying(store: Store) -> Store:
    """The store that holds the images: `store`, or what a selection of rows was made from."""
    while (inner := getattr(store, "selected_from", None)) is not None:
        store = inner
    return store


class Indexing(TypedDict):
    """How images are indexed; see `open_store`."""

    verify: bool
    workers: int | None
    progress: bool
    max_bad_share: float


def _indexed(path: Path, root: str | Path | None, indexing: Indexing) -> Store | None:
    """What has to be indexed on first use: tar shards, a folder, a list of images."""
    from pipelines.stores.tarshards import is_tar

    if is_tar(path):
        from pipelines.stores.tar import TarStore

        return TarStore.open(path, **indexing)
    if os.path.isdir(path):
        from pipelines.stores.folder import FolderStore

        return FolderStore.open(path, **indexing)
    from pipelines.stores.listfile import SUFFIXES

    if path.suffix in SUFFIXES and os.path.isfile(path):
        from pipelines.stores.listed import ListStore

        below = None if root is None else Path(os.path.expanduser(root))
        return ListStore.open(path, below, **indexing)
    return None


def _as_it_is(path: Path) -> Store | None:
    """A file that says itself where its images are."""
    if path.suffix == ".beton" and os.path.isfile(path):
        from pipelines.stores.beton import BetonStore

        return BetonStore.open(path)
    if path.suffix in (".npz", ".npy") and os.path.isfile(path):
        from pipelines.stores.arrays import load_arrays

        return load_arrays(path)
    return None
