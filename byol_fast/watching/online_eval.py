"""How good the representation is while it is trained: kNN and the online probe, on fixed images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from byol_fast.evaluate import knn
from byol_fast.evaluate.data import prepare, spread
from byol_fast.evaluate.features import Features, extract
from byol_fast.watching.probe import OnlineProbe
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

log = logging.getLogger(__name__)

MAX_BANK, MAX_QUERIES = 50_000, 10_000  # enough for ±0.5 points, a small share of an epoch


class OnlineEvaluation:
    """Labelled images set aside for judging: a bank of neighbours and queries.

    With `eval_store` the queries are its images and the bank the training images; without it a
    fifth of the training images, by a hash of their names, are the queries. BYOL sees no labels, so
    training on the same images is no leak of them; a held-out folder is the stricter test.
    `where` is what messages call `train`.

    Raises:
        DataError: there are labels but they cannot be used (one class, classes that do not match).
    """

    def __init__(
        self,
        train: Store,
        eval_store: Store | None,
        *,
        spec: AugmentSpec,
        device: torch.device,
        k: int = 20,
        temperature: float = 0.07,
        threads: int | None = None,
        where: str = "--data",
    ) -> None:
        data = prepare(train, eval_store, where=where)
        self.bank, self.queries = spread(data.train, MAX_BANK), spread(data.test, MAX_QUERIES)
        self.classes, self.source = data.classes, data.source
        # The probe learns from the labels of the store itself, which may have gaps.
        self._numbers = None if data.numbers is None else torch.from_numpy(data.numbers)
        self.spec, self.device, self.threads = spec, device, threads
        self.k, self.temperature = min(k, len(self.bank)), temperature
        self._last: Features | None = None

    def raw_pixels(self) -> float:
        """kNN accuracy of the pixels of the evaluation crop: what a representation has to beat."""
        bank = knn.raw_pixel_features(self.bank, self.spec.image_size, threads=self.threads)
        queries = knn.raw_pixel_features(self.queries, self.spec.image_size, threads=self.threads)
        return self._knn(bank, queries)

    def measure(self, backbone: nn.Module, probe: OnlineProbe | None = None) -> dict[str, float]:
        """`knn_accuracy`, and `probe_accuracy` where there is a probe, as shares of 1."""
        bank, queries = self._features(backbone, self.bank), self._features(backbone, self.queries)
        self._last = queries
        values = {"knn_accuracy": self._knn(bank, queries)}
        if probe is not None:
            labels = queries.labels if self._numbers is None else self._numbers[queries.labels]
            values["probe_accuracy"] = probe.accuracy(queries.features, labels)
        return values

    def save_embedding(self, path: Path, most: int = 2000) -> None:
        """The newest measurement's query features, for the report's picture."""
        if self._last is not None:
            _savez(
                path,
                features=self._last.features[:most].numpy(),
                labels=self._last.labels[:most].numpy(),
                classes=np.array(self.classes),
            )

    def _features(self, backbone: nn.Module, store: Store) -> Features:
        return extract(
            backbone,
            store,
            image_size=self.spec.image_size,
            spec=self.spec,
            device=self.device,
            threads=self.threads,
        )

    def _knn(self, bank: Features, queries: Features) -> float:
        return float(
            knn.accuracy(
                bank.features,
                bank.labels,
                queries.features,
                queries.labels,
                classes=len(self.classes),
                k=self.k,
                temperature=self.temperature,
                device=self.device,
            )
        )


def save_view_pairs(path: Path, x: Tensor, spec: AugmentSpec, most: int = 16) -> None:
    """The first `most` view pairs of x [2, B, 3, S, S] as pictures: uint8 [2, n, S, S, 3]."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    pixels = (x[:, :most].float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    _savez(path, views=pixels.permute(0, 1, 3, 4, 2).cpu().numpy())


def _savez(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """For the report's pictures alone: trouble with the disk is told, and is no failure."""
    try:
        np.savez(path, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        log.warning("%s was not written: %s", path, error)
