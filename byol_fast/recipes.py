"""Recipes: settings that follow from the data set and the length of the run.

A recipe is a table of epochs, as the authors', beside values that do not depend on the epochs. The
row of other epoch counts is the one nearest in ratio (of two equally near ones the longer): 150
epochs use the 200-epoch row, 400 the 300-epoch one, anything above 548 the 1000-epoch one.
A value set by hand always wins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from byol_fast.config import FLAGS, Config, get, replace
from byol_fast.session.split import Split, share_out
from byol_fast.settings import RECIPE


@dataclass(frozen=True, kw_only=True)
class Row:
    """What follows the number of epochs."""

    base_lr: float  # at batch 256
    weight_decay: float
    target_decay: float  # at step 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A table of epochs and the values that stay."""

    source: str
    rows: Mapping[int, Row]
    values: Mapping[str, Any] = field(default_factory=dict)  # by dotted name, over `COMMON`


COMMON: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 4096,
    "backbone": "resnet50",
    "image_size": 224,
    "input.semantics": "deepmind",
    "input.crop_area_min": 0.08,
    "input.views": "byol",
    "optim.warmup_epochs": 10.0,
    "optim.variant": "paper",
    "model.stem": "imagenet",
    "model.hidden_size": 4096,
    "run.precision": "auto",
    "monitor.eval_every": 10,
    "monitor.log_every": 50,
}

# lightly's benchmark is SGD (lr .06 × batch/128, weight decay 5e-4) on the mean of two negative
# cosines. The gradient here is four times that, so a quarter of its rate and four times its decay
# take the same steps: lr .03 × batch/256, decay 2e-3. It has no warm-up, holds τ at .99 and decays
# biases and norms too. Its kNN is .869 and .868 (200 epochs, batch 128 and 512), .910 (800, 512).
_CIFAR = Recipe(
    source="lightly's CIFAR-10 benchmark",
    rows={200: Row(base_lr=0.03, weight_decay=2e-3, target_decay=0.99)},
    values={
        "epochs": 200,
        "batch_size": 512,
        "backbone": "resnet18",
        "image_size": 32,
        "input.semantics": "torchvision",
        "input.views": "no-blur",
        "optim.variant": "sgd",
        "model.stem": "cifar",
        "model.hidden_size": 1024,
    },
)

# lr 4.8 at batch 4096: mmpretrain's for 200 epochs; OpenMixup's for 200, 300, 400 (ImageNet-100)
# and 1000 (STL-10).
_LR_4_8 = Row(base_lr=0.3, weight_decay=1e-6, target_decay=0.99)

RECIPES: dict[str, Recipe] = {
    "imagenet": Recipe(
        source="the BYOL authors; 200 epochs: mmpretrain",
        rows={
            40: Row(base_lr=0.45, weight_decay=1e-6, target_decay=0.97),
            100: Row(base_lr=0.45, weight_decay=1e-6, target_decay=0.99),
            200: Row(base_lr=0.3, weight_decay=1e-6, target_decay=0.99),
            300: Row(base_lr=0.3, weight_decay=1e-6, target_decay=0.99),
            1000: Row(base_lr=0.2, weight_decay=1.5e-6, target_decay=0.996),
        },
    ),
    "mmpretrain": Recipe(
        source="mmpretrain, byol_resnet50_16xb256-coslr-200e_in1k",
        rows={200: _LR_4_8},
        values={
            "epochs": 200,
            "input.semantics": "torchvision",
            "optim.variant": "mmpretrain",
        },
    ),
    "openmixup": Recipe(
        source="OpenMixup, r50_8xb64_accu8_cos",
        rows={
            100: Row(base_lr=0.45, weight_decay=1e-6, target_decay=0.99),
            200: _LR_4_8,
            300: _LR_4_8,
        },
        values={
            "epochs": 200,
            "input.semantics": "torchvision",
            "input.accumulate": 8,  # 8 GPUs × 64
            "optim.variant": "mmpretrain",
            "run.precision": "fp16",
        },
    ),
    "imagenet100": Recipe(
        source="OpenMixup's ImageNet-100 configuration",
        rows={400: _LR_4_8},
        values={"epochs": 400, "backbone": "resnet18", "input.semantics": "torchvision"},
    ),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": Recipe(
        source="OpenMixup's STL-10 configuration",
        rows={1000: _LR_4_8},
        values={"epochs": 1000, "image_size": 96, "input.semantics": "torchvision"},
    ),
    "quickstart": Recipe(
        source="minutes on two cores, for small squares of photographs",
        rows={8: Row(base_lr=0.4, weight_decay=1e-4, target_decay=0.98)},
        values={
            "epochs": 8,
            "batch_size": 64,
            "backbone": "resnet18",
            "image_size": 32,
            "input.crop_area_min": 0.2,
            "input.views": "no-blur",
            "optim.warmup_epochs": 1.0,
            "optim.variant": "sgd",
            "model.hidden_size": 512,
            "monitor.eval_every": 4,
            "monitor.log_every": 10,
        },
    ),
}


# Settings that a recipe fills in.
RECIPE_NAMES = tuple(name for name, flag in FLAGS.items() if flag.unset == RECIPE)


def nearest_row(rows: Mapping[int, Row], epochs: int) -> int:
    """The tabulated number of epochs whose row a run of `epochs` uses: nearest in ratio."""
    longest_first = sorted(rows, reverse=True)
    return min(longest_first, key=lambda row: Fraction(max(row, epochs), min(row, epochs)))


def fill(config: Config) -> Config:
    """`config` with the recipe's values where none was set by hand."""
    recipe = RECIPES[config.recipe]
    values = {**COMMON, **recipe.values}
    epochs = config.epochs if config.epochs is not None else values["epochs"]
    row = recipe.rows[nearest_row(recipe.rows, epochs)]
    values |= {
        "optim.base_lr": row.base_lr,
        "optim.weight_decay": row.weight_decay,
        "model.target_decay": row.target_decay,
    }
    # A warm-up that fills the run would never reach the cosine: a tenth of the run then.
    if values["optim.warmup_epochs"] >= epochs:
        values["optim.warmup_epochs"] = epochs / 10
    return replace(config, {name: v for name, v in values.items() if get(config, name) is None})


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A run in numbers: settings without gaps, and what follows from data and ranks."""

    config: Config
    samples: int
    global_batch: int  # images of one optimizer step
    split: Split  # of the batch, over ranks and micro-batches
    before: Split | None  # of the session that is resumed
    peak_lr: float
    weight_decay: float
    target_decay: float  # at step 0
    total_steps: int  # optimizer steps of all epochs: the schedules' end
    warmup_steps: int
    stop_after: int  # the last step of this run; total_steps unless --run.max-steps is less

    def arithmetic(self) -> list[str]:
        """Where the numbers come from, a line each, for the log."""
        c, batch = self.config, self.global_batch
        recipe = RECIPES[c.recipe]
        lines = [
            f"recipe {c.recipe} ({recipe.source}), {nearest_row(recipe.rows, c.epochs)}-epoch row",
            f"lr {self.peak_lr:.6g} = {c.optim.base_lr:g} × {batch}/256; {batch} = "
            f"{self.split.ranks} {'rank' if self.split.ranks == 1 else 'ranks'} × "
            f"{self.split.micro_batch} × {self.split.accumulate}",
            f"{self.total_steps} steps = {c.epochs} epochs × {self.samples} images // {batch}",
            f"{self.warmup_steps} warm-up steps = {self._warmup()}",
            f"weight decay {self.weight_decay:g}, "
            + (f"EMA decay {self.target_decay:g} → 1" if c.model.momentum else "no moving average"),
        ]
        if c.model.norm == "batch":
            lines.append(self.split.statistics())
        if c.model.method != "byol":
            lines.append(f"not as in the paper: {c.model.method} (--model.method)")
        if self.stop_after < self.total_steps:
            lines.append(f"stops after step {self.stop_after} of {self.total_steps}")
        if change := self.split.change(self.before):
            lines.append(change)
        return lines + self._by_hand()

    def _by_hand(self) -> list[str]:
        recipe = fill(Config(recipe=self.config.recipe, epochs=self.config.epochs))
        pairs = {n: (get(self.config, n), get(recipe, n)) for n in RECIPE_NAMES}
        return [f"set by hand: {n} {v} (recipe: {r})" for n, (v, r) in pairs.items() if v != r]

    def _warmup(self) -> str:
        epochs = self.config.optim.warmup_epochs
        text = f"{epochs:g} epochs × {self.samples} images // {self.global_batch}"
        if self.warmup_steps == self.total_steps:
            text += ": the learning rate rises until the run ends, and the cosine is never reached"
        return text


def resolve(
    config: Config, *, samples: int, world_size: int, before: Split | None = None
) -> Resolved:
    """Fill in the recipe's values and work out the run's numbers.

    Args:
        samples: training images.
        world_size: ranks.
        before: how the session that is resumed had shared out the batch.

    Raises:
        ValueError: the batch cannot be shared out over the ranks, or the warm-up set by hand is
            longer than the run.
        DataError: the batch is larger than the data set.
    """
    from pipelines.plan import too_few_images  # here: `--help` needs no numpy

    filled = fill(config)
    batch = filled.batch_size
    split = share_out(
        batch,
        world_size,
        asked=filled.input.accumulate,
        together=_together(filled, world_size),
        batch_norm=filled.model.norm == "batch",
        before=before,
    )
    if batch > samples:
        raise too_few_images(batch, samples, shares=batch // split.micro_batch, least=2)
    total = _steps(filled.epochs, samples, batch)
    warmup = _steps(filled.optim.warmup_epochs, samples, batch)
    if warmup > total:
        raise ValueError(
            f"--optim.warmup-epochs {filled.optim.warmup_epochs:g} ({warmup} steps) is longer than "
            f"the run of {filled.epochs} epochs ({total} steps): use {filled.epochs} at most, or "
            f"leave it out for the recipe's"
        )
    return Resolved(
        config=filled,
        samples=samples,
        global_batch=batch,
        split=split,
        before=before,
        peak_lr=filled.optim.base_lr * batch / 256,
        weight_decay=filled.optim.weight_decay,
        target_decay=filled.model.target_decay,
        total_steps=total,
        warmup_steps=warmup,
        stop_after=min(total, filled.run.max_steps or total),
    )


def _steps(epochs: float, samples: int, batch: int) -> int:
    """As the authors count and as `pipelines.plan.total_steps`, which this must equal."""
    return math.floor(Fraction(str(epochs)) * samples / batch)  # .3 as it is written


def _together(config: Config, ranks: int) -> int:
    """Ranks whose BatchNorm statistics are taken together."""
    of_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))  # torchrun sets it
    return {"none": 1, "group": of_a_node, "world": ranks}[config.model.bn_sync]
