"""The index of tar shards as columns, and its file, an `.npz` as `pipelines.indexfile` has it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import npz
from pipelines.indexfile import Strings, save_columns
from pipelines.scan import Bad, printable

log = logging.getLogger(__name__)

FORMAT = 2  # raised with the meaning of a column, or of a broken image; another is rebuilt

_COLUMNS = ("stats", "first", "offsets", "lengths", "sizes", "labels")


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """What is known of a list of shards: one row an image, shard by shard."""

    root: Path  # the folder, the file, or the pattern
    paths: tuple[Path, ...]  # [s] of the shards
    shards: tuple[str, ...]  # [s] below the folder common to them
    verified: bool  # every row was decoded strictly, not only its header read
    fingerprint: str  # sha256 of the rows' names and byte sizes
    ignored: int  # members that play no part
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    bad: tuple[Bad, ...]
    stats: npt.NDArray[np.int64]  # [s, 2] bytes, mtime (ns)
    first: npt.NDArray[np.int64]  # [s + 1] shard i holds rows [first[i], first[i + 1])
    names: Strings  # [n] within the shard
    offsets: npt.NDArray[np.int64]  # [n]
    lengths: npt.NDArray[np.int64]  # [n]
    sizes: npt.NDArray[np.int32]  # [n, 2] height, width
    labels: npt.NDArray[np.int32]  # [n], -1 where unlabelled

    def __len__(self) -> int:
        return len(self.names)

    def shard(self, row: int) -> int:
        """The number of the shard that holds a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        return int(np.searchsorted(self.first, row, side="right")) - 1


def class_names(labels: npt.NDArray[np.int32]) -> tuple[str, ...]:
    """The class numbers: shards hold no names."""
    return tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def save(index: TarIndex, path: Path) -> None:
    """Writes the index atomically.

    Raises:
        OSError: the place cannot be written to.
    """
    meta = {
        "format": FORMAT,
        "shards": index.shards,
        "verified": index.verified,
        "fingerprint": index.fingerprint,
        "ignored": index.ignored,
        "notes": index.notes,
        "bad": [(os.fsdecode(b.path), b.reason) for b in index.bad],
    }
    columns: dict[str, Any] = {
        "tar": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        "names": index.names.blob,
        "name_ends": index.names.ends,
    }
    save_columns(columns | {name: getattr(index, name) for name in _COLUMNS}, path)


def load(path: Path, root: Path, paths: Sequence[Path]) -> TarIndex | None:
    """The index in a file; None where there is none to be read."""
    try:
        with open(path, "rb") as file, npz.load(file) as columns:
            meta = json.loads(columns["tar"].tobytes())
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            labels = columns["labels"]
            index = TarIndex(
                root=root,
                paths=tuple(paths),
                shards=tuple(meta["shards"]),
                verified=bool(meta["verified"]),
                fingerprint=str(meta["fingerprint"]),
                ignored=int(meta["ignored"]),
                classes=class_names(labels),
                notes=tuple(meta["notes"]),
                bad=tuple(Bad(os.fsencode(name), why) for name, why in meta["bad"]),
                names=Strings(columns["names"], columns["name_ends"]),
                **{name: columns[name] for name in _COLUMNS},
            )
            if not len(index) == len(index.sizes) == len(labels) == index.first[-1]:
                raise ValueError("its columns do not fit together")
            return index
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged zip and array headers raise nearly anything
        log.warning("%s is not a readable index (%s): indexing again", printable(path), error)
        return None
