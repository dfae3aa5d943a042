"""Images that could not be decoded: left out, counted and named, wherever one was met."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipelines.errors import DataError
from pipelines.scan import printable
from pipelines.stores import Store

log = logging.getLogger(__name__)

Bad: TypeAlias = Mapping[int, str]  # row of a store -> reason
Named: TypeAlias = dict[str, str]  # image -> reason

_SHOWN = 3  # images that a line names; the result file names all


def named(store: Store, bad: Bad) -> Named:
    """With names instead of rows, in the order of the rows."""
    return {printable(store.name(row)): bad[row] for row in sorted(bad)}


def described(**parts: Named) -> dict[str, Any]:
    """The result file's part: how many, and which of `train` and `test`."""
    return {
        "undecodable": sum(map(len, parts.values())),
        "undecodable_images": {part: images for part, images in parts.items() if images},
    }


def notes(**parts: Named) -> list[str]:
    """A line for each of the parts that has some."""
    return [f"{line(images)} ({part})" for part, images in parts.items() if images]


def line(images: Named) -> str:
    """How many, and the first of them."""
    first = "; ".join(f"{name}: {why}" for name, why in list(images.items())[:_SHOWN])
    more = "; …" if len(images) > _SHOWN else ""
    return f"{len(images)} images could not be decoded and are left out: {first}{more}"


def warn(store: Store, bad: Bad) -> None:
    """Log `line` where there are some."""
    if bad:
        log.warning("%s", line(named(store, bad)))


def readable(ids: npt.NDArray[np.int64], bad: Bad) -> torch.Tensor | None:
    """Which places of a batch of these rows hold an image, int64; None where all of them do.

    Raises:
        DataError: none does.
    """
    if not bad or not any(row in bad for row in ids.tolist()):
        return None
    places = [place for place, row in enumerate(ids.tolist()) if row not in bad]
    if not places:
        raise DataError(
            f"none of the {len(ids)} images of a training batch could be decoded: "
            f"{bad[int(ids[0])]}. Check the data with python -m pipelines.index DIR --verify"
        )
    return torch.tensor(places)
