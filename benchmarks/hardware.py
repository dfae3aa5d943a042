"""What this device can do at most, measured: a matrix product, and a copy in memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.host_reads import HostReads


def percentiles(values: np.ndarray) -> list[float]:
    """p20, p50, p80."""
    return [float(f"{v:.4g}") for v in np.percentile(values, [20, 50, 80])]


def wait(device: torch.device) -> None:
    """Blocks until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 7) -> float:
    """The shortest of several runs: a limit, not an average."""
    call()
    seconds = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, device)


def copy_bytes(device: torch.device) -> float:
    """Bytes/s of a copy within the device's memory, read and written bytes together."""
    count = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    return 2 * count / best_seconds(lambda: target.copy_(source), device)


def step_seconds(
    call: Callable[[], object],
    device: torch.device,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,  # without a GPU
) -> np.ndarray:
    """`[steps]` seconds of calls in a row, without waiting for the device between them."""
    if device.type != "cuda":
        marks = [clock()]
        for _ in range(steps):
            call()
            marks.append(clock())
        return np.diff(marks)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    wait(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    wait(device)
    pairs = itertools.pairwise(events)
    return np.array([before.elapsed_time(after) / 1000 for before, after in pairs])


def host_share(call: Callable[[], object], device: torch.device) -> float | None:
    """How much of one step the host is busy handing out work; near 1 it is what limits the step."""
    if device.type != "cuda":
        return None
    shares = []
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        call()
        handed_out = time.perf_counter()
        wait(device)
        shares.append((handed_out - started) / (time.perf_counter() - started))
    return float(np.median(shares))


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def launches_and_waits(
    call: Callable[[], object], device: torch.device
) -> tuple[int | None, int | None]:
    """Kernel launches of a step, and how often the host waits for the GPU in it.

    Without a GPU: None, and how often it would wait. None for both where the profiler has seen no
    launch: it has no access to the counters, which says nothing about the step.
    """
    if device.type != "cuda":
        with HostReads() as seen:
            call()
        return None, len(seen.reads)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    steps = 3
    wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            call()
    names = [event.name for event in profile.events()]
    launches = sum(name.startswith(_LAUNCHES) for name in names)
    if not launches:
        return None, None
    waits = sum(name.startswith(_WAITS) for name in names) - 1  # the profiler's own, at its end
    return round(launches / steps), max(0, round(waits / steps))
