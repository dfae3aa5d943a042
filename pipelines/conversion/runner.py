"""Writing any store as one `.beton` file with its sidecar: the work behind `pipelines.convert`."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipelines.conversion.betonwriter import BetonWriter
from pipelines.conversion.partfile import PartFile
from pipelines.conversion.storage import Storage, Stored
from pipelines.errors import BadImage, DataError, MissingBackend
from pipelines.ordered import in_order
from pipelines.progress import Progress
from pipelines.scan import printable
from pipelines.stores import Store, open_store, sidecar
from pipelines.stores.betonfile import load

_MAX_BAD_SHARE = 0.05  # as `open_store` has it
_SAMPLE = 32  # images that the space needed is estimated from
_ROWS, _PIXELS = 16, 4 << 20  # the most in one task: it bounds the memory of what waits its turn
_TASKS_AHEAD = 3  # for each worker


def convert(
    data: str | Path,
    out: Path,
    *,
    storage: Storage,
    labels: bool = True,
    workers: int,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the images behind `data` to `out`, in their order; returns the sidecar's entries.

    Args:
        data: anything that `stores.open_store` takes by name.
        storage: what becomes of each image.
        labels: whether labels are written, if there are any.
        workers: threads that read, decode and encode.
        force: replace `out` if it exists.
        progress: show how far it is, on stderr.

    Raises:
        DataError: the data cannot be used, too many of its images are bad, or `out` cannot be
            written; nothing is left under its name.
        RuntimeError: a worker failed, with the name of the image it had.
    """
    _check_target(data, out, force)
    store = open_store(data, verify=False, workers=workers, progress=progress)
    job = _Job(store, storage, labels=labels, workers=workers, progress=progress)
    _check_space(job, out)
    try:
        with PartFile(out) as part:
            job.write(part.file)
            entries = _describe(job, part, str(data))
            with PartFile(sidecar.sidecar_path(out)) as side:
                side.file.write(json.dumps(entries, indent=1).encode())
                side.publish()  # first, so that no .beton is ever seen without its classes
            part.publish()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}): check the folder's rights and "
            "free space, or write elsewhere"
        ) from error
    return entries


@dataclass
class _Job:
    """A conversion under way, and what has come of it so far."""

    store: Store
    storage: Storage
    labels: bool
    workers: int
    progress: bool
    how: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def __post_init__(self) -> None:
        self.labels = self.labels and bool((self.store.labels >= 0).any())
        self.bad.extend(self.store.quarantined)
        self.candidates = len(self.store) + len(self.bad)

    def write(self, file: IO[bytes]) -> None:
        """Writes all images and the tables. Room for metadata is left for bad images as well, so
        that it does not matter whether the index or the conversion found them out."""
        writer = BetonWriter(file, self.candidates, labelled=self.labels)
        labels = self.store.labels.tolist()
        with Progress("converting", len(self.store), enabled=self.progress) as bar:
            for row, image in enumerate(self.images(range(len(self.store)))):
                if isinstance(image, Stored):
                    self.how[image.how] += 1
                    writer.add(image.data, image.height, image.width, labels[row])
                else:
                    self.enter_bad(row, image)
                bar.advance()
        writer.finish()

    def images(self, rows: range | list[int]) -> Iterator[Stored | BadImage]:
        """Each row's image as it is to be stored, or why it cannot be, in the order of the rows."""
        tasks = _tasks(rows, self.store.sizes)
        ahead = _TASKS_AHEAD * self.workers
        with closing(in_order(self.store_some, tasks, workers=self.workers, ahead=ahead)) as done:
            for images in done:
                yield from images

    def store_some(self, rows: list[int]) -> list[Stored | BadImage]:
        return [self.store_one(row) for row in rows]

    def store_one(self, row: int) -> Stored | BadImage:
        try:
            return self.storage(self.store.read(row))
        except BadImage as error:
            return error
        except (DataError, MemoryError, MissingBackend):
            raise
        except Exception as error:
            raise RuntimeError(
                f"{self.store.name(row)} could not be converted: {type(error).__name__}: {error}"
            ) from error

    def enter_bad(self, row: int, error: BadImage) -> None:
        self.bad.append((self.store.name(row), str(error)))
        if len(self.bad) > _MAX_BAD_SHARE * self.candidates:
            named = "; ".join(f"{name}: {reason}" for name, reason in self.bad[-3:])
            raise DataError(
                f"{len(self.bad)} of {self.candidates} images cannot be used so far, which is more "
                f"than {_MAX_BAD_SHARE:.1%} ({named}): remove or replace them"
            )


def _tasks(rows: range | list[int], sizes: npt.NDArray[np.int32]) -> Iterator[list[int]]:
    """Runs of rows that are small enough to wait in memory, many at a time."""
    task: list[int] = []
    pixels = 0
    for row in rows:
        pixels += int(sizes[row, 0]) * int(sizes[row, 1])
        task.append(row)
        if len(task) == _ROWS or pixels > _PIXELS:
            yield task
            task, pixels = [], 0
    if task:
        yield task


def _check_target(data: str | Path, out: Path, force: bool) -> None:
    if out.suffix != ".beton":
        raise DataError(f"{out} has not the ending .beton, by which it is known: add it")
    if not os.path.isdir(out.parent):
        raise DataError(f"{out.parent} is not a folder: create it, or write elsewhere")
    if not os.path.exists(out):  # nor where the rights hide it: writing tells that
        return
    if not force:
        raise DataError(f"{out} exists: remove it, add --force, or write to another name")
    if os.path.exists(data) and os.path.samefile(out, data):
        raise DataError(f"{out} is what is to be converted: write to another name")


def _check_space(job: _Job, out: Path) -> None:
    """Refuses what will not fit, judging by evenly spaced images."""
    n = len(job.store)
    rows = np.unique(np.linspace(0, n - 1, _SAMPLE).astype(int)).tolist()
    stored = [image for image in job.images(rows) if isinstance(image, Stored)]
    needed = sum(image.nbytes for image in stored) / max(len(stored), 1) * n
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise DataError(
            f"{out} would have about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free "
            "there: write elsewhere, or take a smaller --max-side"
        )


def _describe(job: _Job, part: PartFile, data: str) -> dict[str, Any]:
    """The sidecar's entries, from the tables as the reader finds them in the file."""
    tables = load(part.path)
    with Progress("hashing", tables.size >> 20, unit="MB", enabled=job.progress) as bar:
        sha256 = sidecar.sha256_of(part.file, bar)
    return {
        "format": sidecar.FORMAT,
        "sha256": sha256,
        "tables_sha256": tables.tables_sha256,
        "bytes": tables.size,
        "samples": len(tables),
        "classes": list(job.store.classes) if job.labels else [],
        "source": {"data": printable(data), "fingerprint": job.store.fingerprint},
        "options": {**asdict(job.storage), "labels": job.labels},
        "libraries": {name: version(name) for name in ("simplejpeg", "pillow")},
        "stored": dict(sorted(job.how.items())),
        "quarantined": [{"name": name, "reason": reason} for name, reason in job.bad],
        "height": _spread(tables.sizes[:, 0]),
        "width": _spread(tables.sizes[:, 1]),
        "image_bytes": _spread(tables.lengths),
    }


def _spread(column: npt.NDArray[Any]) -> dict[str, float]:
    return {
        "min": int(column.min()),
        "mean": round(float(column.mean()), 1),
        "max": int(column.max()),
    }
