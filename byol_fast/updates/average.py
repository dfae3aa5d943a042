"""The target's moving average, as multi-tensor calls."""

from __future__ import annotations

import torch
from torch import Tensor

from byol_fast.updates.layouts import by_kind, overlapping


@torch.no_grad()
def ema_(
    target: list[Tensor],
    online: list[Tensor],
    decay: float | Tensor,
    *,
    finite: Tensor | None = None,
) -> None:
    """target = decay·target + (1 − decay)·online, in place, as multi-tensor calls.

    Give parameters, not buffers, and keep the target fp32 (`online` may be of another dtype): at
    decay .996 and above a bf16 average stands still. `decay` may be a 0-d tensor on the parameters'
    device; nothing is read back from it. Where `finite`, a 0-d bool tensor, is False the target
    stays (`online` must be finite all the same). Empty lists are fine: SimSiam has no target.
    """
    if not target or (finite is not None and not finite.is_cuda and not bool(finite)):
        return
    share = 1.0 - decay
    if finite is not None and finite.is_cuda:
        share = torch.where(finite, share, 0.0)
    pairs = list(zip(target, online, strict=True))
    alone = overlapping(target)  # each reads what the one before wrote
    together = [pair for index, pair in enumerate(pairs) if index not in alone]
    for some in by_kind([t for t, _ in together]):
        _lerp([together[index] for index in some], share)
    for index in sorted(alone):
        _lerp([pairs[index]], share)


def _lerp(pairs: list[tuple[Tensor, Tensor]], share: float | Tensor) -> None:
    """Targets of one kind, each with its online tensor."""
    target = [t for t, _ in pairs]
    online = [o.to(t.dtype) for t, o in pairs]
    if not isinstance(share, Tensor):
        torch._foreach_lerp_(target, online, share)
        return
    # _foreach_lerp_ takes host scalars only, so the same lerp in three calls.
    step = torch._foreach_sub(online, target)
    torch._foreach_mul_(step, share.to(target[0].dtype))
    torch._foreach_add_(target, step)
