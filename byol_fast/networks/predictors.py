"""Predictors that take no gradient: DirectPred, and a ridge regression in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class DirectPred(nn.Module):
    """A linear predictor set from the correlation of its inputs, [N, D] to [N, D].

    Source: Tian, Chen and Ganguli 2021 (arXiv 2102.06810), equations 18 and 19, and the settings of
    their published command: ρ = .3, ε = .01, set after every optimizer step. With z the online
    projections of both views, neither centred nor normalised:

        F = .3·F + .7·E[z zᵀ]            at first F = E[z zᵀ]
        F = Q diag(s) Qᵀ
        W = Q diag(√(s / max s) + .01) Qᵀ

    In training mode a forward pass adds to the moment; `update()` makes F and W of all that came
    since the last one, over all ranks. So micro-batches count as one batch. F and W are buffers:
    they take no gradient, and checkpoints hold them. W is the identity until the first update.
    `.half()` and the like convert W alone: moments and eigenvalues stay fp32.
    """

    weight: Tensor
    correlation: Tensor
    moment: Tensor
    rows: Tensor
    updates: Tensor

    def __init__(self, dim: int, *, keep: float = 0.3, boost: float = 0.01) -> None:
        super().__init__()
        self.keep, self.boost = keep, boost
        self.register_buffer("weight", torch.eye(dim))
        self.register_buffer("correlation", torch.zeros(dim, dim))
        self.register_buffer("moment", torch.zeros(dim, dim))  # sum of z zᵀ since the last update
        self.register_buffer("rows", torch.zeros(()))
        self.register_buffer("updates", torch.zeros(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DirectPred:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("correlation", "moment", "rows", "updates"):
            buffer = self._buffers[name]
            assert buffer is not None
            if torch.finfo(buffer.dtype).bits < 32:
                self._buffers[name] = buffer.float()
        return self

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
                seen = z.detach().to(self.moment.dtype)
                self.moment += seen.T @ seen
                self.rows += len(seen)
        return F.linear(z, self.weight)

    @torch.no_grad()
    def update(self) -> None:
        """F and W from the projections since the last update; nothing on values not finite.

        Every rank of the default process group must call it. On a GPU the eigenvalues make the host
        wait.
        """
        moment, rows = _reduced(self.moment, self.rows)
        mean = moment / rows.clamp_min(1)
        mixed = self.keep * self.correlation + (1 - self.keep) * mean
        new = torch.where(self.updates > 0, mixed, mean)
        good = (rows > 0) & new.isfinite().all()
        self.correlation.copy_(torch.where(good, new, self.correlation))
        values, vectors = torch.linalg.eigh(self.correlation)
        tiny = torch.finfo(values.dtype).tiny
        values = (values.clamp_min(0) / values.max().clamp_min(tiny)).sqrt() + self.boost
        new = (vectors * values) @ vectors.T
        self.weight.copy_(torch.where(good, new, self.weight.to(new.dtype)))
        self.updates += good
        self.moment.zero_()
        self.rows.zero_()


@torch.no_grad()
def closed_form(
    z: Tensor,  # [N, D]
    t: Tensor,  # [N, E]
    *,
    ridge: float = 1e-3,
) -> Tensor:  # [D, E]
    """The linear predictor W with the least ‖zW − t‖² + λ‖W‖²: (zᵀz + λI)⁻¹zᵀt.

    λ is `ridge` times the mean eigenvalue of zᵀz, so that neither the batch's size nor the scale of
    z matters. The moments zᵀz and zᵀt are summed over the ranks of the default process group: every
    rank gets the predictor of the whole batch. In fp32, or fp64 for fp64 input. W takes no
    gradient: it is the best predictor for the projections as they are, and what is trained is z.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}: a small batch has no other solution")
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.promote_types(z.dtype, torch.float32)
        z, t = z.to(dtype), t.to(dtype)
        gram, cross = _reduced(z.T @ z, z.T @ t)
        penalty = ridge * gram.diagonal().mean()
        tiny = torch.finfo(dtype).tiny  # all projections 0: W is 0
        gram.diagonal().add_(penalty.clamp_min(tiny))
        weight: Tensor = torch.linalg.solve(gram, cross)
        return weight


def _reduced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the ranks in one message; what was given, where there is one rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return first, second
    both = torch.cat([first.flatten(), second.flatten()])
    dist.all_reduce(both)
    ours = both[: first.numel()].view_as(first)
    return ours, both[first.numel() :].view_as(second)
