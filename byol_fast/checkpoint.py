"""Checkpoints that are whole or not there: temporary file, fsync, read back, sha256, rename.

A run keeps `checkpoints/step-00012345.pt` with `step-00012345.pt.sha256` beside it. The hash is put
in place before the file it describes, so a checkpoint under its final name always has one.
`checkpoint_files.py` names them and decides which stay; `async_checkpoint.py` saves them beside the
training.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch

from byol_fast.checkpoint_files import (
    file_hash,
    found,
    has_hash,
    hash_path,
    path_of,
    require_whole,
    rotate,
    set_aside,
    step_of,
    surplus,
    sweep,
    sync_folder,
    write,
    write_text,
)
from byol_fast.errors import CheckpointError, SaveError, UnreadableError
from byol_fast.memory import is_out_of_memory

__all__ = [
    "file_hash",
    "has_hash",
    "latest",
    "load",
    "nbytes",
    "path_of",
    "prepare",
    "save",
    "surplus",
    "sweep",
    "write_text",
]

log = logging.getLogger(__name__)

FORMAT = 1
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

    Nothing is removed before the new file has been read back from the disk and its hash compared.

    Args:
        folder: the run's `checkpoints` folder; made if missing.
        state: tensors, numbers, strings and containers of them.
        keep: how many of the newest stay; damaged ones are not counted.
        keep_every: steps; of each span of that many the first checkpoint stays for good.
        before: called before the file gets its name, for what has to be on the disk by then.

    Raises:
        SaveError: the disk is full, read-only or failing; earlier checkpoints are untouched.
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
        digest = file.sha256.hexdigest()
        if _read_back(temporary) != digest:
            raise OSError("the file does not read back as it was written: check the disk")
        if before is not None:
            before()
        write(hash_path(path), digest + "\n")
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on ENOSPC
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(
            f"checkpoint of step {step} was NOT saved to {path}: {error}. "
            f"Free some space (or fix the folder's permissions) and repeat the command"
        ) from error
    rotate(folder, step, keep, keep_every)
    return path


def prepare(folder: Path) -> None:
    """Make the folder and sweep it. Raises OSError where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    sweep(folder)


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
        UnreadableError: the system could not read it, which says nothing about its content.
        CheckpointError: hash missing or different, file truncated, foreign, or not plain data.
    """
    require_whole(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: cannot be read as plain data: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program (format {FORMAT})")
    return state


def latest(
    folder: Path, *, map_location: Any = "cpu", rename_damaged: bool = False
) -> dict[str, Any] | None:
    """The newest checkpoint of `folder` that is whole, or None if there has never been one.

    Args:
        rename_damaged: rename the damaged ones that are newer than it (`….pt.damaged`); for the
            process that writes here. If none is whole nothing is renamed.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be loaded.
    """
    refused: dict[Path, CheckpointError] = {}
    # Listed anew each time: the run that writes here may rotate away what was listed before.
    while path := next((path for path in found(folder) if path not in refused), None):
        try:
            state = load(path, map_location=map_location)
            if state.get("step") != step_of(path):
                raise CheckpointError(f"{path}: holds step {state.get('step')}: it was renamed")
        except CheckpointError as error:
            log.warning("skipped %s", error)
            refused[path] = error
            continue
        if rename_damaged:
            for damaged, error in refused.items():
                set_aside(damaged, error)
        return state
    if not refused:
        return None
    listed = "\n  ".join(map(str, refused.values()))
    raise CheckpointError(
        f"no checkpoint in {folder} can be loaded:\n  {listed}\n"
        f"Put a good copy back, or move the folder away to start from the beginning"
    )


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


def _read_back(path: Path) -> str:
    """sha256 of what the disk holds, not of the page cache's copy where that can be dropped."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file_hash(path)
