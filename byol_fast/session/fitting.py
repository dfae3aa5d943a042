"""What to change where a step does not fit into memory: found by trying smaller micro-batches."""

from __future__ import annotations

import torch

from byol_fast import norm
from byol_fast.compiled import as_they_stand, try_out
from byol_fast.distributed import World
from byol_fast.memory import is_out_of_memory, release
from byol_fast.model import BYOL
from byol_fast.session.split import Split


def advice(
    model: BYOL,
    world: World,
    split: Split,
    *,
    image_size: int,
    dtype: torch.dtype,  # of the views
    autocast_dtype: torch.dtype | None,
) -> str:
    """The setting with which a forward and a backward of the networks fit, in words.

    For a run that ends: `model` shares no statistics any more afterwards. It sends no message, as
    other ranks may be waiting in a step.
    """
    norm.set_sync(model, False)
    each = split.micro_batch * split.accumulate
    for accumulate in range(split.accumulate + 1, each // 2 + 1):  # one image has no statistics
        micro_batch = each // accumulate
        if each % accumulate:
            continue
        if not _fits(model, world, micro_batch, image_size, dtype, autocast_dtype):
            continue
        text = (
            f"A forward and a backward of {micro_batch} images fit: use --input.accumulate "
            f"{accumulate}"
        )
        if any(isinstance(layer, norm.ViewBatchNorm) for layer in model.modules()):
            before, after = split.bn_batch, split.bn_batch * split.accumulate // accumulate
            text += f" (BatchNorm's statistics are then over {after} images instead of {before})"
        return text + ", or a smaller --batch-size"
    return (
        "Fewer images at a time do not fit either: use a smaller --image-size or --backbone, or "
        "end what else uses this memory"
    )


def _fits(
    model: BYOL,
    world: World,
    images: int,
    image_size: int,
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
) -> bool:
    release(world.device)
    try:
        try_out(model, as_they_stand(model), images, image_size, dtype, autocast_dtype)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise
    return True
