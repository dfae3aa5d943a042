"""A request to stop: noticed between two steps, or at once where there is nothing to save."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from byol_fast.errors import Preempted

log = logging.getLogger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGHUP set `received`; repeating them changes
    nothing. A SIGHUP that is ignored, as under nohup, stays so."""

    def __init__(self) -> None:
        self.received = False
        self.name = ""
        self._doing, self._interrupts = "", False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in _STOPPING
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self, doing: str) -> Iterator[None]:
        """A block that the first signal leaves at once.

        Args:
            doing: what the block does, for the reason: "indexing".

        Raises:
            Preempted: a signal came in the block, or had come before.
        """
        self._doing, self._interrupts = doing, True
        try:
            if self.received:
                raise self._preempted()
            yield
        finally:
            self._interrupts = False

    def _preempted(self) -> Preempted:
        return Preempted(f"{self.name} while {self._doing}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received, self.name = True, signal.Signals(number).name
        if self._interrupts:
            self._interrupts = False
            raise self._preempted()
        log.warning("%s: stopping, with a checkpoint if there is a step to save", self.name)
