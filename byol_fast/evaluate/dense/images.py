"""Images and their annotations from disk; every problem names its file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.decode import decode
from pipelines.errors import BadImage, DataError
from pipelines.reading import patiently

Pixels = npt.NDArray[np.uint8]
_SHOWN = 5  # problems that a message lists


def read_bytes(path: Path, what: str) -> bytes:
    """The file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return patiently(path.read_bytes)
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read: {error.strerror}") from error


def read_lines(path: Path, what: str) -> list[str]:
    """The lines that are not empty.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        text = read_bytes(path, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {path} is not UTF-8 text") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_image(path: Path, size: tuple[int, int] | None = None) -> Pixels:
    """RGB pixels `[H, W, 3]`.

    Args:
        size: height and width that the annotations are for.

    Raises:
        DataError: it cannot be read or decoded, or has another size.
    """
    try:
        pixels = decode(read_bytes(path, "image"))
    except BadImage as error:
        raise DataError(f"image {path} cannot be decoded: {error}") from error
    if size is not None and pixels.shape[:2] != size:
        raise DataError(
            f"image {path} is {pixels.shape[0]}×{pixels.shape[1]} pixels (height × width), its "
            f"annotation is for {size[0]}×{size[1]}: they do not belong together"
        )
    return pixels


def refuse(problems: list[str], where: Path) -> None:
    """Raise DataError with the first of `problems`, if there are any."""
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise DataError(f"{len(problems)} faults in {where}, mend or remove them:\n  {shown}{more}")


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """sha256 over the parts and their boundaries, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
