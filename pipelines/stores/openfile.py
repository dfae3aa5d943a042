"""Files that threads read at offsets, each on its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from pipelines.errors import BadImage
from pipelines.scan import open_regular
from pipelines.stores import Images


class OpenFile:
    """A file held open; every read names its offset, so threads share no position.

    It is closed once nobody holds it any more, so a thread in the middle of a read never loses it.
    Pickled as its path, and opened again where it is unpickled.

    Read and not mapped: a page fault in a mapping holds the GIL while the disk works, and a file
    cut short meanwhile would end the process with SIGBUS where a read gives an error. The price is
    9 us for 110 KB in the page cache (22 against 13), which take some 2,000 us to decode.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """

    fd = -1

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.fd = open_regular(os.fspath(path), os.O_RDONLY)

    def __reduce__(self) -> tuple[type[OpenFile], tuple[str | Path]]:
        return OpenFile, (self.path,)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    @property
    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self.fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on.

        Raises:
            BadImage: the file cannot be read, or ends before that.
        """
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        if len(data) != length:
            self._ends_early(len(data), length)
        return data

    def read_pixels(self, offset: int, height: int, width: int) -> Images:
        """Pixels `[height, width, 3]` stored from `offset` on, in memory of their own.

        Raises:
            BadImage: as `read`.
        """
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        try:
            got = os.preadv(self.fd, [pixels.data], offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        if got != pixels.nbytes:
            self._ends_early(got, pixels.nbytes)
        return pixels

    def _ends_early(self, got: int, wanted: int) -> NoReturn:
        raise BadImage(f"the file it lies in ends early: {got:,} of {wanted:,} bytes are there")


class OpenFiles:
    """Many such files by number, of which those used last are held open.

    Args:
        paths: of the files.
        most: held at a time; a process may have 1,024 as a rule.
    """

    def __init__(self, paths: Sequence[Path], most: int = 512) -> None:
        self.paths, self.most = tuple(paths), most
        self._lock = threading.Lock()
        self._held: dict[int, OpenFile] = {}  # the one used last is the last

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[Sequence[Path], int]]:
        return OpenFiles, (self.paths, self.most)

    def __getitem__(self, number: int) -> OpenFile:
        """The file, opened if it is not.

        Raises:
            BadImage: it cannot be.
        """
        with self._lock:
            file = self._held.pop(number, None)
            if file is not None:
                self._held[number] = file
                return file
        try:
            file = OpenFile(self.paths[number])
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        with self._lock:
            self._held[number] = file
            while len(self._held) > self.most:
                del self._held[next(iter(self._held))]  # closed when no thread reads it
        return file
