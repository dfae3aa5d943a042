"""The data a run reads: photograph-like JPEGs where none are given, and stores made of a folder."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import DataError
from pipelines.stores import Store, open_store

STORES = ("folder", "beton", "tar")
_SHARD = 1000  # images in one tar file


def generate(folder: Path, images: int) -> Path:
    """JPEGs of ImageNet's usual size, 500 x 375, and weight, about 110 KB."""
    (folder / "generated").mkdir()
    for number in range(images):
        rng = np.random.default_rng(number)
        pixels = np.full((375, 500, 3), 120.0)
        for cell, strength in ((1, 18), (4, 12), (16, 25), (64, 45)):
            small = (375 // cell + 1, 500 // cell + 1)
            for channel in range(3):
                layer = Image.fromarray(rng.normal(0, strength, small).astype(np.float32))
                pixels[..., channel] += np.asarray(
                    layer.resize((500, 375), Image.Resampling.BICUBIC)
                )
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
        (folder / "generated" / f"{number:04}.jpg").write_bytes(file.getvalue())
    return folder


def make_stores(
    folder: str, names: list[str], scratch: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """The same images in each of the stores `names`: what `open_store` takes, and why not.

    The bytes of every image are the folder's own, so that all rows of a table do the same work.
    """
    made: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            match name:
                case "folder":
                    path = Path(folder)
                case "tar":
                    path = make_tar(open_store(folder, verify=False), scratch / "tar")
                case "beton":
                    path = make_beton(folder, scratch / "images.beton")
                case _:
                    raise ValueError(f"stores are {', '.join(STORES)}, got {name!r}")
            open_store(path, verify=False)  # indexed once, before the rows start
            made[name] = str(path)
        except DataError as error:
            missing[name] = str(error)
    return made, missing


def make_beton(folder: str, file: Path) -> Path:
    """The folder converted by this package's own command.

    Raises:
        DataError: what the command said.
    """
    command = [sys.executable, "-m", "pipelines.convert", folder, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DataError((done.stderr or done.stdout).strip().rpartition("\n")[2])
    return file


def make_tar(store: Store, folder: Path) -> Path:
    """WebDataset shards of an encoded store: a number's `.jpg` (or other suffix) and `.cls`."""
    folder.mkdir()
    for start in range(0, len(store), _SHARD):
        with tarfile.open(folder / f"images-{start // _SHARD:06}.tar", "w") as shard:
            for row in range(start, min(start + _SHARD, len(store))):
                data = store.read(row)
                assert isinstance(data, bytes)
                _add(shard, f"{row:08}{Path(store.name(row)).suffix.lower()}", data)
                _add(shard, f"{row:08}.cls", str(max(0, int(store.labels[row]))).encode())
    return folder


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))
