"""Learning rate and target decay as pure functions of the step (authors' `utils/schedules.py`).

`step` counts optimizer updates from 0: update number `step` uses the value of `step`.
"""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 to `peak` over `warmup_steps`, then a cosine to 0 at `total_steps`.

    After `total_steps` it stays 0. Raises ValueError for a negative step or an impossible length.
    """
    _check(step, total_steps)
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps={total_steps}], got {warmup_steps}"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return 0.0
    return peak * _cosine((step - warmup_steps) / (total_steps - warmup_steps))


def target_decay(step: int, *, base: float, total_steps: int) -> float:
    """The EMA's τ: from `base` at step 0 along a cosine to 1 at `total_steps`, then 1."""
    _check(step, total_steps)
    if not 0.0 <= base <= 1.0:
        raise ValueError(f"base decay must lie in [0, 1], got {base}")
    return 1.0 - (1.0 - base) * _cosine(min(step / total_steps, 1.0))


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _check(step: int, total_steps: int) -> None:
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
