"""The run folder: who owns it, how the run stands, and what it was asked for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from byol_fast.checkpoint import write_text

log = logging.getLogger(__name__)

_LEFT = re.compile(r".+\.(jsonl?|yaml|html|safetensors|pth)\.tmp\d+")


class RunFolder:
    """A run's folder, held by one process at a time (rank 0's). Use as a context manager.

    Raises:
        ValueError: the folder cannot be written, or another process is training in it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"the run folder {self.path} cannot be written: {error}. "
                f"Choose another with --out, or mend its permissions"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise ValueError(
                f"the run folder {self.path} is in use by {owner}: "
                f"wait for it, stop it, or choose another folder with --out"
            ) from error
        except OSError as error:  # Lustre without -o flock, NFS without its lock service
            log.warning(
                "the file system of %s has no locks (%s): see to it that no other run uses it",
                self.path,
                error,
            )
        with contextlib.suppress(OSError):  # a full disk: what is written next will tell
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {platform.node()}")
            self._lock.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # what a full disk has left unwritten
                self._lock.close()  # gives the lock back; so does the end of the process

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def sweep(self) -> None:
        """Remove the temporary files that a killed session left beside their targets."""
        for path in (*self.path.iterdir(), *self.path.glob("exports/*")):
            if _LEFT.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def status(self, state: str, *, step: int, total_steps: int, reason: str = "") -> None:
        """Write `status.json`: running, done, preempted or failed, and why."""
        content = {"state": state, "step": step, "total_steps": total_steps, "reason": reason}
        write_text(self.path / "status.json", json.dumps(content, indent=1) + "\n")

    def running(self, *, step: int, total_steps: int) -> None:
        """`status` of a run that goes on, which it also does where this cannot be written."""
        try:
            self.status("running", step=step, total_steps=total_steps)
        except OSError as error:
            log.warning("%s could not be written: %s", self.path / "status.json", error)

    def read_status(self) -> dict[str, Any]:
        """`status.json` as it stands; empty if there is none."""
        path = self.path / "status.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def summary(self) -> dict[str, Any]:
        """`summary.json` as it stands; empty before the first result, and if it is damaged."""
        path = self.path / "summary.json"
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            log.warning("%s is damaged (%s): begun again", path, error)
            return {}

    def add_to_summary(self, **values: Any) -> None:
        """Enter results in `summary.json`, keeping the others."""
        merged = {**self.summary(), **values}
        write_text(self.path / "summary.json", json.dumps(merged, indent=1) + "\n")
