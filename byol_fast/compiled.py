"""The networks through torch.compile, tried out before training depends on them.

Each network becomes one graph (`fullgraph=True`): BatchNorm, ReLU and the residual sums run in
common kernels, convolutions stay cuDNN's. A compiler that fails is said and costs nothing but the
fusion: the same code then runs as it stands. Compiled code sits inside DistributedDataParallel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from byol_fast.device_errors import raise_if_lost
from byol_fast.distributed import World, on_its_own, share_compile_workers
from byol_fast.errors import OutOfMemory
from byol_fast.loss import pair_loss
from byol_fast.memory import is_out_of_memory
from byol_fast.model import BYOL
from byol_fast.norm import ViewBatchNorm

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
    """The networks compiled for views of one shape, or not compiled on any rank if one cannot.

    A forward and a backward on random views make the compiler work now, not in the first step.
    They leave nothing behind: running statistics are put back, gradients dropped. No rank waits for
    another one before all of them have finished or failed.

    Raises:
        OutOfMemory: on every rank, if one had too little memory.
    """
    share_compile_workers()
    compile_ = partial(
        torch.compile, fullgraph=True, dynamic=False, backend=backend, options=options
    )
    online = cast(nn.Module, compile_(model.online))
    networks = Networks(online, compile_(model.target), compile_(pair_loss))
    started = time.perf_counter()
    try:
        # On its own: a rank whose compiler fails must not leave the others in a collective.
        with on_its_own(world, _groups(model)):
            try_out(model, networks, batch, image_size, dtype, autocast_dtype)
        failed = None
    except Exception as error:  # whatever a compiler, or what it calls, may raise
        raise_if_lost(world.device, error)
        failed = Failed(_reason(error), is_out_of_memory(error))
    seconds = time.perf_counter() - started
    failures = world.gather(failed, patient=True)  # compilers take minutes, not equally many
    if (rank := next((r for r, f in enumerate(failures) if f and f.memory), None)) is not None:
        raise OutOfMemory(f"rank {rank}: {failures[rank].reason}")
    if (rank := next((r for r, f in enumerate(failures) if f), None)) is not None:
        where = f" on rank {rank}" if world.size > 1 else ""
        log.warning(
            "torch.compile failed%s (%s): training goes on without it on every rank, more slowly "
            "(--run.engine eager chooses that)",
            where,
            failures[rank].reason,
        )
        return as_they_stand(model)
    log.info("networks compiled in %.0f s", seconds)
    return Networks(networks.online, networks.target, networks.loss, seconds)


@dataclass(frozen=True)
class Failed:
    """What a rank met in the trial."""

    reason: str
    memory: bool  # whether it was out of memory, which the eager mode needs more of


def _reason(error: Exception) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = 2 if said and said[0].endswith(":") else 1  # "backend='inductor' raised:", and what
    return f"{type(error).__name__}: {' '.join(said[:end])}"


def _groups(model: BYOL) -> list[dist.ProcessGroup]:
    """Those that BatchNorm's statistics are shared over."""
    syncs = {layer.sync for layer in model.modules() if isinstance(layer, ViewBatchNorm)}
    if not dist.is_initialized():
        return []
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    return [world if sync is True else sync for sync in syncs if sync is not False]


def try_out(
    model: BYOL,
    networks: Networks,
    images: int,
    image_size: int,
    dtype: torch.dtype,  # of the views
    autocast_dtype: torch.dtype | None,
) -> None:
    """A forward and a backward of random views that leave nothing behind."""
    device = next(model.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    views = torch.randn(2 * images, image_size, image_size, 3, device=device).to(dtype)
    views = views.permute(0, 3, 1, 2)
    try:
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            with torch.no_grad():
                target = networks.target(views)
            prediction, _, _ = networks.online(views)
        trained = [p for p in model.online.parameters() if p.requires_grad]
        loss = networks.loss(prediction, target)
        # Not backward(): that would wake DistributedDataParallel, where the model is in one.
        first = next(iter(torch.autograd.grad(loss, trained, allow_unused=True)), None)
        if first is not None and not first.any():  # as one version of torch has compiled it
            raise RuntimeError("the compiled backward leaves the first layer without a gradient")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
