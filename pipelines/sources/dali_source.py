"""Crops by NVIDIA DALI: decoding in its threads or on the GPU, resizing where the crops go.

Our threads read the files; DALI decodes each image once and cuts all its views. JPEGs that every
decoder reads alike go to DALI as they are; anything else (PNG, CMYK, ...) is decoded by
`pipelines.decode` first and handed over as a PPM, so that one image policy holds on every backend.

One corrupt image ends a DALI pipeline. Then the batches it held are decoded by `pipelines.decode`,
which finds the culprit, and a new pipeline goes on with them; no batch is lost or repeated.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
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
from pipelines.sources.reader import Reader
from pipelines.sources.workers import Job, Workers, stop
from pipelines.stores import Store

try:
    from pipelines.sources.dali_graph import DaliGraph, Decoder, as_pnm
except (ImportError, OSError) as error:
    raise MissingBackend(
        f"the dali backend needs NVIDIA DALI ({error}): pip install byol-fast[dali]"
    ) from error

log = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]  # encoded, or pixels [H, W, 3]


class _Batch:
    """One batch on its way through reading and DALI."""

    def __init__(self, rows: Rows) -> None:
        self.ids: list[int] = rows.ids.tolist()
        self.windows = rows.windows.astype(np.int32)  # a copy: a bad image gets others
        self.images: list[Bytes] = [np.empty(0, np.uint8)] * len(rows)
        self.job: Job


class DaliSource:
    """Decodes and cuts with DALI. See `pipelines.sources.Source`.

    Args:
        store: where the images are.
        image_size: S, pixels.
        device: where the crops are wanted.
        threads: DALI's worker threads, and as many that read files.
        prefetch: batches that DALI works on ahead of the one in use; one more is being read.
        decode: "cpu" (libjpeg-turbo), "mixed" (nvJPEG), or "auto": mixed where there is a GPU.
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
        self._device = torch.device(device)
        self._decoder = _decoder(decode, self._device) if store.encoded else None
        self._size, self._depth = image_size, prefetch + 1
        self._reader = Reader(store)
        self._workers = Workers(threads)
        grey = np.array([[FILL]], dtype=np.uint8)
        self._grey = as_pnm(grey) if store.encoded else grey
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
        graph: DaliGraph | None = None  # this iteration's own: two at a time do not mix
        try:
            while True:
                for batch in islice(waiting, self._depth + 1 - len(batches)):
                    batches.append(self._begin(batch))
                if not batches:
                    return
                started = time.perf_counter()
                batches[0].job.wait()
                graph = self._fitting(graph, batches[0])
                try:
                    crops = _advance(graph, batches)
                except Exception as error:  # DALI raises nearly any type; see _recover
                    graph = self._recover(graph, batches, error)
                    crops = _advance(graph, batches)
                self._waited += time.perf_counter() - started
                batches.popleft()
                yield crops
        finally:
            stop(batch.job for batch in batches)
            if graph is not None:
                self._give_back(graph)

    def close(self) -> None:
        """Ends the threads, ours and DALI's."""
        self._workers.close()
        if self._idle is not None:
            self._retire(self._idle)
            self._idle = None

    def _begin(self, rows: Rows) -> _Batch:
        """Starts reading a batch."""
        batch = _Batch(rows)
        batch.job = self._workers.start(len(rows), partial(self._fetch, batch, True))
        return batch

    def _fetch(self, batch: _Batch, trust: bool, item: int) -> None:
        """Reads one image; `trust`: DALI may decode it if any decoder gives the same pixels."""
        row = batch.ids[item]
        try:
            batch.images[item] = self._load(row, trust)
        except BadImage as error:
            self._reader.add_bad(row, error)
            batch.images[item], batch.windows[item] = self._grey, (0, 0, 1, 1)

    def _load(self, row: int, trust: bool) -> Bytes:
        data = self._reader.read(row)
        if not isinstance(data, bytes):
            return np.ascontiguousarray(self._reader.pixels(row, data))
        if trust and row not in self.bad and is_plain_jpeg(data):
            self._reader.check_size(row, *header(data))
            return np.frombuffer(data, dtype=np.uint8)
        return as_pnm(self._reader.pixels(row, data))

    def _fitting(self, graph: DaliGraph | None, batch: _Batch) -> DaliGraph:
        """A graph that takes `batch`: the one in use, the idle one, or a new one."""
        if graph is None:
            graph, self._idle = self._idle, None
        if graph is not None:
            if graph.held or graph.fits(batch.windows):
                return graph
            self._retire(graph)
        graph = DaliGraph(
            batch_size=len(batch.ids),
            views=batch.windows.shape[1],
            size=self._size,
            threads=self._workers.threads,
            depth=self._depth,
            device=self._device,
            decoder=self._decoder,
        )
        self._graphs.add(graph)
        return graph

    def _recover(self, graph: DaliGraph, batches: deque[_Batch], error: Exception) -> DaliGraph:
        """After DALI gave up: a new graph, and its batches decoded here, so that it cannot again.

        Raises:
            Exception: `error`, where DALI decodes nothing and so the images are not to blame.
        """
        if self._decoder is None:
            raise error
        known = len(self.bad)
        affected = [batch for number, batch in enumerate(batches) if number < graph.held]
        self._retire(graph)
        for batch in affected:
            fetch = partial(self._fetch, batch, False)
            batch.job = self._workers.start(len(batch.ids), fetch)
        for batch in affected:
            batch.job.wait()
        if len(self.bad) == known:
            log.warning("DALI failed on images that are sound; they were decoded again: %s", error)
        return self._fitting(None, batches[0])

    def _give_back(self, graph: DaliGraph) -> None:
        """Keeps a graph for the next iteration, unless it is in use or not needed."""
        if graph.held or self._idle is not None or self._workers.closed:
            self._retire(graph)
        else:
            self._idle = graph

    def _retire(self, graph: DaliGraph) -> None:
        if graph in self._graphs:
            self._graphs.remove(graph)
            self._retired_seconds += graph.processor_seconds()
            graph.close()


def _advance(graph: DaliGraph, batches: deque[_Batch]) -> Tensor:
    """Submits what has been read, as far as it fits, and waits for the crops of the first batch."""
    for number, batch in enumerate(batches):
        if number < graph.held:
            continue
        if graph.held == graph.depth or not batch.job.succeeded or not graph.fits(batch.windows):
            break
        graph.submit(batch.images, batch.windows)
    return graph.take()


def _decoder(decode: str, device: torch.device) -> Decoder:
    match decode:
        case "auto":
            return "mixed" if device.type == "cuda" else "cpu"
        case "cpu":
            return "cpu"
        case "mixed":
            if device.type != "cuda":
                raise ValueError("decode 'mixed' is on a GPU: use 'cpu' or 'auto' without one")
            return "mixed"
        case _:
            raise ValueError(f"decode is auto, cpu or mixed, got {decode!r}")
