"""Files in a folder of checkpoints: names, hashes, which of them stay, which are damaged.

Damaged files are renamed (`step-00000006.pt.damaged`), never deleted and never counted among those
that stay. A file that the system cannot read (no permission, I/O error) may be whole: it is left
where it is, and not counted either.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

from byol_fast.errors import CheckpointError, UnreadableError

log = logging.getLogger(__name__)

DAMAGED = ".damaged"  # behind the name of a file that was set aside
_NAME = re.compile(r"step-(\d{8,})\.pt")
# Stamps of checkpoints whose hash was right, so that one that stays is not read at each rotation.
_known_whole: dict[Path, tuple[int, ...]] = {}


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}.pt"


def hash_path(path: Path) -> Path:
    """The file with the sha256 of a checkpoint."""
    return path.with_name(path.name + ".sha256")


def has_hash(path: Path) -> bool:
    """Whether `path` is a checkpoint with its hash beside it. Under other names a `.sha256` is
    somebody else's, and may have another form."""
    return bool(_NAME.fullmatch(path.name)) and hash_path(path).is_file()


def found(folder: Path) -> Iterator[Path]:
    """Checkpoint files, the newest step first."""
    named = [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)]
    yield from sorted(named, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    matched = _NAME.fullmatch(path.name)
    assert matched
    return int(matched[1])


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_whole(path: Path) -> None:
    """Compare a checkpoint with its hash.

    Raises:
        UnreadableError: the system could not read it.
        CheckpointError: it is not there, its hash is missing, or they differ.
    """
    of_hash = hash_path(path)
    try:
        # Not is_file(): that calls a file gone that the system fails to look up.
        if stat.S_ISDIR(path.stat().st_mode):
            raise UnreadableError(f"{path}: is a folder, not a checkpoint")
        before = of_hash.read_bytes().strip()
        if file_hash(path).encode() != before:
            raise CheckpointError(f"{path}: content does not match {of_hash.name}: damaged")
    except FileNotFoundError as error:
        if error.filename == str(of_hash) and path.exists():
            raise CheckpointError(f"{path}: its hash file {of_hash.name} is missing") from error
        raise CheckpointError(f"{path}: there is no such checkpoint") from error
    except OSError as error:  # no rights, or a disk that fails
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from error


def set_aside(path: Path, reason: CheckpointError) -> None:
    """Rename a damaged checkpoint and its hash; one that could not be read stays where it is."""
    if isinstance(reason, UnreadableError):
        log.warning("%s stays where it is, as it may be whole, and is not counted", path)
        return
    names = (path.with_name(f"{path.name}{DAMAGED}{n or ''}") for n in itertools.count())
    target = next(name for name in names if not name.exists())
    try:
        os.replace(path, target)
        with contextlib.suppress(FileNotFoundError):
            os.replace(hash_path(path), hash_path(target))
    except FileNotFoundError:
        return  # removed by somebody else
    except OSError as error:
        log.warning("%s is damaged and could not be renamed (%s): not counted", path, error)
        return
    log.warning("%s was set aside as %s; remove it when you have no use for it", path, target.name)


def rotate(folder: Path, newest: int, keep: int, keep_every: int | Fraction | None) -> None:
    """Remove what need not stay beside the checkpoint of step `newest`, which is whole.

    What stays in place of a removed file is compared with its hash first, unless it has not changed
    since. Files of later steps could not be read, or are another run's: they are left.
    """
    files = {step: path for path in found(folder) if (step := step_of(path)) <= newest}
    while spare := surplus(files, keep, keep_every):
        refused = {
            step: reason
            for step in _in_their_place(files, spare, keep, keep_every)
            if step != newest and (reason := _refused(files[step])) is not None
        }
        for step, reason in refused.items():
            log.warning("not counted: %s", reason)
            set_aside(files.pop(step), reason)
        if not refused:
            break
    for step in spare:
        try:
            files[step].unlink(missing_ok=True)
            hash_path(files[step]).unlink(missing_ok=True)
        except OSError as error:  # the new one is on the disk all the same
            log.warning("%s could not be removed: %s", files[step], error)
        _known_whole.pop(files[step], None)


def surplus(steps: Iterable[int], keep: int, every: int | Fraction | None) -> list[int]:
    """Which checkpoints need not stay: neither among the newest `keep` nor the first of a span."""
    ordered = sorted(steps)
    spare, span = [], 0
    for step in ordered[:-keep]:
        if every is not None and step // every > span:
            span = step // every
        else:
            spare.append(step)
    return spare


def _in_their_place(
    steps: Mapping[int, Path], spare: list[int], keep: int, every: int | Fraction | None
) -> list[int]:
    """The steps whose files make those of `spare` needless: the newest, and the first of a span."""
    newest = sorted(steps)[-keep:]
    if every is None:
        return newest
    spans = {step // every for step in spare}
    return newest + [s for s in steps if s not in (*spare, *newest) and s // every in spans]


def _refused(path: Path) -> CheckpointError | None:
    """Why a checkpoint is not whole, or None; its content is read unless it is known."""
    stamp = _stamp(path)
    if stamp is not None and _known_whole.get(path) == stamp:
        return None
    try:
        require_whole(path)
    except CheckpointError as error:
        return error
    # Within a tick of the clock a file can change and keep its times.
    if stamp is not None and time.time_ns() - max(stamp[-2:]) > 2 * 10**9:
        _known_whole[path] = stamp
    return None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Inodes, sizes and times of a checkpoint and its hash."""
    try:
        stats = path.stat(), hash_path(path).stat()
    except OSError:
        return None
    what = (n for each in stats for n in (each.st_ino, each.st_size, each.st_mtime_ns))
    return *what, *(each.st_ctime_ns for each in stats)


def sweep(folder: Path) -> None:
    """Remove what an interrupted `save` left behind: temporary files and hashes without a file."""
    for leftover in folder.glob("step-*.tmp*"):
        leftover.unlink(missing_ok=True)
    for of_hash in folder.glob("step-*.pt.sha256"):
        if not of_hash.with_suffix("").exists():
            of_hash.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        write(temporary, text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    """Write a small file through to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
