"""The index of an image folder as columns, and its file.

The file is an uncompressed `.npz` without pickles: JSON under `meta`, all else numeric arrays.
Names are one blob of bytes with offsets, so no list of a million strings is ever made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipelines import npz
from pipelines.errors import DataError
from pipelines.scan import Bad, expanded, printable

log = logging.getLogger(__name__)

FORMAT = 2  # raised with the meaning of a column, or of a broken image; another is rebuilt

_SUFFIX = ".index.npz"


class Strings:
    """`n` byte strings in two arrays: 20 bytes a file name instead of Python's 70."""

    def __init__(self, blob: npt.NDArray[np.uint8], ends: npt.NDArray[Any]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, items: Sequence[bytes]) -> Strings:
        """The strings `items`, packed."""
        lengths = np.fromiter(map(len, items), dtype=np.int64, count=len(items))
        ends = np.cumsum(lengths)
        small = not len(items) or ends[-1] < 2**32
        blob = np.frombuffer(b"".join(items), dtype=np.uint8)
        return cls(blob, ends.astype(np.uint32) if small else ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, kw_only=True)
class Index:
    """What is known of a folder: one row an image, in a fixed order, grouped by folder."""

    root: Path
    verified: bool  # every row was decoded strictly, not only its header read
    fingerprint: str  # sha256 of the rows' paths and byte sizes
    scanned_at: int  # ns
    listing: str  # sha256 of the names in the root
    ignored: int  # hidden files and files of other kinds
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    bad: tuple[Bad, ...]
    dirs: Strings  # [d] below the root
    dir_mtimes: npt.NDArray[np.int64]  # [d] ns
    dir_labels: npt.NDArray[np.int32]  # [d], -1 where unlabelled
    first: npt.NDArray[np.int64]  # [d + 1] folder i holds rows [first[i], first[i + 1])
    names: Strings  # [n] within the folder
    sizes: npt.NDArray[np.int32]  # [n, 2] height, width
    stats: npt.NDArray[np.int64] | None  # [n, 2] bytes, mtime (ns); None where not loaded

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """`[n]` class numbers, -1 where unlabelled."""
        return np.repeat(self.dir_labels, np.diff(self.first))

    def below(self, row: int) -> bytes:
        """A row's path below the root."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        folder = int(np.searchsorted(self.first, row, side="right")) - 1
        return os.path.join(self.dirs[folder], self.names[row])


def fingerprint(paths: Iterator[bytes], byte_sizes: npt.NDArray[np.int64]) -> str:
    """sha256 of paths and byte sizes, in row order."""
    digest = hashlib.sha256()
    for path, size in zip(paths, byte_sizes.tolist(), strict=True):
        digest.update(b"%b\0%d\n" % (path, size))
    return digest.hexdigest()


def locations(root: Path) -> list[Path]:
    """Where a folder's index may lie: beside it, else in the cache folder."""
    absolute = os.path.abspath(root)
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    name = os.path.basename(absolute) or "root"
    beside = [] if absolute == os.path.sep else [Path(absolute + _SUFFIX)]
    cache = expanded(os.environ.get("BYOL_FAST_CACHE") or "~/.cache/byol_fast")
    if str(cache).startswith("~"):  # nobody's home: a user without one, as in some containers
        return beside
    return [*beside, cache / f"{name}-{digest}{_SUFFIX}"]


def save(index: Index, path: Path) -> None:
    """Writes the index atomically: a reader finds the old file or the new one, never a part.

    Raises:
        OSError: the place cannot be written to; nothing is left behind there.
    """
    assert index.stats is not None, "an index loaded without `stats` is not to be saved"
    meta = {
        "format": FORMAT,
        "verified": index.verified,
        "fingerprint": index.fingerprint,
        "scanned_at": index.scanned_at,
        "listing": index.listing,
        "ignored": index.ignored,
        "classes": index.classes,
        "notes": index.notes,
        "bad": [(os.fsdecode(b.path), b.reason, b.size, b.mtime) for b in index.bad],
    }
    columns: dict[str, Any] = {
        "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        "dirs": index.dirs.blob,
        "dir_ends": index.dirs.ends,
        "dir_mtimes": index.dir_mtimes,
        "dir_labels": index.dir_labels,
        "first": index.first,
        "names": index.names.blob,
        "name_ends": index.names.ends,
        "sizes": index.sizes,
        "stats": index.stats,
    }
    save_columns(columns, path)


def save_columns(columns: dict[str, Any], path: Path) -> None:
    """Writes an `.npz` atomically; raises as `save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **columns)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(root: Path, write: Callable[[Path], None]) -> None:
    """Has an index of `root` written to the first of its locations that can be written to."""
    errors = []
    for path in locations(root):
        try:
            write(path)
        except OSError as error:
            errors.append(f"{path}: {error.strerror or error}")
        else:
            log.info("index written to %s", printable(path))
            return
    log.warning(
        "the index cannot be stored (%s), so every start indexes again: "
        "set BYOL_FAST_CACHE to a folder that can be written to",
        "; ".join(errors),
    )


def load(path: Path, root: Path, *, stats: bool = False) -> Index:
    """Reads an index; `stats` (16 bytes a row) only where it is wanted.

    Raises:
        FileNotFoundError: there is none.
        DataError: the file is damaged, of another format, or no index.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, root, stats)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged zip and array headers raise nearly anything
        raise DataError(f"{path} is not a readable index ({error})") from error


def _read(file: IO[bytes], root: Path, stats: bool) -> Index:
    columns: Any = npz.load(file)
    with columns:
        meta = json.loads(columns["meta"].tobytes())
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        index = Index(
            root=root,
            verified=bool(meta["verified"]),
            fingerprint=str(meta["fingerprint"]),
            scanned_at=int(meta["scanned_at"]),
            listing=str(meta["listing"]),
            ignored=int(meta["ignored"]),
            classes=tuple(meta["classes"]),
            notes=tuple(meta["notes"]),
            bad=tuple(Bad(os.fsencode(p), why, size, when) for p, why, size, when in meta["bad"]),
            dirs=Strings(columns["dirs"], columns["dir_ends"]),
            dir_mtimes=columns["dir_mtimes"],
            dir_labels=columns["dir_labels"],
            first=columns["first"],
            names=Strings(columns["names"], columns["name_ends"]),
            sizes=columns["sizes"],
            stats=columns["stats"] if stats else None,
        )
    n, d = len(index.names), len(index.dirs)
    if not (
        index.sizes.shape == (n, 2)
        and index.first.shape == (d + 1,)
        and len(index.dir_mtimes) == len(index.dir_labels) == d
        and index.first[-1] == n
    ):
        raise ValueError("its columns do not fit together")
    return index
