"""SVMs that see few images of each class: VOC07's low-shot benchmark (Goyal et al. 2019).

For each k, five times: every class gets k images that show it and (C - 1) k that do not. The
published figures take, for each k, the C that is best on the test images. Here C is chosen without
them: the SVMs of one sample are tried on the images of the other samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from byol_fast.evaluate import svmfit
from byol_fast.evaluate.ap import F64, mean_precision
from byol_fast.evaluate.parts import Parts
from byol_fast.evaluate.svm import COSTS, Targets, normalised, run_parts, top1
from byol_fast.evaluate.svmfit import USUAL_COST, Draw

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class LowShotResult:
    """The samples of one k; shares of 1."""

    k: int
    cost: float  # C of all classes and samples
    cost_chosen: bool  # False: the samples left nothing to choose it by, so it is the usual one
    mean_aps: list[float]  # [samples]
    top1s: list[float]  # [samples], [] where images may show several classes
    negatives: int  # of each class, at most

    @property
    def mean(self) -> float:
        return float(np.mean(self.mean_aps))

    @property
    def std(self) -> float:
        """Over the samples, as the published code has it (no correction)."""
        return float(np.std(self.mean_aps))


def fit(
    train: npt.NDArray[Any],  # [n, F]
    train_targets: Targets,
    test: npt.NDArray[Any],  # [m, F]
    test_targets: Targets,
    *,
    shots: tuple[int, ...] = SHOTS,
    samples: int = SAMPLES,
    seed: int = 0,
    costs: tuple[float, ...] = COSTS,
    jobs: int = 1,
    parts: Parts | None = None,
    progress: bool = False,
) -> list[LowShotResult]:
    """One result for each k of `shots`.

    Args:
        samples: independent draws, at least 2: C is chosen on the others.
        seed: of the draws.
        jobs, parts: as in `svm.fit`.

    Raises:
        ValueError: a class has fewer images than the largest k, or there is one sample only.
        MissingBackend: scikit-learn is not installed.
    """
    if samples < 2:
        raise ValueError(f"C is chosen on the other samples: at least 2 are needed, got {samples}")
    rarest = smallest_class(train_targets)
    if max(shots) > rarest:
        raise ValueError(f"k={max(shots)}, but a class has {rarest} training images only")
    x, unseen = normalised(train), normalised(test)
    given: dict[str, Any] = {"jobs": jobs, "parts": parts, "progress": progress}
    results = []
    for k in shots:
        drawn = [draw(train_targets, k, seed=seed, sample=s) for s in range(samples)]
        cost, chosen, found = _scores(k, drawn, x, unseen, costs, given)
        tops = [top1(test_targets, scores) for scores in found]
        results.append(
            LowShotResult(
                k=k,
                cost=cost,
                cost_chosen=chosen,
                mean_aps=[mean_precision(test_targets, scores)[0] for scores in found],
                top1s=[top for top in tops if top is not None],
                negatives=max(len(rest) for _, rest in drawn[0]),
            )
        )
    return results


def _scores(
    k: int,
    drawn: list[list[Draw]],  # [samples][C]
    x: F64,  # [n, F]
    unseen: F64,  # [m, F]
    costs: tuple[float, ...],
    given: dict[str, Any],  # the arguments of `run_parts`
) -> tuple[float, bool, F64]:
    """C, whether it was chosen, and the samples' scores of the unseen images `[samples, m, C]`."""
    each = {
        f"k{k:05d}-sample{s:03d}-class{c:05d}": (s, c)
        for s, classes in enumerate(drawn)
        for c in range(len(classes))
    }
    fits: list[tuple[str, tuple[Any, ...]]]
    fits = [(name, (x, c, s, drawn, costs)) for name, (s, c) in each.items()]
    tried = run_parts(svmfit.fit_few, fits, **given)
    held_out = np.stack([part["held_out"] for part in tried])  # [samples * C, costs]
    known = held_out[~np.isnan(held_out).any(axis=1)]
    cost = costs[_choose(known, costs)]
    fits = [(f"{name}-scores", (x, drawn[s][c], unseen, cost)) for name, (s, c) in each.items()]
    scored = run_parts(svmfit.score_few, fits, **given)
    found = np.stack([part["scores"] for part in scored]).reshape(len(drawn), -1, len(unseen))
    return cost, bool(len(known)), found.transpose(0, 2, 1)


def draw(targets: Targets, k: int, *, seed: int, sample: int) -> list[Draw]:
    """For each class k rows that show it and (C - 1) k that do not, or all there are of those.

    A pure function of its arguments. Images on which a class is only difficult are neither.
    """
    out = []
    classes = targets.shape[1]
    for c in range(classes):
        rng = np.random.default_rng([seed, k, sample, c])
        shown, others = np.flatnonzero(targets[:, c] == 1), np.flatnonzero(targets[:, c] == 0)
        most = min(len(others), (classes - 1) * k)
        out.append((rng.choice(shown, k, replace=False), rng.choice(others, most, replace=False)))
    return out


def smallest_class(targets: Targets) -> int:
    """Images of the class that the fewest images show."""
    return int((targets == 1).sum(axis=0).min())


def _choose(known: F64, costs: tuple[float, ...]) -> int:
    """Which C has the best mean AP on the other samples' images; the smaller of equals."""
    if not len(known):
        return min(range(len(costs)), key=lambda i: abs(np.log(costs[i] / USUAL_COST)))
    means = known.mean(axis=0)
    return min(range(len(costs)), key=lambda i: (-round(float(means[i]), 12), costs[i]))
