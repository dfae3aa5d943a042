"""`OUT.beton.json`, written beside a `.beton`: what is in it, where it came from, its sha256."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import IO, Any

from pipelines.progress import Progress
from pipelines.scan import printable
from pipelines.stores.betonfile import BetonFile

log = logging.getLogger(__name__)

FORMAT = 1  # raised whenever the meaning of an entry changes


def sidecar_path(beton: Path) -> Path:
    """`train.beton.json` for `train.beton`."""
    return beton.with_name(f"{beton.name}.json")


def read_sidecar(beton: BetonFile) -> dict[str, Any] | None:
    """The entries of a file's sidecar; None where there is none, or it is another file's.

    It is this file's if the sha256 of the tables in the file is the one the sidecar has. The sha256
    of the whole file is not computed here: `python -m pipelines.convert --check` does that.
    """
    path = sidecar_path(beton.path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries["format"] != FORMAT:
            raise ValueError(f"format {entries['format']}, this version reads {FORMAT}")
        if entries["tables_sha256"] != beton.tables_sha256 or entries["bytes"] != beton.size:
            raise ValueError("it describes another file")
        int(entries["sha256"], 16)
        [str(name) for name in entries["classes"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("%s is not used (%s: %s)", printable(path), type(error).__name__, error)
        return None
    return dict(entries)


def sha256_of(file: IO[bytes], progress: Progress) -> str:
    """Hex sha256 of a whole file; `progress` counts MiB."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(8 << 20):
        digest.update(block)
        progress.advance(len(block) >> 20)
    return digest.hexdigest()
