"""What a process and its children use: processor time, memory, GPU memory."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds in a unit of /proc/*/stat


def processor_seconds() -> float:
    """User and system time of this process, all its threads, and its living children."""
    return time.process_time() + sum(_child_seconds(pid) for pid in _children())


def host_mb() -> float:
    """The most memory this process has held, and what its living children hold for themselves.

    Not `ru_maxrss`: Linux hands the parent's on to a new process.
    """
    peak = _field("/proc/self/status", "VmHWM:")
    private = sum(
        _field(f"/proc/{pid}/smaps_rollup", name)
        for pid in _children()
        for name in ("Private_Clean:", "Private_Dirty:")
    )
    return (peak + private) / 1024


def gpu_mb(device: torch.device) -> float:
    """Memory in use on the GPU by all processes together; 0 on a CPU.

    Taken from the driver, as DALI's and nvJPEG's memory is not torch's.
    """
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**20


def _children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _child_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK
    return 0.0


def _field(path: str, name: str) -> float:
    """A value in kB out of one of the system's tables; 0 where there is none."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return float(line.split()[1])
    return 0.0
