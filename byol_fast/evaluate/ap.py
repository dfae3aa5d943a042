"""Average precision of one class, by the two definitions that published figures use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def average_precision(truth: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The area under the precision envelope over recall, as VOC has it since 2010.

    It is what the SVM benchmark reports (Goyal et al. 2019, and MMSelfSup and OpenMixup after it),
    on VOC07 too. Equal scores are one step, so the order of the images plays no part.

    Args:
        truth: `[n]`, true where the image shows the class.
        scores: `[n]`, larger for surer.

    Returns:
        A share in [0, 1]; NaN where no image shows the class.
    """
    precision, recall = _curve(truth, scores)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum()) if len(recall) else float("nan")


def eleven_point(truth: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The mean of the envelope at recall 0, .1, …, 1: VOC07's own definition.

    BYOL's transfer table uses it. Arguments and result as in `average_precision`.
    """
    precision, recall = _curve(truth, scores)
    if not len(recall):
        return float("nan")
    points = [precision[recall >= at - 1e-12] for at in np.linspace(0, 1, 11)]
    return float(np.mean([part.max() if len(part) else 0.0 for part in points]))


def mean_precision(
    targets: npt.ArrayLike,  # [n, C]: 1 present, 0 absent, -1 neither: left out of that class
    scores: npt.ArrayLike,  # [n, C]
    *,
    eleven: bool = False,
) -> tuple[float, list[float]]:
    """mAP over the classes that some image shows, and each class's AP (NaN for the others)."""
    truth, values = np.asarray(targets), np.asarray(scores)
    measure = eleven_point if eleven else average_precision
    each = []
    for column in range(truth.shape[1]):
        counted = truth[:, column] >= 0
        each.append(measure(truth[counted, column] == 1, values[counted, column]))
    return (float(np.nanmean(each)) if not np.isnan(each).all() else float("nan")), each


def _curve(truth: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[F64, F64]:
    """Precision and recall after each distinct score, the largest first; empty without a hit."""
    hits, values = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=np.float64)
    if hits.shape != values.shape or hits.ndim != 1:
        raise ValueError(f"truth and scores must be [n], got {hits.shape} and {values.shape}")
    if not hits.any():
        return np.empty(0), np.empty(0)
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # of each distinct score
    found = np.cumsum(hits[order])[last].astype(np.float64)
    return found / (last + 1), found / hits.sum()
