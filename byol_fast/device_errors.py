"""Errors after which a GPU does nothing more for this process, and what came first of a chain."""

from __future__ import annotations

import torch


def raise_if_lost(device: torch.device, error: BaseException) -> None:
    """For whoever catches `error` to go on without what failed.

    An illegal access or a failed device assertion stays: every later call on the device raises it
    again, far from where it happened. Waits for the device.

    Raises:
        RuntimeError: that is so here; from `error`.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise RuntimeError(
            f"{device} is lost to this process ({first_line(lost)}) after: {first_line(error)}. "
            "Start the command again; with CUDA_LAUNCH_BLOCKING=1 the failing call is named"
        ) from error


def root_cause(error: BaseException) -> BaseException:
    """What was raised first, where ending a context raised something more."""
    seen = {id(error)}
    while (before := error.__cause__ or error.__context__) is not None and id(before) not in seen:
        seen.add(id(before))
        error = before
    return error


def first_line(error: BaseException) -> str:
    """Type and first line of an error: CUDA's have many."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
