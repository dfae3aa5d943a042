"""A request to stop, noticed between two steps instead of in the middle of one."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set `received`; repeating them changes nothing."""

    def __init__(self) -> None:
        self.received = False
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.name = True, signal.Signals(number).name
            log.warning("%s: saving a checkpoint after this step, then stopping", self.name)
