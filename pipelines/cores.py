"""Processor cores that this process may use, which every default number of threads comes from."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> float:
    """Cores this process may use: its affinity, or the quota of its control group if that is less.

    Args:
        root: where `proc` and `sys` are.
    """
    return min([float(len(os.sched_getaffinity(0))), *_quotas(root)])


def worker_threads(ranks: int = 1) -> int:
    """Threads that keep the usable cores busy, each of `ranks` processes its share; at least 1."""
    return max(1, int(usable_cores() / ranks))


def ranks_here() -> int:
    """Processes of this run on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def limit_torch_threads() -> None:
    """No more of torch's own threads than this rank has cores: it knows nothing of a quota, and
    threads that wait for each other at one core's pace lose the rest.

    What OMP_NUM_THREADS says stands.
    """
    import torch

    most = worker_threads(ranks_here())
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > most:
        torch.set_num_threads(most)


def _quotas(root: Path) -> list[float]:
    """Cores that each control group above this process grants, version 2 or 1."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for name in ("cpu", controllers) if controllers else ("",):  # of version 1, one links there
            top = root / "sys/fs/cgroup" / name
            here = top / path.lstrip("/")
            for folder in (here, *here.parents):  # a limit above holds as well
                if not folder.is_relative_to(top):
                    break
                found.append(_quota(folder))
    return [quota for quota in found if quota > 0]


def _quota(folder: Path) -> float:
    """Cores, or 0 where there is no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return 0.0 if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return 0.0
