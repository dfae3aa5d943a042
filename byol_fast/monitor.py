"""The run's log: metrics.jsonl always; TensorBoard, Weights & Biases and the terminal beside it.

Only rank 0 writes. Trouble with a log never ends a training that has begun: it is told once, and
lines that could not be written to metrics.jsonl are kept and written when there is room again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

from byol_fast.watching import live, metrics, sinks
from byol_fast.watching.alarms import alarms, collapse_alarms, collapsed, healthy_std, narrowed
from byol_fast.watching.metrics import METRICS, Values

__all__ = [
    "LogError",
    "RunLog",
    "alarms",
    "collapse_alarms",
    "collapsed",
    "healthy_std",
    "narrowed",
]

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
KEPT_POINTS = 256  # log points in `RunLog.history`
PENDING_LINES = 10_000  # kept in memory while the disk is full, about 3 MB


class LogError(OSError):
    """metrics.jsonl cannot be written at the start of a run; the message has path and mend."""


class RunLog:
    """Where a run's numbers and events go.

    Args:
        out: the run's folder; made if missing.
        rank: of this process; ranks other than 0 get a log that does nothing.
        world_size: number of ranks, shown in the panel's title.
        total_steps: of the whole run, for progress and time left.
        tensorboard: write event files under `out/tensorboard`.
        wandb: send to Weights & Biases (offline without credentials).
        panel: "auto" draws a panel on a terminal, "off" prints lines; False is "off".
        resume_step: the step of the checkpoint resumed from: later lines are dropped, for these
            steps are done again. None starts a new log; an old one is kept as metrics.jsonl.old.
        config: what W&B is told about the run.

    Raises:
        LogError: metrics.jsonl cannot be written.
        ImportError: `wandb` was asked for and is not installed.

    `history` holds the last points logged, oldest first, and `first` the first finite value of each
    number, also across a resume; ask `alarms(values, log.history)` before `log(step, values)`.
    """

    def __init__(
        self,
        out: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        total_steps: int,
        tensorboard: bool = True,
        wandb: bool = False,
        panel: str | bool = "auto",
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.history: deque[Values] = deque(maxlen=KEPT_POINTS)
        self.first: dict[str, float] = {}
        self._latest: dict[str, float | None] = {}
        self._bad: set[str] = set()
        self._file: LineFile | None = None
        self._sinks: list[sinks.Sink] = []
        self._display: live.Display | None = None
        if rank != 0:
            return
        if wandb:
            sinks.require_wandb()  # before anything is written
        self._file = LineFile(out / FILE, resume_step)
        for row in metrics.read(out / FILE).rows:
            self._remember({k: v for k, v in row.items() if k != "step"})
        if wandb:
            self._add(sinks.open_wandb(out, config or {}, resumed=resume_step is not None))
        if tensorboard:
            self._add(sinks.open_tensorboard(out / "tensorboard", resume_step))
        if isinstance(panel, bool):
            panel = "auto" if panel else "off"
        ranks = f" · {world_size} ranks" if world_size > 1 else ""
        self._display = live.open_display(total_steps, panel=panel, title=f"byol_fast{ranks}")

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Log numbers measured after `step` updates. NaN and infinity become null and an event."""
        if self._file is None:
            return
        clean = {name: _number(value) for name, value in values.items()}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in clean.items()}
        self._file.write({"step": int(step), **finite})
        self._remember(finite)
        for name, value in finite.items():
            if value is not None:
                self._bad.discard(name)
            elif name not in self._bad:  # told where it begins, not at every point
                self._bad.add(name)
                label = METRICS[name].label if name in METRICS else name
                self.event(step, "not-finite", f"{label} ({name}) is {clean[name]}")
        for sink in list(self._sinks):
            self._guard(sink, "log", step, clean)
        self._show("log", step, self._latest)

    def event(self, step: int, kind: str, text: str) -> None:
        """Log something that happened, in plain words; `kind` is alarm, warning, resume, end, …"""
        if self._file is None:
            return
        self._file.write({"step": int(step), "event": kind, "text": text})
        for sink in list(self._sinks):
            self._guard(sink, "event", step, kind, text)
        self._show("event", step, kind, text)

    def sync(self) -> None:
        """Put the lines on the disk itself; call it before a checkpoint of the same step."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Restore the terminal, finish every log. Safe to repeat; later calls log nothing."""
        display, self._display = self._display, None
        if display is not None:
            with suppress(OSError):  # the terminal may be gone
                display.close()
        for sink in list(self._sinks):
            self._guard(sink, "close")
        self._sinks.clear()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remember(self, values: Values) -> None:
        self.history.append(values)
        self._latest.update(values)
        for name, value in values.items():
            if value is not None:
                self.first.setdefault(name, value)

    def _add(self, sink: sinks.Sink | None) -> None:
        if sink is not None:
            self._sinks.append(sink)

    def _guard(self, sink: sinks.Sink, method: str, *args: object) -> None:
        try:
            getattr(sink, method)(*args)
        except Exception as error:  # a third party's writer: whatever it raises, training goes on
            if sink in self._sinks:
                self._sinks.remove(sink)
            if method != "close":
                log.warning("%s stopped logging (%s); training goes on", sink.name, error)

    def _show(self, method: str, *args: object) -> None:
        if self._display is None:
            return
        try:
            getattr(self._display, method)(*args)
        except OSError as error:  # the terminal or pipe is gone
            self._display = None
            log.warning("nothing can be shown any more (%s); training goes on", error)


class LineFile:
    """A JSON-lines file of which only whole lines ever remain.

    Opening it drops a line torn by a kill and, on a resume, lines after `resume_step`; the rest is
    rewritten beside the file and moved over it. A failed write is undone and repeated later.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self._pending: deque[bytes] = deque()
        self._lost = 0
        self._warned = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                if path.exists() and path.stat().st_size:
                    os.replace(path, path.with_name(path.name + ".old"))
            elif path.exists():
                _truncate(path, resume_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - kept open for the run
        except OSError as error:
            raise LogError(
                f"cannot write {path}: {error.strerror or error}. Give another --out, or fix the "
                "folder's permissions or free space"
            ) from error
        self._size = os.fstat(self._file.fileno()).st_size

    def write(self, record: Mapping[str, object]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        if len(self._pending) >= PENDING_LINES:
            self._pending.popleft()
            self._lost += 1
        # What is not UTF-8 in a path becomes an escape, which JSON understands.
        self._pending.append(line.encode("utf-8", "backslashreplace"))
        self._flush()

    def _flush(self) -> None:
        data = b"".join(self._pending)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)  # no half line stays
            if not self._warned:
                self._warned = True
                log.warning(
                    "cannot write to %s (%s); training goes on, the lines are kept in memory and "
                    "written when there is room",
                    self.path,
                    error,
                )
            return
        self._size += len(data)
        self._pending.clear()
        self._warned = False

    def sync(self) -> None:
        with suppress(OSError):  # told by the write
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._pending:
            self._flush()
        if lost := len(self._pending) + self._lost:
            log.warning("%d lines could not be written to %s", lost, self.path)
        self._file.close()


def _truncate(path: Path, last_step: int) -> None:
    """Keep the whole lines of `path` up to `last_step`, atomically; untouched if that is all."""
    before = path.read_bytes()
    after = b"".join(
        line
        for line in before.splitlines(keepends=True)
        if line.endswith(b"\n")
        and (record := metrics.record_of(line.decode("utf-8", "replace"))) is not None
        and int(str(record["step"])) <= last_step
    )
    if after == before:
        return
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(after)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(value: SupportsFloat) -> float:
    """A Python number JSON can hold; int stays int, tensors and NumPy scalars become float."""
    return value if type(value) is int else float(value)
