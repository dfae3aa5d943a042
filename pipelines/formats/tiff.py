"""TIFF: kinds that Pillow misreads without an error, and the errors that libtiff only prints."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.TiffImagePlugin import TiffImageFile

from pipelines.errors import BadImage

_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _COLOURS, _SUBSAMPLING = 258, 262, 277, 284, 320, 530
_WHITE_IS_ZERO, _YCBCR = 0, 6
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_heard = threading.local()  # .errors: what libtiff complained of in this thread


def prepare(image: TiffImageFile) -> None:
    """Has to be called before the pixels are loaded.

    Raises:
        BadImage: Pillow would take them for something else.
    """
    tags = image.tag_v2
    bits, raw = tags.get(_BITS, (1,)), image.info.get("compression") == "raw"
    planar, samples = tags.get(_PLANAR, 1) == 2, tags.get(_SAMPLES, 1)
    if planar and samples > 1 and set(bits) != {8}:
        raise BadImage(
            f"a TIFF with separate planes of {bits[0]} bits: write it with the samples of a pixel "
            "side by side (PlanarConfiguration 1), or with 8 bits"
        )
    if planar and raw and samples == 1:
        tags[_PLANAR] = 1  # of one plane the order means nothing, but inverted colours get lost
        image._setup()
    if tags.get(_PHOTOMETRIC) == _YCBCR and raw and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        raise BadImage("a TIFF of uncompressed subsampled YCbCr: convert it to RGB")
    colours = tags.get(_COLOURS, ())
    if image.mode == "P" and image.palette is not None and colours and max(colours) < 256:
        image.palette.palette = bytes(colours)  # written with 8 bits instead of 16, as libtiff sees


def high_bytes(image: TiffImageFile) -> npt.NDArray[np.uint8]:
    """uint8 `[H, W]` of grey with 12 or 16 bits, 0 being black."""
    bits = image.tag_v2.get(_BITS, (16,))[0]
    grey: npt.NDArray[np.uint8] = np.clip(np.asarray(image) >> (bits - 8), 0, 255).astype(np.uint8)
    return ~grey if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


@contextmanager
def libtiff_errors() -> Iterator[None]:
    """What libtiff reports while decoding inside the block becomes BadImage.

    Its fax decoders report a bad code word on stderr and go on; Pillow does not hear of it.
    """
    _listen()
    _heard.errors = errors = list[str]()
    try:
        yield
    finally:
        del _heard.errors
    if errors:
        raise BadImage(f"corrupt TIFF: {errors[0]}")


def _on_error(module: bytes | None, text: bytes | None, arguments: int) -> None:
    buffer = ctypes.create_string_buffer(300)
    ctypes.CDLL(None).vsnprintf(buffer, ctypes.c_size_t(300), text, ctypes.c_void_p(arguments))
    line = f"{(module or b'').decode(errors='replace')}: {buffer.value.decode(errors='replace')}"
    errors: list[str] | None = getattr(_heard, "errors", None)
    if errors is None:  # decoded by somebody else: as libtiff does by itself
        print(line, file=sys.stderr)
    else:
        errors.append(line)


_CALLED = _HANDLER(_on_error)  # has to live as long as libtiff may call it


@functools.cache
def _listen() -> None:
    """Has the libtiff that Pillow has loaded report to `_on_error`; without one nothing is done."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            found = re.search(r"/\S*/libtiff[^/\s]*\.so\S*", maps.read())
        if found is None:
            return
        library: Any = ctypes.CDLL(found[0], mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.TIFFSetErrorHandler.restype = ctypes.c_void_p
        library.TIFFSetErrorHandler(_CALLED)
    except (OSError, AttributeError):
        return
