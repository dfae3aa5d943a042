"""One LARS step of a parameter group, in place: the definition, and as multi-tensor calls.

`optim.LARS` says what a step is. The single pass on a GPU is in `fused_update.py`, apex's kernels
are in `apex_update.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Norm = Literal["update", "sum"]
# Parameters, gradients, momentum, the group's options, norm, lr_in_momentum.
Update = Callable[[list[Tensor], list[Tensor], list[Tensor], dict[str, Any], Norm, bool], None]
_Tensors = list[Tensor] | tuple[Tensor, ...]


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    group: dict[str, Any],
    norm: Norm,
    lr_in_momentum: bool,
) -> None:
    """The definition, tensor by tensor; reads norms back from the device."""
    wd, lr = group["weight_decay"], group["lr"]
    for p, g, m in zip(params, grads, buffers, strict=True):
        u = g + wd * p
        if group["adapt"]:
            size = p.norm()
            over = u.norm() if norm == "update" else g.norm()
            if size > 0 and over > 0:
                if norm == "sum":
                    over = over + wd * size + 1e-8
                u = u * (group["eta"] * size / over)
        m.mul_(group["momentum"]).add_(lr * u if lr_in_momentum else u)
        p.sub_(m if lr_in_momentum else lr * m)


def foreach(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    group: dict[str, Any],
    norm: Norm,
    lr_in_momentum: bool,
) -> None:
    """A fixed number of multi-tensor calls; nothing is read back."""
    wd, lr = group["weight_decay"], group["lr"]
    u: _Tensors = torch._foreach_add(grads, params, alpha=wd) if wd else grads
    torch._foreach_mul_(buffers, group["momentum"])
    if group["adapt"]:
        ratio = _trust_ratios(params, grads, u, group["eta"], wd, norm)  # [tensors]
        if lr_in_momentum:
            ratio = ratio * lr
        # Ratio and sum in one pass: the scaled update is never written.
        torch._foreach_addcmul_(buffers, u, ratio.unbind())
    elif not lr_in_momentum:
        torch._foreach_add_(buffers, u)
    elif isinstance(lr, Tensor):
        torch._foreach_add_(buffers, torch._foreach_mul(u, lr))
    else:
        torch._foreach_add_(buffers, u, alpha=lr)
    if lr_in_momentum:
        torch._foreach_sub_(params, buffers)
    elif isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(buffers, lr))
    else:
        torch._foreach_add_(params, buffers, alpha=-lr)


def _trust_ratios(
    params: list[Tensor],
    grads: list[Tensor],
    u: _Tensors,
    eta: float,
    wd: float,
    norm: Norm,
) -> Tensor:
    """[tensors] eta·‖p‖/‖u‖, 1 where a norm is 0: branch-free, so nothing waits for the device."""
    size = torch.stack(torch._foreach_norm(params))
    over = torch.stack(torch._foreach_norm(u if norm == "update" else grads))
    live = (size > 0) & (over > 0)
    if norm == "sum":
        over = over + wd * size + 1e-8
    return torch.where(live, eta * size / over, 1.0)
