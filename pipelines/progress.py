"""Progress with an ETA on stderr: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_EVERY = 5.0  # seconds


class Progress:
    """Counts work done, inside a `with`.

    Args:
        what: the activity, such as `verifying`.
        total: how many there are, None if that is not known yet.
        unit: what is counted.
        enabled: False shows nothing.
    """

    def __init__(
        self, what: str, total: int | None, *, unit: str = "images", enabled: bool = True
    ) -> None:
        self.what, self.total, self.unit, self.enabled = what, total, unit, enabled
        self.done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            self._bar = _bar(self.what, self.total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        if self._bar is not None:
            rate = self.done / max(time.monotonic() - self._start, 1e-9)
            self._bar.update(self._bar.task_ids[0], advance=n, rate=f"{rate:,.0f} {self.unit}/s")
        elif self.enabled and (now := time.monotonic()) - self._last >= _LINE_EVERY:
            self._last = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The plain line after `seconds` of work."""
        rate = self.done / max(seconds, 1e-9)
        if self.total is None:
            return f"{self.what}: {self.done:,} {self.unit}, {rate:,.0f}/s"
        left = (self.total - self.done) / max(rate, 1e-9)
        share = 100 * self.done / max(self.total, 1)
        return (
            f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({share:.1f}%), "
            f"{rate:,.0f}/s, {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bar(what: str, total: int | None) -> Any:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(what, total=total, rate="")
    return bar
