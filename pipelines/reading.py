"""Reading files: what is the file's own fault, what is the system's, and trying again."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import BadImage, DataError

T = TypeVar("T")

# Errors that say something of one file: it counts as a broken image. All others (too many open
# files, a disk or a server that fails, no memory) say nothing of it.
OF_THE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.EILSEQ, errno.ENXIO, errno.ENODEV),
    }
)
PAUSES = (0.05, 0.5, 2.0)  # s before each further try
NO_HANDLES = (errno.EMFILE, errno.ENFILE)


def patiently(read: Callable[[], T], again: Callable[[], None] | None = None) -> T:
    """What `read` returns; it is called again, after a pause, where the system failed.

    Args:
        again: called before each further try.

    Raises:
        OSError: of the file itself, or the system's last one.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno in OF_THE_FILE:
                raise
        time.sleep(pause)
        if again is not None:
            again()
    return read()


def refusal(error: OSError, path: str) -> BadImage | DataError:
    """What a failed read of a file of images is: a broken image, or the end of the run.

    Args:
        path: printable.
    """
    reason = error.strerror or str(error)
    if error.errno in OF_THE_FILE:
        return BadImage(f"cannot be read: {reason}")
    name = errno.errorcode.get(error.errno or 0, "OSError")
    text = f"{path} cannot be read: {reason} ({name}), {len(PAUSES) + 1} times"
    if error.errno in NO_HANDLES:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return DataError(f"{text}: raise the limit of {limit} open files (ulimit -n 4096)")
    return DataError(f"{text}: check the disk or server that it lies on, then repeat the command")


def handles(share: float, most: int) -> int:
    """Files to hold open: this share of the process's limit, at least 8 and at most `most`."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return most
    return min(most, max(8, int(share * limit)))


def read_file(path: str | bytes, opener: Callable[[str | bytes, int], int]) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: see `patiently`.
    """

    def read() -> bytes:
        with open(path, "rb", buffering=0, opener=opener) as file:
            size, data = os.fstat(file.fileno()).st_size, file.read()
        if len(data) < size:
            raise OSError(errno.EIO, f"only {len(data):,} of {size:,} bytes could be read")
        return data

    return patiently(read)
