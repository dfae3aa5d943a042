"""Image files named one by one, as a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import BadImage, DataError
from pipelines.indexnotes import listing_notes
from pipelines.listing import walk
from pipelines.notes import tell
from pipelines.progress import Progress
from pipelines.scan import measure_file


class Files:
    """The readable ones of `paths`, in their order; a row is a file. See `pipelines.stores.Store`.

    What cannot be read as an image is in `quarantined`, as (path, reason), and no row.
    """

    encoded = True
    classes: tuple[str, ...] = ()
    fingerprint = ""  # nothing is kept of loose files

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths: list[Path] = []
        sizes: list[tuple[int, int]] = []
        bad: list[tuple[str, str]] = []
        for path in paths:
            try:
                sizes.append(measure_file(os.fspath(path), verify=False))
                self._paths.append(path)
            except BadImage as error:
                bad.append((str(path), str(error)))
        self.sizes: npt.NDArray[np.int32] = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        self.labels: npt.NDArray[np.int32] = np.full(len(sizes), -1, dtype=np.int32)
        self.quarantined = tuple(bad)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, row: int) -> bytes:
        try:
            return self._paths[row].read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def name(self, row: int) -> str:
        return str(self._paths[row])


def expand(names: Sequence[str | Path]) -> list[Path]:
    """Files as they are; of a folder, the images below it by name. What it leaves out is logged.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found += sorted(_images_below(path))
        else:
            found.append(path)
    return found


def _images_below(folder: Path) -> Iterator[Path]:
    try:
        with Progress("listing", None, enabled=False) as bar:
            listed = walk(os.fsencode(folder), bar)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}): check its rights"
        ) from error
    tell(str(folder), listing_notes(folder, listed))
    for i, below in enumerate(listed.dirs):
        for name in listed.names[listed.first[i] : listed.first[i + 1]]:
            yield folder / os.fsdecode(os.path.join(below, name))
    yield from (folder / os.fsdecode(bad.path) for bad in listed.bad)
