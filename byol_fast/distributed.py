"""One small API over one process or many: torchrun's environment in, a `World` out."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.nn.parallel import DistributedDataParallel

from pipelines.cores import limit_torch_threads, ranks_here, worker_threads

TIMEOUT = "BYOL_FAST_TIMEOUT"  # environment variable: seconds a rank may be waited for in a step
_SECONDS = 300.0  # unless it is set
PATIENCE = timedelta(hours=6)  # of waiting for rank 0 to index, verify or evaluate


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it works on."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo: agreement of the hosts, beside NCCL
    patient: dist.ProcessGroup | None = None  # gloo: for waiting while rank 0 works alone

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. Blocks the host, never the GPU."""
        if self.control is None:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(value) for value in values.tolist())

    def mean(self, values: Tensor) -> Tensor:
        """Element-wise mean over the ranks of a host tensor."""
        if self.control is None:
            return values
        dist.all_reduce(values, group=self.control)
        return values / self.size

    def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
        """Every rank's `value`, by rank, on every rank; `patient`: however long one takes."""
        group = self.patient if patient else self.control
        if group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here, however long one of them takes."""
        if self.patient is not None:
            dist.barrier(group=self.patient)

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank, however long rank 0 takes to have it."""
        if self.patient is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]


def timeout() -> timedelta:
    """How long a step waits for a rank that hangs.

    Raises:
        ValueError: the environment variable is not a number of seconds.
    """
    given = os.environ.get(TIMEOUT) or str(_SECONDS)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86_400:
        raise ValueError(f"{TIMEOUT} must be a number of seconds from 1 to 86400, got {given!r}")
    return timedelta(seconds=seconds)


def start(device: str = "auto") -> World:
    """Join the process group torchrun describes, or be the only process.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: a CUDA device was asked for and there is none, or fewer than local ranks;
            the environment holds no sensible `timeout`; the ranks cannot meet.
    """
    local_rank, patience = int(os.environ.get("LOCAL_RANK", "0")), timeout()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"device {device!r}: no CUDA device is visible; use --device cpu")
        if device == "cuda":
            if local_rank >= count:
                raise ValueError(
                    f"local rank {local_rank} has no GPU of its own ({count} visible): "
                    f"use torchrun --nproc_per_node={count}"
                )
            device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    limit_torch_threads()
    where = torch.device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(0, 1, where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=patience)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where_to = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        first = str(error).partition("\n")[0]
        mend = "set MASTER_PORT to a free port" if "EADDRINUSE" in first else "look there first"
        raise ValueError(f"the ranks cannot meet at {where_to}: {mend} ({first})") from error
    control, patient = (
        cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=each))
        for each in (patience, PATIENCE)
    )
    return World(dist.get_rank(), dist.get_world_size(), where, control, patient)


def statistics_group(word: str, world: World) -> bool | dist.ProcessGroup:
    """Whom a rank shares its BatchNorm statistics with: what `BYOL(bn_sync=…)` takes.

    Every rank has to call this. Nodes may have different numbers of ranks.

    Args:
        word: `none`, `group` (the ranks of a node) or `world`.

    Raises:
        ValueError: the node of a rank is not known, as torchrun has not started it.
    """
    if word == "none" or world.size == 1:
        return False
    if word == "world":
        return True
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "--model.bn-sync group: LOCAL_RANK is not set, so the ranks of a node are not known: "
            "start with torchrun, or use --model.bn-sync world"
        )
    # torchrun counts ranks node by node, so the first rank of a node names it.
    gathered = [torch.zeros((), dtype=torch.int64) for _ in range(world.size)]
    mine = torch.tensor(world.rank - int(os.environ["LOCAL_RANK"]))
    dist.all_gather(gathered, mine, group=world.control)
    nodes = [int(node) for node in gathered]
    own: bool | dist.ProcessGroup = False
    for first in sorted(set(nodes)):  # each rank makes every group, in one order
        ranks = [rank for rank, node in enumerate(nodes) if node == first]
        if len(ranks) == world.size:
            return True
        group = dist.new_group(ranks, timeout=timeout())
        if world.rank in ranks and len(ranks) > 1:
            own = cast(dist.ProcessGroup, group)
    return own


@contextmanager
def on_its_own(world: World, groups: Iterable[dist.ProcessGroup]) -> Iterator[None]:
    """A block in which compiled code reduces over `groups` on this rank alone, without a message.

    Compiled code finds a group by its name when it runs, so that for a while the name can stand for
    a group of one. A rank that fails in the block leaves no other rank waiting.
    """
    groups = list(groups)
    if not groups:
        yield
        return
    alone = dist.new_group([world.rank], use_local_synchronization=True)
    assert isinstance(alone, dist.ProcessGroup)
    try:
        for group in groups:
            _let_name_stand_for(group.group_name, alone)
        yield
    finally:
        for group in groups:
            _let_name_stand_for(group.group_name, group)
        dist.destroy_process_group(alone)


def _let_name_stand_for(name: str, group: dist.ProcessGroup) -> None:
    _unregister_process_group(name)
    _register_process_group(name, group)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def data_parallel(module: nn.Module, world: World) -> nn.Module:
    """`module` under DistributedDataParallel, or as it is in a world of one."""
    if world.size == 1:
        return module
    parameters = inspect.signature(DistributedDataParallel).parameters
    newer = "forward_sync_buffers" in parameters  # the same setting's name in newer torch
    buffers = "forward_sync_buffers" if newer else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}  # running statistics are rank 0's when saved
    return DistributedDataParallel(
        module,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # one copy of the gradients instead of two
        **options,
    )


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """A block in which gradients are accumulated locally, not reduced over the ranks."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()  # type: ignore[no-any-return]
    return nullcontext()


def share_compile_workers() -> None:
    """Give Inductor this rank's share of the cores: by itself it takes all of them, up to 32.

    What TORCHINDUCTOR_COMPILE_THREADS says stands.
    """
    from torch._inductor import config

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        config.compile_threads = min(32, worker_threads(ranks_here()))
