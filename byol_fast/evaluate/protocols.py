"""The recipes of linear evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from byol_fast.schedules import learning_rate
from pipelines.spec import Semantics


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A recipe for the classifier; no weight decay and no warm-up in any of them."""

    name: str
    optimizer: Literal["sgd", "lars"]  # sgd: Nesterov; lars: mmpretrain's, lr inside the momentum
    epochs: int
    batch_size: int
    base_lr: float  # per 256 images: the peak is base_lr * batch_size / 256, then a cosine to 0
    momentum: float = 0.9
    semantics: Semantics = "deepmind"  # of the random crop
    by_epoch: bool = False  # the cosine falls after each epoch, not at every step
    cached: bool = False  # train on stored centre-crop features: fast, and no published protocol

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.base_lr <= 0:
            raise ValueError(
                f"epochs and batch_size must be at least 1 and base_lr above 0, got {self.epochs}, "
                f"{self.batch_size} and {self.base_lr}"
            )

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.batch_size / 256

    def learning_rate(self, step: int, total: int) -> float:
        """The rate of step `step` of `total`."""
        if self.by_epoch:
            step, total = step * self.epochs // total, self.epochs
        return learning_rate(step, peak=self.peak_lr, warmup_steps=0, total_steps=total)

    def arithmetic(self) -> str:
        """The recipe in one line, for the output."""
        unit = "epoch" if self.by_epoch else "step"
        return (
            f"{self.optimizer}, {self.epochs} epochs, lr {self.peak_lr:g} = "
            f"{self.base_lr:g} × {self.batch_size}/256, cosine per {unit}"
        )


# BYOL paper, appendix C.1: five rates (.4 .3 .2 .1 .05) are tried there on held-out training
# images; .2 is the rate of the authors' published code.
PAPER = Protocol(name="paper", optimizer="sgd", epochs=80, batch_size=1024, base_lr=0.2)
# mmpretrain's resnet50_8xb512-linear-coslr-90e_in1k: lr 1.6 at 8 x 512 images.
MMPRETRAIN = Protocol(
    name="mmpretrain",
    optimizer="lars",
    epochs=90,
    batch_size=4096,
    base_lr=0.1,
    semantics="torchvision",
    by_epoch=True,
)
QUICK = Protocol(name="quick", optimizer="sgd", epochs=20, batch_size=256, base_lr=0.1, cached=True)
