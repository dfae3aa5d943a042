"""The method on one screen: one BYOL update. Source: BYOL paper, section 3 and algorithm 1."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from byol_fast.compiled import Networks
from byol_fast.distributed import without_sync
from byol_fast.guard import Guard
from byol_fast.model import BYOL
from byol_fast.optim import LARS, ema_

# What a precision computes in; fp32 and tf32 are not among them.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepOutput(NamedTuple):
    """What a step leaves for the monitor; all on the device, nothing waited for."""

    loss: Tensor  # [] mean over the rank's images, both directions summed (0 to 8)
    projection: Tensor  # [2B, D] of the last micro-batch, view 1 then view 2, detached
    representation: Tensor  # [2B, F] of the last micro-batch, detached
    gradient_norm: Tensor | None = None  # [] of all gradients; with a guard


def train_step(
    model: BYOL,
    networks: Networks,  # online under DDP where there are several ranks
    optimizer: LARS,
    batches: Iterable[Tensor],  # `accumulate` of x [2, B, 3, S, S], each view channels_last
    *,
    accumulate: int,
    decay: Tensor | float,  # τ of this step
    autocast_dtype: torch.dtype | None = None,  # None: fp32 or tf32
    scaler: torch.amp.GradScaler | None = None,
    guard: Guard | None = None,
) -> StepOutput:
    """Target, online, backward, LARS, EMA; one EMA per optimizer step however many micro-batches.

    The learning rate is read from the optimizer's groups. With `guard` a step whose loss or
    gradient is not finite on any rank changes nothing. With `scaler` (fp16) the update is skipped
    when a gradient overflows, as GradScaler does.
    """
    scale = scaler.scale if scaler is not None else _identity
    optimizer.zero_grad(set_to_none=True)
    if guard is not None:
        guard.begin()
    total = torch.zeros((), device=next(model.parameters()).device)
    for number, x in enumerate(batches, start=1):
        views = x.flatten(0, 1)  # [2B, 3, S, S]: both views in one pass, BatchNorm keeps them apart
        with nullcontext() if number == accumulate else without_sync(networks.online):
            with _autocast(views.device.type, autocast_dtype):
                with torch.no_grad():
                    target = networks.target(views)
                prediction, projection, representation = networks.online(views)
            loss = networks.loss(prediction, target)
            scale(loss / accumulate).backward(None if guard is None else guard.seed(loss))
        total += loss.detach() / accumulate
    # Without fp16's scale as it was in this step: the update below may change it.
    norm = None if guard is None else guard.gradient_norm() / scale(torch.ones_like(total))
    finite = None if norm is None else norm.isfinite()
    # EMA after LARS, with the updated online weights, as the authors do.
    pairs = model.target_ema_params(), model.online_ema_params()
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
        ema_(*pairs, decay, finite=finite)
    else:
        optimizer.step_and_average(*pairs, decay, finite=finite)
    model.update_predictor()  # DirectPred sets its weights now; nothing to do for an MLP
    if guard is not None and finite is not None:
        guard.end(finite)
    return StepOutput(total, projection, representation, norm)


def _autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def _identity(loss: Tensor) -> Tensor:
    return loss
