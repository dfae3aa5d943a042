"""A training that goes on where it was interrupted; on a CPU with the same weights, bit for bit."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byol_fast import checkpoint
from byol_fast.errors import CheckpointError
from byol_fast.evaluate.parts import digest

log = logging.getLogger(__name__)


class Resume:
    """States of one training, in a folder that is removed once its result is written.

    Args:
        folder: beside the result file.
        key: all that the training depends on, JSON values; a state of another key is not used.
        every_seconds: at most so much work is lost.
    """

    def __init__(self, folder: Path, key: dict[str, Any], *, every_seconds: float = 120.0) -> None:
        self.folder, self._key, self._every = folder, digest(key), every_seconds
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The newest whole state of this training, None if there is none."""
        try:
            state = checkpoint.latest(self.folder) if self.folder.is_dir() else None
        except CheckpointError as error:
            log.warning("training starts from the beginning: %s", error)
            state = None
        if state is None or state["key"] != self._key:
            self.clear()  # else its later steps would outlive the first ones of this training
            return None
        log.warning("goes on from step %d of %s", state["step"], self.folder)
        return state

    def save(self, step: int, state: Callable[[], dict[str, Any]], *, always: bool = False) -> None:
        """Keep what `state` gives after `step` steps, if it is time or `always`."""
        if always or time.monotonic() - self._last >= self._every:
            checkpoint.save(self.folder, step, {"key": self._key, **state()}, keep=1)
            self._last = time.monotonic()

    def clear(self) -> None:
        """The result is there: nothing is to be resumed."""
        shutil.rmtree(self.folder, ignore_errors=True)
