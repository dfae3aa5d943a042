"""Frozen features: every image's evaluation crop through a network, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.augment import reference
from pipelines.errors import DataError
from pipelines.pipeline import open_source
from pipelines.plan import Rows, centre_windows
from pipelines.progress import Progress
from pipelines.spec import AugmentSpec, Colour
from pipelines.stores import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of the images that could be decoded, in the store's order."""

    features: Tensor  # [n, F] float32 on the CPU
    labels: Tensor  # [n] int64, -1 where unlabelled
    ids: Tensor  # [n] int64: rows of the store
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason, images left out
    seconds: float = 0.0  # wall time of reading, decoding and the network

    @property
    def images_per_second(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0


def extract(
    backbone: nn.Module,
    store: Store,
    *,
    image_size: int,
    spec: AugmentSpec | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    threads: int | None = None,
    backend: str = "auto",
    progress: bool = False,
    label: str = "features",
) -> Features:
    """Features of every image of `store`: the authors' centre crop, normalised as in `spec`.

    The network runs in eval mode and is given back in the mode it came in; on a GPU under bf16
    autocast, on a CPU in fp32.

    Args:
        backbone: images `[B, 3, S, S]` (channels_last) to features `[B, F]`; moved to `device`.
        image_size: S in pixels, whatever `spec` says.
        spec: read for mean and std alone; the ImageNet statistics by default.
        progress: show images done and the time left on stderr.

    Raises:
        ValueError: the network gives something other than `[B, F]`, or non-finite numbers.
        DataError: no image could be decoded.
    """
    device = torch.device(device)
    spec = replace(spec or AugmentSpec(), image_size=image_size)
    backbone = backbone.to(device)
    features: Tensor | None = None
    started = time.perf_counter()
    source = open_source(store, image_size, device, backend=backend, threads=threads)
    try:
        with evaluating(backbone), Progress(label, len(store), enabled=progress) as meter:
            done = 0
            for crops in source.crops(_centre_rows(store, batch_size)):
                with inference(device):
                    batch = backbone(reference.normalise(crops, spec)[0])
                _check(batch, crops.shape[1])
                if features is None:
                    features = torch.empty(len(store), batch.shape[1])
                features[done : done + len(batch)] = batch.float().cpu()
                done += len(batch)
                meter.advance(len(batch))
        bad = dict(source.bad)
    finally:
        source.close()
    seconds = time.perf_counter() - started
    return _without_bad(features, store, bad, seconds)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every sub-module is back in its own mode."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """No gradients, and bf16 where there is a GPU; a CPU stays in fp32, so it is reproducible."""
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    with torch.no_grad(), autocast:
        yield


def _centre_rows(store: Store, batch_size: int) -> Iterator[Rows]:
    """The whole store in order, one view each; no colours, as nothing is coloured."""
    for start in range(0, len(store), batch_size):
        ids = np.arange(start, min(start + batch_size, len(store)), dtype=np.int64)
        colours = np.zeros((len(ids), 1, len(Colour)), dtype=np.float32)
        yield Rows(ids, centre_windows(store.sizes[ids]), colours)


def _check(batch: Tensor, images: int) -> None:
    if batch.ndim != 2 or len(batch) != images:
        raise ValueError(
            f"the backbone gave {list(batch.shape)} for {images} images, but features must be "
            "[B, F]: end it with pooling and flattening, or name its hidden layer"
        )
    if not bool(torch.isfinite(batch).all()):
        raise ValueError(
            "the backbone gave NaN or infinite features: the weights are broken, or the run "
            "diverged; evaluate an earlier checkpoint"
        )


def _without_bad(
    features: Tensor | None, store: Store, bad: dict[int, str], seconds: float
) -> Features:
    kept = np.setdiff1d(np.arange(len(store)), np.fromiter(bad, dtype=np.int64, count=len(bad)))
    if features is None or not len(kept):
        reason = f": {next(iter(bad.values()))}" if bad else ""
        raise DataError(f"none of the {len(store)} images could be decoded{reason}")
    ids = torch.from_numpy(kept)
    if bad:
        log.warning("%d images could not be decoded and are left out of the evaluation", len(bad))
        features = features[ids]
    labels = torch.as_tensor(np.asarray(store.labels)[kept], dtype=torch.int64)
    return Features(features, labels, ids, bad, seconds)
