"""A `.beton` file, FFCV's format, read without the ffcv package."""

from __future__ import annotations

import logging
from pathlib import Path

from pipelines.errors import DataError
from pipelines.scan import printable
from pipelines.stores import Images
from pipelines.stores.betonfile import BetonFile, load
from pipelines.stores.openfile import OpenFile
from pipelines.stores.sidecar import read_sidecar

log = logging.getLogger(__name__)


class BetonStore:
    """The images of a `.beton` file. Opening one decodes nothing: their sizes are in the file.

    Names of classes come from the sidecar that `pipelines.convert` writes beside the file; without
    one they are the numbers. Fingerprint: the sidecar's sha256 of the whole file if the sidecar
    belongs to the file, else the sha256 of the file's tables, which hold every image's size,
    label, place and length, but not its content.

    Args:
        file: the file's tables; see `pipelines.stores.betonfile.load`.
    """

    quarantined: tuple[tuple[str, str], ...] = ()  # what could not be read was never written

    def __init__(self, file: BetonFile) -> None:
        self.file = file
        self.sizes, self.labels = file.sizes, file.labels
        self.encoded = not bool(file.raw.all())
        known = read_sidecar(file) or {}
        self.verified = bool(known)  # our converter decodes strictly; FFCV's does not
        self.fingerprint: str = known.get("sha256", file.tables_sha256)
        count, named = int(file.labels.max()) + 1, known.get("classes", ())
        fits = len(named) >= count > 0
        self.classes: tuple[str, ...] = tuple(map(str, named if fits else range(count)))
        try:
            self._open = OpenFile(file.path)
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror}") from error

    @classmethod
    def open(cls, path: Path) -> BetonStore:
        """The store in a file.

        Raises:
            DataError: see `pipelines.stores.betonfile.load`.
        """
        return cls(load(path))

    def __len__(self) -> int:
        return len(self.file)

    def read(self, row: int) -> bytes | Images:
        """The JPEG's bytes, or the pixels `[H, W, 3]` of an image stored as such.

        Raises:
            BadImage: the file cannot be read any more.
        """
        offset = int(self.file.offsets[self._checked(row)])
        if self.file.raw[row]:
            height, width = self.sizes[row].tolist()
            return self._open.read_pixels(offset, height, width, 3)
        return self._open.read(offset, int(self.file.lengths[row]))

    def name(self, row: int) -> str:
        """`train.beton[12]`."""
        return f"{printable(str(self.file.path))}[{self._checked(row)}]"

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        return row
