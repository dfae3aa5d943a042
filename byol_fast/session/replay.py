"""One row of an epoch's table, drawn: the two views of a sample as the network was shown them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch

from byol_fast import checkpoint
from byol_fast import config as configuration
from byol_fast.recipes import Resolved
from byol_fast.session.opening import Data
from pipelines.augment import choose
from pipelines.parts import Parts
from pipelines.pipeline import open_source
from pipelines.plan import EpochPlan, Rows
from pipelines.spec import Colour
from pipelines.stores import Store

log = logging.getLogger(__name__)

PARTS = "parts.json"  # in the run folder: which sample ids are in which part
_GAP = 4  # pixels between the views


def replay(resolved: Resolved, data: Data, epoch: int, index: int, *, rank: int) -> Path | None:
    """Write the views as a PNG into the run's folder, and log the row; returns the picture's path.

    One rank does, the first of those that hold the sample; the others return None.

    Raises:
        ValueError: there is no such sample.
    """
    from PIL import Image

    config, store = resolved.config, data.store
    part = data.parts.of_rank(rank)
    first = _first_id(config, data.parts)
    row = index - (part.first if first is None else first)
    if not 0 <= row < len(store):
        if first is None and index < data.parts.images:
            return None
        raise ValueError(
            f"--replay index={index}: {config.data} has {len(store)} images"
            + (f" here, from index {first} on" if first else "")
        )
    if rank != part.ranks[0]:
        return None
    spec = configuration.spec(config)
    plan = EpochPlan(spec, config.seed, epoch, store.sizes, index - row)
    ids = np.array([row])
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
    log.info("%s, epoch %d, index %d, label %d", store.name(row), epoch, index, _label(store, row))
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


def note_parts(folder: Path, parts: Parts) -> None:
    """Keep the parts' order for a replay where only one of them is; nothing of a single part."""
    path = folder / PARTS
    if len(parts) == 1:
        path.unlink(missing_ok=True)
    else:
        checkpoint.write_text(path, json.dumps(parts.identity()["parts"], indent=1) + "\n")


def _first_id(config: configuration.Config, parts: Parts) -> int | None:
    """The first sample id of the one part that is here; None where all parts are.

    Raises:
        ValueError: the run's parts are noted, and this is none of them.
    """
    path = Path(config.out) / PARTS
    if len(parts) > 1 or not path.is_file():
        return None
    first = 0
    for part in json.loads(path.read_text(encoding="utf-8")):
        if part["fingerprint"] == parts.parts[0].fingerprint:
            return first
        first += part["images"]
    raise ValueError(
        f"--replay: {config.data} is none of the parts in {path}: replay where the part is"
    )


def _label(store: Store, row: int) -> int:
    return int(np.asarray(store.labels)[row])
