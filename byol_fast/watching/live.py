"""What a person watching a run sees: a panel on a terminal, one line per log point otherwise.

Both are drawn only when something is logged. There is no thread and no full-screen mode, so output
and tracebacks of the run stay readable above the panel.
"""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from byol_fast.watching import metrics
from byol_fast.watching.metrics import METRICS, Values, short

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType

BARS = "▁▂▃▄▅▆▇█"
TREND = 48  # log points in the panel's loss curve

# label and metric, in the order shown
SHOWN = (
    ("loss", metrics.LOSS),
    ("lr", metrics.LEARNING_RATE),
    ("tau", metrics.TARGET_DECAY),
    ("images/s", metrics.IMAGES_PER_SECOND),
    ("wait", metrics.DATA_WAIT_SHARE),
    ("kNN", metrics.KNN_ACCURACY),
)


class Display(Protocol):
    """Shows the newest known value of every metric, and events."""

    def log(self, step: int, values: Values) -> None: ...
    def event(self, step: int, kind: str, text: str) -> None: ...
    def close(self) -> None: ...


class Eta:
    """Time left, from the pace over the last `window` log points (evaluations included)."""

    def __init__(
        self, total_steps: int, *, window: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=window)

    def update(self, step: int) -> float | None:
        """Seconds left at `step`, or None while only one point is known."""
        if not self._seen or step > self._seen[-1][0]:
            self._seen.append((step, self._clock()))
        (first, then), (last, now) = self._seen[0], self._seen[-1]
        if last == first:
            return None
        return max(0.0, (self.total_steps - last) * (now - then) / (last - first))


def open_display(
    total_steps: int,
    *,
    panel: str = "auto",
    title: str = "byol_fast",
    stream: TextIO | None = None,
) -> Display | None:
    """The panel where `stream` (standard output) is a UTF-8 terminal and rich is there, else lines.

    `panel` is "auto", or "off" for lines in any case. None where standard output is closed.
    """
    if panel not in ("auto", "off"):
        raise ValueError(f"panel is auto or off, got {panel!r}")
    out = stream if stream is not None else sys.stdout
    if out is None:  # the process was started without one
        return None
    if panel == "auto" and out.isatty() and (out.encoding or "").lower().startswith("utf"):
        try:
            from rich.console import Console
        except Exception:  # also where it is installed and broken
            return Lines(total_steps, out)
        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal:
            return Panel(total_steps, console, title=title)
    return Lines(total_steps, out)


class Lines:
    """One plain ASCII line per log point, for files, pipes and schedulers."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total = total_steps
        self._stream = stream
        self._eta = Eta(total_steps)

    def log(self, step: int, values: Values) -> None:
        left = self._eta.update(step)
        share = 100 * step / self._total if self._total else 100.0
        parts = [f"step {step}/{self._total} ({share:.1f} %)"]
        parts += [
            f"{label} {short(values[n], METRICS[n].kind)}" for label, n in SHOWN if n in values
        ]
        if left is not None:
            parts.append(f"left {short(left, 'seconds')}")
        self._print("  ".join(parts))

    def event(self, step: int, kind: str, text: str) -> None:
        self._print(f"[{kind}] step {step}: {text}")

    def close(self) -> None:
        return None

    def _print(self, line: str) -> None:
        encoding = self._stream.encoding or "ascii"
        safe = line.encode(encoding, "replace").decode(encoding)
        print(safe, file=self._stream, flush=True)


class Panel:
    """A panel that is redrawn in place, with progress, pace, numbers and the loss's course."""

    def __init__(self, total_steps: int, console: Console, *, title: str = "byol_fast") -> None:
        from rich.live import Live

        self._total = total_steps
        self._title = title
        self._console = console
        self._eta = Eta(total_steps)
        self._losses: deque[float] = deque(maxlen=TREND)
        self._alarm = ""
        # What the run prints goes above the panel; what is sent to a file stays in the file.
        on_screen = sys.stderr is not None and sys.stderr.isatty()
        self._live = Live(
            console=console, auto_refresh=False, transient=False, redirect_stderr=on_screen
        )
        self._hook = sys.excepthook
        self._open = True
        stderr = sys.stderr
        self._live.start()
        # Handlers keep the stream they were made with, which would write into the panel.
        self._handlers = _handlers_of(stderr) if on_screen else []
        for handler in self._handlers:
            handler.setStream(sys.stderr)
        self._stderr = stderr
        sys.excepthook = self._on_error
        atexit.register(self.close)

    def log(self, step: int, values: Values) -> None:
        if not self._open:
            return
        loss = values.get(metrics.LOSS)
        if loss is not None:
            self._losses.append(loss)
        self._live.update(self._render(step, values, self._eta.update(step)), refresh=True)

    def event(self, step: int, kind: str, text: str) -> None:
        from rich.text import Text

        if kind == "alarm":
            self._alarm = f"step {step}: {text}"
        style = "bold red" if kind == "alarm" else "yellow" if kind == "warning" else "dim"
        self._console.print(Text(f"[{kind}] step {step}: {text}", style=style))

    def close(self) -> None:
        """Leave the last picture, show the cursor, give stdout and stderr back. Safe to repeat."""
        if not self._open:
            return
        self._open = False
        if sys.excepthook == self._on_error:
            sys.excepthook = self._hook
        atexit.unregister(self.close)
        self._live.stop()
        for handler in self._handlers:
            handler.setStream(self._stderr)

    def _on_error(self, *what: object) -> None:
        self.close()  # before the traceback, so it is printed below the panel and unwrapped
        self._hook(*what)  # type: ignore[arg-type]

    def _render(self, step: int, values: Values, left: float | None) -> Group:
        from rich.console import Group
        from rich.panel import Panel as Frame
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        epoch = values.get(metrics.EPOCH)
        where = f"step {step:,} of {self._total:,}"
        if epoch is not None:
            where += f" · epoch {epoch:.4g}"
        head.add_row(where, "" if left is None else f"{short(left, 'seconds')} left")
        numbers = Table.grid(expand=True, padding=(0, 2))
        shown = [(label, name) for label, name in SHOWN if name in values]
        for _ in shown:
            numbers.add_column()
        numbers.add_row(
            *(Text("τ" if label == "tau" else label, style="dim") for label, _ in shown)
        )
        numbers.add_row(*(Text(short(values[n], METRICS[n].kind), style="bold") for _, n in shown))
        trend = Text(f"loss {sparkline(list(self._losses))}", style="cyan")
        bar = Table.grid(expand=True)  # a bar by itself does not end its line
        bar.add_row(ProgressBar(total=max(self._total, 1), completed=step))
        body: list[RenderableType] = [head, bar, numbers, trend]
        if self._alarm:
            body.append(Text(self._alarm, style="bold red"))
        return Group(Frame(Group(*body), title=self._title, border_style="dim"))


def _handlers_of(stream: TextIO) -> list[logging.StreamHandler[Any]]:
    """Every logging handler that writes to `stream`."""
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    return [
        handler
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]


def sparkline(values: list[float]) -> str:
    """`values` as block characters, lowest to highest; NaN as a space."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BARS[round((v - low) * scale)] if v == v and abs(v) != float("inf") else " " for v in values
    )
