"""What one process of the SVM benchmark does: fits for one class. It imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from byol_fast.evaluate.ap import F64, average_precision
from pipelines.errors import import_problem

Ids = npt.NDArray[np.int64]
Draw = tuple[Ids, Ids]  # rows that show a class, and rows that do not

FOLDS = 3
_LAST = -1e9  # below any SVM's score
USUAL_COST = 1.0  # C where there are too few images to choose by


def classifier(cost: float) -> Any:
    """The published code's `LinearSVC`."""
    try:
        from sklearn.svm import LinearSVC
    except Exception as error:
        install = "pip install '.[evaluate]' in the checkout"
        raise import_problem("scikit-learn", "sklearn", error, install) from error
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=2000,
        random_state=0,
    )


def fit_class(x: F64, truth: Ids, unseen: F64, costs: tuple[float, ...]) -> dict[str, F64]:
    """C, the cross-validated AP that chose it, and the scores of `unseen`."""
    from sklearn.model_selection import cross_val_score

    folds = min(FOLDS, int((truth == 1).sum()), int((truth == -1).sum()))
    cost, best = USUAL_COST, float("nan")
    with _unconverged():
        if folds >= 2:
            aps = [
                cross_val_score(classifier(c), x, truth, cv=folds, scoring="average_precision")
                for c in costs
            ]
            chosen = int(np.argmax([ap.mean() for ap in aps]))
            cost, best = costs[chosen], float(aps[chosen].mean())
        if len(np.unique(truth)) < 2:  # nothing to separate; what was never seen is guessed last
            scores = np.full(len(unseen), 0.0 if truth.max() > 0 else _LAST)
        else:
            scores = classifier(cost).fit(x, truth).decision_function(unseen)
    return {"cost": np.array([cost]), "crossval": np.array([best]), "scores": scores}


def fit_few(
    x: F64, c: int, sample: int, drawn: list[list[Draw]], costs: tuple[float, ...]
) -> dict[str, F64]:
    """AP of class c on what the other samples drew, for each C.

    NaN where the other samples drew the same images: then nothing can be chosen by it.
    """
    rows, truth = _drawn_rows(drawn[sample][c])
    others = [each[c] for s, each in enumerate(drawn) if s != sample]
    tried = np.setdiff1d(np.concatenate([part for pair in others for part in pair]), rows)
    is_shown = np.isin(tried, np.concatenate([pair[0] for pair in others]))
    if not is_shown.any() or is_shown.all():
        return {"held_out": np.full(len(costs), np.nan)}
    with _unconverged():
        scores = (classifier(c).fit(x[rows], truth).decision_function(x[tried]) for c in costs)
        return {"held_out": np.array([average_precision(is_shown, each) for each in scores])}


def score_few(x: F64, drawn: Draw, unseen: F64, cost: float) -> dict[str, F64]:
    """Scores of `unseen` by the SVM that has seen one draw of one class."""
    rows, truth = _drawn_rows(drawn)
    with _unconverged():
        return {"scores": classifier(cost).fit(x[rows], truth).decision_function(unseen)}


def _drawn_rows(drawn: Draw) -> tuple[Ids, Ids]:
    shown, rest = drawn
    return np.concatenate([shown, rest]), np.repeat([1, -1], [len(shown), len(rest)])


@contextmanager
def _unconverged() -> Iterator[None]:
    """2000 iterations may not be enough at a large C: the published recipe stops there too."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
