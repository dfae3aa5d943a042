"""Figures published for BYOL with a ResNet-50 pretrained on ImageNet-1k, in percent.

Sources: the paper (arXiv 2006.07733), mmpretrain's and OpenMixup's pages on BYOL. OpenMixup's rows
are its 200-epoch run (batch 4096); its "300-epoch" ImageNet row repeats another project's 200-epoch
run, so it is not used here.
"""

from __future__ import annotations

from dataclasses import dataclass

KNN_TEMPERATURE = 0.07


@dataclass(frozen=True)
class Published:
    """One figure in percent."""

    value: float
    epochs: int  # of pretraining
    by: str
    metric: str = "top-1"
    on: str = "ImageNet-1k"


LINEAR = {
    "paper": Published(74.3, 1000, "BYOL paper, table 1"),
    "mmpretrain": Published(71.80, 200, "mmpretrain"),
}
KNN = {  # k -> figure, at KNN_TEMPERATURE
    10: Published(63.9, 200, "mmpretrain"),
    20: Published(64.2, 200, "mmpretrain"),
    100: Published(62.9, 200, "mmpretrain"),
    200: Published(61.9, 200, "mmpretrain"),
}


def _openmixup(value: float, metric: str, on: str) -> Published:
    return Published(value, 200, "OpenMixup", metric, on)


# Features of the stem and of the four stages, each with a linear classifier.
MHEAD = {
    "imagenet": tuple(
        _openmixup(v, "top-1", "ImageNet-1k") for v in (15.16, 35.26, 47.77, 63.10, 71.21)
    ),
    "places205": tuple(
        _openmixup(v, "top-1", "Places205") for v in (21.25, 36.55, 43.66, 50.74, 53.82)
    ),
}
SVM = _openmixup(86.31, "mAP", "VOC07")
LOW_SHOT = {  # images a class -> figure
    k: _openmixup(v, "mAP", "VOC07")
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
VOC_DETECTION = _openmixup(80.35, "AP50", "VOC07 test")
COCO_BOX = tuple(
    _openmixup(value, metric, "COCO val2017")
    for value, metric in ((40.9, "box AP"), (61.0, "box AP50"), (44.6, "box AP75"))
)
COCO_MASK = tuple(
    _openmixup(value, metric, "COCO val2017")
    for value, metric in ((36.8, "mask AP"), (58.1, "mask AP50"), (39.5, "mask AP75"))
)
VOC_SEGMENTATION = _openmixup(67.16, "mIoU", "VOC12 val")


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
