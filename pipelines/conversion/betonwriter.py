"""Writing a `.beton` file that FFCV and `pipelines.stores.betonfile` read."""

from __future__ import annotations

from typing import IO

import numpy as np

from pipelines.stores import Images
from pipelines.stores.betonfile import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    JPEG,
    RAW,
    VERSION,
    row_type,
)

PAGE_SIZE = 8 << 20  # FFCV's default


class BetonWriter:
    """Writes the images as they come, in order; the tables, and last the header, at the end.

    Data that would cross the border of a page begins at the next page, and an image larger than a
    page doubles the page size until it fits: the borders of larger pages are among those of smaller
    ones, so what lies in the file already stays within its page.

    Args:
        file: empty, open for writing; what is skipped in it reads as zeros.
        capacity: the most samples that may come; their metadata lies before the images.
        labelled: whether the samples have a field `label` beside their `image`.
    """

    def __init__(self, file: IO[bytes], capacity: int, *, labelled: bool) -> None:
        self._file, self._labelled = file, labelled
        self._fields = np.zeros(1 + labelled, dtype=FIELD)
        self._fields["kind"] = [IMAGE_FIELD, INT_FIELD][: 1 + labelled]
        self._fields["name"] = [b"image", b"label"][: 1 + labelled]
        self._rows = np.zeros(capacity, dtype=row_type(self._fields["kind"].tolist()))
        self._table = np.zeros(capacity, dtype=ALLOCATION)
        self._page_size, self._written = PAGE_SIZE, 0
        used = HEADER.itemsize + self._fields.nbytes + self._rows.nbytes
        self._end = used + -used % PAGE_SIZE

    def __len__(self) -> int:
        return self._written

    def add(self, data: bytes | Images, height: int, width: int, label: int) -> None:
        """One image: the bytes of a JPEG, or pixels `[height, width, 3]`."""
        raw = not isinstance(data, bytes)
        content = data if isinstance(data, bytes) else data.tobytes()
        length = len(content)
        start = self._place(length)
        self._file.seek(start)
        self._file.write(content)
        row = self._written
        self._rows["f0"][row] = (RAW if raw else JPEG, width, height, start)
        if self._labelled:
            self._rows["f1"][row] = label
        self._table[row] = (row, start, length)
        self._written, self._end = row + 1, start + length

    def _place(self, length: int) -> int:
        while length > self._page_size:
            self._page_size *= 2
        left = -self._end % self._page_size  # in the page begun; 0 where none is
        return self._end + left if left < length else self._end

    def finish(self) -> None:
        """Writes the tables and the header."""
        n = self._written
        table = self._end + -self._end % 8
        self._file.seek(HEADER.itemsize)
        self._file.write(self._fields.tobytes())
        self._file.write(self._rows[:n].data)
        self._file.seek(table)
        self._file.write(self._table[:n].data)
        self._file.flush()
        values = (VERSION, len(self._fields), self._page_size, n, table)
        self._file.seek(0)
        self._file.write(np.array([values], dtype=HEADER).tobytes())
        self._file.flush()
