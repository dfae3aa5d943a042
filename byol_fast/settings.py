"""The sections of a pretraining run's settings: names, defaults, bounds, help."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from byol_fast.flags import Section, UsageError, nearest, setting

RECIPE = "the recipe's"  # what None stands for until `recipes.fill`
METHODS = ("byol", "simsiam", "directpred", "no-predictor", "group-ws")
_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(m|h)|(\d+)")
_KEEP = re.compile(r"([1-9]\d*)(?:, ?every=([1-9]\d*)(e?))?")


def of_recipe(text: str, *, free: bool = False, **bounds: Any) -> Any:
    """A field whose value is the recipe's unless set: None until `recipes.fill`."""
    return setting(text, default=None, unset=RECIPE, free=free, **bounds)


@dataclass(frozen=True, kw_only=True)
class InputConfig(Section):
    """From files to views."""

    prefix: ClassVar[str] = "input"
    semantics: Literal["deepmind", "torchvision"] = of_recipe(
        "meaning of the colour jitter, the blur's border and the crop's retries"
    )
    crop_area_min: float = of_recipe("smallest crop, as a share of the image", above=0, at_most=1)
    views: Literal["byol", "no-blur", "no-flip", "no-blur-no-flip"] = of_recipe(
        "the paper's two views, or those without blur (for images of 32 pixels), without mirror "
        "images (for writing), or without both"
    )
    verify: bool = setting(
        "decode every image strictly once when indexing, so that broken ones are named then",
        default=True,
        free=True,
    )
    threads: int | None = setting(
        "decoding threads of each process",
        default=None,
        unset="the cores a process has",
        free=True,
        at_least=1,
    )
    accumulate: int | None = setting(
        "micro-batches of one optimizer step on each process",
        default=None,
        unset="1; as many as memory is known to need when resumed on fewer processes",
        free=True,
        at_least=1,
    )

    @property
    def blur(self) -> bool:
        """Whether views are blurred: view 1 always, view 2 one time in ten."""
        return "no-blur" not in self.views

    @property
    def flip(self) -> bool:
        """Whether every other view is a mirror image."""
        return "no-flip" not in self.views


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimizer and schedule."""

    prefix: ClassVar[str] = "optim"
    base_lr: float = of_recipe("learning rate at batch 256; times batch/256 at the peak", above=0)
    weight_decay: float = of_recipe("of weights; biases and norms have none", at_least=0)
    warmup_epochs: float = of_recipe("linear warm-up from 0, then cosine to 0", at_least=0)
    variant: Literal["paper", "lightly", "mmpretrain", "sgd"] = of_recipe(
        "LARS as the authors', as lightly's (the norms are summed), as mmpretrain's (that, and the "
        "rate inside the momentum), or no trust ratio at all"
    )

    @property
    def norm(self) -> Literal["update", "sum"]:
        """What LARS divides by: the norm of the update, or the sum of its parts' norms."""
        return "sum" if self.variant in ("lightly", "mmpretrain") else "update"

    @property
    def lr_in_momentum(self) -> bool:
        """Whether the momentum buffer accumulates steps (lr times update) instead of updates."""
        return self.variant == "mmpretrain"

    @property
    def adapt(self) -> bool:
        """Whether weights get LARS's trust ratio; without it this is SGD with momentum."""
        return self.variant != "sgd"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Networks."""

    prefix: ClassVar[str] = "model"
    stem: Literal["imagenet", "cifar"] = of_recipe(
        "of a ResNet: 7x7 with stride 2 and max-pool, or 3x3 with stride 1 and none"
    )
    hidden_size: int = of_recipe(
        "width of the projector's and predictor's hidden layer", at_least=1
    )
    hidden_layer: int | str = setting(
        "which layer is the representation: the name or the index of a child", default=-1
    )
    target_decay: float = of_recipe("EMA decay at step 0; rises to 1", at_least=0, at_most=1)
    method: str = setting(
        "byol, or what differs from it, joined by +: simsiam (the target is the online network "
        "behind a stop-gradient), directpred (a predictor set from its inputs' correlation), "
        "no-predictor, group-ws (GroupNorm and weight standardisation for BatchNorm)",
        default="byol",
    )
    bn_sync: Literal["none", "group", "world"] = setting(
        "whose BatchNorm statistics are taken together: each process by itself, the processes of "
        "a node, or all of them as in the paper (also said as false and true)",
        default="world",
        switch=("none", "world"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.method.split("+")
        if unknown := [word for word in words if word not in METHODS]:
            raise UsageError(
                f"--model.method must be byol, or some of {', '.join(METHODS[1:])} joined by +, "
                f"got {self.method!r}{nearest(unknown[0], METHODS)}"
            )
        if {"directpred", "no-predictor"} <= set(words):
            raise UsageError("--model.method must not be both directpred and no-predictor")
        if len(set(words)) < len(words) or ("byol" in words and len(words) > 1):
            raise UsageError(
                f"--model.method must name each difference from byol once, got {self.method!r}"
            )

    @property
    def momentum(self) -> bool:
        """Whether the target is a moving average; else the online network itself."""
        return "simsiam" not in self.method

    @property
    def predictor(self) -> Literal["mlp", "directpred", "none"]:
        """What stands between the online projection and the loss."""
        if "directpred" in self.method:
            return "directpred"
        return "none" if "no-predictor" in self.method else "mlp"

    @property
    def norm(self) -> Literal["batch", "group-ws"]:
        """What normalises, in the backbone and in the heads."""
        return "group-ws" if "group-ws" in self.method else "batch"


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """How it runs."""

    prefix: ClassVar[str] = "run"
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = of_recipe(
        "of the networks; auto is bf16 on a GPU that has it, else fp32. tf32 rounds what a GPU "
        "multiplies to 10 bits of mantissa and adds up in fp32; fp32 does not round"
    )
    engine: Literal["auto", "eager", "compile", "graph"] = setting(
        "networks as they stand, through torch.compile, or that and the whole step as one CUDA "
        "graph, for small batches; auto compiles on a GPU",
        default="auto",
        free=True,
    )
    max_steps: int | None = setting(
        "stop after this step with a checkpoint; the schedule stays that of all epochs",
        default=None,
        unset="all",
        free=True,
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """What is watched."""

    prefix: ClassVar[str] = "monitor"
    eval_every: int = of_recipe(
        "epochs between kNN evaluations; 0: only at the start and the end", free=True, at_least=0
    )
    eval_data: str = setting(
        "labelled images that kNN is scored on, in class folders like the training images'",
        default="",
        free=True,
    )
    log_every: int = of_recipe("steps between lines of the log", free=True, at_least=1)
    tracker: Literal["tensorboard", "wandb", "both", "none"] = setting(
        "where curves go besides metrics.jsonl", default="tensorboard", free=True
    )
    on_trouble: Literal["warn", "stop", "stop-collapsed", "stop-nonfinite"] = setting(
        "when the embeddings collapse, or a loss or gradient is not finite (such a step is always "
        "skipped): say so and go on, or end the run with exit code 5, for both or for one of them",
        default="warn",
        free=True,
        formerly="on_collapse",
    )

    @property
    def stop_collapsed(self) -> bool:
        """Whether collapsed embeddings end the run."""
        return self.on_trouble in ("stop", "stop-collapsed")

    @property
    def stop_nonfinite(self) -> bool:
        """Whether a step that is not finite ends the run."""
        return self.on_trouble in ("stop", "stop-nonfinite")

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard events are written."""
        return self.tracker in ("tensorboard", "both")

    @property
    def wandb(self) -> bool:
        """Whether Weights & Biases is used."""
        return self.tracker in ("wandb", "both")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints."""

    prefix: ClassVar[str] = "checkpoint"
    every: int | str = setting(
        "how often: 30m, 2h, or a number of steps", default="30m", free=True, above=0
    )
    keep: int | str = setting(
        "how many of the newest stay on disk; 2,every=5000 also keeps one for good every 5000 "
        "steps, and 2,every=10e every 10 epochs",
        default=2,
        free=True,
        at_least=1,
    )
    allow_config_change: bool = setting(
        "resume although settings differ from the checkpoint's", default=False, free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        found = _INTERVAL.fullmatch(str(self.every))
        if not found or not float(found[1] or found[3]):
            raise UsageError(
                f"--checkpoint.every must be minutes (30m), hours (2h) or a number of steps (500), "
                f"got {self.every!r}"
            )
        if not _KEEP.fullmatch(str(self.keep)):
            raise UsageError(
                f"--checkpoint.keep must be a number (2), or one with steps or epochs after which "
                f"a checkpoint stays for good (2,every=5000 or 2,every=10e), got {self.keep!r}"
            )

    @property
    def keep_newest(self) -> int:
        """How many of the newest stay."""
        return self._keep()[0]

    def keep_every(self, *, samples: int, global_batch: int) -> Fraction | None:
        """Steps between checkpoints that stay for good; None: none does."""
        _, every, epochs = self._keep()
        return Fraction(every * samples, global_batch) if epochs else Fraction(every or 0) or None

    def _keep(self) -> tuple[int, int, bool]:
        found = _KEEP.fullmatch(str(self.keep))
        assert found
        return int(found[1]), int(found[2] or 0), bool(found[3])

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 where it goes by time."""
        return int(self.every) if str(self.every).isdigit() else 0

    @property
    def every_minutes(self) -> float:
        """Minutes between checkpoints; infinite where it goes by steps."""
        found = _INTERVAL.fullmatch(str(self.every))
        assert found
        return float(found[1]) * (60 if found[2] == "h" else 1) if found[2] else math.inf
