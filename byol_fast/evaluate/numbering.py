"""Class numbers that are those of something else: rows for the classes that occur alone."""

from __future__ import annotations

import torch
from torch import Tensor

# A head may have rows of classes that no image shows, but 900,000 of 2048 features are 7 GB.
_FACTOR, _LEAST = 10, 1000


def sparse(labels: Tensor, classes: int) -> Tensor | None:
    """The labels that occur, int64 `[C]` ascending, where they are far fewer than `classes`."""
    present = torch.unique(labels)
    return present if classes > max(_LEAST, _FACTOR * len(present)) else None


def rows_of(labels: Tensor, present: Tensor | None) -> Tensor:
    """The place of each label in `present`, -1 where it is not there; as it is for None."""
    if present is None:
        return labels
    places = torch.searchsorted(present, labels).clamp(max=len(present) - 1)
    return torch.where(present[places] == labels, places, -1)
