"""A linear classifier trained beside BYOL on its representation, without touching it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OnlineProbe:
    """Softmax regression on detached representations; unlabelled images (-1) are left out.

    Args:
        features: F, width of the representation.
        classes: number of labels.
        lr: of SGD with momentum 0.9, constant.
    """

    def __init__(
        self, features: int, classes: int, device: torch.device, *, lr: float = 0.1
    ) -> None:
        self.linear = nn.Linear(features, classes).to(device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self._optimizer = torch.optim.SGD(self.linear.parameters(), lr=lr, momentum=0.9)

    def update(
        self, representation: Tensor, labels: Tensor, finite: Tensor | None = None
    ) -> Tensor:
        """One step on `representation` [V*B, F] with `labels` [B]; returns the loss, a 0-d tensor.

        Where `finite`, a 0-d bool tensor, is False nothing is learned from it (the momentum of
        earlier steps goes on). Nothing is read back from the device.
        """
        views = len(representation) // len(labels)
        if finite is not None:
            representation = torch.where(finite, representation, 0.0)
            labels = torch.where(finite, labels, -1)
        with torch.enable_grad():
            logits = self.linear(representation.detach().float())
            loss = F.cross_entropy(logits, labels.repeat(views), ignore_index=-1)
            # A batch without one label has loss 0/0; it must not reach the weights.
            loss = torch.where((labels >= 0).any(), loss, torch.zeros_like(loss))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Top-1 share on `features` [n, F]."""
        predicted = self.linear(features.to(self.linear.weight.device)).argmax(1).cpu()
        return float((predicted == labels.cpu()).float().mean())

    def state_dict(self) -> dict[str, Any]:
        """Weights and momentum, for the checkpoint."""
        return {"linear": self.linear.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.linear.load_state_dict(state["linear"])
        self._optimizer.load_state_dict(state["optimizer"])
