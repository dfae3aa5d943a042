"""The recipes of the tasks that train on images: `mhead`, `semi` and `finetune`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from byol_fast.schedules import learning_rate
from pipelines.spec import Semantics, ViewSpec

# Crop of 8 to 100 % of the area, flip, and nothing else.
CROP_AND_FLIP = ViewSpec(jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
# The same with colours always jittered, without hue.
JITTERED = ViewSpec(
    jitter=1.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.0,
    grey=0.0,
    blur=0.0,
    solarize=0,
)
# 7/8 of the side: 224 pixels out of 256, somewhere in the centre square.
SQUARE = ViewSpec(
    crop_area=(0.765625,) * 2, crop_aspect=(1.0, 1.0), jitter=0.0, grey=0.0, blur=0.0, solarize=0.0
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained: SGD with momentum, and what it sees."""

    name: str
    epochs: int = 0  # or `steps`
    steps: int = 0  # of training, where it is not counted in epochs
    batch_size: int = 256
    base_lr: float  # per 256 images: the peak is base_lr * batch_size / 256
    head_lr_factor: float = 1.0  # the classifier's rate, in units of the backbone's
    momentum: float = 0.9
    nesterov: bool
    weight_decay: float = 0.0  # of every weight, biases and norms too
    decay_over_lr: bool = False  # the weight decay is divided by the peak rate
    schedule: Literal["steps", "cosine"]
    drops: tuple[float, ...] = ()  # "steps": after these shares of the training ...
    gamma: float = 0.1  # ... the rate is multiplied by this
    view: ViewSpec = CROP_AND_FLIP
    from_square: bool = False  # crops are taken from the centre square of the image
    lighting: float = 0.0  # standard deviation of colour shifts along ImageNet's main axes
    semantics: Semantics = "torchvision"  # of the random crop and the colours
    slow_norms: bool = False  # BatchNorm averages over ten epochs' worth: decay max(1 - 10/s, .9)

    def __post_init__(self) -> None:
        if (self.epochs < 1) == (self.steps < 1):
            raise ValueError(f"one of epochs and steps, got {self.epochs} and {self.steps}")
        if self.batch_size < 1 or self.base_lr <= 0 or self.head_lr_factor <= 0:
            raise ValueError(
                "batch_size must be at least 1, base_lr and head_lr_factor above 0, got "
                f"{self.batch_size}, {self.base_lr} and {self.head_lr_factor}"
            )
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.batch_size / 256

    @property
    def l2(self) -> float:
        """The coefficient that the optimizer gets."""
        return self.weight_decay / (self.peak_lr if self.decay_over_lr else 1.0)

    def total_steps(self, images: int) -> int:
        """Optimizer steps on a training set of so many images, at least 1."""
        return self.steps or max(1, self.epochs * images // self.batch_size)

    def factor(self, step: int, total: int) -> float:
        """The learning rate of step `step` of `total`, as a share of the peak."""
        if self.schedule == "cosine":
            return learning_rate(step, peak=1.0, warmup_steps=0, total_steps=total)
        return self.gamma ** sum(step >= round(share * total) for share in self.drops)

    def changed(self, asked: dict[str, Any]) -> Recipe:
        """With the values of `asked` that are not None; steps replace epochs and the reverse."""
        values = {key: value for key, value in asked.items() if value is not None}
        if "steps" in values:
            values.setdefault("epochs", 0)
        elif "epochs" in values:
            values["steps"] = 0
        return replace(self, **values)

    def arithmetic(self) -> str:
        """The recipe in one line, for the output."""
        how = "SGD, Nesterov" if self.nesterov else "SGD"
        length = f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps"
        rate = f"lr {self.peak_lr:g} = {self.base_lr:g} × {self.batch_size}/256"
        head = "" if self.head_lr_factor == 1 else f", head × {self.head_lr_factor:g}"
        decay = f"weight decay {self.l2:g}"
        if self.decay_over_lr and self.weight_decay:
            decay += f" = {self.weight_decay:g} / {self.peak_lr:g}"
        ends = ", ".join(f"{share * (self.epochs or self.steps):.3g}" for share in self.drops)
        unit = "epochs" if self.epochs else "steps"
        drops = f"× {self.gamma:g} after {ends} {unit}" if ends else "constant"
        course = "cosine per step" if self.schedule == "cosine" else drops
        return f"{how}, {length}, {rate}{head}, {decay}, {course}"


def _mhead(name: str, epochs: int, drops: tuple[int, ...], **rest: Any) -> Recipe:
    return Recipe(
        name=name,
        epochs=epochs,
        base_lr=0.01,
        nesterov=True,
        weight_decay=1e-4,
        schedule="steps",
        drops=tuple(drop / epochs for drop in drops),
        **rest,
    )


# MMSelfSup's resnet50_mhead_* configurations and OpenMixup's, which agree: linear classifiers on
# Feature1 to Feature5.
MHEAD = {
    "imagenet": _mhead("imagenet", 90, (30, 60), view=JITTERED, lighting=0.1),
    "places205": _mhead("places205", 28, (7, 14, 21), view=SQUARE, from_square=True),
    "inaturalist18": _mhead("inaturalist18", 84, (24, 48, 72)),
}

# MMSelfSup's imagenet_{1,10}percent/resnet50_head100_4xb64-steplr1e-2-20e, one of nine there.
_SEMI = Recipe(
    name="head100_lr1e-2",
    epochs=20,
    base_lr=0.01,
    head_lr_factor=100.0,
    nesterov=False,
    schedule="steps",
    drops=(12 / 20, 16 / 20),
    gamma=0.2,
)
SEMI_GRID = {"base_lr": (0.1, 0.01, 0.001), "head_lr_factor": (1.0, 10.0, 100.0)}


def semi(share: float) -> Recipe:
    """Semi-supervised fine-tuning with a `share` of the labels: less of them, more decay."""
    return replace(_SEMI, weight_decay=5e-4 if share < 0.05 else 1e-4)


# BYOL paper, appendix, after SimCLR's: 20,000 steps at batch 256, Nesterov; rate and decay are
# chosen from the grid below for each data set. These defaults are a point of it, not a published
# choice. The cosine is Kornblith et al.'s (2019), whose protocol it is.
FINETUNE = Recipe(
    name="finetune",
    steps=20_000,
    base_lr=0.01,
    nesterov=True,
    weight_decay=1e-6,
    decay_over_lr=True,
    schedule="cosine",
    semantics="deepmind",
    slow_norms=True,
)
FINETUNE_GRID = {
    "base_lr": tuple(round(10 ** (-4 + i / 2), 10) for i in range(7)),
    "weight_decay": (0.0, *(round(10 ** (-6 + i / 2), 10) for i in range(7))),
}


def quick(recipe: Recipe, images: int) -> Recipe:
    """For trying: five passes in small batches, at least 30 steps; no published protocol."""
    batch = min(64, images)
    epochs = max(5, -(-30 * batch // images))
    length = {"steps": epochs * images // batch} if recipe.steps else {"epochs": epochs}
    return recipe.changed({"batch_size": batch, "base_lr": recipe.base_lr * 256 / batch, **length})
