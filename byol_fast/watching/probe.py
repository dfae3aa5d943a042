"""A linear classifier trained beside BYOL on its representation, without touching it."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Of the mean variance: what a feature that hardly varies is divided by at least. Relative, so that
# features of any scale are treated alike.
EPS = 1e-3


class OnlineProbe:
    """Softmax regression on detached, standardised representations; labels of -1 are left out.

    Each feature is centred and scaled by its mean and variance over the batch, in `accuracy` by
    their running means, as by a BatchNorm without affine: a network's features have any scale, and
    it changes while they are learned. With F such features the loss's curvature is at most F/2, so
    SGD with momentum 0.9 is stable below a rate of 7.6/F.

    Args:
        features: F, width of the representation.
        classes: number of labels.
        lr: of SGD with momentum 0.9, constant; 4/F where it is None.
    """

    def __init__(
        self, features: int, classes: int, device: torch.device, *, lr: float | None = None
    ) -> None:
        self.linear = nn.Linear(features, classes).to(device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean = torch.zeros(features, device=device)
        self.var = torch.ones(features, device=device)
        self.batches = torch.zeros((), device=device)  # that the running means are of
        rate = 4 / features if lr is None else lr
        self._optimizer = torch.optim.SGD(self.linear.parameters(), lr=rate, momentum=0.9)

    def update(
        self, representation: Tensor, labels: Tensor, finite: Tensor | None = None
    ) -> Tensor:
        """One step on `representation` [V*B, F] with `labels` [B]; returns the loss, a 0-d tensor.

        Where `finite`, a 0-d bool tensor, is False nothing is learned from it (the momentum of
        earlier steps goes on). Nothing is read back from the device.
        """
        views = len(representation) // len(labels)
        rows = representation.detach().float()
        if finite is not None:
            rows = torch.where(finite, rows, 0.0)
            labels = torch.where(finite, labels, -1)
        labels = labels.repeat(views)
        labelled = labels >= 0
        mean, var = self._statistics(rows, labelled)
        with torch.enable_grad():
            logits = self.linear(_standardised(rows, mean, var))
            loss = F.cross_entropy(logits, labels, ignore_index=-1)
            # A batch without one label has loss 0/0; it must not reach the weights.
            loss = torch.where(labelled.any(), loss, torch.zeros_like(loss))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _statistics(self, rows: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [F] of the labelled rows, which the running ones take in."""
        weight = labelled.float()[:, None] / labelled.sum().clamp_min(1)
        mean = (rows * weight).sum(0)
        var = ((rows - mean).square() * weight).sum(0)
        some = labelled.any().float()
        self.batches += some
        share = some / self.batches.clamp(1, 10)  # the mean of the first ten, then momentum 0.1
        self.mean.lerp_(mean, share)
        self.var.lerp_(var, share)
        return mean, var

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Top-1 share on `features` [n, F]."""
        rows = features.to(self.linear.weight.device).float()
        predicted = self.linear(_standardised(rows, self.mean, self.var)).argmax(1).cpu()
        return float((predicted == labels.cpu()).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and running means, for the checkpoint."""
        running = {"mean": self.mean, "var": self.var, "batches": self.batches}
        return {
            "linear": self.linear.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "running": running,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        if "running" not in state:  # weights for features that were not standardised
            log.warning("the checkpoint's probe is of an earlier version: it begins anew")
            return
        self.linear.load_state_dict(state["linear"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, value in state["running"].items():
            getattr(self, name).copy_(value)


def _standardised(rows: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    least = (EPS * var.mean()).clamp_min(torch.finfo(var.dtype).tiny)
    return (rows - mean) * (var + least).rsqrt()
