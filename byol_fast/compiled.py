"""The networks through torch.compile, tried out before training depends on them.

Each network becomes one graph (`fullgraph=True`): BatchNorm, ReLU and the residual sums run in
common kernels, convolutions stay cuDNN's. A compiler that fails is said and costs nothing but the
fusion: the same code then runs as it stands. Compiled code sits inside DistributedDataParallel.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from byol_fast.device_errors import raise_if_lost
from byol_fast.distributed import World
from byol_fast.loss import pair_loss
from byol_fast.model import BYOL

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Networks:
    """What `train_step` calls: the model's own parts, or those parts compiled."""

    online: nn.Module
    target: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] = pair_loss
    compile_seconds: float | None = None  # None: they run as they stand


def as_they_stand(model: BYOL) -> Networks:
    """The model's parts, not compiled."""
    return Networks(model.online, model.target)


def compiled(
    model: BYOL,
    world: World,
    *,
    batch: int,  # images of a micro-batch on this rank
    image_size: int,
    dtype: torch.dtype,  # of the views
    autocast_dtype: torch.dtype | None,
    backend: str = "inductor",
    options: dict[str, str | int | bool] | None = None,  # of the backend
) -> Networks:
    """The networks compiled for views of one shape, or as they stand if any rank cannot.

    A forward and a backward on random views make the compiler work now, not in the first step.
    They leave nothing behind: running statistics are put back, gradients dropped.
    """
    _share_cores()
    compile_ = partial(
        torch.compile, fullgraph=True, dynamic=False, backend=backend, options=options
    )
    online = cast(nn.Module, compile_(model.online))
    networks = Networks(online, compile_(model.target), compile_(pair_loss))
    views = torch.randn(2 * batch, image_size, image_size, 3, device=world.device)
    started, reason = time.perf_counter(), ""
    try:
        _try_out(model, networks, views.to(dtype).permute(0, 3, 1, 2), autocast_dtype)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    except Exception as error:  # whatever a compiler, or what it calls, may raise
        raise_if_lost(world.device, error)
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        end = 2 if said and said[0].endswith(":") else 1  # "backend='inductor' raised:", and what
        reason = f"{type(error).__name__}: {' '.join(said[:end])}"
    seconds = time.perf_counter() - started
    (failed,) = world.any(bool(reason))
    if failed:
        log.warning(
            "torch.compile failed%s: training goes on without it, more slowly (--run.engine eager "
            "chooses that)",
            f" ({reason})" if reason else " on another rank",
        )
        return as_they_stand(model)
    log.info("networks compiled in %.0f s", seconds)
    return Networks(networks.online, networks.target, networks.loss, seconds)


def _share_cores() -> None:
    """Inductor starts as many workers as there are cores, up to 32, on every rank of a node."""
    from torch._inductor import config

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.compile_threads = min(32, max(1, len(os.sched_getaffinity(0)) // ranks_here))


def _try_out(
    model: BYOL, networks: Networks, views: Tensor, autocast_dtype: torch.dtype | None
) -> None:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.autocast(views.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            with torch.no_grad():
                target = networks.target(views)
            prediction, _, _ = networks.online(views)
        networks.loss(prediction, target).backward()
        first = next((p.grad for p in model.online.parameters() if p.requires_grad), None)
        if first is not None and not first.any():  # as one version of torch has compiled it
            raise RuntimeError("the compiled backward leaves the first layer without a gradient")
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for parameter in model.parameters():
            parameter.grad = None
