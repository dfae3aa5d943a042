"""One row of an epoch's table, drawn: the two views of a sample as the network was shown them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from byol_fast import config as configuration
from byol_fast.recipes import Resolved
from pipelines.augment import choose
from pipelines.pipeline import open_source
from pipelines.plan import EpochPlan, Rows
from pipelines.spec import Colour
from pipelines.stores import Store

log = logging.getLogger(__name__)

_GAP = 4  # pixels between the views


def replay(resolved: Resolved, store: Store, epoch: int, index: int) -> Path:
    """Write the views as a PNG into the run's folder, and log the row; returns the picture's path.

    Raises:
        ValueError: there is no such sample.
    """
    from PIL import Image

    config = resolved.config
    if index >= len(store):
        raise ValueError(f"--replay index={index}: {config.data} has {len(store)} images")
    spec = configuration.spec(config)
    plan = EpochPlan(spec, config.seed, epoch, store.sizes)
    ids = np.array([index])
    rows = Rows(ids, plan.windows(ids), plan.colours(ids))
    device = torch.device("cpu")
    backend, _, decode = config.backend.partition(":")
    source = open_source(
        store,
        spec.image_size,
        device,
        backend=backend,
        threads=config.input.threads,
        decode=decode or "auto",
    )
    try:
        crops = next(iter(source.crops(iter([rows]))))
        views = choose(spec, device)(crops, torch.from_numpy(rows.colours))
    finally:
        source.close()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    pixels = (views[:, 0].float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    first, second = pixels.permute(0, 2, 3, 1).numpy()
    gap = np.full((spec.image_size, _GAP, 3), 255, np.uint8)
    path = Path(config.out) / f"replay-epoch{epoch}-index{index}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([first, gap, second], axis=1)).save(path)
    log.info(
        "%s, epoch %d, index %d, label %d", store.name(index), epoch, index, _label(store, index)
    )
    for number in range(2):
        top, left, height, width = rows.windows[0, number].tolist()
        colours = {c.name.lower(): float(f"{rows.colours[0, number, c]:.4g}") for c in Colour}
        log.info(
            "view %d: rows %d to %d, columns %d to %d; %s",
            number + 1,
            top,
            top + height,
            left,
            left + width,
            colours,
        )
    log.info("views: %s", path)
    return path


def _label(store: Store, index: int) -> int:
    return int(np.asarray(store.labels)[index])
