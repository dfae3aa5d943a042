"""Fine-tune a detector and measure it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.evaluate.dense import coco, detector, voc_metric
from byol_fast.evaluate.dense.boxes import (
    Annotated,
    DetectionSet,
    Sample,
    training_images,
    training_sample,
)
from byol_fast.evaluate.dense.images import read_image
from byol_fast.evaluate.dense.loop import Job, Trained, precise_statistics, seeded, train
from byol_fast.evaluate.dense.recipes import DetectionRecipe
from byol_fast.evaluate.dense.voc_metric import Detections
from pipelines.errors import DataError
from pipelines.ordered import in_order
from pipelines.progress import Progress


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Figures as shares of 1, by `box` or `mask` and the metric's name."""

    figures: dict[str, dict[str, float]]
    by_class: dict[str, float]  # AP50, VOC only
    trained: Trained
    training_images: int
    test_images_per_second: float


def fit(
    network: nn.Module,
    train_set: DetectionSet,
    test_set: DetectionSet,
    recipe: DetectionRecipe,
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
) -> DetectionResult:
    """Train the recipe's detector around `network`, which is changed, and test it.

    Args:
        identity, folder, save_every: as in `loop.Job`.

    Raises:
        ValueError: the network is no ResNet.
        DataError: the sets name other classes, the test set has no objects, or an image cannot be
            read.
        (and as `loop.train`)
    """
    if train_set.classes != test_set.classes:
        raise DataError("the training set and the test set have different classes")
    if all(image.difficult.all() for image in test_set.images):  # of no objects too
        raise DataError("the test set has no object that is not difficult: nothing to measure")
    images = training_images(train_set)
    with seeded(seed):
        model = detector.build(network, len(train_set.classes), recipe, mean=mean, std=std)
    model.to(device)
    job = Job(
        model=model,
        recipe=recipe,
        images=len(images),
        sample=_sampler(images, recipe, seed),
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
    precise_statistics(job, recipe.precise_bn_batches)
    detector.test_sizes(model, recipe)
    began = time.perf_counter()
    figures, by_class = _measure(model, test_set, recipe, device, threads, progress)
    return DetectionResult(
        figures=figures,
        by_class=by_class,
        trained=trained,
        training_images=len(images),
        test_images_per_second=len(test_set.images) / (time.perf_counter() - began),
    )


def _sampler(
    images: list[Annotated], recipe: DetectionRecipe, seed: int
) -> Callable[[int, int], Sample]:
    masks = coco.masks if recipe.architecture == "fpn" else None

    def sample(image: int, place: int) -> Sample:
        return training_sample(images[image], place, seed, masks)

    return sample


def loss_of(model: nn.Module, device: torch.device, samples: list[Sample]) -> Tensor:
    """The sum of the detector's losses on a batch."""
    images = [_unit(x, device) for x, _ in samples]
    targets = [{k: v.to(device) for k, v in target.items()} for _, target in samples]
    losses = model(images, targets)
    return torch.stack([value.float() for value in losses.values()]).sum()


def detections(
    model: nn.Module,
    images: tuple[Annotated, ...],
    *,
    device: torch.device,
    threads: int = 4,
    progress: bool = False,
) -> Iterator[tuple[Annotated, dict[str, Tensor]]]:
    """What the model finds in each image, on the device, in fp32; one image at a time."""
    model.eval()
    read = in_order(_pixels, images, workers=threads, ahead=threads + 2)
    with Progress("testing", len(images), enabled=progress) as meter:
        for image, x in zip(images, read, strict=True):
            with torch.inference_mode():
                (found,) = model([_unit(x, device)])
            yield image, found
            meter.advance()


def _measure(
    model: nn.Module,
    test_set: DetectionSet,
    recipe: DetectionRecipe,
    device: torch.device,
    threads: int,
    progress: bool,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    found = detections(model, test_set.images, device=device, threads=threads, progress=progress)
    if recipe.architecture == "c4":
        measured = voc_metric.evaluate(
            [
                Detections(*(one[key].cpu().numpy() for key in ("boxes", "labels", "scores")))
                for _, one in found
            ],
            test_set.images,
        )
        figures = {"AP50": measured.ap50, "AP": measured.ap, "AP75": measured.ap75}
        names = {test_set.classes[label - 1]: ap for label, ap in measured.by_class.items()}
        return {"box": figures}, names
    assert test_set.source is not None  # the test set is one file
    numbers = coco.category_numbers(test_set.source)
    boxes: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    for image, one in found:
        for row in range(len(one["scores"])):
            left, top, right, bottom = one["boxes"][row].tolist()
            base = {
                "image_id": image.id,
                "category_id": numbers[int(one["labels"][row]) - 1],
                "score": float(one["scores"][row]),
            }
            boxes.append({**base, "bbox": [left, top, right - left, bottom - top]})
            binary = (one["masks"][row, 0] > 0.5).cpu().numpy()
            masks.append({**base, "segmentation": coco.run_length(binary)})
    ids = [image.id for image in test_set.images]
    return {
        "box": coco.evaluate(test_set.source, boxes, "bbox", ids),
        "mask": coco.evaluate(test_set.source, masks, "segm", ids),
    }, {}


def _pixels(image: Annotated) -> Tensor:
    pixels = read_image(image.image, (image.height, image.width))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unit(x: Tensor, device: torch.device) -> Tensor:
    """uint8 over PCIe, then `[3, H, W]` in 0…1."""
    return x.to(device, non_blocking=True).float() / 255
