"""Seconds of training, over all sessions of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts between laps; what happens while it is paused (evaluation) is left out."""

    def __init__(self, seconds: float = 0.0, step: int = 0) -> None:
        self.seconds = seconds  # at the last lap that named a step
        self.step = step  # at the last lap
        self.waited = 0.0  # for data, at the last lap
        self._since = time.perf_counter()

    def lap(self, step: int | None = None) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        lap, self._since = now - self._since, now
        if step is not None:
            self.step, self.seconds = step, self.seconds + lap
        return lap

    @property
    def so_far(self) -> float:
        """Seconds counted until now, between laps as well."""
        return self.seconds + time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time is not counted."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started
