"""LARS and the moving average alone: every implementation of ours and other packages', in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import hardware, peer_updates
from benchmarks.hardware import percentiles
from benchmarks.stepping import StepSettings
from byol_fast.device_errors import raise_if_lost
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups

OURS = ("reference", "foreach", "fused", "apex")


def measure(
    settings: StepSettings,
    device: torch.device,
    *,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
    each: Callable[[dict[str, Any]], None] = lambda rows: None,  # sees them as they come
) -> dict[str, Any]:
    """Milliseconds of an update and moving average of BYOL's parameters, by implementation.

    Ratios are to ours as `auto` chooses it, within each round.
    """
    calls: dict[str, Callable[[], None]] = {}
    result: dict[str, Any] = {}
    for name in (*OURS, *peer_updates.PEERS):
        try:
            if name == "fused" and device.type != "cuda":
                raise ValueError("needs a GPU: interpreted, its time means nothing")
            calls[name] = _update(settings, device, name)
            calls[name]()
        except (ImportError, ValueError, RuntimeError) as error:
            raise_if_lost(device, error)
            calls.pop(name, None)
            result[name] = {"text": f"left out: {error}"}
    rounds, part = (max(3, steps // 10), 10) if device.type == "cuda" else (max(3, steps), 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # A B C A B C
        for name, call in calls.items():
            some = hardware.step_seconds(call, device, part, clock)
            seconds[name].append(float(np.median(some)))
    ours = "fused" if "fused" in calls else "foreach"
    for name in seconds:
        taken = np.array(seconds[name])
        spread = percentiles(1000 * taken)
        launches, waits = hardware.launches_and_waits(calls[name], device)
        ratio = taken / np.array(seconds[ours])
        text = "{1:.3f} ({0:.3f}-{2:.3f}) ms".format(*spread)
        if name != ours:
            text += f", {np.median(ratio):.2f}x of {ours}"
        if launches is not None:
            text += f", {launches} launches"
        result[name] = {
            "ms": spread,
            f"over_{ours}": percentiles(ratio),
            "launches": launches,
            "host_waits": waits,
            "n": rounds,
            "text": text if waits is None else f"{text}, {waits} waits of the host",
        }
        each(result)
    return result


def _update(settings: StepSettings, device: torch.device, name: str) -> Callable[[], None]:
    """The update of a whole model by one implementation, on gradients that stay."""
    torch.manual_seed(0)
    model = BYOL(settings.backbone, image_size=settings.image_size).to(device)
    for p in model.online.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    if name in peer_updates.PEERS:
        return peer_updates.PEERS[name](model)
    optimizer = LARS(param_groups(model.online, 1.5e-6), 0.1, impl=name)  # type: ignore[arg-type]
    pairs: tuple[list[Tensor], list[Tensor]] = (
        model.target_ema_params(),
        model.online_ema_params(),
    )
    return partial(optimizer.step_and_average, *pairs, 0.99)
