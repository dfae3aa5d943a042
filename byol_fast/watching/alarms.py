"""Alarms in plain words: collapsed embeddings and numbers that are not finite.

Both gauges belong on the online network's projections. The predictor's outputs will not do: in the
first hundred steps of a healthy run it answers with the mean of the targets, and their spread was
0.11 of 1/sqrt(d) then, no more than that of a collapsed run.

The thresholds were set on small runs with 256-dimensional projections. With a predictor the spread
stayed between 0.63 and 0.82 of 1/sqrt(d) and RankMe above 14 (ResNet-18 on 2,000 CIFAR images, a
small network on 28-pixel digits, 60 to 500 steps). Without one it was below 0.25 after 20 steps and
0.06 to 0.12 at the end, while RankMe went to 4 on the digits and only to 31 on CIFAR.

RankMe's course in one run says more than its value, which depends on the batch and the network: a
fall below `NARROW` of its first value is no collapse to one point, but a partial (dimensional) one,
and gets a warning. That share was set on the quickstart's 1,869 images of 32 pixels, 12 classes. A
three-layer network went from 59 to no less than 16.7 (0.28) and ended at 0.37 after 8 epochs, 0.35
after 24, 0.57 with a quarter of the rate, and 0.08 without a predictor. The quickstart's ResNet-18
went from 93 to 13.8 (0.15), while its kNN accuracy rose. On large data no share was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from byol_fast.watching import metrics
from byol_fast.watching.metrics import Values

PATIENCE = 5  # bad log points before an alarm: this many times log_every is the detection delay
SETTLE = 5  # first log points of a run are never counted: a fresh network may pass through a dip
STD_LOW, STD_OK = 0.25, 0.4  # times 1/sqrt(d): below the first is bad, above the second recovered
RANK_LOW, RANK_OK = 3.0, 5.0  # effective dimensions, whatever d
NARROW, WIDE = 0.25, 0.35  # times the first RankMe of the run


class _Gauge(NamedTuple):
    name: str
    low: float
    recovered: float


def healthy_std(dim: int) -> float:
    """Spread of `dim`-dimensional embeddings that fill the sphere evenly: 1/sqrt(dim)."""
    return 1.0 / math.sqrt(dim)


def gauges(dim: int) -> tuple[_Gauge, _Gauge]:
    """What is watched for collapse, with its two thresholds for embeddings of `dim` numbers."""
    healthy = healthy_std(dim)
    return (
        _Gauge(metrics.EMBEDDING_STD, STD_LOW * healthy, STD_OK * healthy),
        _Gauge(metrics.RANKME, RANK_LOW, RANK_OK),
    )


def alarms(values: Values, history: Sequence[Values], *, dim: int = 256) -> list[str]:
    """Messages of the alarms that begin at this log point; most often none.

    Args:
        values: what was measured now.
        history: what was measured at the log points before, oldest first, without `values`; the
            whole run or at least its last 64 points. Points without a gauge do not count for it.
        dim: size of the projections that EMBEDDING_STD and RANKME were measured on.

    A collapse alarm begins at the PATIENCE-th point below the lower threshold since the gauge was
    last above the upper one, and does not come again before it has recovered. So a collapse is told
    PATIENCE log points after it began, and one from the first step on at log point number
    SETTLE + PATIENCE. A number that is not finite is told at once.
    """
    found = [
        text
        for name in (metrics.LOSS, metrics.GRAD_NORM)
        if name in values and (text := _not_finite(name, values, history))
    ]
    return found + collapse_alarms(values, history, dim=dim)


def collapse_alarms(values: Values, history: Sequence[Values], *, dim: int = 256) -> list[str]:
    """Those of `alarms` that tell of a collapse."""
    return [
        _collapse(gauge, values, dim) for gauge in gauges(dim) if _begins(gauge, values, history)
    ]


def collapsed(values: Sequence[Values], *, dim: int = 256) -> bool:
    """Whether a run with these log points (oldest first) ended in the alarmed state."""
    return any(_ends_bad(gauge, values) for gauge in gauges(dim))


def _ends_bad(gauge: _Gauge, values: Sequence[Values]) -> bool:
    seen = [v[gauge.name] for v in values if gauge.name in v]
    bad = 0
    for value in seen[SETTLE:]:
        bad = 0 if _recovered(value, gauge) else bad + _is_bad(value, gauge)
    return bad >= PATIENCE


def narrowed(values: Values, history: Sequence[Values], first: float | None) -> str:
    """The warning that begins at this log point if RankMe has fallen for good; most often "".

    Args:
        values, history: as `alarms` takes them.
        first: RankMe of the run's first log point.
    """
    if first is None or not _begins(_spectrum(first), values, history):
        return ""
    return f"{spectrum(values[metrics.RANKME] or 0.0, first)} {NARROW_MEANS}"


def narrow(values: Sequence[Values]) -> bool:
    """Whether a run with these log points (oldest first) ended in the state `narrowed` warns of."""
    seen = [v for point in values if (v := point.get(metrics.RANKME)) is not None]
    return bool(seen) and _ends_bad(_spectrum(seen[0]), values)


NARROW_MEANS = (
    "That is partial (dimensional) collapse: images are still told apart, but along few "
    "directions. The loss does not show it, and kNN accuracy may rise all the same, but a lower "
    "RankMe goes with worse linear probes and transfer (Garrido et al. 2023). It is usual in short "
    "runs on few images; elsewhere try a lower learning rate, a larger batch or a higher target "
    "decay."
)


def spectrum(now: float, first: float) -> str:
    """RankMe's course in words."""
    return (
        f"The embeddings use {now:.1f} directions (RankMe), {100 * now / first:.0f} % of the "
        f"{first:.1f} at the start."
    )


def _spectrum(first: float) -> _Gauge:
    return _Gauge(metrics.RANKME, NARROW * first, WIDE * first)


def suspect(values: Values, *, dim: int = 256) -> bool:
    """Whether one log point by itself is below a threshold, collapse or only a dip."""
    return any(_is_bad(values.get(gauge.name), gauge) for gauge in gauges(dim))


def _is_bad(value: float | None, gauge: _Gauge) -> bool:
    return value is not None and value < gauge.low  # NaN is the other alarm's business


def _recovered(value: float | None, gauge: _Gauge) -> bool:
    return value is not None and value >= gauge.recovered


def _begins(gauge: _Gauge, values: Values, history: Sequence[Values]) -> bool:
    if gauge.name not in values or not _is_bad(values[gauge.name], gauge):
        return False
    settled = _settled(gauge.name, history)
    if settled < 0:  # always so on ranks other than 0, which keep no history
        return False
    bad = 1
    for i in range(len(history) - 1, settled - 1, -1):
        value = history[i].get(gauge.name)
        if _recovered(value, gauge) or bad > PATIENCE:
            break
        bad += _is_bad(value, gauge)
    return bad == PATIENCE


def _settled(name: str, history: Sequence[Values]) -> int:
    """Index behind the first SETTLE points that carry `name`; -1 while there are fewer."""
    seen = 0
    for i, values in enumerate(history):
        seen += name in values
        if seen == SETTLE:
            return i + 1
    return -1


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _not_finite(name: str, values: Values, history: Sequence[Values]) -> str:
    if _finite(values[name]):
        return ""
    before = next((v[name] for v in reversed(history) if name in v), 0.0)
    if not _finite(before):
        return ""  # told already
    what = metrics.METRICS[name].label.lower()
    return (
        f"The {what} is not a finite number. Such a step is skipped: weights, target and running "
        "statistics stay as they were. If it happens again and again, try a lower learning rate, a "
        "longer warm-up, or bf16 or fp32 instead of fp16."
    )


def _collapse(gauge: _Gauge, values: Values, dim: int) -> str:
    value = values[gauge.name] or 0.0
    if gauge.name == metrics.EMBEDDING_STD:
        seen = (
            f"The spread of the embeddings is {value:.2g}, {100 * value / healthy_std(dim):.0f} % "
            f"of the healthy 1/√{dim} = {healthy_std(dim):.2g}"
        )
    else:
        seen = f"The embeddings use only {value:.1f} of {dim} directions (RankMe)"
    return (
        f"{seen}, at {PATIENCE} log points. The network is mapping all images to almost the same "
        "point: the loss looks good and nothing is learned. Check that the predictor is trained "
        "and the target network is not; then try a higher target decay, a lower learning rate or "
        "a longer warm-up."
    )
