"""LARS and the moving average alone, in every implementation, taking turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import hardware
from benchmarks.hardware import percentiles
from benchmarks.stepping import StepSettings
from byol_fast.model import BYOL
from byol_fast.optim import LARS, param_groups


def measure(settings: StepSettings, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Milliseconds of an update and moving average of BYOL's parameters, by implementation."""
    calls: dict[str, Callable[[], None]] = {}
    result: dict[str, Any] = {}
    for impl in ("reference", "foreach", "fused", "apex"):
        try:
            if impl == "fused" and device.type != "cuda":
                raise ValueError("needs a GPU: interpreted, its time means nothing")
            calls[impl] = _update(settings, device, impl)
            calls[impl]()
        except (ImportError, ValueError, RuntimeError) as error:
            calls.pop(impl, None)
            result[impl] = {"text": f"left out: {error}"}
    rounds = max(3, steps // 10)
    seconds: dict[str, list[float]] = {impl: [] for impl in calls}
    for _ in range(rounds):  # A B C A B C
        for impl, call in calls.items():
            seconds[impl].append(float(np.median(hardware.step_seconds(call, device, 10))))
    for impl, some in seconds.items():
        spread = percentiles(1000 * np.array(some))
        launches, waits = hardware.launches_and_waits(calls[impl], device)
        text = "{1:.3f} ({0:.3f}-{2:.3f}) ms".format(*spread)
        if launches is not None:
            text += f", {launches} launches, {waits} waits of the host"
        result[impl] = {"ms": spread, "launches": launches, "host_waits": waits, "n": rounds}
        result[impl]["text"] = text
    return result


def _update(settings: StepSettings, device: torch.device, impl: str) -> Callable[[], None]:
    """The update of a whole model by one implementation, on gradients that stay."""
    model = BYOL(settings.backbone, image_size=settings.image_size).to(device)
    optimizer = LARS(param_groups(model.online, 1.5e-6), 0.1, impl=impl)  # type: ignore[arg-type]
    for p in model.online.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    pairs: tuple[list[Tensor], list[Tensor]] = (
        model.target_ema_params(),
        model.online_ema_params(),
    )
    return partial(optimizer.step_and_average, *pairs, 0.99)
