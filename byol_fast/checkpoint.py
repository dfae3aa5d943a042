"""Checkpoints that are whole or not there: temporary file, fsync, sha256, rename.

A run keeps `checkpoints/step-00012345.pt` with `step-00012345.pt.sha256` beside it. The hash is put
in place before the file it describes, so a checkpoint under its final name always has one.
`async_checkpoint.py` does this beside the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch

from byol_fast.errors import CheckpointError, SaveError

log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.pt")
_OVERHEAD = 1 << 20  # bytes of a file besides its tensors: names, settings, the zip's table


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int | Fraction | None = None,
    before: Callable[[], None] | None = None,
) -> Path:
    """Write `state` as the checkpoint of `step`, then remove those that need not stay.

    Args:
        folder: the run's `checkpoints` folder; made if missing.
        state: tensors, numbers, strings and containers of them.
        keep: how many of the newest stay.
        keep_every: steps; of each span of that many the first checkpoint stays for good.
        before: called before the file gets its name, for what has to be on the disk by then.

    Raises:
        SaveError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    path = path_of(folder, step)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        prepare(folder)
        _require_space(folder, nbytes(state) + _OVERHEAD)
        with open(temporary, "wb") as raw:
            file = _HashedFile(raw)
            torch.save({"format": FORMAT, "step": step, **state}, file)  # type: ignore[arg-type]
            file.flush()
            os.fsync(raw.fileno())
        if before is not None:
            before()
        _write(_hash_path(path), file.sha256.hexdigest() + "\n")
        os.replace(temporary, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on ENOSPC
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(
            f"checkpoint of step {step} was NOT saved to {path}: {error}. "
            f"Free some space (or fix the folder's permissions) and repeat the command"
        ) from error
    _tidy(folder, step, keep, keep_every)
    return path


def _tidy(folder: Path, newest: int, keep: int, keep_every: int | Fraction | None) -> None:
    """Remove what need not stay beside the checkpoint of step `newest`.

    Files of later steps are damaged ones that were passed over: counted among the newest they would
    crowd out the very checkpoint that was just written.
    """
    found = {step: path for path in _found(folder) if (step := _step(path)) <= newest}
    for step in surplus(found, keep, keep_every):
        try:
            found[step].unlink(missing_ok=True)
            _hash_path(found[step]).unlink(missing_ok=True)
        except OSError as error:  # the new one is on the disk all the same
            log.warning("%s could not be removed: %s", found[step], error)


def prepare(folder: Path) -> None:
    """Make the folder and sweep it. Raises OSError where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    sweep(folder)


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


def nbytes(state: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(nbytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(nbytes, state))
    return 0


def load(path: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint after checking its hash. Nothing in it is ever executed.

    Raises:
        CheckpointError: hash missing or different, file truncated, foreign, or not plain data.
    """
    hash_path = _hash_path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such checkpoint")
        if not hash_path.is_file():
            raise CheckpointError(f"{path}: its hash file {hash_path.name} is missing")
        if file_hash(path).encode() != hash_path.read_bytes().strip():  # it may be damaged itself
            raise CheckpointError(f"{path}: content does not match {hash_path.name}: damaged")
    except OSError as error:  # no rights, or a disk that fails
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    from byol_fast.interop import files

    try:
        state = files.plain(path, map_location)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as plain data: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program (format {FORMAT})")
    return state


def latest(folder: Path, *, map_location: Any = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint of `folder` that is whole, or None if there has never been one.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be loaded.
    """
    reasons = []
    for path in _found(folder):
        try:
            state = load(path, map_location=map_location)
            if state.get("step") != _step(path):
                raise CheckpointError(f"{path}: holds step {state.get('step')}: it was renamed")
            return state
        except CheckpointError as error:
            log.warning("skipped %s", error)
            reasons.append(str(error))
    if not reasons:
        return None
    listed = "\n  ".join(reasons)
    raise CheckpointError(
        f"no checkpoint in {folder} can be loaded:\n  {listed}\n"
        f"Put a good copy back, or move the folder away to start from the beginning"
    )


def sweep(folder: Path) -> None:
    """Remove what an interrupted `save` left behind: temporary files and hashes without a file."""
    for leftover in folder.glob("step-*.tmp*"):
        leftover.unlink(missing_ok=True)
    for hash_path in folder.glob("step-*.pt.sha256"):
        if not hash_path.with_suffix("").exists():
            hash_path.unlink(missing_ok=True)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}.pt"


def has_hash(path: Path) -> bool:
    """Whether `path` is a checkpoint with its hash beside it. Under other names a `.sha256` is
    somebody else's, and may have another form."""
    return bool(_NAME.fullmatch(path.name)) and _hash_path(path).is_file()


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        _write(temporary, text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _found(folder: Path) -> Iterator[Path]:
    """Checkpoint files, the newest step first."""
    named = [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)]
    yield from sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found
    return int(found[1])


class _HashedFile:
    """A file that is hashed while it is written: once through the data instead of twice."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free in {folder}"
        )


def _hash_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
