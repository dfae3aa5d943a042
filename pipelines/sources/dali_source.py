"""Crops by NVIDIA DALI: decoding in its threads or on the GPU, resizing where the crops go.

Our threads read the files; DALI decodes each image once and cuts all its views. JPEGs that every
decoder reads alike go to DALI as they are; anything else (PNG, CMYK, ...) is decoded by
`pipelines.decode` first and handed over as a PPM, so that one image policy holds on every backend.

DALI decodes damaged JPEGs without an error: what was not verified when it was indexed is decoded
strictly by `pipelines.decode` once, when it is first read.

One corrupt image ends a DALI pipeline. Then the batches it held are decoded by `pipelines.decode`,
which finds the culprit, and a new pipeline goes on with them; no batch is lost or repeated. Batches
also change pipelines without a seam while `auto` tries decoders.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.decode import header, is_plain_jpeg
from pipelines.errors import BadImage, MissingBackend
from pipelines.plan import Rows
from pipelines.sources import FILL
from pipelines.sources.dali_decode import Decoder, StreamClock, Trial, decoders
from pipelines.sources.reader import Reader
from pipelines.sources.workers import Job, Workers, stop
from pipelines.stores import Store

try:
    from pipelines.sources.dali_graph import DaliGraph, as_pnm
except Exception as error:  # an import can raise anything
    raise MissingBackend(
        f"the dali backend needs NVIDIA DALI ({type(error).__name__}: {error}): "
        "pip install '.[dali]' in the checkout"
    ) from error

log = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]  # encoded, or pixels [H, W, 3]


class _Batch:
    """One batch on its way through reading and DALI."""

    def __init__(self, rows: Rows) -> None:
        self.ids: list[int] = rows.ids.tolist()
        self.windows = rows.windows.astype(np.int32)  # a copy: a bad image gets others
        self.images: list[Bytes] = [np.empty(0, np.uint8)] * len(rows)
        self.trusted = True  # DALI may decode what any decoder gives the same pixels of
        self.graph: DaliGraph | None = None  # that works on it
        self.job: Job


class _Failure(Exception):
    """DALI gave up; it raises nearly any type."""

    def __init__(self, graph: DaliGraph, error: Exception) -> None:
        super().__init__(str(error))
        self.graph, self.error = graph, error


class DaliSource:
    """Decodes and cuts with DALI. See `pipelines.sources.Source`.

    On a GPU the crops lie in DALI's memory, not in torch's: `record_stream` does not know them,
    and is not needed, as DALI waits for all streams before it takes memory back.

    Args:
        store: where the images are.
        image_size: S, pixels.
        device: where the crops are wanted.
        threads: DALI's worker threads, and as many that read files.
        prefetch: batches that DALI works on ahead of the one in use, on a GPU one fewer; the next
            one or two are being read.
        decode: "cpu" (libjpeg-turbo); "mixed" (nvJPEG), or "mixed:0.8" with a share of the GPU's
            JPEG engines; "auto": what is fastest, tried on the first batches of the run.
    """

    def __init__(
        self,
        store: Store,
        *,
        image_size: int,
        device: torch.device | str,
        threads: int,
        prefetch: int = 2,
        decode: str = "auto",
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch must not be negative, got {prefetch}")
        self._device = _numbered(torch.device(device))
        self._trial = Trial(decoders(decode, self._device), StreamClock(self._device))
        self._encoded = store.encoded  # any of it: then pixels go as PPM files
        self._size, self._ahead, self._most = image_size, prefetch + 2, 0
        on_gpu = self._device.type == "cuda"  # a decoded batch of 256 takes 0.15 GB: one fewer
        self._depth = max(1, prefetch) if on_gpu else prefetch + 1
        self._reader = Reader(store)
        self._workers = Workers(threads)
        self._graphs: set[DaliGraph] = set()  # all that live
        self._idle: DaliGraph | None = None  # one of them, between two iterations
        self._waited = self._retired_seconds = 0.0

    @property
    def bad(self) -> dict[int, str]:
        """Sample id -> reason, of images shown as grey."""
        return self._reader.bad

    @property
    def waits(self) -> dict[str, float]:
        """Seconds; see `Source.waits`. DALI's copies to a GPU are not told apart: `copy` is 0."""
        dali = sum(graph.processor_seconds() for graph in self._graphs) + self._retired_seconds
        return {
            "decode": self._workers.busy_seconds + dali,
            "read": self._reader.seconds,
            "wait": self._waited,
            "copy": 0.0,
        }

    def crops(self, rows: Iterable[Rows]) -> Iterator[Tensor]:
        """uint8 `[V, B, S, S, 3]` for each of `rows`; see `Source.crops`."""
        waiting, batches = iter(rows), deque[_Batch]()
        graphs: list[DaliGraph] = []  # this iteration's own: two at a time do not mix
        self._trial.pause()
        try:
            while True:
                for batch in islice(waiting, self._ahead - len(batches)):
                    batches.append(self._begin(batch))
                if not batches:
                    return
                started = time.perf_counter()
                batches[0].job.wait()
                crops = self._next(batches, graphs)
                self._waited += time.perf_counter() - started
                yield crops
        finally:
            stop(batch.job for batch in batches)
            self._trial.pause()
            self._give_back(graphs)

    def close(self) -> None:
        """Ends the threads, ours and DALI's."""
        self._workers.close()
        if self._idle is not None:
            self._retire([self._idle])
            self._idle = None

    def _begin(self, rows: Rows) -> _Batch:
        """Starts reading a batch."""
        batch = _Batch(rows)
        self._most = max(self._most, len(rows))
        batch.job = self._workers.start(len(rows), partial(self._fetch, batch))
        return batch

    def _fetch(self, batch: _Batch, item: int) -> None:
        """Reads one image."""
        row = batch.ids[item]
        try:
            batch.images[item] = self._load(row, batch.trusted)
        except BadImage as error:
            self._reader.add_bad(row, error)
            batch.images[item] = self._prepared(np.array([[FILL]], dtype=np.uint8))
            batch.windows[item] = (0, 0, 1, 1)

    def _load(self, row: int, trusted: bool) -> Bytes:
        data = self._reader.read(row)
        trusted = trusted and self._encoded and row not in self.bad
        if trusted and isinstance(data, bytes) and is_plain_jpeg(data) and _is_whole(data):
            self._reader.check_size(row, *header(data))
            return np.frombuffer(self._reader.whole(row, data), dtype=np.uint8)
        return self._prepared(self._reader.pixels(row, data))

    def _prepared(self, pixels: Bytes) -> Bytes:
        return as_pnm(pixels) if self._encoded else np.ascontiguousarray(pixels)

    def _next(self, batches: deque[_Batch], graphs: list[DaliGraph]) -> Tensor:
        """The crops of the first batch, which has been read."""
        while True:
            try:
                crops = self._advance(batches, graphs)
                break
            except _Failure as failure:
                self._recover(failure, batches, graphs)
        batch = batches.popleft()
        if batch.trusted and batch.graph is not None and batch.graph.decoder is not None:
            self._trial.taken(batch.graph.decoder, len(batch.ids))
        wanted = self._decoder()
        self._retire([g for g in graphs if not g.held and g.decoder != wanted], graphs)
        return crops

    def _advance(self, batches: deque[_Batch], graphs: list[DaliGraph]) -> Tensor:
        """Submits what has been read, as far as it fits, and waits for the first batch."""
        for batch in islice(batches, self._depth):
            if batch.graph is not None:
                continue
            if not batch.job.succeeded:
                break
            batch.graph = self._fitting(batch, graphs)
            with _failures_of(batch.graph):
                batch.graph.submit(batch.images, batch.windows)
        first = batches[0].graph
        assert first is not None
        with _failures_of(first):
            return first.take()

    def _decoder(self) -> Decoder | None:
        return self._trial.decoder if self._encoded else None

    def _fitting(self, batch: _Batch, graphs: list[DaliGraph]) -> DaliGraph:
        """A graph that takes `batch`: one in use, the idle one, or a new one."""
        if self._idle is not None:
            graphs.append(self._idle)
            self._idle = None
        while True:
            decoder = self._decoder()
            for graph in graphs:
                if graph.decoder == decoder and graph.fits(batch.windows):
                    return graph
            self._retire([graph for graph in graphs if not graph.held], graphs)
            try:
                graph = DaliGraph(
                    batch_size=self._most,
                    views=batch.windows.shape[1],
                    size=self._size,
                    threads=self._workers.threads,
                    depth=self._depth,
                    device=self._device,
                    decoder=decoder,
                )
            except Exception as error:
                if decoder is None or not self._trial.drop(decoder, error):
                    raise
                continue
            self._graphs.add(graph)
            graphs.append(graph)
            return graph

    def _recover(self, failure: _Failure, batches: deque[_Batch], graphs: list[DaliGraph]) -> None:
        """After DALI gave up: its batches decoded here, so that new graphs cannot fail on them.

        Raises:
            Exception: DALI's, where it decodes nothing and so the images are not to blame.
        """
        decoder, error = failure.graph.decoder, failure.error
        if decoder is None:
            raise error
        self._retire(list(graphs), graphs)
        affected = [batch for batch in batches if batch.graph is not None]
        known, again = len(self.bad), not any(batch.trusted for batch in affected)
        for batch in affected:
            batch.graph, batch.trusted = None, False
            batch.job = self._workers.start(len(batch.ids), partial(self._fetch, batch))
        for batch in affected:
            batch.job.wait()
        if len(self.bad) > known:
            return
        if not self._trial.failed(decoder, error, certain=again):
            raise error
        log.warning("DALI failed on images that are sound; they were decoded again: %s", error)

    def _give_back(self, graphs: list[DaliGraph]) -> None:
        """Keeps one graph for the next iteration, unless it is in use or not needed."""
        for graph in graphs:
            wanted = not graph.held and graph.decoder == self._decoder()
            if wanted and self._idle is None and not self._workers.closed:
                self._idle = graph
        self._retire([graph for graph in graphs if graph is not self._idle])

    def _retire(self, old: list[DaliGraph], graphs: list[DaliGraph] | None = None) -> None:
        """Ends graphs, and takes them out of an iteration's."""
        for graph in old:
            if graphs is not None:
                graphs.remove(graph)
            if graph in self._graphs:
                self._graphs.remove(graph)
                self._retired_seconds += graph.processor_seconds()
                graph.close()


@contextmanager
def _failures_of(graph: DaliGraph) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Failure(graph, error) from error


def _is_whole(jpeg: bytes) -> bool:
    """Whether it has its end marker, which scans cannot contain. Truncation is the damage that
    happens, and DALI checks no more than the header of what it gives to a GPU's JPEG engines."""
    return jpeg.rfind(b"\xff\xd9", -64) >= 0


def _numbered(device: torch.device) -> torch.device:
    """With its index, so that a later change of the current device means nothing."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
