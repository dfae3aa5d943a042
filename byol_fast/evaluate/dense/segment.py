"""Fine-tune a segmenter and measure it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.evaluate.dense.crop import normalise, resize, scaled_size, training_crop
from byol_fast.evaluate.dense.fcn import Segmenter
from byol_fast.evaluate.dense.loop import Job, Trained, seeded, train
from byol_fast.evaluate.dense.masks import IGNORE, SegmentationSet, apart, read_pair
from byol_fast.evaluate.dense.recipes import SegmentationRecipe
from byol_fast.evaluate.dense.stream import generator
from pipelines.errors import DataError
from pipelines.ordered import in_order
from pipelines.progress import Progress

Sample = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """Figures as shares of 1."""

    miou: float
    pixel_accuracy: float
    by_class: dict[str, float]  # IoU of the classes that occur
    trained: Trained
    test_images_per_second: float


def fit(
    network: nn.Module,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    recipe: SegmentationRecipe,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    folder: Path,
    identity: dict[str, Any],
    seed: int = 0,
    threads: int = 4,
    save_every: int = 500,
    progress: bool = False,
) -> SegmentationResult:
    """Train the recipe's segmenter on `network`, which is changed, and test it.

    Args:
        identity, folder, save_every: as in `loop.Job`.

    Raises:
        ValueError: the network is no ResNet.
        DataError: a test image is trained on, or a file cannot be read.
        (and as `loop.train`)
    """
    apart(train_set, test_set)
    with seeded(seed):
        model = Segmenter(network, len(train_set.classes), recipe)
    model.to(device).to(memory_format=torch.channels_last)

    def sample(image: int, place: int) -> Sample:
        pixels, label = read_pair(train_set.pairs[image], train_set)
        return training_crop(pixels, label, recipe, generator(seed, place), mean=mean, std=std)

    job = Job(
        model=model,
        recipe=recipe,
        images=len(train_set.pairs),
        sample=sample,
        loss=partial(loss_of, model, device),
        folder=folder,
        identity=identity,
        device=device,
        seed=seed,
        threads=threads,
        save_every=save_every,
        progress=progress,
    )
    trained = train(job)
    began = time.perf_counter()
    table = confusion(
        model, test_set, mean=mean, std=std, device=device, threads=threads, progress=progress
    )
    named = zip(test_set.classes, class_iou(table).tolist(), strict=True)
    return SegmentationResult(
        miou=mean_iou(table),
        pixel_accuracy=float(table.diagonal().sum() / table.sum()),
        by_class={name: value for name, value in named if value == value},
        trained=trained,
        test_images_per_second=len(test_set.pairs) / (time.perf_counter() - began),
    )


def loss_of(model: Segmenter, device: torch.device, samples: list[Sample]) -> Tensor:
    """The loss on a batch of crops."""
    x, classes = (torch.stack(part).to(device, non_blocking=True) for part in zip(*samples))  # noqa: B905
    return model.loss(x.contiguous(memory_format=torch.channels_last), classes)


def confusion(
    model: Segmenter,
    data: SegmentationSet,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    threads: int = 4,
    progress: bool = False,
) -> Tensor:
    """How often each class (row) was taken for each class (column), `[C, C]` int64, in fp32.

    Images are fitted into the recipe's size; the scores are brought back to the image's own size.
    """
    model.eval()
    classes, to = len(data.classes), model.recipe.resize_to
    table = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def load(number: int) -> Sample:
        pixels, label = read_pair(data.pairs[number], data)
        x = torch.from_numpy(pixels).permute(2, 0, 1)
        x = resize(x, *scaled_size(label.shape[0], label.shape[1], to))
        return normalise(x.float() / 255, mean, std), torch.from_numpy(label)

    samples = in_order(load, range(len(data.pairs)), workers=threads, ahead=threads + 2)
    with Progress("testing", len(data.pairs), enabled=progress) as meter, torch.inference_mode():
        for x, label in samples:
            batch = x[None].to(device).contiguous(memory_format=torch.channels_last)
            predicted = model.predict(batch, label.shape[0], label.shape[1])
            table += count(label.to(device), predicted, classes)
            meter.advance()
    if not int(table.sum()):
        raise DataError("the test images have no pixel with a class: nothing to measure")
    return table.cpu()


def count(label: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """The confusion table `[C, C]` of one image; pixels labelled IGNORE are left out."""
    known = label != IGNORE
    pairs = label[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def class_iou(table: Tensor) -> Tensor:
    """Intersection over union of each class `[C]`; NaN for one neither there nor predicted."""
    hits = table.diagonal().double()
    return hits / (table.sum(0) + table.sum(1) - table.diagonal())


def mean_iou(table: Tensor) -> float:
    """The mean over the classes that are there or were predicted."""
    return float(class_iou(table).nanmean())
