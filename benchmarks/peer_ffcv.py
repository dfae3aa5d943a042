"""FFCV as it is shipped: its Loader, with one `PipelineSpec` for each view of the same images.

So is BYOL fed with FFCV: a second pipeline reads the image field again, which decodes every image
twice. Windows are FFCV's own draws; its crops are resized by area, without a bicubic kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

_before = torch.get_num_threads()
from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.pipeline import PipelineSpec  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402

torch.set_num_threads(_before)  # importing it sets one thread


class TwoSpecs:
    """A Loader over a `.beton` file with two decoders; the fields it does not need are left out.

    Args:
        path: the file; its images are in the field `image`.
        threads: `num_workers`.
        size: S, pixels.
        batch_size: images of a batch.
        batches: of one pass; more than the file has begin it again.
        ids: the samples of a pass, where they are not the whole file: a pass that ends before
            them leaves batches that FFCV has begun for nothing.
        image_field: its name in the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        size: int,
        batch_size: int,
        batches: int,
        ids: Sequence[int] | None = None,
        image_field: str = "image",
    ) -> None:
        before, self._batches = torch.get_num_threads(), batches
        views = {
            f"view{number}": PipelineSpec(
                image_field,
                decoder=RandomResizedCropRGBImageDecoder((size, size)),
                transforms=[ToTensor()],
            )
            for number in (1, 2)
        }
        self._loader = Loader(
            str(path),
            batch_size=batch_size,
            num_workers=threads,
            order=OrderOption.RANDOM,
            indices=None if ids is None else np.asarray(ids, dtype=np.uint64),
            os_cache=True,
            pipelines={image_field: None, "label": None, **views},
        )
        torch.set_num_threads(before)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The two views of each batch, uint8 `[B, S, S, 3]`; written again some batches later."""
        left = self._batches
        while left > 0:
            before = torch.get_num_threads()
            epoch = iter(self._loader)
            torch.set_num_threads(before)
            for _, views in zip(range(left), epoch, strict=False):
                left -= 1
                yield views
            epoch.close()  # its thread would go on

    def close(self) -> None:
        """Nothing to end: a thread of FFCV's lasts as long as an epoch."""
