"""Random views of images that are tensors already: the plan's draws, for use without a pipeline.

`pipelines.build` decodes and crops files, faster, and repeats its views bit by bit. What is here is
for a training loop that has batches of images in memory.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.augment import reference
from pipelines.plan import EpochPlan
from pipelines.spec import AugmentSpec


class RandomView(nn.Module):
    """One of a specification's two views: crop and resize, flip, jitter, grey, blur, solarize.

    Each call draws anew for every image, from torch's default generator: `torch.manual_seed`
    repeats the views. Works on the images' device; the draws are made on the host. Nothing here is
    differentiable.

    spec: sizes, probabilities and the meaning of the operations ("deepmind" or "torchvision").
    view: 0 or 1, which of `spec.views`.
    """

    def __init__(self, spec: AugmentSpec, view: int) -> None:
        super().__init__()
        self.spec = replace(spec, views=(spec.views[view],) * 2)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] or [3, H, W]
        """Views [N, 3, S, S] or [3, S, S], float32, normalised by the specification.

        Images are uint8, or floats in [0, 1]; floats are rounded to 1/255, as a decoder gives them.
        """
        batch = as_bytes(images)
        seed = int(torch.randint(2**62, ()))
        plan = EpochPlan(self.spec, seed, 0, [batch.shape[2:]] * len(batch))
        ids = np.arange(len(batch))
        size = self.spec.image_size
        crops = torch.empty(1, len(batch), size, size, 3, dtype=torch.uint8, device=batch.device)
        for item, window in enumerate(plan.windows(ids)[:, 0].tolist()):
            crops[0, item] = _resized(batch[item], window, size)
        views = reference.apply(crops, torch.from_numpy(plan.colours(ids)[:, :1]), self.spec)[0]
        return views if images.dim() == 4 else views[0]


class CentreView(nn.Module):
    """For evaluation: the middle square of the images, resized to S and normalised.

    Images whose size is S already are only normalised. Input and output as `RandomView`.
    """

    def __init__(self, spec: AugmentSpec) -> None:
        super().__init__()
        self.spec = spec

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] or [3, H, W]
        batch, size = as_bytes(images), self.spec.image_size
        height, width = batch.shape[2:]
        side = min(height, width)
        window = [(height - side) // 2, (width - side) // 2, side, side]
        crops = torch.stack([_resized(image, window, size) for image in batch])[None]
        views = reference.normalise(crops, self.spec)[0]
        return views if images.dim() == 4 else views[0]


def as_bytes(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] or [3, H, W] as a uint8 batch. Raises ValueError for other shapes."""
    batch = images if images.dim() == 4 else images[None]
    if batch.dim() != 4 or batch.shape[1] != 3:
        raise ValueError(
            f"expected images [N, 3, H, W] or [3, H, W], got {list(images.shape)}: these views are "
            "for 3 channels, so give others an augmentation of your own (augment_fn=)"
        )
    if batch.dtype == torch.uint8:
        return batch
    if not batch.is_floating_point():
        raise ValueError(f"images are uint8 or floats in [0, 1], got {batch.dtype}")
    batch = batch.float()  # halves would round the 255 levels
    if len(batch) and (batch.min() < 0 or batch.max() > 1):
        warnings.warn(
            "images outside [0, 1] are clipped: give them as they were decoded, not normalised; "
            "the views are normalised at the end",
            stacklevel=3,
        )
    return batch.clamp(0, 1).mul(255).round_().to(torch.uint8)


def _resized(image: Tensor, window: list[int], size: int) -> Tensor:
    """uint8 [S, S, 3]: the window (top, left, height, width) of [3, H, W], bicubic, antialiased."""
    top, left, height, width = window
    crop = image[:, top : top + height, left : left + width]
    if (height, width) != (size, size):
        wide = F.interpolate(crop[None].float(), (size, size), mode="bicubic", antialias=True)
        crop = wide[0].round_().clamp_(0, 255).to(torch.uint8)
    return crop.permute(1, 2, 0)
