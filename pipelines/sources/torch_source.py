"""Crops without DALI: simplejpeg and torch's antialiased uint8 resize, in threads.

Both release the GIL, so threads do what other loaders start processes for: no pickling, no shared
memory, and each image is decoded once for both views. The pixels are a pure function of file,
window and size: thread count and prefetch change nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.errors import BadImage
from pipelines.plan import Rows
from pipelines.sources import FILL
from pipelines.sources.reader import Reader
from pipelines.sources.transfer import HostToDevice
from pipelines.sources.workers import Job, Workers, stop
from pipelines.stores import Store


def resize_crop(
    image: npt.NDArray[np.uint8],  # [H, W, 3]
    window: Sequence[int],  # top, left, height, width
    size: int,
) -> Tensor:
    """uint8 `[size, size, 3]`: the window cut out, then resized bicubically with antialiasing.

    Pixels outside the window play no part, as in the authors' code and torchvision's
    `RandomResizedCrop`. The kernel is Pillow's (a = -0.5) in fixed-point arithmetic.
    """
    out = torch.empty(1, size, size, 3, dtype=torch.uint8)
    _resize_into(_as_tensor(image), window, out.permute(0, 3, 1, 2))
    return out[0]


def _as_tensor(image: npt.NDArray[np.uint8]) -> Tensor:
    """`[H, W, 3]` as `[1, 3, H, W]`, in the same memory if torch can use it."""
    if not image.flags.writeable or min(image.strides) < 0:
        image = image.copy()  # torch takes only writable arrays, in ascending order
    if image.strides[2] != 1:  # planes: torch fails on a window that is the whole of them
        image = np.ascontiguousarray(image)
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def _resize_into(
    image: Tensor,  # [1, 3, H, W]
    window: Sequence[int],
    out: Tensor,  # [1, 3, S, S], channels_last: a place in the batch, written without a copy
) -> None:
    top, left, height, width = window
    crop = image.narrow(2, top, height).narrow(3, left, width)
    torch.ops.aten._upsample_bicubic2d_aa.out(crop, out.shape[2:], False, None, None, out=out)


class TorchSource:
    """Decodes and cuts on CPU threads. See `pipelines.sources.Source`.

    Args:
        store: where the images are.
        image_size: S, pixels.
        device: where the crops are wanted.
        threads: worker threads; one core each keeps them busy.
        prefetch: batches made ahead of the one in use, >= 0.
    """

    def __init__(
        self,
        store: Store,
        *,
        image_size: int,
        device: torch.device | str,
        threads: int,
        prefetch: int = 2,
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch must not be negative, got {prefetch}")
        self._reader = Reader(store)
        self._size, self._prefetch = image_size, prefetch
        self._transfer = HostToDevice(torch.device(device), keep=prefetch + 2)
        self._workers = Workers(threads)
        self._fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
        self._waited = 0.0

    @property
    def bad(self) -> dict[int, str]:
        """Sample id -> reason, of images shown as grey."""
        return self._reader.bad

    @property
    def waits(self) -> dict[str, float]:
        """Seconds; see `Source.waits`."""
        return {
            "decode": self._workers.busy_seconds,
            "read": self._reader.seconds,
            "wait": self._waited,
            "copy": self._transfer.seconds(),
        }

    def crops(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        """uint8 `[V, B, S, S, 3]` for each of `rows`; see `Source.crops`."""
        waiting, batches = iter(rows), deque[tuple[Job, Tensor]]()
        try:
            while True:
                for batch in islice(waiting, self._prefetch + 1 - len(batches)):
                    batches.append(self._begin(batch))
                if not batches:
                    return
                job, host = batches[0]
                started = time.perf_counter()
                job.wait()
                self._waited += time.perf_counter() - started
                batches.popleft()
                yield self._transfer.send(host)
        finally:
            stop(job for job, _ in batches)

    def close(self) -> None:
        """Ends the threads."""
        self._workers.close()

    def _begin(self, rows: Rows) -> tuple[Job, Tensor]:
        """Sets the workers on a batch; the tensor is complete when the job is done."""
        views = rows.windows.shape[1]
        host = self._transfer.empty(views, len(rows), self._size, self._size, 3)
        crops = host.permute(0, 1, 4, 2, 3)  # [V, B, 3, S, S]
        ids, windows = rows.ids.tolist(), rows.windows.tolist()

        def cut(item: int) -> None:
            row = ids[item]
            rows = max(top + height for top, _, height, _ in windows[item])
            try:
                image = _as_tensor(self._reader.pixels(row, self._reader.read(row), rows))
            except BadImage as error:
                self._reader.add_bad(row, error)
                crops[:, item] = self._fill
                return
            for view, window in enumerate(windows[item]):
                _resize_into(image, window, crops[view, item : item + 1])

        return self._workers.start(len(rows), cut), host
