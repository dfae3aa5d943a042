"""Average precision as the VOC benchmark counts it, at one or more overlaps.

The rules of detectron2's `PascalVOCDetectionEvaluator`, by which MoCo and those after it report:
eleven recall points for VOC2007; a detection belongs to the object it overlaps most and hits if
that overlap is above the threshold; a second hit of an object is a false positive; a hit of a
difficult object counts neither way. Scores and coordinates are not rounded here, as they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byol_fast.evaluate.dense.boxes import Annotated

F64 = npt.NDArray[np.float64]
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


@dataclass(frozen=True)
class Detections:
    """What was found in one image."""

    boxes: npt.NDArray[np.floating]  # [n, 4] as in `Annotated`
    labels: npt.NDArray[np.integer]  # [n]
    scores: npt.NDArray[np.floating]  # [n]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Means over the classes that occur, shares of 1."""

    ap: float  # mean over the overlaps .5, .55, …, .95
    ap50: float
    ap75: float
    by_class: dict[int, float]  # label -> AP50


def evaluate(
    found: Sequence[Detections],
    truth: Sequence[Annotated],
    thresholds: tuple[float, ...] = THRESHOLDS,
) -> Precision:
    """AP of detections in the images of `truth`, in the same order; `thresholds` has .5 and .75."""
    assert len(found) == len(truth)
    table = {
        label: [_class_ap(found, truth, int(label), t) for t in thresholds]
        for label in np.unique(np.concatenate([t.labels[~t.difficult] for t in truth]))
    }
    if not table:
        raise ValueError("the test set has no object that is not difficult: nothing to measure")
    means = dict(zip(thresholds, np.mean(list(table.values()), axis=0).tolist(), strict=True))
    return Precision(
        ap=float(np.mean(list(means.values()))),
        ap50=means[0.5],
        ap75=means[0.75],
        by_class={int(k): v[thresholds.index(0.5)] for k, v in table.items()},
    )


def _class_ap(
    found: Sequence[Detections], truth: Sequence[Annotated], label: int, threshold: float
) -> float:
    scores: list[float] = []
    outcomes: list[int] = []  # 1 hit, 0 miss, −1 counts neither way
    positives = 0
    for detections, image in zip(found, truth, strict=True):
        mine, objects = detections.labels == label, image.labels == label
        positives += int((objects & ~image.difficult).sum())
        order = np.argsort(-detections.scores[mine], kind="stable")
        scores += detections.scores[mine][order].tolist()
        overlaps = iou(detections.boxes[mine][order], image.boxes[objects])
        outcomes += _outcomes(overlaps, image.difficult[objects], threshold)
    # An object is only ever taken within its image, so the images can be matched one by one.
    by_score = np.argsort(-np.array(scores), kind="stable")
    return average_precision(np.array(outcomes, np.int64)[by_score], positives)


def _outcomes(overlaps: F64, difficult: npt.NDArray[np.bool_], threshold: float) -> list[int]:
    """Of one class in one image, the surest first; overlaps `[detections, objects]`."""
    outcomes, taken = [], set[int]()
    for row in overlaps:
        best = int(row.argmax()) if len(row) else -1
        if best < 0 or row[best] <= threshold:
            outcomes.append(0)
        elif difficult[best]:
            outcomes.append(-1)
        else:
            outcomes.append(0 if best in taken else 1)
            taken.add(best)
    return outcomes


def average_precision(outcomes: npt.NDArray[np.int64], positives: int) -> float:
    """Mean over recall 0, .1, …, 1 of the best precision at that recall or beyond.

    Args:
        outcomes: 1 hit, 0 miss, −1 neither, of the surest detection first.
        positives: objects there are.
    """
    hits, misses = np.cumsum(outcomes == 1), np.cumsum(outcomes == 0)
    recall = hits / positives
    precision = hits / np.maximum(hits + misses, 1)
    best = [precision[recall >= t].max(initial=0.0) for t in np.arange(11) * 0.1]
    return float(np.mean(best))


def iou(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> F64:
    """Overlap of every box of `a` with every box of `b`: `[len(a), len(b)]`."""
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common: F64 = sides.clip(0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    return np.asarray(common / (areas[0] + areas[1] - common), np.float64)
