"""The optimizers and moving averages of other packages, on our model's parameters and gradients.

lightly's are called as installed. solo-learn is not on PyPI, so its way is written out here as its
`solo/utils/lars.py` and `solo/utils/momentum.py` do it: a Python loop over parameters, with the
optional limit on the rate (its CIFAR recipes use it), and a new tensor for each averaged parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byol_fast.model import BYOL
from byol_fast.optim import param_groups

_MOMENTUM, _ETA, _DECAY = 0.9, 1e-3, 0.99


def lightly(model: BYOL) -> Callable[[], None]:
    """lightly's LARS and `update_momentum`. Raises ImportError."""
    from lightly.models.utils import update_momentum
    from lightly.utils.lars import LARS

    groups = [
        {key: group[key] for key in ("params", "weight_decay")}
        for group in param_groups(model.online, 1.5e-6)
    ]
    optimizer = LARS(groups, lr=0.1, momentum=_MOMENTUM)
    encoder, target = model.online.encoder, model.target

    def update() -> None:
        optimizer.step()
        update_momentum(encoder, target, m=_DECAY)

    return update


def solo_learn(model: BYOL) -> Callable[[], None]:
    """The loops of solo-learn, with its limit on the rate."""
    groups = param_groups(model.online, 1.5e-6)
    buffers: dict[Tensor, Tensor] = {}
    target, online = model.target_ema_params(), model.online_ema_params()

    @torch.no_grad()
    def update() -> None:
        for group in groups:
            for p in group["params"]:
                _lars(p, group["weight_decay"], buffers, lr=0.1)
        for follower, leader in zip(target, online, strict=True):
            follower.data = _DECAY * follower.data + (1 - _DECAY) * leader.data

    return update


def _lars(p: Tensor, weight_decay: float, buffers: dict[Tensor, Tensor], *, lr: float) -> None:
    gradient: Any = p.grad
    size, over = p.data.norm(), gradient.norm()  # of biases and norms too, unused there
    if p.ndim != 1 and size != 0 and over != 0:  # two waits for the device
        rate: Any = _ETA * size / (over + weight_decay * size + 1e-8)
        rate = min(rate / lr, 1)  # and a third
        gradient = gradient.add(p, alpha=weight_decay) * rate
    if p not in buffers:
        buffers[p] = gradient.clone()
    else:
        buffers[p].mul_(_MOMENTUM).add_(gradient)
    p.add_(buffers[p], alpha=-lr)


PEERS = {"lightly": lightly, "solo-learn's loops": solo_learn}
