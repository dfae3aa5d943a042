"""Indexing tar shards once: `open_tar_index`.

The index is kept beside the shards, and made again when the list of them, or the size or time of
one, has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines import decode
from pipelines.cores import worker_threads
from pipelines.errors import BadImage, DataError
from pipelines.indexfile import Strings, fingerprint, keep, locations
from pipelines.ordered import in_order
from pipelines.progress import Progress
from pipelines.scan import EXTENSIONS, Bad, expanded
from pipelines.stores.openfile import OpenFile, OpenFiles
from pipelines.stores.tarindex import TarIndex, class_names, load, save
from pipelines.stores.tarshards import Samples, read_shard, shard_paths

_HEAD_BYTES = 64 << 10  # what a header needs as a rule
_MAX_BYTES = 1 << 30  # a member over 1 GiB is no image this library could use
_ROWS = 32  # in one task


@dataclass(frozen=True)
class _Listed:
    """The shards behind a name, as they look now."""

    root: Path  # the folder, the file, or the pattern
    beside: Path  # where the index is kept: the root, or a name for the pattern
    paths: list[Path]
    shards: tuple[str, ...]  # below the folder common to them
    looks: npt.NDArray[np.int64]  # [s, 2] bytes, mtime (ns)

    @classmethod
    def of(cls, data: str | Path) -> _Listed:
        paths = shard_paths(data)
        try:
            stats = [os.stat(path) for path in paths]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error
        for path, info in zip(paths, stats, strict=True):
            if not stat.S_ISREG(info.st_mode):  # opening a named pipe would wait for ever
                raise DataError(f"{path} is not a regular file: name tar files only")
        looks = np.array([(s.st_size, s.st_mtime_ns) for s in stats], np.int64).reshape(-1, 2)
        common = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
        root = beside = expanded(data)
        if not os.path.exists(root):  # a pattern, which may be longer than a file's name
            digest = hashlib.sha256(os.fsencode(root.name)).hexdigest()[:8]
            name = re.sub(r"[^\w.-]", "_", root.name)
            beside = Path(common) / (name if len(name) <= 100 else f"{name[:80]}-{digest}")
        shards = tuple(os.path.relpath(path, common) for path in paths)
        return cls(root, beside, paths, shards, looks)

    def stored(self) -> Iterator[TarIndex]:
        """The indexes kept of them, whether they still fit or not."""
        for place in locations(self.beside):
            if (known := load(place, self.root, self.paths)) is not None:
                yield known

    def fits(self, index: TarIndex) -> bool:
        return index.shards == self.shards and np.array_equal(index.stats, self.looks)


def stored_tar_index(data: str | Path) -> TarIndex | None:
    """The index that `open_tar_index` would take as it is, if there is one; raises as it does."""
    listed = _Listed.of(data)
    return next((known for known in listed.stored() if listed.fits(known)), None)


def open_tar_index(
    data: str | Path,
    *,
    verify: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[TarIndex, int]:
    """The index of the shards behind `data`, and how many images were read for it.

    Args:
        data: see `tarshards.is_tar`; others as in `index.open_index`.

    Raises:
        DataError: a shard is missing or no sound tar file, or they hold no images.
    """
    listed = _Listed.of(data)
    for known in listed.stored():
        refused = any(bad.refused for bad in known.bad)  # which may have passed
        if listed.fits(known) and (known.verified or not verify) and not refused:
            return known, 0
        verify = verify or known.verified  # what was verified once stays so
    root, paths = listed.root, listed.paths
    threads = workers or worker_threads()
    found = _list(paths, threads, progress)
    images = sum(len(samples.names) for samples in found)
    if not images and not any(samples.bad for samples in found):
        others = sum(samples.ignored for samples in found)
        raise DataError(
            f"{data} holds no images in {len(paths)} tar files, only {others} members of other "
            f"kinds: name shards whose samples have an image each ({', '.join(EXTENSIONS)})"
        )
    with Progress("verifying" if verify else "reading headers", images, enabled=progress) as bar:
        sizes, reasons = _measure(paths, found, verify=verify, workers=threads, bar=bar)
    index = _assemble(root, paths, listed.shards, listed.looks, found, sizes, reasons, verify)
    keep(listed.beside, partial(save, index))
    return index, images


def _list(paths: Sequence[Path], workers: int, progress: bool) -> list[Samples]:
    """The samples of each shard."""
    found: list[Samples] = []
    with (
        Progress("listing", len(paths), unit="shards", enabled=progress) as bar,
        closing(in_order(read_shard, paths, workers=workers, ahead=2 * workers)) as results,
    ):
        for samples in results:
            found.append(samples)
            bar.advance()
    return found


def _assemble(
    root: Path,
    paths: Sequence[Path],
    shards: tuple[str, ...],
    stats: npt.NDArray[np.int64],
    found: Sequence[Samples],
    sizes: npt.NDArray[np.int32],
    reasons: dict[int, str],
    verified: bool,
) -> TarIndex:
    """Rows from the good images, everything else into quarantine."""
    names, whole, bad = list[bytes](), list[bytes](), list[Bad]()  # whole: with the shard's name
    for shard, samples in zip(shards, found, strict=True):
        folder = os.fsencode(shard) + b"/"
        names += samples.names
        whole += [folder + name for name in samples.names]
        bad += [Bad(folder + b.path, b.reason) for b in samples.bad]
    bad += [Bad(whole[row], reason) for row, reason in reasons.items()]
    good = np.array([row for row in range(len(names)) if row not in reasons], np.int64)
    lengths = _column(found, "lengths")[good]
    labels = _column(found, "labels")[good].astype(np.int32)
    return TarIndex(
        root=root,
        paths=tuple(paths),
        shards=shards,
        verified=verified,
        fingerprint=fingerprint((whole[row] for row in good), lengths),
        ignored=sum(samples.ignored for samples in found),
        classes=class_names(labels),
        notes=_notes(found),
        bad=tuple(sorted(bad)),
        stats=stats,
        first=np.searchsorted(good, _first(found)),
        names=Strings.of([names[row] for row in good]),
        offsets=_column(found, "offsets")[good],
        lengths=lengths,
        sizes=sizes[good],
        labels=labels,
    )


def _column(found: Sequence[Samples], name: str) -> npt.NDArray[np.int64]:
    return np.concatenate([np.array(getattr(samples, name), np.int64) for samples in found])


def _first(found: Sequence[Samples]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *(len(samples.names) for samples in found)])


def _notes(found: Sequence[Samples]) -> tuple[str, ...]:
    images = sum(samples.extra_images for samples in found)
    labels = sum(samples.odd_labels for samples in found)
    return (
        *([f"{images} samples have several images: each one's first is used"] if images else []),
        *([f"{labels} labels are no class numbers and count as none"] if labels else []),
    )


def _measure(
    paths: Sequence[Path], found: Sequence[Samples], *, verify: bool, workers: int, bar: Progress
) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    """Sizes `[n, 2]` of the images, and a reason for each row that is bad."""
    files, first = OpenFiles(paths), _first(found)
    offsets, lengths = _column(found, "offsets"), _column(found, "lengths")
    sizes, bad = np.zeros((len(offsets), 2), np.int32), dict[int, str]()

    def measure_some(rows: range) -> None:
        for row in rows:
            shard = int(np.searchsorted(first, row, side="right")) - 1
            place = int(offsets[row]), int(lengths[row])
            try:
                sizes[row] = _measure_member(files[shard], *place, verify=verify)
            except BadImage as error:
                bad[row] = str(error)

    n = len(offsets)
    tasks = [range(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]
    ahead = 4 * workers
    with closing(in_order(measure_some, tasks, workers=workers, ahead=ahead)) as results:
        for rows, _ in zip(tasks, results, strict=True):
            bar.advance(len(rows))
    return sizes, bad


def _measure_member(file: OpenFile, offset: int, length: int, *, verify: bool) -> tuple[int, int]:
    """Height and width, as `scan.measure_file` has them of a file."""
    if length > _MAX_BYTES:
        raise BadImage(f"{length:,} bytes are more than the limit of {_MAX_BYTES:,}")
    if verify:
        return decode.verify(file.read(offset, length))
    head = min(length, _HEAD_BYTES)
    try:
        return decode.header(file.read(offset, head))
    except BadImage:
        if head == length:
            raise
    return decode.header(file.read(offset, length))
