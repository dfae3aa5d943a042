"""Out of memory, by whatever name torch, CUDA's libraries or Python report it."""

from __future__ import annotations

import gc

import torch

_WORDS = (
    "out of memory",  # CUDA's own error, also from a library or a graph
    "can't allocate memory",  # torch on a CPU
    "not enough memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, is a lack of the device's or host's memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def release(device: torch.device) -> None:
    """Give back what is held but not used, after an error that has been dealt with."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
