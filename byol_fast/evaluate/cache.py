"""Features that are computed once and kept, in chunks, so that an interrupted run goes on."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.evaluate.decoding import described
from byol_fast.evaluate.features import Crop, Features, Gathered, stream
from byol_fast.evaluate.parts import Parts
from pipelines.progress import Progress
from pipelines.spec import AugmentSpec
from pipelines.stores import Store

FORMAT = 2  # raised whenever the same key would give other features
CHUNK_ROWS = 8192  # 64 MiB of a ResNet-50's features
CHUNK_SECONDS = 30.0  # at most this much work is lost where images are slow


@dataclass
class _Chunk:
    """What was computed since the last part was written."""

    first: int  # row
    batches: list[Tensor]
    bad: dict[int, str]
    began: float  # time.perf_counter()

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """`features.extract` with a memory.

    Args:
        root: where features are kept, a folder for each key; None keeps nothing.
        network: what tells networks apart, JSON values: the sha256 of the weights, and how the
            network was built of them.
    """

    root: Path | None
    network: dict[str, Any]

    def key(
        self,
        store: Store,
        *,
        image_size: int,
        spec: AugmentSpec,
        device: torch.device,
        backend: str,
        crop: Crop = "centre",
        pooling: str = "global",
    ) -> dict[str, Any]:
        """All that the features of `store` depend on; other values, other features."""
        on_gpu = device.type == "cuda"
        return {
            "format": FORMAT,
            "network": self.network,
            "data": store.fingerprint,
            "images": len(store),
            "image_size": image_size,
            "normalisation": {k: asdict(spec)[k] for k in ("mean", "std")},
            "crop": crop,
            "pooling": pooling,
            "reading": described(backend, store, device),
            "precision": "bf16" if on_gpu else "fp32",
        }

    def extract(
        self,
        backbone: nn.Module,
        store: Store,
        *,
        image_size: int,
        spec: AugmentSpec | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        threads: int | None = None,
        backend: str = "auto",
        crop: Crop = "centre",
        pooling: str = "global",
        progress: bool = False,
        label: str = "features",
    ) -> Features:
        """As `features.extract`; chunks that are there are read, the rest is computed and kept.

        `pooling` names what `backbone` puts out where that is not what `network` says.
        """
        device, spec = torch.device(device), spec or AugmentSpec()
        key = self.key(
            store,
            image_size=image_size,
            spec=spec,
            device=device,
            backend=backend,
            crop=crop,
            pooling=pooling,
        )
        parts = Parts(self.root, key)
        gathered = Gathered(store)
        stored = _read(parts, gathered, Progress(label, None, enabled=progress))
        started = time.perf_counter()
        chunk = _Chunk(stored, [], {}, started)
        batches = stream(
            backbone,
            store,
            image_size=image_size,
            spec=spec,
            device=device,
            batch_size=batch_size,
            threads=threads,
            backend=backend,
            crop=crop,
            start=stored,
            progress=progress,
            label=label,
        )
        for rows, batch, wrong in batches if stored < len(store) else ():
            gathered.add(rows, batch, wrong)
            chunk.batches.append(batch)
            chunk.bad.update(wrong)
            late = time.perf_counter() - chunk.began > CHUNK_SECONDS
            if late or chunk.rows >= CHUNK_ROWS or rows.stop == len(store):
                _keep(parts, chunk)
                chunk = _Chunk(rows.stop, [], {}, time.perf_counter())
        seconds = time.perf_counter() - started if stored < len(store) else 0.0
        return gathered.complete(seconds, stored)


def _keep(parts: Parts, chunk: _Chunk) -> None:
    about = {"first": chunk.first, "bad": {str(row): why for row, why in chunk.bad.items()}}
    parts.write(f"{chunk.first:09d}", {"features": torch.cat(chunk.batches)}, about)


def _read(parts: Parts, into: Gathered, meter: Progress) -> int:
    """Add the first rows, as far as there are chunks without a gap; how many these are."""
    rows, done = len(into.store), 0
    with meter:
        while done < rows and (part := parts.read(f"{done:09d}")) is not None:
            values, about = part[0]["features"], part[1]
            if done + len(values) > rows or (done and values.shape[1] != into.features.shape[1]):
                break
            bad = {int(row): why for row, why in about["bad"].items()}
            into.add(range(done, done + len(values)), values, bad)
            done += len(values)
            meter.advance(len(values))
    return done
