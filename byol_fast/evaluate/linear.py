"""Linear evaluation: a softmax classifier on the frozen network, by two published recipes.

Training images are cropped and flipped through the epoch plan (one window each, no colours); test
images are shown once, by the authors' centre crop. The backbone stays in eval mode throughout.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from byol_fast.evaluate import undecodable
from byol_fast.evaluate.cache import FeatureCache
from byol_fast.evaluate.decoding import open_pinned
from byol_fast.evaluate.features import Features, evaluating, extract, inference
from byol_fast.evaluate.head import HeadTrainer, batches, top_k
from byol_fast.evaluate.numbering import rows_of, sparse
from byol_fast.evaluate.protocols import MMPRETRAIN, PAPER, QUICK, Protocol
from byol_fast.evaluate.recipes import CROP_AND_FLIP
from byol_fast.evaluate.resume import Resume
from pipelines.augment import choose
from pipelines.plan import Rows, RowStream, total_steps
from pipelines.progress import Progress
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

log = logging.getLogger(__name__)

__all__ = ["MMPRETRAIN", "PAPER", "QUICK", "LinearResult", "Protocol", "fit", "fit_features"]


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """Accuracies as shares of 1, and the classifier that reached them."""

    protocol: Protocol
    top1: float
    top5: float  # of min(5, classes) guesses
    head: nn.Linear  # on the CPU; takes the backbone's features as they are
    numbers: torch.Tensor | None  # [C] the label of each row of `head`, if that is not its number
    test_images: int
    bad_train: dict[int, str]  # row -> reason, of training images that could not be decoded ...
    bad_test: dict[int, str]  # ... and of test images; both are left out
    images_per_second: float  # training: reading, network and classifier; quick: reading, network
    final_loss: float  # training loss, mean over the last epoch

    @property
    def bad_images(self) -> int:
        """How many could not be decoded."""
        return len(self.bad_train) + len(self.bad_test)


def fit(
    backbone: nn.Module,
    train: Store,
    test: Store,
    *,
    protocol: Protocol = PAPER,
    image_size: int,
    spec: AugmentSpec | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool = False,
    cache: FeatureCache | None = None,
    resume: Resume | None = None,
) -> LinearResult:
    """Train a classifier on the frozen `backbone` and test it.

    Args:
        backbone: images `[B, 3, S, S]` to features `[B, F]`; not changed.
        train: labelled images; `test` has labels of the same numbering (see `data.prepare`).
        spec: read for mean and std; the ImageNet statistics by default.
        seed: of the order, the crops and the classifier's first weights.
        cache: keeps features of centre crops, which the test and the quick check are made of.
        resume: where an interrupted training is kept, and goes on from.

    Raises:
        ValueError: no labels, features that are not `[B, F]`, or a loss that is not finite.
        DataError: fewer training images than `protocol.batch_size`, or a batch of which none could
            be decoded.
    """
    spec, device = replace(spec or AugmentSpec(), image_size=image_size), torch.device(device)
    features = partial(
        extract if cache is None else cache.extract,
        backbone,
        image_size=image_size,
        spec=spec,
        device=device,
        threads=threads,
        backend=backend,
        progress=progress,
    )
    classes = _classes(train)
    labels = torch.as_tensor(train.labels, dtype=torch.int64)
    present = sparse(labels, classes)
    if protocol.cached:
        bank = features(train, label="train features")
        queries = features(test, label="test features")
        return fit_features(
            bank, queries, classes=classes, protocol=protocol, device=device, seed=seed
        )
    head, loss, rate, bad = _train_on_images(
        backbone,
        train,
        labels=rows_of(labels, present),
        classes=classes if present is None else len(present),
        protocol=protocol,
        spec=spec,
        device=device,
        seed=seed,
        threads=threads,
        backend=backend,
        progress=progress,
        resume=resume,
    )
    unseen = features(test, label="test features")
    return _result(protocol, head, present, bad, unseen, rate, loss)


def fit_features(
    train: Features,
    test: Features,
    *,
    classes: int,
    protocol: Protocol = QUICK,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LinearResult:
    """The quick check: the classifier trained on features that were extracted once.

    Features are standardised for training, so one rate fits any network; the scale is folded back
    into the returned head. A batch larger than the training set is the whole set.

    Raises:
        ValueError: a loss that is not finite.
    """
    device = torch.device(device)
    protocol = replace(protocol, batch_size=min(protocol.batch_size, len(train.labels)))
    mean, std = train.features.mean(0), train.features.std(0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)  # a dead channel stays what it is
    present = sparse(train.labels, classes)
    x, labels = (train.features - mean) / std, rows_of(train.labels, present)
    x, labels = x.to(device), labels.to(device)
    total = total_steps(protocol.epochs, len(x), protocol.batch_size)
    rows = classes if present is None else len(present)
    trainer = HeadTrainer(x.shape[1], rows, protocol, total, device, seed)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches(len(x), protocol.batch_size, total, generator):
        batch = batch.to(device)
        trainer.step(x[batch], labels[batch])
    head = trainer.finish()
    with torch.no_grad():
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)
    images, seconds = train.computed + test.computed, train.seconds + test.seconds
    loss = trainer.mean_loss(total // protocol.epochs)
    rate = images / seconds if seconds else 0.0
    return _result(protocol, head, present, train.bad, test, rate, loss)


def _train_on_images(
    backbone: nn.Module,
    train: Store,
    *,
    labels: torch.Tensor,  # [n] rows of the head
    classes: int,
    protocol: Protocol,
    spec: AugmentSpec,
    device: torch.device,
    seed: int,
    threads: int | None,
    backend: str,
    progress: bool,
    resume: Resume | None,
) -> tuple[nn.Linear, float, float, dict[int, str]]:
    """The head after `protocol.epochs`, its mean training loss over the last epoch, images/s, and
    the images that were left out."""
    spec = replace(spec, views=(CROP_AND_FLIP, CROP_AND_FLIP), semantics=protocol.semantics)
    stream = RowStream(spec, seed=seed, sizes=train.sizes, batch_size=protocol.batch_size)
    total = total_steps(protocol.epochs, len(train), protocol.batch_size)
    an_epoch = total // protocol.epochs
    backbone, augment = backbone.to(device), choose(spec, device)
    make = partial(
        HeadTrainer, classes=classes, protocol=protocol, total=total, device=device, seed=seed
    )
    trainer: HeadTrainer | None = None
    start, bad = 0, dict[int, str]()
    if resume is not None and (state := resume.load()) is not None:
        trainer, start = make(state["head"]["weight"].shape[1]), state["done"]
        trainer.load(state)
        bad = {int(row): why for row, why in state.get("bad", {}).items()}
    began = time.perf_counter()
    source = open_pinned(train, spec.image_size, device, backend=backend, threads=threads)
    todo = (total - start) * protocol.batch_size
    meter = Progress("linear training", todo, enabled=progress)
    pending: deque[Rows] = deque()

    def feed() -> Iterator[Rows]:
        for step in range(start, total):
            pending.append(_one_view(stream.rows(step)))
            yield pending[-1]

    try:
        with evaluating(backbone), meter:
            for step, crops in enumerate(source.crops(feed()), start + 1):
                rows = pending.popleft()
                x, y = augment(crops, torch.from_numpy(rows.colours))[0], labels[rows.ids]
                bad.update(source.bad)
                if (kept := undecodable.readable(rows.ids, bad)) is not None:
                    x, y = x[kept.to(device)].contiguous(memory_format=torch.channels_last), y[kept]
                with inference(device):
                    features = backbone(x)
                trainer = trainer or make(features.shape[1])
                trainer.step(features, y.to(device, non_blocking=True))
                if resume is not None:
                    state_now = partial(_state, trainer, an_epoch, bad)
                    resume.save(step, state_now, always=step == total)
                meter.advance(len(rows))
    finally:
        source.close()
    assert trainer is not None  # RowStream refuses a batch larger than the data
    rate = todo / (time.perf_counter() - began)
    undecodable.warn(train, bad)
    return trainer.finish(), trainer.mean_loss(an_epoch), rate, bad


def _state(trainer: HeadTrainer, last: int, bad: dict[int, str]) -> dict[str, Any]:
    return {**trainer.state(last), "bad": {str(row): why for row, why in bad.items()}}


def _one_view(rows: Rows) -> Rows:
    """The first window of each row: the source then decodes once and cuts once."""
    return Rows(rows.ids, rows.windows[:, :1], rows.colours[:, :1])


def _result(
    protocol: Protocol,
    head: nn.Linear,
    present: torch.Tensor | None,
    bad_train: dict[int, str],
    test: Features,
    rate: float,
    loss: float,
) -> LinearResult:
    if present is not None:
        log.warning(
            "the classifier has a row for each of the %d classes that occur, not for each number "
            "up to %d: LinearResult.numbers says which is which",
            len(present),
            int(present[-1]),
        )
    top1, top5 = top_k(head, replace(test, labels=rows_of(test.labels, present)))
    return LinearResult(
        protocol=protocol,
        top1=top1,
        top5=top5,
        head=head,
        numbers=present,
        test_images=len(test.labels),
        bad_train=bad_train,
        bad_test=test.bad,
        images_per_second=rate,
        final_loss=loss,
    )


def _classes(store: Store) -> int:
    labels = np.asarray(store.labels)
    if not len(labels) or int(labels.min()) < 0:
        raise ValueError("every training image needs a label; -1 marks one without")
    return max(len(store.classes), int(labels.max()) + 1)
