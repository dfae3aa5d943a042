"""Names of what a run logs, what each means, and how to read a log back.

The live panel, the report and the alarms share this table, so a name is explained in one place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TIMING = "time/"  # keys under it differ from run to run; everything else is reproducible

LOSS = "loss"
LEARNING_RATE = "lr"
TARGET_DECAY = "target_decay"
GRAD_NORM = "grad_norm"
EMBEDDING_STD = "embedding_std"
RANKME = "rankme"
ALIGNMENT = "alignment"
UNIFORMITY = "uniformity"
PROBE_LOSS = "probe_loss"
PROBE_ACCURACY = "probe_accuracy"
KNN_ACCURACY = "knn_accuracy"
EPOCH = "epoch"
IMAGES_PER_SECOND = "time/images_per_second"
IMAGES_PER_SECOND_PER_GPU = "time/images_per_second_per_gpu"
DATA_WAIT_SHARE = "time/data_wait_share"
ELAPSED = "time/elapsed"

Values = Mapping[str, float | None]  # None stands for a number that was not finite


@dataclass(frozen=True)
class Metric:
    """One logged quantity. `kind` says how to print it: number, share (0 to 1), rate or seconds."""

    label: str
    help: str
    kind: str = "number"


METRICS: dict[str, Metric] = {
    LOSS: Metric(
        "Loss",
        "2 − 2·cos between predicted and target embedding, summed over both directions; it should "
        "fall, but a loss near zero can also mean collapse.",
    ),
    LEARNING_RATE: Metric("Learning rate", "Linear warm-up, then half a cosine down to zero."),
    TARGET_DECAY: Metric(
        "Target decay τ",
        "Share of the target network kept at each update; rises to 1, where the target stands "
        "still.",
    ),
    GRAD_NORM: Metric(
        "Gradient norm", "Length of the whole gradient; spikes point at instability."
    ),
    EMBEDDING_STD: Metric(
        "Embedding spread",
        "Standard deviation of the projections scaled to length 1; healthy runs stay near 1/√d, "
        "collapse goes to 0.",
    ),
    RANKME: Metric(
        "RankMe",
        "Number of directions the projections really use; near 1 means collapse, less than a "
        "quarter of its first value partial collapse.",
    ),
    ALIGNMENT: Metric(
        "Alignment", "Squared distance between the two views of an image; lower is closer."
    ),
    UNIFORMITY: Metric(
        "Uniformity", "How evenly embeddings cover the sphere; 0 is one point, lower is better."
    ),
    PROBE_LOSS: Metric(
        "Probe loss", "Cross-entropy of the linear probe trained along, without gradient to BYOL."
    ),
    PROBE_ACCURACY: Metric(
        "Linear probe", "Accuracy of a linear classifier trained along on frozen features.", "share"
    ),
    KNN_ACCURACY: Metric(
        "kNN accuracy", "Weighted vote of the nearest neighbours on frozen features.", "share"
    ),
    EPOCH: Metric("Epoch", "Passes over the data so far."),
    IMAGES_PER_SECOND: Metric("Images per second", "Over all devices, two views each.", "rate"),
    IMAGES_PER_SECOND_PER_GPU: Metric("Images per second per device", "Of one rank.", "rate"),
    DATA_WAIT_SHARE: Metric(
        "Waiting for data", "Share of the time the step stood waiting for the loader.", "share"
    ),
    ELAPSED: Metric(
        "Elapsed", "Time trained so far, over all sessions, without evaluations.", "seconds"
    ),
}


def short(value: float | None, kind: str = "number") -> str:
    """`value` for a human: 4 significant digits, or per cent, rate, h:mm:ss by `kind`."""
    if value is None or not math.isfinite(value):
        return "not finite"
    match kind:
        case "share":
            return f"{100 * value:.1f} %"
        case "rate":
            return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
        case "seconds":
            minutes, seconds = divmod(round(value), 60)
            hours, minutes = divmod(minutes, 60)
            return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2e}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Event:
    """Something that happened at `step`; `kind` is a word such as alarm, warning, resume, end."""

    step: int
    kind: str
    text: str


@dataclass
class Log:
    """A metrics.jsonl read back: rows of numbers and events, each in the order written."""

    rows: list[dict[str, float | None]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric; values that were not finite come as NaN."""
        pairs = [
            (float(r["step"] or 0), math.nan if r[name] is None else float(r[name] or 0.0))
            for r in self.rows
            if name in r
        ]
        return [p[0] for p in pairs], [p[1] for p in pairs]


def parse(lines: Iterable[str]) -> Log:
    """Rows and events of `lines`; a line that is not a whole record (torn by a kill) is skipped."""
    log = Log()
    for line in lines:
        record = record_of(line)
        if record is None:
            continue
        if "event" in record:
            step, kind, text = record["step"], record["event"], record.get("text", "")
            log.events.append(Event(int(str(step)), str(kind), str(text)))
        else:
            log.rows.append(
                {k: v for k, v in record.items() if v is None or isinstance(v, int | float)}
            )
    return log


def record_of(line: str) -> dict[str, object] | None:
    """The record in one line of a log, or None where the line is not a whole one."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def read(path: Path) -> Log:
    """The log at `path`; an empty one where there is no such file."""
    if not path.exists():
        return Log()
    return parse(path.read_text(encoding="utf-8", errors="replace").splitlines())


def reproducible(log: Log) -> list[dict[str, float | None]]:
    """Rows without timing keys: two runs of one configuration must agree on these exactly."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in log.rows]
