"""A store, a plan, a source and an augmentation put together: `build` and what it returns."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.augment import Augment, choose
from pipelines.cores import ranks_here, worker_threads
from pipelines.plan import Place, Rows, RowStream
from pipelines.spec import AugmentSpec
from pipelines.stores import Store, open_store
from pipelines.timing import Timer

if TYPE_CHECKING:
    from pipelines.sources import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Views:
    """One micro-batch of one rank, ready on the device's current stream."""

    x: Tensor  # [2, B, 3, S, S] in build's dtype, normalised, each view channels_last
    index: Tensor  # [B] int64 on the CPU: rows of the store
    label: Tensor  # [B] int64 on the device, -1 where there is none


class ViewPipeline:
    """Iterates the plan's steps as views on the device. Made by `build`."""

    def __init__(
        self,
        store: Store,
        stream: RowStream,
        source: Source,
        augment: Augment,
        device: torch.device,
    ) -> None:
        self.store, self.stream, self.source, self.device = store, stream, source, device
        self._augment = augment
        self._labels = torch.as_tensor(store.labels, dtype=torch.int64)
        self._augment_timer = Timer(device)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that start in the first epoch; later epochs may have one fewer."""
        return len(self.stream.steps(0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Views]:
        """The micro-batches of the steps that start in `epoch`, from its step `start` on."""
        steps = self.stream.steps(epoch)
        return self.steps(steps.start + start, steps.stop)

    def steps(self, first: int, stop: int) -> Iterator[Views]:
        """The micro-batches of the global steps [first, stop): `accumulate` of them each step."""
        pending: deque[Rows] = deque()

        def feed() -> Iterator[Rows]:
            for step in range(first, stop):
                for micro in range(self.stream.accumulate):
                    rows = self.stream.rows(step, micro)
                    pending.append(rows)
                    yield rows

        for crops in self.source.crops(feed()):
            yield self._views(crops, pending.popleft())

    def _views(self, crops: Tensor, rows: Rows) -> Views:
        index = torch.from_numpy(rows.ids)
        with self._augment_timer:
            x = self._augment(crops, torch.from_numpy(rows.colours))
        return Views(x, index, _to(self._labels[index], self.device))

    def stats(self) -> dict[str, Any]:
        """Seconds since the start: `decode` (all workers), `wait`, `copy`, `augment`; `bad` images
        as {row: reason}."""
        return {
            **self.source.waits,
            "augment": self._augment_timer.seconds(),
            "bad": dict(self.source.bad),
        }

    def close(self) -> None:
        """Ends the source's threads and frees its buffers."""
        self.source.close()


def build(
    data: Any,
    *,
    spec: AugmentSpec,
    batch_size: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    place: Place | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    prefetch: int = 2,
    decode: str = "auto",
    verify: bool = True,
    dtype: torch.dtype = torch.float32,
) -> ViewPipeline:
    """Open `data` and return its dual-view pipeline.

    Args:
        data: a folder, a `.npz` file, `synthetic:N`, arrays, or an open store.
        spec: the two views and the image size.
        batch_size: images of one optimizer step over all ranks; each rank gets
            batch_size / world_size of them in `accumulate` micro-batches.
        place: where this rank stands if `data` is one of several parts; see `pipelines.parts`.
        seed: with the epoch and the sample it decides everything random.
        device: where the views are wanted.
        backend: `auto`, `torch`, `dali`, `ffcv` or `synthetic`; `auto` takes DALI where there is a
            GPU and DALI is installed, FFCV for a `.beton` where that is, else torch.
        threads: decoding threads of this rank; by default its share of the processor's cores.
        prefetch: batches made ahead.
        decode: `auto`, `cpu`, `mixed` (on the GPU) or `mixed:0.65` with a share of its JPEG
            engines; read by DALI alone.
        verify: strictly decode a folder's images when it is indexed for the first time.
        dtype: of the views: float32, bfloat16 or float16. Colours are computed in float32.

    Raises:
        DataError: the data is missing, empty, broken or smaller than a batch.
        MissingBackend: the backend asked for is not installed.
    """
    device = torch.device(device)
    store = data if isinstance(data, Store) else open_store(data, verify=verify)
    stream = RowStream(
        spec,
        seed=seed,
        sizes=store.sizes,
        batch_size=batch_size,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        place=place,
    )
    augment = choose(spec, device, dtype)
    backend = choose_backend(backend, store, device)
    log.info("data: %d images, cut by the %s backend", len(store), backend)
    source = open_source(
        store,
        spec.image_size,
        device,
        backend=backend,
        threads=threads,
        prefetch=prefetch,
        decode=decode,
    )
    return ViewPipeline(store, stream, source, augment, device)


def open_source(
    store: Store,
    image_size: int,
    device: torch.device,
    *,
    backend: str = "auto",
    threads: int | None = None,
    prefetch: int = 2,
    decode: str = "auto",
) -> Source:
    """The source that `backend` names; `auto` is resolved and logged."""
    threads = threads or default_threads()
    match choose_backend(backend, store, device):
        case "torch":
            from pipelines.sources.torch_source import TorchSource

            return TorchSource(
                store, image_size=image_size, device=device, threads=threads, prefetch=prefetch
            )
        case "dali":
            from pipelines.sources.dali_source import DaliSource

            return DaliSource(
                store,
                image_size=image_size,
                device=device,
                threads=threads,
                prefetch=prefetch,
                decode=decode,
            )
        case "ffcv":
            from pipelines.sources.ffcv_source import FfcvSource

            return FfcvSource(
                store, image_size=image_size, device=device, threads=threads, prefetch=prefetch
            )
        case "synthetic":
            from pipelines.sources.synthetic_source import SyntheticSource

            return SyntheticSource(store, image_size=image_size, device=device)
        case _:
            raise ValueError(f"backend is auto, torch, dali, ffcv or synthetic, got {backend!r}")


def choose_backend(backend: str, store: Store, device: torch.device) -> str:
    """What `auto` means for this store and device; any other name is returned as it is."""
    if backend != "auto":
        return backend
    from pipelines.stores.synthetic import SyntheticStore

    if isinstance(store, SyntheticStore):
        return "synthetic"
    if device.type == "cuda":
        from pipelines.sources import dali_available

        if dali_available():
            return "dali"
        log.warning(
            "DALI is not installed, so images are decoded on the CPU; it is usually faster on a "
            "GPU (pip install '.[dali]' in the checkout)"
        )
    from pipelines.stores.beton import BetonStore

    if isinstance(store, BetonStore):
        from pipelines.sources import ffcv_available

        if ffcv_available():
            return "ffcv"
    return "torch"


def default_threads() -> int:
    """This rank's share of the cores this process may use, at least 1."""
    return worker_threads(ranks_here())


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
