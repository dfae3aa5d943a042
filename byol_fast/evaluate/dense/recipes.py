"""The recipes of detection and segmentation, with the place each number was read from.

VOC detection: MoCo's `detection/configs/pascal_voc_R_50_C4_24k_moco.yaml` and its two base files,
for detectron2. COCO detection: MMSelfSup's `mask_rcnn_r50_fpn_mstrain_1x_coco.py` (heads, sizes,
norms, rates), with detectron2's 1x schedule counted in iterations. Segmentation: MMSegmentation's
`fcn_r50-d8_4xb4-20k_voc12aug-512x512.py` and `fcn_r50-d8_4xb2-40k_cityscapes-769x769.py`, which
MMSelfSup takes over, on MMSelfSup's plain ResNet-50.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from byol_fast.evaluate.published import COCO_BOX, COCO_MASK, VOC_DETECTION, VOC_SEGMENTATION


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with momentum, counted in iterations."""

    name: str
    title: str  # in the table
    train_sets: tuple[str, ...]
    test_set: str
    iterations: int
    batch_size: int
    lr: float  # the peak
    momentum: float = 0.9
    weight_decay: float
    decay_norms: bool = True  # whether norm layers' parameters decay too

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(
                "iterations and batch size must be at least 1 and the learning rate above 0, got "
                f"{self.iterations}, {self.batch_size} and {self.lr:g}"
            )

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, …, iterations − 1."""
        raise NotImplementedError

    def changed(self, *, iterations: int | None, batch_size: int | None, lr: float | None) -> Self:
        """The recipe with another length, batch or rate; the rate follows the batch."""
        batch_size = self.batch_size if batch_size is None else batch_size
        if lr is None:
            lr = self.lr * batch_size / self.batch_size
        length = self.iterations if iterations is None else iterations
        return replace(self, iterations=length, batch_size=batch_size, lr=lr)


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """Faster R-CNN on a ResNet-C4, or Mask R-CNN on a ResNet-FPN."""

    architecture: Literal["c4", "fpn"]
    milestones: tuple[int, ...]  # iterations after which the rate falls to a tenth
    warmup_iterations: int  # linear, from a thousandth
    short_sides: tuple[int, ...]  # pixels; one is drawn for each image
    test_short_side: int = 800
    max_side: int = 1333
    before_nms: tuple[int, int]  # proposals in training and test; of each level with FPN
    after_nms: tuple[int, int]
    rois_per_image: int = 512  # proposals the box head is trained on, a quarter of them objects
    detections_per_image: int = 100
    roi_size: int = 14  # what layer 4 sees of a box (c4), in feature pixels
    pyramid_channels: int = 256  # of the heads on it too (fpn)
    precise_bn_batches: int = 0  # training batches whose statistics the test uses; 0: the running

    def learning_rate(self, step: int) -> float:
        rate = self.lr * 0.1 ** sum(step >= milestone for milestone in self.milestones)
        if step >= self.warmup_iterations:
            return rate
        share = step / self.warmup_iterations
        return rate * (0.001 * (1 - share) + share)

    def changed(self, *, iterations: int | None, batch_size: int | None, lr: float | None) -> Self:
        new = super().changed(iterations=iterations, batch_size=batch_size, lr=lr)
        ratio = new.iterations / self.iterations
        return replace(
            new,
            milestones=tuple(round(m * ratio) for m in self.milestones),
            warmup_iterations=min(self.warmup_iterations, new.iterations // 10),
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """A fully convolutional head with an auxiliary one, on a ResNet of output stride 8."""

    resize_to: tuple[int, int]  # longest and shortest side in pixels, the aspect kept
    crop: int  # side in pixels
    scales: tuple[float, float] = (0.5, 2.0)  # of resize_to, drawn uniformly
    most_of_one_class: float = 0.75  # a crop with more of one class is drawn again, ten times
    power: float = 0.9  # of the polynomial decay
    last_lr: float = 1e-4
    channels: int = 512  # of the head; the auxiliary one has half of them
    auxiliary_weight: float = 0.4
    dropout: float = 0.1
    align_corners: bool  # of the upsampling
    slide: int | None = None  # stride of test windows as large as a crop; None: whole images

    def learning_rate(self, step: int) -> float:
        left: float = (1 - step / self.iterations) ** self.power
        return self.last_lr + (self.lr - self.last_lr) * left


VOC = DetectionRecipe(
    name="voc",
    title="VOC07+12 Faster R-CNN C4",
    train_sets=("VOC2007/trainval", "VOC2012/trainval"),
    test_set="VOC2007/test",
    iterations=24_000,
    batch_size=16,
    lr=0.02,
    weight_decay=1e-4,
    decay_norms=False,
    architecture="c4",
    milestones=(18_000, 22_000),
    warmup_iterations=100,
    short_sides=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    before_nms=(12_000, 6_000),
    after_nms=(2_000, 1_000),
    precise_bn_batches=200,
)
COCO = DetectionRecipe(
    name="coco",
    title="COCO Mask R-CNN FPN 1×",
    train_sets=("train2017",),
    test_set="val2017",
    iterations=90_000,
    batch_size=16,
    lr=0.02,
    weight_decay=1e-4,
    architecture="fpn",
    milestones=(60_000, 80_000),
    warmup_iterations=500,  # MMDetection's schedule_1x; detectron2 has 1000
    short_sides=(640, 672, 704, 736, 768, 800),
    before_nms=(2_000, 1_000),
    after_nms=(1_000, 1_000),
)
VOC12AUG = SegmentationRecipe(
    name="voc12aug",
    title="VOC12aug FCN-D8 512²",
    train_sets=("train", "aug"),
    test_set="val",
    iterations=20_000,
    batch_size=16,
    lr=0.01,
    weight_decay=5e-4,
    resize_to=(2048, 512),
    crop=512,
    align_corners=False,
)
CITYSCAPES = SegmentationRecipe(
    name="cityscapes",
    title="Cityscapes FCN-D8 769²",
    train_sets=("train",),
    test_set="val",
    iterations=40_000,
    batch_size=8,
    lr=0.01,
    weight_decay=5e-4,
    resize_to=(2049, 1025),
    crop=769,
    align_corners=True,
    slide=513,
)
DETECTION = {recipe.name: recipe for recipe in (VOC, COCO)}
SEGMENTATION = {recipe.name: recipe for recipe in (VOC12AUG, CITYSCAPES)}
PUBLISHED = {"box": COCO_BOX[0], "mask": COCO_MASK[0], "voc": VOC_DETECTION}
PUBLISHED["voc12aug"] = VOC_SEGMENTATION  # Cityscapes: none for BYOL


def quick_detection(recipe: DetectionRecipe) -> DetectionRecipe:
    """For trying: small images and few of everything."""
    short = recipe.changed(iterations=200, batch_size=2, lr=None)
    return replace(
        short,
        short_sides=(112, 128, 144),
        test_short_side=128,
        max_side=256,
        before_nms=(200, 100),
        after_nms=(100, 50),
        rois_per_image=16,
        detections_per_image=10,
        roi_size=7,
        pyramid_channels=64,
        precise_bn_batches=min(recipe.precise_bn_batches, 2),
    )


def quick_segmentation(recipe: SegmentationRecipe) -> SegmentationRecipe:
    """For trying: small crops and a small head."""
    short = recipe.changed(iterations=200, batch_size=4, lr=None)
    return replace(
        short,
        resize_to=(256, 64),
        crop=65 if recipe.align_corners else 64,
        channels=64,
        slide=None if recipe.slide is None else 43,
    )
