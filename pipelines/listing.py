"""Listing the images below a folder, with a count of everything there that is not taken."""

from __future__ import annotations

import os
import stat
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.notes import Tally
from pipelines.progress import Progress
from pipelines.reading import OF_THE_FILE, patiently, refusal
from pipelines.scan import EXTENSIONS, Bad, printable

# What a NAS (Synology, QNAP, NetApp), macOS, Windows and ext4 keep beside people's files: previews,
# snapshots and deleted files. Names that begin with a dot are hidden, and left out as well.
_SERVICE = {
    *(b"@eadir", b"@recycle", b"@recently-snapshot", b"@tmp", b"@sharebin", b"@sharesnap"),
    *(b"#recycle", b"#snapshot", b"~snapshot", b"trashbox", b"network trash folder"),
    *(b"__macosx", b"temporary items", b"$recycle.bin", b"recycler", b"lost+found"),
    *(b"system volume information", b"_vti_cnf", b"_vti_pvt"),
}
_SUFFIXES = tuple(f".{e}".encode() for e in EXTENSIONS)
_MOST_ENDINGS = 1000  # counted one by one
OTHER = "file"  # the kind of a file that is not taken: this and its ending


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
    ignored: int = 0  # hidden files and folders, files of other kinds
    found: Tally = field(default_factory=Tally)  # what is not taken, or in doubt
    tars: list[bytes] = field(default_factory=list)  # paths of uncompressed tar files
    inodes: array[int] = field(default_factory=lambda: array("Q"))  # of device and inode, mixed
    linked: list[int] = field(default_factory=list)  # rows that a link leads to
    hard: list[int] = field(default_factory=list)  # rows of files with several names


@dataclass(frozen=True)
class _Folder:
    """A folder that is still to be listed."""

    below: bytes  # its path below the root
    real: bytes | None = None  # its real path, where a link leads to it


def walk(root: bytes, progress: Progress) -> Listing:
    """Lists the images below `root`.

    Hidden files and folders, and those of a NAS or operating system, are left out. Links to folders
    are followed unless what they lead to is listed anyway; of several names of a file that differ
    by links, one is taken. What cannot be listed or is no regular file is entered in `bad`.

    Raises:
        OSError: the root itself cannot be listed.
        DataError: the system cannot list a folder below it.
    """
    out = Listing(scanned_at=time.time_ns())
    links = Links(root)
    todo = [_Folder(b"")]
    while todo:
        folder = todo.pop()
        try:
            info, entries = patiently(partial(_list, os.path.join(root, folder.below)))
        except OSError as error:
            if not folder.below:
                raise
            if error.errno not in OF_THE_FILE:
                raise refusal(error, printable(os.path.join(root, folder.below))) from error
            out.bad.append(
                Bad(folder.below + b"/", f"the folder cannot be listed: {error.strerror}")
            )
            continue
        below = list(_enter_files(out, folder, entries, links))
        todo.extend(reversed(below))
        progress.advance(len(out.names) - out.first[-1])
        out.dirs.append(folder.below)
        out.mtimes.append(info.st_mtime_ns)
        out.first.append(len(out.names))
    _leave_out_doubles(out)
    return out


def _list(folder: bytes) -> tuple[os.stat_result, list[os.DirEntry[bytes]]]:
    info = os.stat(folder)  # before listing: later changes show
    with os.scandir(folder) as found:
        return info, sorted(found, key=lambda entry: entry.name)


def is_service(name: bytes) -> bool:
    """Whether a folder of this name is hidden, or one that a NAS or operating system keeps."""
    lower = name.lower()
    return name.startswith(b".") or lower in _SERVICE or lower.endswith(b".lrdata")


def in_service(path: bytes) -> bool:
    """Whether one of the folders in a file's path is such a folder."""
    return any(
        part not in (b"", b".", b"..") and is_service(part) for part in path.split(b"/")[:-1]
    )


def ending_of(name: bytes) -> str:
    """`.txt`, in lower case; `no ending`."""
    stem, _, ending = name.rpartition(b".")
    return f".{printable(ending.lower())}" if stem and len(ending) <= 12 else "no ending"


def _enter_files(
    out: Listing, folder: _Folder, entries: Sequence[os.DirEntry[bytes]], links: Links
) -> Iterator[_Folder]:
    """Enters a folder's images in the listing and yields the folders in it."""
    for entry in entries:
        path, name = os.path.join(folder.below, entry.name), entry.name
        try:
            if name.startswith(b"."):
                _leave_out_hidden(out, entry, path)
                continue
            link = entry.is_symlink()
            if entry.is_dir():
                if is_service(name):
                    out.ignored += 1
                    out.found.add("service folders", path)
                    continue
                real = folder.real and os.path.join(folder.real, name)
                if (link or real) and (real := links.follow(path, real, link)) is None:
                    out.found.add("doubled folders", links.words(path))
                else:
                    yield _Folder(path, real)
                continue
            if not name.lower().endswith(_SUFFIXES):
                if link and not os.path.exists(entry.path):
                    out.ignored += 1
                    out.found.add("dead links", path)
                else:
                    _leave_out_other(out, path)
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
        if link or folder.real is not None:
            out.linked.append(len(out.names))
        elif info.st_nlink > 1:
            out.hard.append(len(out.names))
        out.names.append(name)
        out.stats.extend((info.st_size, info.st_mtime_ns))
        # 0 where the file system has none; a device's number is small, and so is an inode's
        out.inodes.append(info.st_ino and (info.st_ino ^ info.st_dev << 44) & (1 << 64) - 1)


def _leave_out_hidden(out: Listing, entry: os.DirEntry[bytes], path: bytes) -> None:
    if entry.is_dir():
        out.ignored += 1
        out.found.add("hidden folders", path)
    elif entry.name.lower().endswith(_SUFFIXES):
        out.ignored += 1
        out.found.add("hidden images", path)
    else:
        _leave_out_other(out, path)


def _leave_out_other(out: Listing, path: bytes) -> None:
    out.ignored += 1
    kind = OTHER + ending_of(os.path.basename(path))
    if kind not in out.found.counts and len(out.found.counts) > _MOST_ENDINGS:
        kind = OTHER + ".…"
    out.found.add(kind, path)
    if kind == OTHER + ".tar":
        out.tars.append(path)


class Links:
    """Which links to folders are followed: those that lead to something that is not yet listed."""

    def __init__(self, root: bytes) -> None:
        self.root, self._given = os.path.realpath(root), root
        self.seen: set[bytes] = set()  # real paths of folders that links led to

    def follow(self, path: bytes, real: bytes | None, link: bool) -> bytes | None:
        """The real path of a folder that was reached by a link; None where it is listed anyway.

        Args:
            real: the path as far as it is known; that of a link is looked up.
        """
        found = os.path.realpath(os.path.join(self._given, path)) if link or real is None else real
        if self._below(found) is not None or found in self.seen:
            return None
        self.seen.add(found)
        return found

    def _below(self, real: bytes) -> bytes | None:
        """A folder's path below the root, if it is listed there without any link."""
        below = os.path.relpath(real, self.root)
        outside = below == b".." or below.startswith(b"../")
        return None if outside or in_service(below + b"/") else below

    def words(self, path: bytes) -> str:
        """`latest → v2`."""
        real = os.path.realpath(os.path.join(self._given, path))
        below = self._below(real)
        return f"{printable(path)} → {printable(real if below is None else below)}"


def _leave_out_doubles(out: Listing) -> None:
    """Leaves out links to files that are listed by a name of their own; counts hard links."""
    if not (out.linked or out.hard):
        return
    inodes: npt.NDArray[Any] = np.array(out.inodes, dtype=np.uint64)
    hard = inodes[out.hard]
    repeated = len(hard) - len(np.unique(hard))
    if repeated:
        seen, again = set[int](), list[int]()
        for row in out.hard:
            if out.inodes[row] in seen:
                again.append(row)
            seen.add(out.inodes[row])
        for row in again:
            out.found.add("hard links", _path(out, row))
    linked = np.array(out.linked, dtype=np.int64)
    if not len(linked):
        return
    own = np.ones(len(inodes), dtype=bool)
    own[linked] = False
    double = np.isin(inodes[linked], inodes[own])
    _, first = np.unique(inodes[linked], return_index=True)
    once = np.zeros(len(linked), dtype=bool)
    once[first] = True
    drop = linked[(double | ~once) & (inodes[linked] != 0)]
    for row in drop.tolist():
        out.found.add("doubled files", _path(out, row))
    keep = np.ones(len(inodes), dtype=bool)
    keep[drop] = False
    out.first = np.concatenate([[0], np.cumsum(keep)])[np.array(out.first)].tolist()
    out.names = [out.names[row] for row in np.flatnonzero(keep)]
    stats: npt.NDArray[np.int64] = np.array(out.stats, dtype=np.int64).reshape(-1, 2)
    out.stats = array("q", stats[keep].tobytes())


def _path(out: Listing, row: int) -> bytes:
    folder = int(np.searchsorted(np.array(out.first), row, side="right")) - 1
    return os.path.join(out.dirs[folder], out.names[row])
