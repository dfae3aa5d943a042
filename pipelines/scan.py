"""Finding the images under a folder, and reading their sizes in parallel."""

from __future__ import annotations

import errno
import os
import stat
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines import decode
from pipelines.cores import worker_threads
from pipelines.errors import BadImage, DataError
from pipelines.progress import Progress
from pipelines.reading import OF_THE_FILE, patiently, refusal

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm")

_HEAD_BYTES = 64 << 10  # what a header needs as a rule; files with more before it are read whole
_MAX_BYTES = 1 << 30  # a file over 1 GiB is no image this library could use
_FILES_PER_TASK = 32
_REFUSED = ("cannot be read", "cannot be found", "the folder cannot be listed")
_SUFFIXES = tuple(f".{e}".encode() for e in EXTENSIONS)

Sizes: TypeAlias = npt.NDArray[np.int32]
_Task: TypeAlias = "Future[tuple[Sizes, dict[int, str]]]"


class Bad(NamedTuple):
    """A file that is no row: path below the root, reason, and what it looked like then."""

    path: bytes
    reason: str
    size: int = -1  # bytes
    mtime: int = -1  # ns

    @property
    def refused(self) -> bool:
        """Whether the system would not let it be read, which may pass without a trace in its size
        and date: rights, the target of a link, a disk."""
        return self.reason.startswith(_REFUSED)


@dataclass
class Listing:
    """All image files under a root, folder by folder in depth-first order, names sorted as bytes.

    Folder i holds the files [first[i], first[i + 1]).
    """

    scanned_at: int  # ns
    dirs: list[bytes] = field(default_factory=list)  # below the root; b"" is the root itself
    mtimes: list[int] = field(default_factory=list)  # ns, of the folders
    first: list[int] = field(default_factory=lambda: [0])
    names: list[bytes] = field(default_factory=list)
    stats: array[int] = field(default_factory=lambda: array("q"))  # bytes, mtime (ns), bytes, ...
    bad: list[Bad] = field(default_factory=list)
    ignored: int = 0  # hidden files and files of other kinds
    notes: list[str] = field(default_factory=list)


def walk(root: bytes, progress: Progress) -> Listing:
    """Lists the images below `root`.

    Links to folders are followed unless they lead to a folder they lie in. Hidden files and folders
    are left out. What cannot be listed or is no regular file is entered in `bad`.

    Raises:
        OSError: the root itself cannot be listed.
        DataError: the system cannot list a folder below it.
    """
    out = Listing(scanned_at=time.time_ns())
    todo: list[tuple[bytes, tuple[tuple[int, int], ...]]] = [(b"", ())]
    while todo:
        folder, above = todo.pop()
        try:
            info, entries = patiently(partial(_list, os.path.join(root, folder)))
        except OSError as error:
            if not folder:
                raise
            if error.errno not in OF_THE_FILE:
                raise refusal(error, printable(os.path.join(root, folder))) from error
            out.bad.append(Bad(folder + b"/", f"the folder cannot be listed: {error.strerror}"))
            continue
        me = (info.st_dev, info.st_ino)
        if me in above:
            out.notes.append(f"{printable(folder)} links to a folder it lies in: not followed")
            continue
        below = [(path, (*above, me)) for path in _enter_files(out, folder, entries)]
        todo.extend(reversed(below))
        progress.advance(len(out.names) - out.first[-1])
        out.dirs.append(folder)
        out.mtimes.append(info.st_mtime_ns)
        out.first.append(len(out.names))
    return out


def _list(folder: bytes) -> tuple[os.stat_result, list[os.DirEntry[bytes]]]:
    info = os.stat(folder)  # before listing: later changes show
    with os.scandir(folder) as found:
        return info, sorted(found, key=lambda entry: entry.name)


def _enter_files(
    out: Listing, folder: bytes, entries: Sequence[os.DirEntry[bytes]]
) -> Iterator[bytes]:
    """Enters a folder's images in the listing and yields the folders in it."""
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(b"."):
            out.ignored += 1
            continue
        try:
            if entry.is_dir():
                yield path
                continue
            if not entry.name.lower().endswith(_SUFFIXES):
                out.ignored += 1
                continue
            info = patiently(entry.stat)
        except OSError as error:
            if error.errno not in OF_THE_FILE:
                raise refusal(error, printable(entry.path)) from error
            out.bad.append(Bad(path, f"cannot be found: {error.strerror}"))
            continue
        if not stat.S_ISREG(info.st_mode):  # opening a named pipe would wait for ever
            out.bad.append(Bad(path, "not a regular file"))
            continue
        out.names.append(entry.name)
        out.stats.extend((info.st_size, info.st_mtime_ns))


def default_workers(verify: bool) -> int:
    """Threads that read images: headers wait for the disk, decoding does not."""
    cores = worker_threads()
    return cores if verify else min(32, 4 * cores)


def measure(
    root: bytes, paths: Sequence[bytes], *, verify: bool, workers: int, progress: Progress
) -> tuple[Sizes, dict[int, str]]:
    """Sizes `[n, 2]` (height, width) of the images, and a reason for each that is bad (size 0).

    Threads do: reading and decoding hold no lock. Two of them verified 395 images/s where two
    processes verified 371, on the same busy cores; a core to itself does about 900 of 110 KB.
    """
    sizes: Sizes = np.zeros((len(paths), 2), dtype=np.int32)
    bad: dict[int, str] = {}
    starts = iter(range(0, len(paths), _FILES_PER_TASK))
    waiting: deque[tuple[int, _Task]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="index") as pool:
        while True:
            while len(waiting) < 4 * workers and (start := next(starts, None)) is not None:
                chunk = paths[start : start + _FILES_PER_TASK]
                waiting.append((start, pool.submit(_measure_some, root, chunk, verify)))
            if not waiting:
                return sizes, bad
            start, task = waiting.popleft()
            some, wrong = task.result()
            sizes[start : start + len(some)] = some
            bad.update({start + offset: reason for offset, reason in wrong.items()})
            progress.advance(len(some))


def _measure_some(
    root: bytes, paths: Sequence[bytes], verify: bool
) -> tuple[Sizes, dict[int, str]]:
    sizes: Sizes = np.zeros((len(paths), 2), dtype=np.int32)
    bad: dict[int, str] = {}
    for i, path in enumerate(paths):
        try:
            sizes[i] = measure_file(os.path.join(root, path), verify=verify)
        except BadImage as error:
            bad[i] = str(error)
    return sizes, bad


def measure_file(path: str | bytes, *, verify: bool) -> tuple[int, int]:
    """Height and width of one file.

    Raises:
        BadImage: it may not be read, or `decode.header` (`decode.verify`) refuses it.
        DataError: the system cannot read it.
    """
    try:
        return patiently(partial(_measure_file, path, verify))
    except OSError as error:
        raise refusal(error, printable(path)) from error


def _measure_file(path: str | bytes, verify: bool) -> tuple[int, int]:
    with open(path, "rb", opener=open_regular) as file:
        if (size := os.fstat(file.fileno()).st_size) > _MAX_BYTES:
            raise BadImage(f"{size:,} bytes are more than the limit of {_MAX_BYTES:,}")
        if verify:
            return decode.verify(file.read())
        head = file.read(_HEAD_BYTES)
        try:
            return decode.header(head)
        except BadImage:
            if len(head) < _HEAD_BYTES:
                raise
        return decode.header(head + file.read())


def open_regular(path: str | bytes, flags: int) -> int:
    """A file descriptor; for `open(path, "rb", opener=open_regular)`.

    Opening a named pipe waits for a writer, and a device may give bytes for ever.

    Raises:
        OSError: it is no regular file, whatever it was when it was listed, or cannot be opened.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` replaced, where there are such homes."""
    return Path(os.path.expanduser(path))


def refuse_hidden(path: Path) -> None:
    """Raises DataError where the rights of a folder above hide whether there is such a path."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise DataError(
            f"{path} cannot be looked at ({error.strerror}): check the rights of the folders above"
        ) from error
    except (OSError, ValueError):
        pass  # a pattern, or a mistake that is told elsewhere


def printable(path: bytes | str | os.PathLike[str]) -> str:
    """A path for people: what is not printable or not UTF-8 is shown as an escape."""
    text = os.fsdecode(path)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
