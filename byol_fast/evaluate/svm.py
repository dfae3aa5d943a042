"""Linear SVMs on frozen features, one for each class: the benchmark of Goyal et al. 2019.

The recipe is that of its published code (fair_self_supervision_benchmark, which MMSelfSup and
OpenMixup took over): L2-normalised features, scikit-learn's `LinearSVC`, C by cross-validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from byol_fast.evaluate import svmfit
from byol_fast.evaluate.ap import F64, mean_precision
from byol_fast.evaluate.parts import Parts
from byol_fast.evaluate.svmfit import FOLDS, USUAL_COST, classifier
from pipelines.progress import Progress

__all__ = ["COSTS", "FOLDS", "QUICK_COSTS", "USUAL_COST", "SvmResult", "classifier", "fit"]

Targets = npt.NDArray[np.int8]  # [n, C]: 1 present, 0 absent, -1 all its objects are difficult

COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))  # C; `parse_cost_list` there
QUICK_COSTS = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class SvmResult:
    """Shares of 1; NaN for a class that no test image shows."""

    mean_ap: float
    top1: float | None  # of images with exactly one class; None where there are others
    aps: list[float]  # [C]
    costs: list[float]  # [C] the C chosen for each class
    crossval_aps: list[float]  # [C] by which it was chosen; NaN where it could not be
    scores: F64  # [test images, C]


def fit(
    train: npt.NDArray[Any],  # [n, F]
    train_targets: Targets,
    test: npt.NDArray[Any],  # [m, F]
    test_targets: Targets,
    *,
    costs: tuple[float, ...] = COSTS,
    jobs: int = 1,
    parts: Parts | None = None,
    progress: bool = False,
) -> SvmResult:
    """One SVM for each class, its C the one with the best average precision in 3 folds of `train`.

    An image on which a class is only difficult is a negative in training and left out of that
    class's test, as in the published code.

    Args:
        jobs: processes; the result does not depend on it.
        parts: where finished classes are kept for a run that goes on.

    Raises:
        MissingBackend: scikit-learn is not installed.
    """
    x, unseen = normalised(train), normalised(test)
    truth = np.where(train_targets == 1, 1, -1)
    tasks = [(f"class-{c:05d}", (x, truth[:, c], unseen, costs)) for c in range(truth.shape[1])]
    done = list(run_parts(svmfit.fit_class, tasks, jobs=jobs, parts=parts, progress=progress))
    scores = np.stack([part["scores"] for part in done], axis=1)
    mean, aps = mean_precision(test_targets, scores)
    return SvmResult(
        mean_ap=mean,
        top1=top1(test_targets, scores),
        aps=aps,
        costs=[float(part["cost"][0]) for part in done],
        crossval_aps=[float(part["crossval"][0]) for part in done],
        scores=scores,
    )


def normalised(features: npt.NDArray[Any]) -> F64:
    """Rows of length 1, in float64; the 1e-5 is the published code's."""
    x = np.asarray(features, dtype=np.float64)
    return np.asarray(x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5))


def top1(targets: Targets, scores: F64) -> float | None:
    """Share of images whose only class has the largest score; None if an image has not just one."""
    if not bool(((targets == 1).sum(axis=1) == 1).all()):
        return None
    return float((scores.argmax(axis=1) == targets.argmax(axis=1)).mean())


def run_parts(
    work: Callable[..., dict[str, F64]],
    tasks: list[tuple[str, tuple[Any, ...]]],  # name and arguments of each call
    *,
    jobs: int,
    parts: Parts | None,
    progress: bool,
) -> Iterator[dict[str, F64]]:
    """What `work` gives for each task, in order; what `parts` has is not computed again."""
    svmfit.classifier(USUAL_COST)  # scikit-learn missing: say so here, not in a worker
    from joblib import Parallel, delayed

    parts = parts or Parts(None, {})
    kept = {name: part[0] for name, _ in tasks if (part := parts.read(name)) is not None}
    todo = [(name, arguments) for name, arguments in tasks if name not in kept]
    calls = (delayed(work)(*arguments) for _, arguments in todo)
    running = iter(Parallel(n_jobs=min(jobs, len(todo)) or 1, return_as="generator")(calls))
    with Progress("SVMs", len(tasks), unit="fits", enabled=progress) as meter:
        for name, _ in tasks:
            if name in kept:
                yield {key: value.numpy() for key, value in kept[name].items()}
            else:
                values = next(running)
                parts.write(name, {k: torch.from_numpy(v) for k, v in values.items()}, {})
                yield values
            meter.advance()
