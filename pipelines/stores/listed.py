"""Images that a file lists, below a folder: `train.txt`, `train_places205.csv`, `train2018.json`.

What reading the images' headers told is kept in `LIST.index.npz` beside the list, or in the cache
folder, and used again while the list itself is unchanged. What was bad then is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.indexfile import Strings, keep, locations, save_columns
from pipelines.progress import Progress
from pipelines.reading import read_file, refusal
from pipelines.scan import Bad, Sizes, default_workers, measure, open_regular, printable
from pipelines.stores.listfile import Listed, read_list

log = logging.getLogger(__name__)

FORMAT = 1  # raised whenever the meaning of a column changes; another format is rebuilt


class ListStore:
    """The listed images in the order of the list; a row is a file, `read` gives its bytes.

    Args:
        path: the list.
        root: the folder that the listed paths lie below.
        listed: what the list says.
        sizes: `[n, 2]` of the listed images, (0, 0) where one is bad.
        reasons: why each of the bad ones is.
    """

    encoded = True
    verified = False  # whether every image was decoded strictly

    def __init__(
        self, path: Path, root: Path, listed: Listed, sizes: Sizes, reasons: dict[int, str]
    ) -> None:
        self.path, self.root = path, root
        good = [row for row in range(len(listed.paths)) if row not in reasons]
        self._root, self._names = os.fsencode(root), Strings.of([listed.paths[i] for i in good])
        self.sizes: npt.NDArray[np.int32] = sizes[good]
        self.labels = np.array(listed.labels, dtype=np.int32)[good]
        self.classes = listed.classes if np.any(self.labels >= 0) else ()
        self.bad = (*listed.bad, *(Bad(listed.paths[i], why) for i, why in reasons.items()))
        digest = hashlib.sha256(self._names.blob.tobytes())
        for column in (self._names.ends.astype(np.int64), self.labels, self.sizes):
            digest.update(np.ascontiguousarray(column).tobytes())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def open(
        cls,
        path: Path,
        root: Path | None = None,
        *,
        verify: bool = True,
        workers: int | None = None,
        progress: bool = True,
        max_bad_share: float = 0.05,
    ) -> ListStore:
        """Reads the list, and the headers of its images or their index; see `open_store`.

        Raises:
            DataError: the list cannot be read, there is no such root, or more than
                `max_bad_share` of its lines and images are bad; they are named.
        """
        root = path.parent if root is None else root
        if not os.path.isdir(root):
            raise DataError(f"{root} is not a folder: name the one that {path} is about (--root)")
        listed = read_list(path)
        key = _key(path, root)
        known = _load(path, key, verify)
        if known is None:
            sizes, before = np.zeros((len(listed.paths), 2), np.int32), None
            todo = list(range(len(listed.paths)))
        else:
            verify, sizes, before = known
            todo = sorted(before)
        reasons: dict[int, str] = {}
        if todo:
            threads = workers or default_workers(verify)
            what = "verifying" if verify else "reading headers"
            paths = [listed.paths[row] for row in todo]
            with Progress(what, len(todo), enabled=progress) as bar:
                sizes[todo], bad = measure(
                    os.fsencode(root), paths, verify=verify, workers=threads, progress=bar
                )
            reasons = {todo[i]: reason for i, reason in bad.items()}
        if reasons != before:
            keep(path, partial(_save, key, verify, sizes, reasons))
        store = cls(path, root, listed, sizes, reasons)
        store.verified = verify
        store._judge(max_bad_share)
        return store

    @property
    def quarantined(self) -> tuple[tuple[str, str], ...]:
        """(line or path, reason) of what is listed and is no row."""
        return tuple((printable(b.path), b.reason) for b in self.bad)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, row: int) -> bytes:
        """The file's bytes.

        Raises:
            BadImage: it is gone or may not be read.
            DataError: the system cannot read it.
        """
        try:
            return read_file(self._join(row), open_regular)
        except OSError as error:
            raise refusal(error, self.name(row)) from error

    def name(self, row: int) -> str:
        """The file's path, with an escape for what cannot be printed."""
        return printable(self._join(row))

    def _join(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in [0, {len(self)})")
        return os.path.join(self._root, self._names[row])

    def _judge(self, max_bad_share: float) -> None:
        if not self.bad:
            return
        total, path = len(self) + len(self.bad), printable(str(self.path))
        some = "; ".join(f"{name}: {why}" for name, why in self.quarantined[:3])
        some += "; …" if len(self.bad) > 3 else ""
        if not len(self) or len(self.bad) > max_bad_share * total:
            raise DataError(
                f"{path}: {len(self.bad)} of {total} listed images cannot be used, more than "
                f"{max_bad_share:.1%} ({some}): paths are looked up below "
                f"{printable(str(self.root))}; name "
                "another folder with --root, or mend the list"
            )
        log.warning(
            "%s: %d of %d listed images cannot be used and are left out (%s)",
            path,
            len(self.bad),
            total,
            some,
        )


def _key(path: Path, root: Path) -> dict[str, Any]:
    """What the images' sizes were read for: this list, as it is now, below this folder."""
    info = path.stat()
    below = os.path.abspath(root)
    return {"format": FORMAT, "root": below, "list": [info.st_size, info.st_mtime_ns]}


def _save(
    key: dict[str, Any], verified: bool, sizes: Sizes, reasons: dict[int, str], path: Path
) -> None:
    meta = {**key, "verified": verified, "bad": sorted(reasons.items())}
    text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    save_columns({"list": text, "sizes": sizes}, path)


def _load(
    path: Path, key: dict[str, Any], verify: bool
) -> tuple[bool, Sizes, dict[int, str]] | None:
    """Whether verified, sizes and reasons, from an index that still holds; None where none does."""
    for place in locations(path):
        try:
            with open(place, "rb") as file, np.load(file, allow_pickle=False) as columns:
                meta, sizes = json.loads(columns["list"].tobytes()), columns["sizes"]
            if key.items() <= meta.items() and (meta["verified"] or not verify):
                reasons = {int(row): str(why) for row, why in meta["bad"]}
                return bool(meta["verified"]), sizes, reasons
        except FileNotFoundError:
            continue
        except Exception as error:  # damaged zip and array headers raise nearly anything
            log.warning("%s is not a readable index (%s): indexing again", place, error)
    return None
