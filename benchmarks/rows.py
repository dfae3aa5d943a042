"""The rows of the loader's table: which there are, and how each is set to work."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipelines.plan import Rows, RowStream
from pipelines.spec import AugmentSpec
from pipelines.stores import Store, open_store

PILLOW = ("pil crops", "pil views", "lightly transform", "torchvision v2")
FFCV = "ffcv two specs"
DALI = "dali as solo-learn"
PEERS = (*PILLOW, FFCV, DALI)
TRIAL = 140  # batches after which DALI's `auto` has chosen: the first turn has no fewer


@dataclass(frozen=True)
class Row:
    """One row: what runs, from which store, how.

    Args:
        kind: `torch crops` (a backend, and crops or whole views), or one of PEERS.
        threads: of the source; worker processes of the Pillow peers where there are more than one.
        store: `folder`, `beton` or `tar`.
        decode: of DALI alone: `cpu`, `mixed`, `mixed:0.8` or `auto`.
    """

    kind: str
    threads: int = 1
    store: str = "folder"
    decode: str = ""

    @property
    def label(self) -> str:
        """The row's name in the table."""
        unit = "process" if self.kind in PILLOW and self.threads > 1 else "thread"
        plural = ("es" if unit == "process" else "s") if self.threads > 1 else ""
        parts = [self.kind, self.store, self.decode, f"{self.threads} {unit}{plural}"]
        return ", ".join(filter(None, parts))

    @property
    def peer(self) -> bool:
        """Whether it is another project's way."""
        return self.kind in PEERS

    @property
    def work(self) -> str:
        """`crops` (decoded and cut, uint8) or `views` (coloured and normalised as well)."""
        return "crops" if self.kind.endswith("crops") or self.kind == FFCV else "views"


@dataclass(frozen=True)
class Work:
    """What every row of a run does."""

    stores: dict[str, str]  # name -> what open_store takes
    device: str = "cpu"
    image_size: int = 224
    batch_size: int = 64
    images: int = 384  # of one turn, in whole batches

    @property
    def steps(self) -> int:
        """Batches of one turn."""
        return self.images // self.batch_size


def all_rows(
    stores: Iterable[str], threads: Sequence[int], decodes: Sequence[str], device: str
) -> list[Row]:
    """The table's rows, peers first. What is not installed shows when it is asked to work."""
    rows = [Row(kind, n) for kind in PILLOW for n in threads]
    places = dict.fromkeys("cpu" if decode == "cpu" else "mixed" for decode in decodes)
    rows += [Row(DALI, n, decode=place) for n in threads for place in places]
    for store in stores:
        rows += [Row("torch crops", n, store) for n in threads]
        rows += [Row("dali crops", n, store, decode) for n in threads for decode in decodes]
        if store == "beton":
            rows += [Row(kind, n, store) for kind in (FFCV, "ffcv crops") for n in threads]
    rows += [Row("torch views", n) for n in threads]
    if device != "cpu":  # where the colours are the GPU's work, any source can feed it
        rows += [Row("dali views", n, decode=decode) for n in threads for decode in decodes]
        rows += [Row("ffcv views", n, "beton") for n in threads if "beton" in stores]
    return [*rows, Row("synthetic crops")]


class Chain(Protocol):
    """A row at work."""

    def batches(self) -> Iterator[Sequence[torch.Tensor] | torch.Tensor]:
        """One pass over the run's images: `[0]` of a batch is the first view, `[B, ...]`."""
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...


@dataclass(frozen=True)
class Job:
    """What a row's process has at hand before anything is timed."""

    work: Work
    store: Store
    rows: list[Rows]  # the batches of one turn


def plan(work: Work, store: Store) -> list[Rows]:
    """The batches of one turn. More images than the store has show it again with other windows."""
    spec = AugmentSpec(image_size=work.image_size)
    stream = RowStream(spec, seed=0, sizes=store.sizes, batch_size=work.batch_size)
    return [stream.rows(step) for step in range(work.steps)]


class OurChain:
    """This package: a source's crops, or the whole pipeline's views."""

    def __init__(self, row: Row, job: Job) -> None:
        from pipelines.pipeline import build

        self.rows, self.crops = job.rows, row.work == "crops"
        self.passes = -(-TRIAL // len(job.rows)) if row.decode == "auto" else 1  # in the first turn
        self.pipeline = build(
            job.store,
            spec=AugmentSpec(image_size=job.work.image_size),
            batch_size=job.work.batch_size,
            device=job.work.device,
            backend=row.kind.partition(" ")[0],
            threads=row.threads,
            decode=row.decode or "auto",
        )

    def batches(self) -> Iterator[torch.Tensor]:
        """uint8 `[2, B, S, S, 3]`, or normalised `[2, B, 3, S, S]`."""
        passes, self.passes = self.passes, 1
        if self.crops:
            yield from self.pipeline.source.crops(self.rows * passes)
        else:
            yield from (views.x for views in self.pipeline.steps(0, len(self.rows) * passes))

    def close(self) -> None:
        """Ends the source."""
        self.pipeline.close()


def prepare(row: Row, work: Work) -> Job:
    """Opens the store, plans the rows and imports what the row needs, before anything is timed.

    Raises:
        ImportError: it is not installed.
    """
    for module in _modules(row):
        importlib.import_module(module)
    with suppress(ImportError):  # a GPU's colours go without it, if more slowly
        importlib.import_module("triton")
    store = open_store(work.stores[row.store], verify=False, progress=False)
    return Job(work, store, plan(work, store))


def _modules(row: Row) -> list[str]:
    if row.kind == "lightly transform":
        return ["benchmarks.peers_pillow", "lightly.transforms.byol_transform"]
    if row.kind in PILLOW:
        return ["benchmarks.peers_pillow"]
    if row.kind == FFCV:
        return ["benchmarks.peer_ffcv"]
    if row.kind == DALI:
        return ["benchmarks.peer_dali"]
    return ["pipelines.pipeline", f"pipelines.sources.{row.kind.partition(' ')[0]}_source"]


def open_chain(row: Row, job: Job) -> Chain:
    """Constructs what the row is about: from here its time to the first batch counts."""
    if row.kind in PILLOW:
        from benchmarks.peers_pillow import PillowChain

        size = job.work.image_size
        return PillowChain(row.kind, row.threads, store=job.store, rows=job.rows, size=size)
    options: dict[str, Any] = {
        "threads": row.threads,
        "size": job.work.image_size,
        "batch_size": job.work.batch_size,
        "batches": len(job.rows),
    }
    if row.kind == FFCV:
        from benchmarks.peer_ffcv import TwoSpecs

        ids = np.concatenate([rows.ids for rows in job.rows]).tolist()
        return TwoSpecs(Path(job.work.stores[row.store]), **options, ids=ids)
    if row.kind == DALI:
        from benchmarks.peer_dali import TwoViews

        where = {"device": job.work.device, "decode": row.decode}
        return TwoViews(Path(job.work.stores[row.store]), **options, **where)
    return OurChain(row, job)
