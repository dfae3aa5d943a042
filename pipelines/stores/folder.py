"""A folder of image files, with class folders or without, through its index."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.index import open_index, refuse_if_bad, warn_of
from pipelines.indexfile import Index
from pipelines.reading import read_file, refusal
from pipelines.scan import open_regular, printable


class FolderStore:
    """The images below a folder; a row is a file, `read` gives its bytes.

    Args:
        index: what the folder holds; see `pipelines.index.open_index`.
    """

    encoded = True

    def __init__(self, index: Index) -> None:
        self.index, self.root = index, index.root
        self.sizes, self.labels = index.sizes, index.labels
        self.classes, self.fingerprint = index.classes, index.fingerprint
        self.verified = index.verified  # every image was decoded strictly
        self._root = os.fsencode(index.root)

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        verify: bool = True,
        workers: int | None = None,
        progress: bool = True,
        max_bad_share: float = 0.05,
    ) -> FolderStore:
        """Indexes the folder, or reads its index; arguments as in `stores.open_store`.

        Raises:
            DataError: no images, or more than `max_bad_share` of them are bad.
        """
        index = open_index(root, verify=verify, workers=workers, progress=progress)
        refuse_if_bad(index, max_bad_share)
        warn_of(index)
        return cls(index)

    @property
    def quarantined(self) -> tuple[tuple[str, str], ...]:
        """(path, reason) of the files that are no rows."""
        return tuple((printable(self._join(b.path)), b.reason) for b in self.index.bad)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row: int) -> bytes:
        """The file's bytes.

        Raises:
            BadImage: it is gone or may not be read.
            DataError: the system cannot read it.
        """
        try:
            return read_file(self._join(self.index.below(row)), open_regular)
        except OSError as error:
            raise refusal(error, self.name(row)) from error

    def name(self, row: int) -> str:
        """The file's path, with an escape for what cannot be printed."""
        return printable(self._join(self.index.below(row)))

    def _join(self, below: bytes) -> bytes:
        return os.path.join(self._root, below)
