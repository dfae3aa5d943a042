"""Indexing a folder of images once: `open_index`, and `python -m pipelines.index DIR [--verify]`.

An index is reused while the folder is unchanged: the modification times of its folders and the
names in its root. After a change everything is listed again, but only files whose byte size or time
changed are read again. A file overwritten in place changes no folder's time: run the command, which
always compares every file.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import DataError, MissingBackend
from pipelines.indexbuild import make_index, root_listing
from pipelines.indexfile import Index, keep, load, locations, save
from pipelines.scan import printable, refuse_hidden
from pipelines.stores.tarbuild import open_tar_index, stored_tar_index
from pipelines.stores.tarindex import TarIndex
from pipelines.stores.tarshards import is_tar

log = logging.getLogger(__name__)

_SETTLED = 2 * 10**9  # ns: a folder changed so shortly before it was listed may change unseen


def open_index(
    root: Path,
    *,
    verify: bool = True,
    workers: int | None = None,
    progress: bool = True,
    refresh: bool = False,
) -> Index:
    """The index of the images below `root`: read from its file if that still holds, else made.

    Args:
        root: a folder.
        verify: every image was, or now is, decoded strictly; otherwise its header is enough.
            An index that was once verified stays so.
        workers: threads; by default every core this process may use.
        progress: show how far it is, on stderr.
        refresh: compare every file's size and time even if no folder changed.

    Raises:
        DataError: the folder cannot be listed or holds no images.
    """
    return _open(root, verify, workers, progress, refresh)[0]


def stored_index(data: Path) -> Index | TarIndex | None:
    """The index that the next start would use as it is, if there is one; nothing is made.

    Raises:
        DataError: a tar shard is missing or cannot be read.
    """
    if is_tar(data):
        return stored_tar_index(data)
    index, _, holds = _find(data)
    return index if holds else None


def _open(
    root: Path, verify: bool, workers: int | None, progress: bool, refresh: bool
) -> tuple[Index, int]:
    """The index, and how many files were read for it."""
    previous, path, holds = _find(root)
    if previous is not None and path is not None:
        if holds and not refresh and (previous.verified or not verify):
            return previous, 0
        try:
            previous = load(path, root, stats=True)
        except (DataError, FileNotFoundError):
            previous = None  # replaced since by another process
    index, read = make_index(root, previous, verify=verify, workers=workers, progress=progress)
    keep(root, partial(save, index))
    return index, read


def _find(root: Path) -> tuple[Index | None, Path | None, bool]:
    """The index to start from, its file, and whether it holds: one that does if there is one."""
    found: tuple[Index | None, Path | None, bool] = (None, None, False)
    for path in locations(root):
        try:
            index = load(path, root)
        except FileNotFoundError:
            continue
        except DataError as error:
            log.warning("%s: indexing again", error)
            continue
        if _unchanged(index):
            return index, path, True
        if found[0] is None:
            found = (index, path, False)
    return found


def _unchanged(index: Index) -> bool:
    root = os.fsencode(index.root)
    try:
        for folder, mtime in zip(index.dirs, index.dir_mtimes.tolist(), strict=True):
            now = os.stat(os.path.join(root, folder)).st_mtime_ns
            if now != mtime or now > index.scanned_at - _SETTLED:
                return False
        if any(b.refused and os.access(os.path.join(root, b.path), os.R_OK) for b in index.bad):
            return False
        return root_listing(root) == index.listing
    except OSError:
        return False


def warn_of(index: Index | TarIndex) -> None:
    """Logs what is odd about the data, and how many images are left out."""
    root = printable(str(index.root))
    for note in index.notes:
        log.warning("%s: %s", root, printable(note))
    if index.bad:
        log.warning(
            "%s: %d of %d images cannot be used and are left out (the first: %s: %s); "
            "python -m pipelines.index names them all",
            root,
            len(index.bad),
            len(index) + len(index.bad),
            printable(index.bad[0].path),
            index.bad[0].reason,
        )


def refuse_if_bad(index: Index | TarIndex, max_bad_share: float = 0.05) -> None:
    """Refuses a folder in which more than `max_bad_share` of the images are bad, or all are.

    Raises:
        DataError: with the first few names and reasons.
    """
    bad = len(index.bad)
    if len(index) and bad <= max_bad_share * (len(index) + bad):
        return
    named = "; ".join(f"{printable(b.path)}: {b.reason}" for b in index.bad[:3])
    root = printable(str(index.root))
    raise DataError(
        f"{root}: {bad} of {len(index) + bad} images cannot be used, which is more than "
        f"{max_bad_share:.1%} ({named}{'; …' if bad > 3 else ''}): remove or replace them; "
        f"python -m pipelines.index {shlex.quote(root)} names them all"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 usable, 4 not, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.index",
        description="Index a folder of images or tar shards: count, name the classes and find "
        "broken files.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of images, or tar shards")
    parser.add_argument("--verify", action="store_true", help="decode every image strictly")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads (default: every core)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.perf_counter()
    try:
        index: Index | TarIndex
        refuse_hidden(args.dir)
        if is_tar(args.dir):
            index, read = open_tar_index(args.dir, verify=args.verify, workers=args.workers)
        elif os.path.isdir(args.dir):
            index, read = _open(args.dir, args.verify, args.workers, progress=True, refresh=True)
        else:
            raise DataError(f"{args.dir} is not a folder: name the folder that holds the images")
        report = _report(index, read, time.perf_counter() - start)
        print(json.dumps(report, indent=2) if args.json else _text(report))
        refuse_if_bad(index)
    except DataError as error:
        print(error, file=sys.stderr)
        return 4
    except MemoryError as error:
        print(f"out of memory ({error}): repeat with fewer --workers", file=sys.stderr)
        return 1
    except MissingBackend as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no index was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def positive(text: str) -> int:
    """A number of workers or pixels, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _report(index: Index | TarIndex, read: int, seconds: float) -> dict[str, Any]:
    return {
        "root": printable(str(index.root)),
        "images": len(index),
        "classes": list(index.classes),
        "verified": index.verified,
        "quarantined": [{"name": printable(b.path), "reason": b.reason} for b in index.bad],
        "ignored": index.ignored,
        "notes": list(index.notes),
        "fingerprint": index.fingerprint,
        "read": read,
        "seconds": round(seconds, 3),
        "images_per_second": round(read / max(seconds, 1e-9), 1),
    }


def _text(report: dict[str, Any]) -> str:
    classes, checked = report["classes"], "verified" if report["verified"] else "headers read"
    some = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    lines = [
        f"{report['root']}: {report['images']:,} images ({checked})",
        f"classes: {len(classes)} ({some})" if classes else "classes: none, the set is unlabelled",
        f"quarantined: {len(report['quarantined'])}; other files ignored: {report['ignored']:,}",
        *(f"  {bad['name']}: {bad['reason']}" for bad in report["quarantined"]),
        *(f"note: {note}" for note in report["notes"]),
        f"read {report['read']:,} files in {report['seconds']:.1f} s, "
        f"{report['images_per_second']:,.0f} images/s; fingerprint {report['fingerprint'][:16]}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end it
    sys.exit(main())
