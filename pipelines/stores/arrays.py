"""Images in memory, or in an `.npz` / `.npy` file: uint8 `[N, H, W, 3]`, or grey `[N, H, W]`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.decode import MAX_PIXELS
from pipelines.errors import DataError
from pipelines.stores import MOST_CLASSES
from pipelines.stores.openfile import OpenFile

_HASH_WHOLE = 2 << 30  # bytes: 2 s of sha256; of more, every k-th image is hashed


class NpyFile:
    """The array in an `.npy` file, read and not mapped: a file cut short while it is in use would
    end the process with SIGBUS where a read gives an error.

    Args:
        mapped: the array as numpy maps it, C-contiguous; its pixels are not touched.
    """

    def __init__(self, path: Path, mapped: Any) -> None:
        self.shape, self.dtype, self.ndim = mapped.shape, mapped.dtype, mapped.ndim
        self.nbytes, self._offset = mapped.nbytes, mapped.offset
        self._row = self.nbytes // self.shape[0]
        self._file = OpenFile(path)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: int | slice) -> npt.NDArray[np.uint8]:
        """One image, or some.

        Raises:
            IndexError: there is no such row.
            DataError: the file was cut short, or the system cannot read it.
        """
        if not isinstance(rows, slice):
            row = range(len(self))[rows]
            return self._file.read_pixels(self._offset + row * self._row, *self.shape[1:])
        wanted = range(len(self))[rows]
        if wanted.step != 1:
            return np.stack([self[row] for row in wanted])
        shape = len(wanted), *self.shape[1:]
        return self._file.read_pixels(self._offset + wanted.start * self._row, *shape)


class ArrayStore:
    """Images that are arrays already. Nothing is copied.

    Args:
        images: uint8 `[N, H, W, 3]`, `[N, H, W, 1]` or `[N, H, W]`.
        labels: `[N]` class numbers from 0, -1 for an unlabelled image; None if there are none.
        classes: names of the classes; by default their numbers.
        where: what messages and `name` call the array.
    """

    encoded = False
    quarantined: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        images: npt.ArrayLike | NpyFile,
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        *,
        where: str = "images",
    ) -> None:
        if not isinstance(images, NpyFile):
            images = np.asanyarray(images)
        _check_images(images, where)
        self.where, self.images = where, images
        n = len(self.images)
        self.labels = _check_labels(labels, n, where)
        count = int(self.labels.max()) + 1
        self.classes = tuple(str(c) for c in (range(count) if classes is None else classes))
        if count > len(self.classes):
            raise DataError(
                f"{where}: label {count - 1} has no name in `classes` ({len(self.classes)} names): "
                "name every class, or leave `classes` out"
            )
        size = np.array(self.images.shape[1:3], dtype=np.int32)
        self.sizes: npt.NDArray[np.int32] = np.broadcast_to(size, (n, 2))
        self.fingerprint = _fingerprint(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> npt.NDArray[np.uint8]:
        """Pixels `[H, W, 3]` of row `row`; may be a view that must not be written to.

        Raises:
            DataError: of an `.npy` file, see `NpyFile`.
        """
        image = np.asarray(self.images[row])
        if image.ndim == 2:
            image = image[:, :, None]
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image

    def name(self, row: int) -> str:
        """`images[12]`."""
        return f"{self.where}[{row}]"


def load_arrays(path: Path) -> ArrayStore:
    """The store in an `.npz` file (`images`, optional `labels`, `classes`) or an `.npy` file.

    Of an `.npy` file each image is read when it is needed. Object arrays are refused: they are
    pickles.
    """
    try:
        arrays = _read(path)
    except DataError:
        raise
    except Exception as error:  # damaged zip, deflate and array headers raise nearly anything
        raise DataError(
            f"{path} cannot be read as arrays ({type(error).__name__}: {error}): write it again"
        ) from error
    return ArrayStore(*arrays, where=str(path))


def _read(
    path: Path,
) -> tuple[npt.NDArray[Any] | NpyFile, npt.NDArray[Any] | None, list[str] | None]:
    """Images, labels and names of classes."""
    loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if loaded.dtype != np.uint8 or not loaded.size or not loaded.ndim:
            return loaded, None, None  # refused, untouched
        if not loaded.flags.c_contiguous:  # images in Fortran's order lie all over the file
            loaded = np.ascontiguousarray(np.load(path, allow_pickle=False))
            return loaded, None, None
        return NpyFile(path, loaded), None, None
    with loaded:
        if "images" not in loaded:
            raise DataError(
                f"{path} has no array `images`, only {sorted(loaded)}: "
                "save it as np.savez(path, images=..., labels=...)"
            )
        labels, names = loaded.get("labels"), loaded.get("classes")
        if names is not None and names.ndim != 1:
            raise DataError(
                f"{path}: `classes` must be a list of names, got shape {names.shape}: "
                "save it as np.savez(path, images=..., labels=..., classes=['ant', 'bee', ...])"
            )
        classes = None if names is None else names.astype(str).tolist()
        return loaded["images"], labels, classes


def _check_images(images: npt.NDArray[Any] | NpyFile, where: str) -> None:
    shape = images.shape
    if images.dtype != np.uint8:
        raise DataError(f"{where} must be uint8 pixels in 0..255, got {images.dtype}: convert them")
    if images.ndim == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        raise DataError(
            f"{where} has its channels first, {shape}: use images.transpose(0, 2, 3, 1)"
        )
    if images.ndim not in (3, 4) or (images.ndim == 4 and shape[3] not in (1, 3)):
        raise DataError(f"{where} must be [N, H, W, 3], [N, H, W, 1] or [N, H, W], got {shape}")
    if 0 in shape:
        raise DataError(f"{where} holds no pixels, its shape is {shape}: give at least one image")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise DataError(f"{where}: {shape[1]} x {shape[2]} pixels are more than {MAX_PIXELS:,}")


def _check_labels(labels: npt.ArrayLike | None, n: int, where: str) -> npt.NDArray[np.int32]:
    if labels is None:
        return np.full(n, -1, dtype=np.int32)
    array = np.asarray(labels)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{where}: labels must be {n} whole numbers, one an image, "
            f"got shape {array.shape} of {array.dtype}"
        )
    if array.min() < -1 or array.max() >= MOST_CLASSES:
        raise DataError(
            f"{where}: labels must count classes from 0 (-1: unlabelled), "
            f"got {array.min()} to {array.max()}"
        )
    return array.astype(np.int32)


def _fingerprint(images: npt.NDArray[np.uint8] | NpyFile, labels: npt.NDArray[np.int32]) -> str:
    """sha256 of shape, pixels and labels; of an array over 2 GiB, of evenly spaced images."""
    digest = hashlib.sha256(f"{images.shape}".encode())
    every = -(-images.nbytes // _HASH_WHOLE)
    step = max(1, (1 << 24) // max(1, images[0].nbytes)) * every
    for first in range(0, len(images), step):
        digest.update(np.ascontiguousarray(images[first : first + step : every]).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()
