"""The `.beton` format of FFCV, version 2: its layout, and reading it without the ffcv package.

    header | field descriptors | one metadata row a sample | pages of data | allocation table

An image's metadata says how it is stored (a JPEG, or its pixels), its width and height and where
its data begins; how long the data is stands only in the allocation table, found by that pointer. No
data crosses the border of a page, and the header is written last. Nothing has a checksum, so every
pointer is checked here before it is followed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipelines.decode import MAX_PIXELS
from pipelines.errors import DataError
from pipelines.scan import open_regular, printable
from pipelines.stores import MOST_CLASSES

log = logging.getLogger(__name__)

VERSION = 2
JPEG, RAW = 0, 1  # an image's mode

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page_size", "<u4"),  # a power of two; page k begins at byte k * page_size
        ("samples", "<u8"),
        ("table", "<u8"),  # where the allocation table begins; it ends with the file
    ]
)
FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

INT_FIELD, IMAGE_FIELD = 1, 2
_POINTER_AND_SIZE = np.dtype([("pointer", "<u8"), ("size", "<u8")])
_METADATA = {  # by the kind of a field: what each sample's row holds of it
    0: np.dtype("<f8"),
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: IMAGE,
    3: _POINTER_AND_SIZE,  # bytes
    4: np.dtype("<u8"),  # an array
    5: _POINTER_AND_SIZE,  # JSON
    6: np.dtype("<u8"),  # a tensor
}
_AGAIN = "copy it again, or write it again with python -m pipelines.convert"


def row_type(kinds: Sequence[int]) -> np.dtype[Any]:
    """A sample's metadata row: `f0`, `f1`, ... in the order of the fields, aligned as in C."""
    return np.dtype([(f"f{i}", _METADATA[kind]) for i, kind in enumerate(kinds)], align=True)


@dataclass(frozen=True, kw_only=True)
class BetonFile:
    """Where the images of a `.beton` file lie: one row a sample, every row within the file."""

    path: Path
    size: int  # bytes
    page_size: int
    image_field: str  # the name of the field that is read
    label_field: str | None  # None where the samples have no label
    sizes: npt.NDArray[np.int32]  # [n, 2] height, width
    labels: npt.NDArray[np.int32]  # [n], -1 where unlabelled
    raw: npt.NDArray[np.bool_]  # [n] stored as pixels, else as a JPEG
    offsets: npt.NDArray[np.int64]  # [n] where the data begins
    lengths: npt.NDArray[np.int64]  # [n] bytes
    tables_sha256: str  # of everything but the images: header, descriptors, metadata, allocations

    def __len__(self) -> int:
        return len(self.offsets)


def load(path: Path) -> BetonFile:
    """Reads the tables of a `.beton` file, written by FFCV or by `pipelines.convert`.

    Tables are mapped and checked as whole columns: 1.28 million rows take less than a second.

    Raises:
        DataError: it is no such file, is unfinished, damaged or truncated, or holds no images.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            return _Tables(path, file).load()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check the path and its rights"
        ) from error


class _Tables:
    """One file while its tables are read; each is mapped only as long as it is looked at."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.digest = hashlib.sha256()

    def load(self) -> BetonFile:
        if self.size < HEADER.itemsize:
            self.fail(f"has {self.size} bytes, fewer than a .beton file's header", _AGAIN)
        header = self.records(HEADER, 0, 1)[0]
        n, table = self.check_header(header)
        fields = self.records(FIELD, HEADER.itemsize, int(header["fields"]))
        names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
        kinds = fields["kind"].tolist()
        image, label = self.choose_fields(kinds, names)
        start = HEADER.itemsize + fields.nbytes
        if table < start + n * row_type(kinds).itemsize:
            self.fail(f"has no room for the {n:,} samples it claims", _AGAIN)
        rows = self.records(row_type(kinds), start, n)
        raw, sizes, offsets = self.images(rows[f"f{image}"])
        labels = np.full(n, -1, np.int32) if label is None else self.labels(rows[f"f{label}"])
        begin = start + rows.nbytes
        del rows, fields  # 31 MB a million samples
        lengths = self.lengths(offsets, table)
        self.check_rows(begin, table, sizes, raw, offsets, lengths)
        return BetonFile(
            path=self.path,
            size=self.size,
            page_size=int(header["page_size"]),
            image_field=names[image],
            label_field=None if label is None else names[label],
            sizes=sizes,
            labels=labels,
            raw=raw,
            offsets=offsets,
            lengths=lengths,
            tables_sha256=self.digest.hexdigest(),
        )

    def fail(self, reason: str, mend: str) -> NoReturn:
        raise DataError(f"{self.path} {reason}: {mend}")

    def records(self, dtype: np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
        """`count` records from `offset` on; what is read is entered in the digest."""
        if count == 0:
            return np.empty(0, dtype)
        if offset + count * dtype.itemsize > self.size:
            self.fail(f"is truncated: it has only {self.size:,} bytes", _AGAIN)
        self.file.seek(offset)  # not mapped: cut short meanwhile, a mapping ends in SIGBUS
        table = np.fromfile(self.file, dtype, count)
        if len(table) < count:
            self.fail("was cut short while it was read", _AGAIN)
        self.digest.update(table.view(np.uint8).data)
        return table

    def check_header(self, header: Any) -> tuple[int, int]:
        """The number of samples, and where the allocation table begins."""
        version, table, page = (
            int(header["version"]),
            int(header["table"]),
            int(header["page_size"]),
        )
        if version == 0 or (version == VERSION and table == 0):
            self.fail("is unfinished: whatever wrote it was stopped", _AGAIN)
        if version != VERSION or page & (page - 1) or not page:
            self.fail(
                f"is no .beton file of version {VERSION} (it begins with {version})",
                "name a file that FFCV or python -m pipelines.convert wrote",
            )
        if table > self.size or (self.size - table) % ALLOCATION.itemsize:
            self.fail(
                f"is truncated: its allocation table begins at byte {table:,} of {self.size:,} and "
                "is not whole",
                _AGAIN,
            )
        if not header["samples"]:
            self.fail("holds no images", "convert a data set that has some")
        return int(header["samples"]), table

    def choose_fields(self, kinds: list[int], names: list[str]) -> tuple[int, int | None]:
        """The image's field, and the label's: the one so named, else the first (the only) one."""
        for kind, name in zip(kinds, names, strict=True):
            if kind not in _METADATA:
                self.fail(
                    f"has a field {name!r} of its writer's own kind ({kind}), whose size is "
                    "nowhere stated",
                    "write it without that field",
                )
        images = [i for i, kind in enumerate(kinds) if kind == IMAGE_FIELD]
        if not images:
            self.fail(f"has no image field, only {names}", "write it with FFCV's RGBImageField")
        image = next((i for i in images if names[i] == "image"), images[0])
        numbers = [i for i, kind in enumerate(kinds) if kind == INT_FIELD]
        label = next((i for i in numbers if names[i] == "label"), None)
        if label is None and len(numbers) > 1:
            log.warning(
                "%s: none of its whole numbers (%s) is named label, so its images are unlabelled",
                *(printable(self.path), printable(", ".join(names[i] for i in numbers))),
            )
        return image, numbers[0] if label is None and len(numbers) == 1 else label

    def images(
        self, rows: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Whether raw, sizes and pointers; those beyond the file become its end, a wrong place."""
        if (rows["mode"] > RAW).any():
            row = int(np.argmax(rows["mode"] > RAW))
            self.fail(f"is damaged: sample {row} has the unknown mode {rows['mode'][row]}", _AGAIN)
        sizes = np.empty((len(rows), 2), np.int32)
        sizes[:, 0], sizes[:, 1] = rows["height"], rows["width"]
        return rows["mode"] == RAW, sizes, np.minimum(rows["pointer"], self.size).astype(np.int64)

    def labels(self, column: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        if column.min() < -1 or column.max() >= MOST_CLASSES:
            log.warning(
                "%s: its numbers from %d to %d count no classes, so its images are unlabelled",
                *(printable(self.path), column.min(), column.max()),
            )
            return np.full(len(column), -1, np.int32)
        return column.astype(np.int32)

    def lengths(self, offsets: npt.NDArray[np.int64], table: int) -> npt.NDArray[np.int64]:
        """Bytes of each sample's data; 0 where the allocation table does not know the pointer."""
        found = self.records(ALLOCATION, table, (self.size - table) // ALLOCATION.itemsize)
        begins, lengths = found["pointer"].astype(np.int64), found["size"].astype(np.int64)
        del found
        if not lengths.all():  # an empty one shares its pointer with the next
            begins, lengths = begins[lengths != 0], lengths[lengths != 0]
        if not len(begins):
            return np.zeros(len(offsets), np.int64)
        if (begins[1:] < begins[:-1]).any():  # FFCV's workers enter theirs one after the other
            order = np.argsort(begins)
            begins, lengths = begins[order], lengths[order]
            del order
        place = np.searchsorted(begins, offsets)
        np.minimum(place, len(begins) - 1, out=place)
        return np.where(begins[place] == offsets, lengths[place], 0)

    def check_rows(
        self,
        begin: int,
        end: int,
        sizes: npt.NDArray[np.int32],
        raw: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        """Every image lies between the metadata and the allocation table, and has a usable size."""
        pixels = sizes[:, 0].astype(np.int64) * sizes[:, 1]
        for wrong, what in (
            (lengths == 0, "is not in the allocation table"),
            (
                (offsets < begin) | (lengths < 0) | (lengths > end - offsets),
                "lies outside the file",
            ),
            ((pixels < 1) | (pixels > MAX_PIXELS), "has an impossible size"),
            (raw & (lengths != 3 * pixels), "has not as many bytes as its size needs"),
        ):
            if wrong.any():
                self.fail(f"is damaged or truncated: sample {int(np.argmax(wrong))} {what}", _AGAIN)
