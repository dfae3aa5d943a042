"""What the report says first: how the run went, in plain words and in four figures."""

from __future__ import annotations

import math
from html import escape

from byol_fast.report.data import KNN_RAW, KNN_TRAINED, KNN_UNTRAINED, RunData
from byol_fast.report.html import para, prose, tag
from byol_fast.watching import metrics
from byol_fast.watching.alarms import (
    NARROW_MEANS,
    collapsed,
    healthy_std,
    narrow,
    spectrum,
    suspect,
)
from byol_fast.watching.metrics import short


def verdict(data: RunData) -> str:
    """The box at the top."""
    level, headline = judge(data)
    sentences = [s for s in (_loss(data), _accuracy(data), _speed(data), _health(data)) if s]
    mark = {"good": "✓ ", "bad": "✕ ", "warn": "! "}.get(level, "")
    body = tag("h2", escape(mark + headline), id="verdict")
    if sentences:
        body += para(" ".join(sentences))
    return tag("section", body, class_=f"verdict {level}", aria_labelledby="verdict")


def judge(data: RunData) -> tuple[str, str]:
    """(good, warn, bad or plain) and the headline."""
    if not data.log.rows:
        return "plain", "Nothing has been logged yet"
    if diverged(data):
        return "bad", "Training diverged: the loss is not a finite number"
    if collapse(data) == "yes":
        return "bad", "The embeddings collapsed"
    if collapse(data) == "possible":
        return "warn", "The embeddings may be collapsing"
    trained = data.number(KNN_TRAINED)
    untrained, raw = data.number(KNN_UNTRAINED), data.number(KNN_RAW)
    if trained is None or untrained is None:
        what = "not measured" if untrained is None else "not measured after training yet"
        if collapse(data) == "partial":
            return "warn", f"The embeddings use few directions; kNN accuracy was {what}"
        return "plain", f"No alarm was raised; kNN accuracy was {what}"
    if trained <= untrained:
        return "warn", "Training has not improved the features so far"
    if raw is not None and trained <= raw:
        return "warn", "Better than the untrained network, not yet better than raw pixels"
    if collapse(data) == "partial":
        return "warn", "The network learned, but its embeddings use few directions"
    beaten = "both baselines" if raw is not None else "the untrained network"
    return "good", f"The network learned: its features beat {beaten}"


def tiles(data: RunData) -> str:
    """Four figures: accuracy, loss, speed, health."""
    trained, raw = data.number(KNN_TRAINED), data.number(KNN_RAW)
    untrained = data.number(KNN_UNTRAINED)
    against = [
        f"{label} {short(value, 'share')}"
        for label, value in (("untrained", untrained), ("raw pixels", raw))
        if value is not None
    ]
    ends = _ends(data, metrics.LOSS)
    rate = data.images_per_second
    each = data.images_per_second_per_gpu
    waiting = data.usual(metrics.DATA_WAIT_SHARE)
    pace = [f"{short(each, 'rate')} per device"] if each is not None and each != rate else []
    pace += [f"{short(waiting, 'share')} waiting for data"] if waiting is not None else []
    shown = (
        (
            "kNN accuracy",
            short(trained, "share") if trained is not None else "–",
            " · ".join(against),
        ),
        ("Loss", short(ends[1]) if ends else "–", f"from {short(ends[0])}" if ends else ""),
        ("Images per second", short(rate, "rate") if rate is not None else "–", " · ".join(pace)),
        ("Collapse", *_health_tile(data)),
    )
    inner = "".join(
        tag(
            "div",
            tag("dt", escape(name))
            + tag("dd", escape(value), class_="value")
            + (tag("dd", prose(note), class_="note") if note else ""),
            class_="tile",
        )
        for name, value, note in shown
    )
    return tag("dl", inner, class_="tiles")


def _health_tile(data: RunData) -> tuple[str, str]:
    ends = _ends(data, metrics.EMBEDDING_STD)
    if ends is None:
        return "not watched", ""
    share = ends[1] / healthy_std(data.embedding_dim)
    note = f"spread at {100 * share:.0f} % of healthy"
    if rank := _ends(data, metrics.RANKME):
        note += f" · RankMe {short(rank[1])}, {short(rank[0])} at the start"
    return collapse(data), note


def _ends(data: RunData, name: str) -> tuple[float, float] | None:
    """First and last finite value of a logged quantity."""
    values = [v for v in data.log.series(name)[1] if math.isfinite(v)]
    return (values[0], values[-1]) if values else None


def diverged(data: RunData) -> bool:
    """Whether the run ended because, or with, a loss that is not finite."""
    loss = data.log.series(metrics.LOSS)[1]
    told = any(e.kind == "diverged" for e in data.log.events)
    return told or bool(loss and not math.isfinite(loss[-1]))


def collapse(data: RunData) -> str:
    """yes, no, not watched, possible (the newest gauges are bad, but not for long enough), or
    partial (the embeddings are spread, but along few of the directions that they had at first)."""
    watched = [row for row in data.log.rows if metrics.EMBEDDING_STD in row]
    if not watched:
        return "not watched"
    if collapsed(data.log.rows, dim=data.embedding_dim):
        return "yes"
    if suspect(watched[-1], dim=data.embedding_dim):
        return "possible"
    return "partial" if narrow(data.log.rows) else "no"


def _loss(data: RunData) -> str:
    ends = _ends(data, metrics.LOSS)
    if ends is None:
        return ""
    steps = int(max(data.log.series(metrics.LOSS)[0]))
    if ends[0] == ends[1]:
        return f"The loss is {short(ends[1])} after {steps:,} steps."
    way = "fell" if ends[1] < ends[0] else "rose"
    return f"The loss {way} from {short(ends[0])} to {short(ends[1])} in {steps:,} steps."


def _accuracy(data: RunData) -> str:
    trained = data.number(KNN_TRAINED)
    if trained is None:
        return ""
    against = [
        f"{short(value, 'share')} for {label}"
        for label, value in (
            ("the untrained network", data.number(KNN_UNTRAINED)),
            ("raw pixels", data.number(KNN_RAW)),
        )
        if value is not None
    ]
    words = f", against {' and '.join(against)}" if against else ""
    return f"kNN accuracy is {short(trained, 'share')}{words}."


def _speed(data: RunData) -> str:
    rate = data.images_per_second
    if rate is None:
        return ""
    seconds = data.log.series(metrics.ELAPSED)[1]
    took = f" and trained for {short(seconds[-1], 'seconds')}" if seconds else ""
    return f"It ran at {short(rate, 'rate')} images/s{took}."


def _health(data: RunData) -> str:
    rank = _ends(data, metrics.RANKME)
    directions = f" {spectrum(rank[1], rank[0])}" if rank and rank[0] else ""
    match collapse(data):
        case "yes":
            return "All images are mapped to almost the same point; see the alarms below."
        case "possible":
            return "At the last log points the embeddings were almost the same for all images."
        case "partial":
            return f"The embeddings did not fall together.{directions} {NARROW_MEANS}"
        case "no" if any(e.kind == "alarm" for e in data.log.events):
            return f"An alarm was raised on the way.{directions}"
        case "no":
            return f"There was no sign of collapse.{directions}"
    return ""
