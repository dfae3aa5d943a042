"""Frozen features: every image's evaluation crop through a network, once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from byol_fast.evaluate import undecodable
from byol_fast.evaluate.decoding import open_pinned
from pipelines.augment import reference
from pipelines.crops import Windows
from pipelines.errors import DataError
from pipelines.plan import Rows, centre_windows
from pipelines.progress import Progress
from pipelines.spec import AugmentSpec, Colour
from pipelines.stores import Store

Crop: TypeAlias = Literal["centre", "square", "whole"]


@dataclass(frozen=True)
class Features:
    """Features of the images that could be decoded, in the store's order."""

    features: Tensor  # [n, F] float32 on the CPU
    labels: Tensor  # [n] int64, -1 where unlabelled
    ids: Tensor  # [n] int64: rows of the store
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason, images left out
    seconds: float = 0.0  # wall time of reading, decoding and the network
    stored: int = 0  # rows whose features were not computed now: they came from a cache

    @property
    def computed(self) -> int:
        """Images that went through the network in `seconds`."""
        return len(self.ids) + len(self.bad) - self.stored

    @property
    def images_per_second(self) -> float:
        return self.computed / self.seconds if self.seconds else 0.0


class Gathered:
    """Features of the rows of `store` as they come."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.features = torch.empty(0)  # [n, F] once the first rows have come
        self.bad: dict[int, str] = {}  # row -> reason

    def add(self, rows: range, batch: Tensor, bad: dict[int, str]) -> None:
        """Features `[len(rows), F]` of these rows; those of `bad` ones mean nothing."""
        if not len(self.features):
            self.features = torch.empty(len(self.store), batch.shape[1])
        self.features[rows.start : rows.stop] = batch
        self.bad.update(bad)

    def complete(self, seconds: float, stored: int = 0) -> Features:
        """All rows without the bad ones, once all have come.

        Raises:
            DataError: that leaves none.
        """
        store, bad, features = self.store, self.bad, self.features
        unread = np.fromiter(bad, dtype=np.int64, count=len(bad))
        kept = np.setdiff1d(np.arange(len(store)), unread)
        if not len(kept):
            reason = f": {next(iter(bad.values()))}" if bad else ""
            raise DataError(f"none of the {len(store)} images could be decoded{reason}")
        ids = torch.from_numpy(kept)
        if bad:
            undecodable.warn(store, bad)
            features = features[ids]
        labels = torch.as_tensor(np.asarray(store.labels)[kept], dtype=torch.int64)
        return Features(features, labels, ids, bad, seconds, stored)


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
    crop: Crop = "centre",
    progress: bool = False,
    label: str = "features",
) -> Features:
    """Features of every image of `store`: one crop each, normalised as in `spec`.

    The network runs in eval mode and is given back in the mode it came in; on a GPU under bf16
    autocast, on a CPU in fp32.

    Args:
        backbone: images `[B, 3, S, S]` (channels_last) to features `[B, F]`; moved to `device`.
        image_size: S in pixels, whatever `spec` says.
        spec: read for mean and std alone; the ImageNet statistics by default.
        crop: what of an image is shown; see `windows`.
        progress: show images done and the time left on stderr.

    Raises:
        ValueError: the network gives something other than `[B, F]`, or non-finite numbers.
        DataError: no image could be decoded.
    """
    started, gathered = time.perf_counter(), Gathered(store)
    for rows, batch, wrong in stream(
        backbone,
        store,
        image_size=image_size,
        spec=spec,
        device=device,
        batch_size=batch_size,
        threads=threads,
        backend=backend,
        crop=crop,
        progress=progress,
        label=label,
    ):
        gathered.add(rows, batch, wrong)
    return gathered.complete(time.perf_counter() - started)


def stream(
    backbone: nn.Module,
    store: Store,
    *,
    image_size: int,
    spec: AugmentSpec | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    threads: int | None = None,
    backend: str = "auto",
    crop: Crop = "centre",
    start: int = 0,
    progress: bool = False,
    label: str = "features",
) -> Iterator[tuple[range, Tensor, dict[int, str]]]:
    """`extract` batch by batch, from row `start` on: rows, features `[b, F]` float32 on the CPU,
    and the reasons of those rows that could not be decoded (their features mean nothing)."""
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    device = torch.device(device)
    spec = replace(spec or AugmentSpec(), image_size=image_size)
    backbone = backbone.to(device)
    source = open_pinned(store, image_size, device, backend=backend, threads=threads)
    meter = Progress(label, len(store) - start, enabled=progress)
    try:
        with evaluating(backbone), meter:
            for crops in source.crops(_rows(store, batch_size, crop, start)):
                with inference(device):
                    batch = backbone(reference.normalise(crops, spec)[0])
                rows = range(start, start + crops.shape[1])
                start = rows.stop
                bad = source.bad
                wrong = {row: bad[row] for row in rows if row in bad}
                _check(batch, len(rows))
                yield rows, batch.float().cpu(), wrong
                meter.advance(len(rows))
    finally:
        source.close()


def windows(sizes: npt.ArrayLike, crop: Crop) -> Windows:
    """What each image shows, `[n, 1, 4]` (top, left, height, width), before it is resized to S².

    `centre` is the authors' evaluation crop (a centred square of .875 of the short side), `square`
    the centred square of the whole short side, `whole` the image itself, whatever its shape.
    """
    if crop != "whole":
        return centre_windows(sizes, 0.875 if crop == "centre" else 1.0)
    sizes = np.asarray(sizes, dtype=np.int32)
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)[:, None]


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


def _rows(store: Store, batch_size: int, crop: Crop, start: int) -> Iterator[Rows]:
    """The store in order, one view each; no colours, as nothing is coloured."""
    for first in range(start, len(store), batch_size):
        ids = np.arange(first, min(first + batch_size, len(store)), dtype=np.int64)
        colours = np.zeros((len(ids), 1, len(Colour)), dtype=np.float32)
        yield Rows(ids, windows(store.sizes[ids], crop), colours)


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
