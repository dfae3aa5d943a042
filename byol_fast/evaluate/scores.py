"""Accuracy of classifiers on a labelled store: top-1, top-5 and the mean over classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byol_fast.evaluate.features import extract
from pipelines.stores import Store


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of 1, for one classifier."""

    top1: float
    top5: float  # of min(5, classes) guesses
    mean_per_class: float  # top-1 of each class that has test images, averaged

    def figures(self, metric: str = "top-1") -> dict[str, float]:
        """By the names of the table's columns, `metric` first."""
        named = {"top-1": self.top1, "mean per class": self.mean_per_class}
        return {metric: named[metric], "top-5": self.top5}


def score(guesses: Tensor, labels: Tensor, classes: int) -> Scores:
    """Scores of guesses `[n, k]`, the best first, for labels `[n]` in [0, classes)."""
    hits = guesses == labels[:, None]
    first = hits[:, 0].double()
    seen = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels, weights=first, minlength=classes)
    return Scores(
        top1=first.mean().item(),
        top5=hits.any(dim=1).double().mean().item(),
        mean_per_class=(right[seen > 0] / seen[seen > 0]).mean().item(),
    )


class Measured(NamedTuple):
    """What a test found."""

    each: list[Scores]  # one for each classifier
    tested: int  # images
    bad: dict[int, str]  # row of the store -> reason, of images that could not be decoded


def measure(module: nn.Module, store: Store, classes: int, **reading: Any) -> Measured:
    """Scores of each of the classifiers in `module` on centre crops.

    Args:
        module: images `[B, 3, S, S]` to a list of logits `[B, classes]`.
        reading: as `features.extract` takes it.

    Raises:
        ValueError: logits that are not finite.
        DataError: no image could be decoded.
    """
    k = min(5, classes)
    found = extract(_Guesses(module, k), store, **reading)
    guesses = found.features.to(torch.int64).unflatten(1, (-1, k))
    each = [score(guesses[:, i], found.labels, classes) for i in range(guesses.shape[1])]
    return Measured(each, len(found.ids), found.bad)


class _Guesses(nn.Module):
    """The k best classes of every classifier as numbers `[B, heads * k]`, in place of features.

    Five numbers an image instead of the logits, which are 40,000 for five heads of iNaturalist.
    """

    def __init__(self, module: nn.Module, k: int) -> None:
        super().__init__()
        self.module, self.k = module, k

    def forward(self, x: Tensor) -> Tensor:
        each = self.module(x)
        if not all(bool(torch.isfinite(logits).all()) for logits in each):
            raise ValueError("the classifier gives NaN or infinite values: use a lower rate")
        best = [logits.float().topk(self.k, dim=1).indices for logits in each]
        return torch.cat(best, dim=1).float()
