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
from pipelines.indexbuild import make_index, notes_on, root_listing
from pipelines.indexfile import Index, keep, load, locations, save
from pipelines.listing import walk
from pipelines.progress import Progress
from pipelines.scan import printable, refuse_hidden
from pipelines.stores.tarbuild import open_tar_index, stored_tar_index
from pipelines.stores.tarindex import TarIndex
from pipelines.stores.tarshards import is_tar

log = logging.getLogger(__name__)

_SETTLED = 2 * 10**9  # ns: a folder changed so shortly before it was listed may change unseen
_AHEAD = 86_400 * 10**9  # ns: a time further in the future is no clock's that will set it again


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
    index, _, why = _find(data)
    return None if why else index


def why_stale(root: Path) -> str:
    """Why the index of a folder does not hold; empty where it holds or there is none."""
    return _find(root)[2]


def folder_notes(root: Path, progress: Progress) -> list[str]:
    """The notes that an index of a folder would have; no image is read.

    Raises:
        OSError: the folder cannot be listed.
        DataError: as `open_index`.
    """
    return notes_on(root, walk(os.fsencode(root), progress))


def _open(
    root: Path, verify: bool, workers: int | None, progress: bool, refresh: bool
) -> tuple[Index, int]:
    """The index, and how many files were read for it."""
    previous, path, why = _find(root)
    if previous is not None and path is not None:
        if not why and not refresh and (previous.verified or not verify):
            return previous, 0
        try:
            previous = load(path, root, stats=True)
        except (DataError, FileNotFoundError):
            previous = None  # replaced since by another process
    index, read = make_index(root, previous, verify=verify, workers=workers, progress=progress)
    keep(root, partial(save, index))
    return index, read


def _find(root: Path) -> tuple[Index | None, Path | None, str]:
    """The index to start from, its file, and why it does not hold: one that does if there is one.

    Empty where it holds, and where there is none.
    """
    found: tuple[Index | None, Path | None, str] = (None, None, "")
    for path in locations(root):
        try:
            index = load(path, root)
        except FileNotFoundError:
            continue
        except DataError as error:
            log.warning("%s: indexing again", error)
            continue
        if not (why := _change(index)):
            return index, path, ""
        if found[0] is None:
            found = (index, path, why)
    return found


def _change(index: Index) -> str:
    """What has changed since a folder was listed; empty where nothing has."""
    root = os.fsencode(index.root)
    try:
        for folder, mtime in zip(index.dirs, index.dir_mtimes.tolist(), strict=True):
            now, name = os.stat(os.path.join(root, folder)).st_mtime_ns, printable(folder or b".")
            if now != mtime:
                return f"the folder {name} has changed"
            if index.scanned_at - _SETTLED < now < index.scanned_at + _AHEAD:
                return (
                    f"the folder {name} was changed less than {_SETTLED / 1e9:g} s before it was "
                    "listed, or its time is ahead of this machine's clock"
                )
        for bad in index.bad:
            if bad.refused and os.access(os.path.join(root, bad.path), os.R_OK):
                return f"{printable(bad.path)} can be read now"
        return "" if root_listing(root) == index.listing else "the names in it have changed"
    except OSError as error:
        return f"{printable(error.filename or root)} cannot be looked at ({error.strerror})"


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
        elif os.path.isfile(args.dir):
            return _show(_report_of_file(args.dir, args.verify, args.workers), args.json)
        else:
            raise DataError(f"{args.dir} is not a folder: name the folder that holds the images")
        _show(_report(index, read, time.perf_counter() - start), args.json)
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
        "notes": [printable(note) for note in index.notes],
        "fingerprint": index.fingerprint,
        "read": read,
        "seconds": round(seconds, 3),
        "images_per_second": round(read / max(seconds, 1e-9), 1),
    }


def _report_of_file(path: Path, verify: bool, workers: int | None) -> dict[str, Any]:
    """The report of a list, whose images are indexed, or of a file that needs no index."""
    from pipelines.notes import notes_of
    from pipelines.stores import open_store

    start = time.perf_counter()
    store = open_store(path, verify=verify, workers=workers, quiet=True)
    return {
        "root": printable(str(path)),
        "images": len(store),
        "classes": list(store.classes),
        "verified": getattr(store, "verified", False),
        "quarantined": [{"name": name, "reason": reason} for name, reason in store.quarantined],
        "ignored": 0,
        "notes": [printable(note) for note in notes_of(store)],
        "fingerprint": store.fingerprint,
        "read": 0,
        "seconds": round(time.perf_counter() - start, 3),
        "images_per_second": 0.0,
    }


def _show(report: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(report, indent=2) if as_json else _text(report))
    return 0


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
