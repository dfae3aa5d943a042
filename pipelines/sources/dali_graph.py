"""One DALI pipeline: encoded images and windows in, every view's crop out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

Decoder = Literal["cpu", "mixed"]
_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds in a unit of /proc/*/stat


def as_pnm(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 `[H, W, 3]` as the bytes of a binary PPM file, which DALI's decoders give back as is.

    So images that only our own decoder may read go the way of all others, and a batch may mix them.
    """
    height, width, _ = image.shape
    head = np.frombuffer(b"P6 %d %d 255\n" % (width, height), dtype=np.uint8)
    return np.concatenate([head, image.reshape(-1)])


class DaliGraph:
    """Batches go in by `submit` and come out by `take`, in order, up to `depth` at a time.

    The windows are cut before they are resized: a resize with `roi_start` and `roi_end` is 10%
    faster on a CPU, but its kernel reads pixels outside the window along the borders, which the
    other sources do not (mean deviation of the outer rows 0.56 against 0.22 of 255 levels).

    Args:
        batch_size: images in the largest batch.
        views: V, windows of an image.
        size: S, pixels of the crops' sides.
        threads: DALI's worker threads.
        depth: batches that DALI may work on at a time, >= 1.
        device: where the crops are wanted; resizing happens there.
        decoder: "cpu", "mixed" (nvJPEG on the GPU), or None where images are pixels already.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        views: int,
        size: int,
        threads: int,
        depth: int,
        device: torch.device,
        decoder: Decoder | None,
    ) -> None:
        self.batch_size, self.views, self.depth = batch_size, views, depth
        self._size, self._device, self._decoder = size, device, decoder
        self._inputs: deque[list[Any]] = deque()  # DALI reads them where they are: keep them alive
        self._batches: deque[int] = deque()
        before = _thread_ids()
        self._pipeline: Any = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=_index(device),
            prefetch_queue_depth=depth,
            exec_dynamic=True,
        )
        with self._pipeline:
            self._pipeline.set_outputs(*self._define())
        self._pipeline.build()
        self._prime()
        self._threads = _thread_ids() - before

    def _define(self) -> list[Any]:
        gpu = self._device.type == "cuda"
        # On a GPU DALI may still read an input when its batch is handed out, so it takes a copy.
        image = fn.external_source(
            name="image",
            ndim=3 if self._decoder is None else 1,
            layout="HWC" if self._decoder is None else None,
            dtype=types.UINT8,
            no_copy=not gpu,
        )
        if self._decoder is not None:
            image = fn.decoders.image(
                image,
                device=self._decoder,
                output_type=types.RGB,
                adjust_orientation=False,  # pixels as stored
                jpeg_fancy_upsampling=True,  # libjpeg's default, on the GPU too
                affine=False,  # threads bound to cores would meet those of other ranks
            )
        if gpu:
            image = image.gpu()
        return [self._crop(image, view) for view in range(self.views)]

    def _crop(self, image: Any, view: int) -> Any:
        start = fn.external_source(name=f"start{view}", ndim=1, dtype=types.INT32)
        end = fn.external_source(name=f"end{view}", ndim=1, dtype=types.INT32)
        return fn.resize(
            fn.slice(image, start=start, end=end, axes=[0, 1]),
            size=[self._size, self._size],
            interp_type=types.INTERP_CUBIC,  # a = -0.5, as Pillow's and torch's
            antialias=True,
        )

    def _prime(self) -> None:
        """Runs `depth` small batches: DALI's first `schedule_run` runs that many at once, later
        ones a single batch. A broken installation shows itself here."""
        pixel = np.zeros((1, 1, 3), dtype=np.uint8)
        image = pixel if self._decoder is None else as_pnm(pixel)
        windows = np.array([[[0, 0, 1, 1]] * self.views], dtype=np.int32)
        for _ in range(self.depth):
            self._feed([image], windows)
        self._pipeline.schedule_run()
        for _ in range(self.depth):
            self.take()

    @property
    def held(self) -> int:
        """Batches submitted and not taken yet."""
        return len(self._batches)

    def fits(self, windows: npt.NDArray[np.int32]) -> bool:
        """Whether a batch with `windows` `[B, V, 4]` may be submitted."""
        return len(windows) <= self.batch_size and windows.shape[1] == self.views

    def submit(
        self,
        images: Sequence[npt.NDArray[np.uint8]],  # [B] encoded bytes, or pixels [H, W, 3]
        windows: npt.NDArray[np.int32],  # [B, V, 4] top, left, height, width
    ) -> None:
        """Hand a batch to DALI, which works on it in the background.

        Raises:
            Exception: DALI's, when an earlier batch could not be decoded.
        """
        self._feed(images, windows)
        self._pipeline.schedule_run()

    def _feed(
        self, images: Sequence[npt.NDArray[np.uint8]], windows: npt.NDArray[np.int32]
    ) -> None:
        self._inputs.append(list(images))
        self._batches.append(len(images))
        self._pipeline.feed_input("image", self._inputs[-1])
        for view in range(self.views):
            start = np.ascontiguousarray(windows[:, view, :2])
            end = start + windows[:, view, 2:]
            self._pipeline.feed_input(f"start{view}", start)
            self._pipeline.feed_input(f"end{view}", end)

    def take(self) -> Tensor:
        """Crops uint8 `[V, B, S, S, 3]` of the oldest batch, copied out of DALI's memory.

        Raises:
            Exception: DALI's, when an image cannot be decoded; the graph is of no use after it.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        outputs = self._pipeline.share_outputs(cuda_stream=stream)
        shape = (self.views, self._batches.popleft(), self._size, self._size, 3)
        crops = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for view, output in enumerate(outputs):
            feed_ndarray(output.as_tensor(), crops[view], cuda_stream=stream)
        self._pipeline.release_outputs()
        self._inputs.popleft()
        return crops

    def close(self) -> None:
        """Ends DALI's threads, dropping what was not taken."""
        self._pipeline = None  # first: it reads the inputs to its end
        self._inputs.clear()

    def processor_seconds(self) -> float:
        """Processor time of DALI's threads, as the system counts it (in hundredths of seconds)."""
        return sum(_processor_seconds(thread) for thread in self._threads)


def _index(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _thread_ids() -> set[str]:
    """This process's threads that DALI has named as its own."""
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/comm") as file:
            if file.read().startswith("[DALI]"):
                found.add(thread)
    return found


def _processor_seconds(thread: str) -> float:
    with suppress(OSError), open(f"/proc/self/task/{thread}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK  # user and system time
    return 0.0
