"""Wall time of work that may be queued on a GPU, without ever waiting for it."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

import torch


class Timer:
    """Sums the time of `with timer:` blocks, in seconds.

    On a GPU a block is bracketed by two events; `seconds()` adds up those that have passed and
    leaves the others for later, so reading it does not synchronise.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._total = 0.0
        self._started = 0.0
        self._open: torch.cuda.Event | None = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> Timer:
        if self._cuda:
            self._open = torch.cuda.Event(enable_timing=True)
            self._open.record(torch.cuda.current_stream(self._device))
        else:
            self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(self._device))
            self._pairs.append((self._open, end))
            self._collect()  # keeps the queue as short as the GPU's backlog
        else:
            self._total += time.perf_counter() - self._started

    def seconds(self) -> float:
        """Seconds of all blocks that have finished so far."""
        self._collect()
        return self._total

    def _collect(self) -> None:
        while self._pairs and self._pairs[0][1].query():
            start, end = self._pairs.popleft()
            self._total += start.elapsed_time(end) / 1000
