"""Checkpoints that are whole or not there: temporary file, fsync, sha256, rename.

A run keeps `checkpoints/step-00012345.pt` with `step-00012345.pt.sha256` beside it. The hash is put
in place before the file it describes, so a checkpoint under its final name always has one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from byol_fast.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.pt")


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step`, then remove all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder; made if missing.
        state: tensors, numbers, strings and containers of them.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        _write(_hash_path(path), file_hash(temporary) + "\n")
        os.replace(temporary, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on ENOSPC
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"checkpoint of step {step} was NOT saved to {path}: {error}. "
            f"Free some space (or fix the folder's permissions) and repeat the command"
        ) from error
    for old in list(_found(folder))[keep:]:
        old.unlink(missing_ok=True)
        _hash_path(old).unlink(missing_ok=True)
    return path


def load(path: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint after checking its hash. Nothing in it is ever executed.

    Raises:
        CheckpointError: hash missing or different, file truncated, foreign, or not plain data.
    """
    hash_path = _hash_path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    if not hash_path.is_file():
        raise CheckpointError(f"{path}: its hash file {hash_path.name} is missing")
    if file_hash(path) != hash_path.read_text().strip():
        raise CheckpointError(f"{path}: content does not match {hash_path.name}: damaged")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
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
            return load(path, map_location=map_location)
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


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    _write(temporary, text)
    os.replace(temporary, path)


def _found(folder: Path) -> Iterator[Path]:
    """Checkpoint files, the newest step first."""
    named = [(m, p) for p in folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
    yield from (p for _, p in sorted(named, key=lambda pair: -int(pair[0][1])))


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
