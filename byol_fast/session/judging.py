"""What a run is judged by while it trains: images for kNN, and a linear probe."""

from __future__ import annotations

import logging

import numpy as np
import torch

from byol_fast.distributed import World
from byol_fast.evaluate.numbering import sparse
from byol_fast.session.opening import Data
from byol_fast.watching.online_eval import OnlineEvaluation
from byol_fast.watching.probe import OnlineProbe
from pipelines.errors import DataError
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

log = logging.getLogger(__name__)


def judges(
    data: Data, world: World, *, spec: AugmentSpec, feature_dim: int, threads: int | None
) -> tuple[OnlineEvaluation | None, OnlineProbe | None]:
    """kNN on rank 0 and the online probe on every rank, where there are labels for them.

    Raises:
        DataError: images for kNN were named, and cannot be used.
    """
    classes, agreed = data.store.classes, data.parts.one_label_space
    if agreed and len(classes) < 2:
        log.info("the images have no labels: training without kNN accuracy and linear probe")
        return None, None
    if agreed and (present := sparse(_labels(data.store), len(classes))) is not None:
        log.warning(
            "%d classes are numbered up to %d: training without linear probe, which has a row for "
            "each number. Number them from 0 for one",
            len(present),
            int(present[-1]),
        )
        probe = None
    else:
        probe = OnlineProbe(feature_dim, len(classes), world.device) if agreed else None
    if not world.is_main:
        return None, probe
    if not agreed:
        log.warning(
            "the parts do not hold the same classes: %s. Training without linear probe; each part "
            "needs an image of every class for one",
            "; ".join(f"part {part} has {part.classes}" for part in data.parts.parts),
        )
    bank, queries, where = _judged_on(data)
    try:
        evaluation = OnlineEvaluation(
            bank, queries, spec=spec, device=world.device, threads=threads, where=where
        )
    except DataError as error:
        if data.evaluated is not None:
            raise
        # Measuring is no reason not to train.
        log.warning("training without kNN accuracy (--monitor.eval-data DIR): %s", error)
        return None, probe
    measured = "kNN and probe accuracy are" if agreed else "kNN accuracy is"
    log.info("%s measured on %s", measured, evaluation.source)
    return evaluation, probe


def _labels(store: Store) -> torch.Tensor:
    labels = torch.as_tensor(np.asarray(store.labels), dtype=torch.int64)
    return labels[labels >= 0]


def _judged_on(data: Data) -> tuple[Store, Store | None, str]:
    """Images for neighbours, images for queries (None: some of the same) and what to call them.

    Rank 0 reads one part. If that may lack classes, the evaluation images are neighbours, too.
    """
    store, evaluated, agreed = data.store, data.evaluated, data.parts.one_label_space
    if len(data.parts) == 1:
        return store, evaluated, "--data"
    here = f"rank 0's part of --data, {data.parts.of_rank(0)}"
    if agreed:
        log.info("the probe learns from rank 0's rows, and so from %s", here)
    labels = np.asarray(store.labels)
    every_class = agreed and len(np.unique(labels[labels >= 0])) == len(store.classes)
    if evaluated is None or every_class:
        log.info("kNN looks for neighbours in %s", here)
        return store, evaluated, here
    log.warning(
        "%s, may not hold every class, so kNN looks for neighbours in --monitor.eval-data", here
    )
    return evaluated, None, "--monitor.eval-data"
