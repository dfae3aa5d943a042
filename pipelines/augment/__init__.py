"""Photometry on the device: from uint8 crops and a colour table to normalised views.

`reference` is plain torch: the meaning of the method, the oracle of every faster path, and what
runs on a CPU. `fused` is the same in four Triton kernels; `choose` takes it on a GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipelines.augment import reference
from pipelines.spec import AugmentSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Crops uint8 [V,B,S,S,3] and colours float32 [B,V,len(Colour)] to views [V,B,3,S,S].
Augment = Callable[[Tensor, Tensor], Tensor]

log = logging.getLogger(__name__)


def choose(spec: AugmentSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> Augment:
    """The augmentation of a run, bound to its specification and the views' dtype.

    The reference on a CPU. On a GPU the fused kernels, after they have been compiled for this
    `spec` and compared with the reference; where Triton is missing, or they fail or differ, the
    reference, and a warning says why. Which one it is on a GPU is logged.

    Raises:
        ValueError: a dtype that is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is float32, bfloat16 or float16, got {dtype}")
    plain = partial(reference.apply, spec=spec, dtype=dtype)
    if device.type != "cuda":
        return plain
    started = time.perf_counter()
    try:
        from pipelines.augment import fused

        apart = fused.self_check(spec, device, dtype)
    except ImportError as error:
        log.warning("views are augmented by plain torch: no Triton (%s); pip install triton", error)
        return plain
    # Compiler, launcher and driver each raise their own kinds: whichever it is, plain torch works.
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(device)  # raises where the context is lost, for plain torch too
        log.warning(
            "views are augmented by plain torch: the Triton kernels failed their first run here "
            "(%s: %s)",
            type(error).__name__,
            error,
        )
        return plain
    log.info(
        "views are augmented by Triton kernels, built and checked in %.1f s: %.0e from plain torch",
        time.perf_counter() - started,
        apart,
    )
    return partial(fused.apply, spec=spec, dtype=dtype)
