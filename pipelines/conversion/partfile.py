"""A file that appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import IO

from pipelines.errors import DataError
from pipelines.scan import printable

log = logging.getLogger(__name__)


class PartFile:
    """A file `.NAME.part` beside its target, to write to inside a `with`; `publish` renames it.

    It is removed if the block ends without that. What a killed process left behind is overwritten
    by the next, as the name is always the same; a lock, which dies with its process, keeps two that
    run at once apart.

    Args:
        target: the file that is to appear.
    """

    file: IO[bytes]

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, target.with_name(f".{target.name}.part")
        self._published = False

    def __enter__(self) -> PartFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.file = open(os.open(self.path, flags, 0o666), "w+b", buffering=1 << 20, closefd=True)
        try:
            self._lock()
        except BaseException:
            self.file.close()
            raise
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken() from None
        except OSError:
            log.info("%s: this file system has no locks", printable(self.path))
        mine = os.fstat(self.file.fileno())
        if not os.path.exists(self.path) or not os.path.samestat(mine, os.stat(self.path)):
            raise self._taken()  # the other process has just published it
        self.file.truncate(0)

    def _taken(self) -> DataError:
        return DataError(f"{self.target} is being written by another process: wait for that one")

    def publish(self) -> None:
        """Gives the file its name, once every byte is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.path, self.target)
        self._published = True
        folder = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could undo the renaming
        finally:
            os.close(folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._published:
            self.file.close()
            return
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk fails again on what is still buffered
            self.file.close()
