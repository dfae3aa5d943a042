"""Figures published for BYOL, in percent, by the project that measured them.

Most are of a ResNet-50 pretrained on ImageNet-1k: the paper's (arXiv 2006.07733), mmpretrain's
linear accuracy, and MMSelfSup's byol_resnet50_8xb32-accum16-coslr-200e. OpenMixup's page repeats
MMSelfSup's figures; the accuracies of Feature1 to Feature5 on ImageNet are its own (its 200-epoch
run; its "300-epoch" row repeats another project's 200-epoch run and is not used). CIFAR-10's are of
a ResNet-18 with a 3×3 stem on 32 pixels, by lightly and solo-learn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KNN_TEMPERATURE = 0.07
USUAL = "ResNet-50 pretrained on ImageNet-1k"
SMALL = "ResNet-18 (3×3 stem, 32 pixels) pretrained on CIFAR-10"

DATASETS = ("imagenet", "cifar10")  # that figures of knn, linear, mhead and semi are of
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_SHORTER = {"plane": "airplane", "car": "automobile"}  # as many folders of it are named


@dataclass(frozen=True)
class Published:
    """One figure in percent."""

    value: float
    epochs: int  # of pretraining
    by: str
    metric: str = "top-1"
    on: str = "ImageNet-1k"
    network: str = USUAL


def dataset_of(classes: tuple[str, ...]) -> str | None:
    """Which of `DATASETS` has these classes: ImageNet-1k's 1000 synsets (or numbers, which lists
    of it have), CIFAR-10's ten names."""
    if len(classes) == 1000 and all(re.fullmatch(r"n\d{8}|\d{1,3}", name) for name in classes):
        return "imagenet"
    names = {_SHORTER.get(name.lower(), name.lower()) for name in classes}
    return "cifar10" if names == set(_CIFAR10.split()) else None


LINEAR = {
    "paper": Published(74.3, 1000, "BYOL paper, table 1"),
    "mmpretrain": Published(71.80, 200, "mmpretrain"),
}
KNN = {  # k -> figure, at KNN_TEMPERATURE
    k: Published(value, 200, "MMSelfSup")
    for k, value in {10: 63.9, 20: 64.2, 100: 62.9, 200: 61.9}.items()
}


def _cifar10(value: float, epochs: int, by: str) -> Published:
    return Published(value, epochs, by, on="CIFAR-10", network=SMALL)


CIFAR10_KNN = (  # k 200, temperature .1
    _cifar10(86.9, 200, "lightly, batch 128"),
    _cifar10(86.8, 200, "lightly, batch 512"),
    _cifar10(91.0, 800, "lightly, batch 512"),
)
CIFAR10_KNN_K, CIFAR10_KNN_TEMPERATURE = 200, 0.1
CIFAR10_LINEAR = _cifar10(92.58, 1000, "solo-learn")


def _mmselfsup(value: float, metric: str, on: str) -> Published:
    return Published(value, 200, "MMSelfSup", metric, on)


# Features of the stem and of the four stages, each with a linear classifier.
MHEAD = {
    "imagenet": tuple(Published(v, 200, "OpenMixup") for v in (15.16, 35.26, 47.77, 63.10, 71.21)),
    "places205": tuple(
        _mmselfsup(v, "top-1", "Places205") for v in (21.25, 36.55, 43.66, 50.74, 53.82)
    ),
}
SVM = _mmselfsup(86.31, "mAP", "VOC07")
LOW_SHOT = {  # images a class -> figure
    k: _mmselfsup(v, "mAP", "VOC07")
    for k, v in {
        **{1: 45.37, 2: 56.83, 4: 68.47, 8: 74.12, 16: 78.30, 32: 81.53},
        **{64: 83.56, 96: 84.73},
    }.items()
}
# Logistic regression on frozen features; the metric is each data set's own.
TRANSFER = {
    name: Published(value, 1000, "BYOL paper, table 3", metric, on)
    for name, (value, metric, on) in {
        "food101": (75.3, "top-1", "Food-101"),
        "cifar10": (91.3, "top-1", "CIFAR-10"),
        "cifar100": (78.4, "top-1", "CIFAR-100"),
        "birdsnap": (57.2, "top-1", "Birdsnap"),
        "sun397": (62.2, "top-1", "SUN397"),
        "cars": (67.8, "top-1", "Cars"),
        "aircraft": (60.6, "per class", "Aircraft"),
        "voc2007": (82.5, "mAP11", "VOC2007"),
        "dtd": (75.5, "top-1", "DTD"),
        "pets": (90.4, "per class", "Pets"),
        "caltech101": (94.2, "per class", "Caltech-101"),
        "flowers": (96.1, "per class", "Flowers"),
    }.items()
}
SEMI = {  # share of the labels -> figure
    0.01: Published(53.2, 1000, "BYOL paper, table 2"),
    0.10: Published(68.8, 1000, "BYOL paper, table 2"),
}
VOC_DETECTION = _mmselfsup(80.35, "AP50", "VOC07 test")
COCO_BOX = tuple(
    _mmselfsup(value, metric, "COCO val2017")
    for value, metric in ((40.9, "box AP"), (61.0, "box AP50"), (44.6, "box AP75"))
)
COCO_MASK = tuple(
    _mmselfsup(value, metric, "COCO val2017")
    for value, metric in ((36.8, "mask AP"), (58.1, "mask AP50"), (39.5, "mask AP75"))
)
VOC_SEGMENTATION = _mmselfsup(67.16, "mIoU", "VOC12 val")


def _fine_tuned(value: float, on: str, metric: str = "top-1") -> Published:
    return Published(value, 1000, "BYOL paper, table 3", metric, on)


FINETUNE = {  # the data set's name on the command line -> figure
    "food101": _fine_tuned(88.5, "Food-101"),
    "cifar10": _fine_tuned(97.8, "CIFAR-10"),
    "cifar100": _fine_tuned(86.1, "CIFAR-100"),
    "birdsnap": _fine_tuned(76.3, "Birdsnap"),
    "sun397": _fine_tuned(63.7, "SUN397"),
    "cars": _fine_tuned(91.6, "Stanford Cars"),
    "aircraft": _fine_tuned(88.1, "FGVC Aircraft", "mean per class"),
    "dtd": _fine_tuned(76.2, "DTD"),
    "pets": _fine_tuned(91.7, "Oxford-IIIT Pets", "mean per class"),
    "caltech101": _fine_tuned(93.8, "Caltech-101", "mean per class"),
    "flowers": _fine_tuned(97.0, "Oxford 102 Flowers", "mean per class"),
}
