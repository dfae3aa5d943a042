"""What an `.npz` declares, before any of it is inflated: deflate can pack 3 GB into 3 MB."""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

_LARGEST_FREE = 256 << 20  # bytes that any array may inflate to
_MOST_RATIO = 200  # of larger ones: zeros pack 1000 to 1, drawings and masks 20 to 50
_DIMENSIONS = 32


@dataclass(frozen=True)
class Header:
    """One array, as its file describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int  # of the array
    packed: int  # bytes in the file


def headers(path: Path | IO[bytes]) -> dict[str, Header]:
    """Name -> header of every array.

    Raises:
        ValueError: no archive of arrays, one of objects (a pickle), or one whose size is not the
            one it declares.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as file:
                shape, dtype, length = _header(file)
            nbytes = math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise ValueError(f"{info.filename} holds objects, which are pickles")
            if length + nbytes != info.file_size:
                raise ValueError(
                    f"{info.filename} declares {nbytes:,} bytes and has {info.file_size - length:,}"
                )
            name = info.filename.removesuffix(".npy")
            found[name] = Header(shape, dtype, nbytes, info.compress_size)
    return found


def check(header: Header, name: str) -> None:
    """Raises ValueError for an array that inflates as no data does, or beyond this machine."""
    if header.nbytes > max(_LARGEST_FREE, _MOST_RATIO * header.packed):
        raise ValueError(
            f"`{name}` would inflate from {header.packed:,} to {header.nbytes:,} bytes, which is "
            "no data but a trap; save it with np.savez if it is yours"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if header.nbytes > memory:
        raise ValueError(
            f"`{name}` needs {header.nbytes:,} bytes and this machine has {memory:,}: save the "
            "images as .npy, of which one image at a time is read"
        )


def load(path: Path | IO[bytes]) -> Any:
    """`np.load` of an `.npz` all of whose arrays pass `check`.

    Raises:
        ValueError: an array does not pass.
        Exception: nearly anything, for a damaged file.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("a single array, or no archive of arrays")
    for name, header in headers(path).items():
        check(header, name)
    if not isinstance(path, Path):
        path.seek(0)
    return np.load(path, allow_pickle=False)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and length of an `.npy` header."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if len(shape) > _DIMENSIONS or any(side < 0 for side in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, dtype, file.tell()
