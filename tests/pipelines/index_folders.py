"""Folders of images to index, and what their indexes say."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import scan
from pipelines.index import open_index
from pipelines.indexfile import Index


def jpeg(height: int = 20, width: int = 30, value: int = 90) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[::2] //= 3
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def fill(root: Path, files: dict[str, bytes | None]) -> Path:
    """Writes files (None: an ordinary picture) and sets the folders' times a minute back."""
    for i, (name, data) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20 + i) if data is None else data)
    settle(root)
    return root


def settle(root: Path, ago: float = 60.0) -> None:
    """As if the folders had been changed a while ago: an index can be relied on at once."""
    for folder, _, _ in os.walk(root):
        now = os.stat(folder).st_mtime
        os.utime(folder, (now - ago, now - ago))


def three_classes(root: Path) -> Path:
    return fill(root, {f"{c}/{i}.jpg": None for c in ("cat", "dog", "eel") for i in range(4)})


def quietly(root: Path, **options: object) -> Index:
    return open_index(root, progress=False, **options)  # type: ignore[arg-type]


def paths(index: Index) -> list[str]:
    return [os.fsdecode(index.below(row)) for row in range(len(index))]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that is read from now on."""
    seen: list[str] = []
    real = scan.measure_file

    def counted(path: bytes, *, verify: bool) -> tuple[int, int]:
        seen.append(os.path.basename(os.fsdecode(path)))
        return real(path, verify=verify)

    monkeypatch.setattr(scan, "measure_file", counted)
    return seen
