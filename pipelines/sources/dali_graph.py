"""One DALI pipeline: encoded images and windows in, every view's crop out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import backend, fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.sources.dali_decode import Decoder
from pipelines.turbo import simplejpeg

# What nvJPEG keeps for each thread, in bytes. They grow to what the largest image needs: a pixel
# takes 5.5 of the GPU's and 3.7 of pinned memory, twice. DALI begins with 16 and 8 MiB.
_DEVICE_PADDING, _HOST_PADDING = 4 << 20, 2 << 20
_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds in a unit of /proc/*/stat

_Array = npt.NDArray[Any]
_conditional: Any = fn._conditional  # type: ignore[attr-defined]  # what DALI makes `if` of
_release: Any = backend.ReleaseUnusedMemory  # type: ignore[attr-defined]


def as_pnm(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 `[H, W, 3]` as the bytes of a binary PPM file, which DALI's decoders give back as is.

    So images that only our own decoder may read go the way of all others, and a batch may mix them.
    """
    height, width, _ = image.shape
    head = np.frombuffer(b"P6 %d %d 255\n" % (width, height), dtype=np.uint8)
    return np.concatenate([head, image.reshape(-1)])


class DaliGraph:
    """Batches go in by `submit` and come out by `take`, in order, up to `depth` at a time.

    An image is decoded once and stands in the batch of its windows once for each view, by
    reference. So all crops are one tensor of DALI's, view by view, and can leave it without a copy.

    The windows are cut before they are resized: a resize with `roi_start` and `roi_end` is 10%
    faster on a CPU, but its kernel reads pixels outside the window along the borders, which the
    other sources do not (mean deviation of the outer rows 0.56 against 0.22 of 255 levels). The
    GPU's kernel does the same, by design; the cut costs it two reads of the window in all.

    Args:
        batch_size: images in the largest batch.
        views: V, windows of an image, 1 or 2.
        size: S, pixels of the crops' sides.
        threads: DALI's worker threads.
        depth: batches that DALI may work on at a time, >= 1.
        device: where the crops are wanted; resizing happens there.
        decoder: None where images are pixels already.
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
        if views not in (1, 2):
            raise ValueError(f"DALI cuts one or two windows of an image, got {views}")
        self.batch_size, self.views, self.depth = batch_size, views, depth
        self.decoder = decoder
        self._size, self._device = size, device
        self._inputs: deque[list[Any]] = deque()  # DALI reads them where they are: keep them alive
        before = _thread_ids()
        self._pipeline: Any = Pipeline(
            batch_size=batch_size * views,
            num_threads=threads,
            device_id=_index(device),
            prefetch_queue_depth=depth,
            exec_dynamic=True,  # a tensor that was handed out is never written again
        )
        with self._pipeline:
            self._pipeline.set_outputs(self._define())
        self._pipeline.build()
        self._prime()
        self._threads = _thread_ids() - before

    def _define(self) -> Any:
        pixels = self.decoder is None
        image = _input("image", 3 if pixels else 1, types.UINT8, layout="HWC" if pixels else None)
        start, shape = _input("start", 1, types.INT32), _input("shape", 1, types.INT32)
        if self.views == 2:
            first = _input("first", 0, types.BOOL)
            image, _ = _conditional.split(image, predicate=first)
        if self.decoder is not None:
            image = self._decode(image, self.decoder)
        if self._device.type == "cuda":
            image = image.gpu()
        if self.views == 2:
            image = _conditional.merge(image, image, predicate=first)
        return fn.resize(
            fn.slice(image, start=start, shape=shape, axes=[0, 1]),
            size=[self._size, self._size],
            interp_type=types.INTERP_CUBIC,  # a = -0.5, as Pillow's and torch's
            antialias=True,
        )

    def _decode(self, encoded: Any, decoder: Decoder) -> Any:
        options: dict[str, Any] = {}
        if decoder.device == "mixed":
            options = {
                "hw_decoder_load": decoder.hardware,
                "device_memory_padding": _DEVICE_PADDING,
                "host_memory_padding": _HOST_PADDING,
                "affine": False,  # threads bound to cores would meet those of other ranks
            }
        return fn.decoders.image(
            encoded,
            device=decoder.device,
            output_type=types.RGB,
            adjust_orientation=False,  # pixels as stored
            jpeg_fancy_upsampling=True,  # libjpeg's default, on the GPU too
            **options,
        )

    def _prime(self) -> None:
        """Runs `depth` small batches: DALI's first `schedule_run` runs that many at once, later
        ones a single batch. A broken installation shows itself here.

        The JPEG engines need a whole batch of JPEGs: of the first batch nvImageCodec takes the
        number of images that they ever get.
        """
        pixels = np.zeros((16, 16, 3), dtype=np.uint8)
        image = np.frombuffer(simplejpeg.encode_jpeg(pixels), dtype=np.uint8)
        images = self.batch_size if self.decoder is not None and self.decoder.hardware else 1
        windows = np.array([[[0, 0, 16, 16]] * self.views] * images, dtype=np.int32)
        for _ in range(self.depth):
            self._feed([pixels if self.decoder is None else image] * images, windows)
        self._pipeline.schedule_run()
        for _ in range(self.depth):
            self.take()

    @property
    def held(self) -> int:
        """Batches submitted and not taken yet."""
        return len(self._inputs)

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
        by_view = windows.transpose(1, 0, 2).reshape(-1, 4)  # [V * B, 4]
        start = np.ascontiguousarray(by_view[:, :2])
        shape = np.ascontiguousarray(by_view[:, 2:])
        inputs: dict[str, _Array | list[_Array]] = {"start": start, "shape": shape}
        inputs["image"] = list(images)
        if self.views == 2:  # all inputs are as long as the longest
            blank = np.zeros((1, 1, 3) if self.decoder is None else 1, dtype=np.uint8)
            inputs["image"] += [blank] * len(images)
            inputs["first"] = np.arange(len(by_view)) < len(images)
        self._inputs.append([*inputs.values()])
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)

    def take(self) -> Tensor:
        """Crops uint8 `[V, B, S, S, 3]` of the oldest batch, in memory that was DALI's.

        They are ready on the current stream. DALI gets the memory back when the tensor is gone and
        the GPU has done all that it was given before, on whatever stream.

        Raises:
            Exception: DALI's, when an image cannot be decoded; the graph is of no use after it.
        """
        with self._on_device() as stream:
            (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        self._pipeline.release_outputs()
        self._inputs.popleft()
        crops = from_dlpack(output.as_tensor())  # makes the stream wait for DALI's
        return crops.view(self.views, -1, self._size, self._size, 3)

    @contextmanager
    def _on_device(self) -> Iterator[torch.cuda.Stream | None]:
        """DALI takes the default stream, which has no handle, for that of the current device."""
        if self._device.type == "cpu":
            yield None
        else:
            with torch.cuda.device(self._device):
                yield torch.cuda.current_stream()

    def close(self) -> None:
        """Ends DALI's threads, dropping what was not taken."""
        self._pipeline = None  # first: it reads the inputs to its end
        self._inputs.clear()
        if self._device.type == "cuda":
            _release()  # the next graph may need other sizes

    def processor_seconds(self) -> float:
        """Processor time of DALI's threads, as the system counts it (in hundredths of seconds)."""
        return sum(_processor_seconds(thread) for thread in self._threads)


def _input(name: str, ndim: int, dtype: Any, layout: str | None = None) -> Any:
    """Data that `feed_input` gives. DALI reads it in place, on the CPU, before its batch is out;
    what goes to a GPU passes through DALI's own pinned memory."""
    return fn.external_source(name=name, ndim=ndim, dtype=dtype, layout=layout, no_copy=True)


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
