"""Making an index: list, carry over what has not changed, read the rest, sort good from bad."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.indexfile import Index, Strings, fingerprint
from pipelines.progress import Progress
from pipelines.scan import EXTENSIONS, Bad, Listing, default_workers, measure, printable, walk


def root_listing(root: bytes) -> str:
    """sha256 of the names in the root, for file systems whose folders keep no useful time."""
    return hashlib.sha256(b"\0".join(sorted(os.listdir(root)))).hexdigest()


def make_index(
    root: Path, previous: Index | None, *, verify: bool, workers: int | None, progress: bool
) -> tuple[Index, int]:
    """The index of `root`, and how many files were read for it.

    Args:
        previous: an older index, loaded with its stats, whose unchanged rows are taken over.

    Others as in `index.open_index`.
    """
    raw_root = os.fsencode(root)
    try:
        with Progress("listing", None, enabled=progress) as bar:
            listed = walk(raw_root, bar)
        listing = root_listing(raw_root)
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({error.strerror}): check its rights") from error
    if not listed.names:
        raise DataError(_nothing(root, listed))
    verify = verify or (previous is not None and previous.verified)
    usable = previous if previous is not None and (previous.verified or not verify) else None
    stats = np.array(listed.stats, dtype=np.int64).reshape(-1, 2)
    sizes, reasons = _carry_over(listed, stats, usable)
    todo = np.flatnonzero(sizes[:, 0] < 0)
    if len(todo):
        paths = list(_paths(listed, todo))
        what = "verifying" if verify else "reading headers"
        threads = workers or default_workers(verify)
        with Progress(what, len(todo), enabled=progress) as bar:
            sizes[todo], bad = measure(
                raw_root, paths, verify=verify, workers=threads, progress=bar
            )
        reasons.update({int(todo[i]): reason for i, reason in bad.items()})
    index = _assemble(root, listed, listing, stats, sizes, reasons, verify)
    return index, len(todo)


def _nothing(root: Path, listed: Listing) -> str:
    kinds = f"images ({', '.join(EXTENSIONS)})"
    if listed.bad:
        first = listed.bad[0]
        return (
            f"{root} holds no readable {kinds}: {printable(first.path)} {first.reason}, "
            f"{len(listed.bad)} such in all: check rights and links"
        )
    if listed.ignored:
        return (
            f"{root} holds no {kinds}, only {listed.ignored} files of other kinds: "
            "name the folder that holds the images"
        )
    return f"{root} is an empty folder: put {kinds} there, in class folders or not"


def _paths(listed: Listing, rows: npt.NDArray[np.int64]) -> Iterator[bytes]:
    folders = np.searchsorted(np.array(listed.first), rows, side="right") - 1
    for folder, row in zip(folders.tolist(), rows.tolist(), strict=True):
        yield os.path.join(listed.dirs[folder], listed.names[row])


def _carry_over(
    listed: Listing, stats: npt.NDArray[np.int64], previous: Index | None
) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    """Sizes `[n, 2]` and reasons of the files that have not changed; -1 where it must be read."""
    sizes = np.full((len(listed.names), 2), -1, dtype=np.int32)
    reasons: dict[int, str] = {}
    if previous is None or previous.stats is None:
        return sizes, reasons
    folders = {folder: i for i, folder in enumerate(previous.dirs)}
    bad = {b.path: b for b in previous.bad if not b.refused}
    for i, folder in enumerate(listed.dirs):
        old = folders.get(folder)
        span = slice(*previous.first[old : old + 2].tolist()) if old is not None else slice(0)
        rows = range(len(previous))[span]
        then = dict(zip((previous.names[row] for row in rows), rows, strict=True))
        same = dict(zip(rows, previous.stats[span].tolist(), strict=True))
        here = slice(listed.first[i], listed.first[i + 1])
        now = zip(listed.names[here], stats[here].tolist(), strict=True)
        for new, (name, looks) in enumerate(now, start=here.start):
            row = then.get(name, -1)
            if row >= 0 and same[row] == looks:
                sizes[new] = previous.sizes[row]
            elif (b := bad.get(os.path.join(folder, name))) and [b.size, b.mtime] == looks:
                sizes[new], reasons[new] = 0, b.reason
    return sizes, reasons


def _assemble(
    root: Path,
    listed: Listing,
    listing: str,
    stats: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    reasons: dict[int, str],
    verified: bool,
) -> Index:
    """Rows from the good files, everything else into quarantine."""
    wrong = np.array(sorted(reasons), dtype=np.int64)
    bad = [
        Bad(path, reasons[i], int(stats[i, 0]), int(stats[i, 1]))
        for path, i in zip(_paths(listed, wrong), wrong.tolist(), strict=True)
    ]
    keep = np.ones(len(sizes), dtype=bool)
    keep[wrong] = False
    before = np.concatenate([[0], np.cumsum(keep)])
    first = before[np.array(listed.first)]
    good = np.flatnonzero(keep)
    classes, labels, notes = _classes(listed, np.diff(first))
    return Index(
        root=root,
        verified=verified,
        fingerprint=fingerprint(_paths(listed, good), stats[good, 0]),
        scanned_at=listed.scanned_at,
        listing=listing,
        ignored=listed.ignored,
        classes=classes,
        notes=(*listed.notes, *notes),
        bad=tuple(sorted([*listed.bad, *bad])),
        dirs=Strings.of(listed.dirs),
        dir_mtimes=np.array(listed.mtimes, dtype=np.int64),
        dir_labels=labels,
        first=first.astype(np.int64),
        names=Strings.of([listed.names[i] for i in good]),
        sizes=sizes[good],
        stats=stats[good],
    )


def _classes(
    listed: Listing, usable: npt.NDArray[np.int64]
) -> tuple[tuple[str, ...], npt.NDArray[np.int32], list[str]]:
    """Class names, the label of each folder, and what is odd about the classes.

    A class is a folder of the first level that holds image files at any depth. There are classes
    only if there are two or more and no usable image lies in the root itself.
    """
    tops = [folder.split(b"/", 1)[0] for folder in listed.dirs]
    files, good = dict.fromkeys(tops, 0), dict.fromkeys(tops, 0)
    for i, top in enumerate(tops):
        files[top] += listed.first[i + 1] - listed.first[i]
        good[top] += int(usable[i])
    in_root = good.pop(b"", 0)
    names = [top for top in good if files[top]]  # the listing is sorted
    notes = [f"{printable(t)} holds no images and is no class" for t in good if not files[t]]
    notes += [f"class {printable(t)} has no readable image left" for t in names if not good[t]]
    labels = np.full(len(tops), -1, dtype=np.int32)
    if len(names) < 2 or in_root:
        if len(names) >= 2:
            notes.append(f"{in_root} images beside the folders, so the set counts as unlabelled")
        return (), labels, notes
    number = {top: i for i, top in enumerate(names)}
    for i, top in enumerate(tops):
        labels[i] = number.get(top, -1)
    return tuple(printable(top) for top in names), labels, notes
