"""Work that is kept between runs: tensors in small files, each whole and unchanged or not used.

A part is a safetensors file whose metadata hold the sha256 of its tensors. It is written to a
temporary file and renamed. One that is damaged is made again; no part is ever an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from byol_fast.export import write_atomically

log = logging.getLogger(__name__)

_STALE = 3600.0  # seconds after which a temporary file belongs to a run that was killed


def digest(key: Mapping[str, Any]) -> str:
    """Hex name of what `key` describes: 128 bits of the sha256 of its JSON."""
    text = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Parts:
    """The parts of one piece of work, in a folder of its own below `root`.

    Args:
        root: None keeps nothing: nothing is found, and nothing is written.
        key: all that the work depends on, JSON values; another key is another folder.
    """

    def __init__(self, root: Path | None, key: Mapping[str, Any]) -> None:
        self.folder = root / digest(key) if root is not None else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
            about = self.folder / "about.json"
            if not about.exists():
                text = json.dumps(key, indent=1, default=str) + "\n"
                write_atomically(about, lambda path: _write_text(path, text))
        except OSError as error:
            log.warning("nothing is kept for a later run (%s): name a folder with --cache", error)
            self.folder = None

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON values of one part, or None where it is missing or damaged."""
        path = self.folder / f"{name}.safetensors" if self.folder is not None else None
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = file.metadata() or {}
            if about["sha256"] != _hash(tensors):
                raise ValueError("its content has changed")
            return tensors, dict(json.loads(about["about"]))
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged and is made again (%s)", path, error)
            return None

    def write(self, name: str, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep one part. Where that fails it is said once, and the run goes on without."""
        if self.folder is None:
            return
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        metadata = {"format": "pt", "sha256": _hash(tensors), "about": json.dumps(about)}
        try:
            write_atomically(
                self.folder / f"{name}.safetensors",
                lambda path: safetensors.torch.save_file(tensors, path, metadata=metadata),
            )
        except OSError as error:
            log.warning("from here on nothing is kept for a later run: %s", error)
            self.folder = None


def _hash(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        total.update(f"{key} {value.dtype} {[*value.shape]}".encode())
        total.update(value.contiguous().numpy().reshape(-1).view("uint8").data)
    return total.hexdigest()


def _sweep(folder: Path) -> None:
    for leftover in folder.glob("*.tmp*"):
        if time.time() - leftover.stat().st_mtime > _STALE:
            leftover.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
