"""Files that threads read at offsets, each on its own."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from pipelines.errors import DataError
from pipelines.reading import NO_HANDLES, handles, patiently, refusal
from pipelines.scan import open_regular, printable
from pipelines.stores import Images

T = TypeVar("T")


class OpenFile:
    """A file held open; every read names its offset, so threads share no position.

    It is closed once nobody holds it any more, so a thread in the middle of a read never loses it.
    Pickled as its path, and opened again where it is unpickled.

    Read and not mapped: a page fault in a mapping holds the GIL while the disk works, and a file
    cut short meanwhile would end the process with SIGBUS where a read gives an error. The price is
    9 us for 110 KB in the page cache (22 against 13), which take some 2,000 us to decode.

    A read that fails is tried again, in the file opened anew: a stale handle stays stale.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """

    fd = -1

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.fd = patiently(partial(open_regular, os.fspath(path), os.O_RDONLY))
        info = os.fstat(self.fd)
        self._looks = info.st_size, info.st_mtime_ns

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
            DataError: the file ends before that, or the system cannot read it.
        """
        data = self._patiently(lambda: self._some(offset, length))
        while len(data) < length:  # as network file systems and signals have it
            got = len(data)
            more = self._patiently(partial(self._some, offset + got, length - got))
            if not more:
                self._ends_early(got, length)
            data += more
        return data

    def read_pixels(self, offset: int, *shape: int) -> Images:
        """uint8 of this shape stored from `offset` on, in memory of their own.

        Raises:
            DataError: as `read`.
        """
        pixels = np.empty(shape, dtype=np.uint8)
        room, got = pixels.reshape(-1).data, 0
        while got < len(room):
            more = self._patiently(partial(self._some_into, room[got:], offset + got))
            if not more:
                self._ends_early(got, len(room))
            got += more
        return pixels

    def _some(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        if not data and length:
            self._check_end(offset)
        return data

    def _some_into(self, room: memoryview, offset: int) -> int:
        got = os.preadv(self.fd, [room], offset)
        if not got:
            self._check_end(offset)
        return got

    def _check_end(self, offset: int) -> None:
        """Raises OSError where a read has ended before the file does."""
        if offset < self.size:
            raise OSError(errno.EIO, f"nothing was read at byte {offset:,} of {self.size:,}")

    def _patiently(self, read: Callable[[], T]) -> T:
        try:
            return patiently(read, self._open_again)
        except OSError as error:
            raise refusal(error, printable(self.path)) from error

    def _open_again(self) -> None:
        """Under the same number, so that no thread meets a closed one."""
        try:
            fd = open_regular(os.fspath(self.path), os.O_RDONLY)
        except OSError:
            return  # the next read tells
        info = os.fstat(fd)
        if (info.st_size, info.st_mtime_ns) == self._looks:
            os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)

    def _ends_early(self, got: int, wanted: int) -> NoReturn:
        before, now = self._looks[0], self.size
        what = f"ends early, {got:,} of {wanted:,} bytes of a part of it are there"
        if now < before:
            what = f"was cut short while it was read: it had {before:,} bytes and has {now:,}"
        raise DataError(
            f"{printable(self.path)} {what}. Copy or write it again, then repeat the command"
        )


class OpenFiles:
    """Many such files by number, of which those used last are held open.

    Args:
        paths: of the files.
        most: held at a time, if that is not over a quarter of what a process may have (1,024 as a
            rule).
    """

    def __init__(self, paths: Sequence[Path], most: int = 512) -> None:
        self.paths, self.most = tuple(paths), handles(0.25, most)
        self._lock = threading.Lock()
        self._held: dict[int, OpenFile] = {}  # the one used last is the last

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[Sequence[Path], int]]:
        return OpenFiles, (self.paths, self.most)

    def __getitem__(self, number: int) -> OpenFile:
        """The file, opened if it is not.

        Raises:
            BadImage: it is gone, or may not be read.
            DataError: the system cannot open it.
        """
        with self._lock:
            file = self._held.pop(number, None)
            if file is not None:
                self._held[number] = file
                return file
        try:
            file = self._open(number)
        except OSError as error:
            raise refusal(error, printable(self.paths[number])) from error
        with self._lock:
            self._held[number] = file
            while len(self._held) > self.most:
                del self._held[next(iter(self._held))]  # closed when no thread reads it
        return file

    def _open(self, number: int) -> OpenFile:
        try:
            return OpenFile(self.paths[number])
        except OSError as error:
            if error.errno not in NO_HANDLES:
                raise
        with self._lock:  # the rest of the process needs more than was left to it
            self.most = max(1, len(self._held) // 2)
            self._held.clear()
        return OpenFile(self.paths[number])
