"""Encoded bytes to RGB pixels: one policy, which every backend follows.

- Pixels are as stored: an EXIF orientation is ignored, as by TensorFlow's `decode_jpeg`, FFCV and
  torchvision's `ImageFolder`. (A TIFF's orientation is part of its layout: Pillow applies it.)
- Grey becomes three equal channels, a palette its colours, alpha is dropped, CMYK and YCCK go
  through Pillow's conversion, 16 bits keep their high byte, an animation gives its first frame.
- More than MAX_PIXELS are refused from the header, before anything is decoded.
- Pixels that are all there are used, whatever is odd beside them: metadata, bytes between segments,
  bytes left over, a missing end marker (`formats.jpeg_clean`, `formats.png`).
- Data that a strict decoder finds corrupt is BadImage and never a half-grey picture. Strictness
  costs nothing measurable: 650 against 663 images/s a core on 110 KB ImageNet JPEGs. A flipped bit
  that leaves a valid JPEG stream is beyond any decoder, as the format has no checksum.
- Rows that no window shows need not be decoded. Then only an end that comes too early is found:
  what flipped bits leave over looks like the rows left out. Verifying decodes all (`verify`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pipelines.errors import BadImage, MissingBackend
from pipelines.formats import tiff
from pipelines.formats.jpeg import EOI, Frame, jpeg_frame
from pipelines.formats.jpeg_clean import cleaned, left_over, with_clean_header
from pipelines.formats.kinds import kind_of
from pipelines.formats.png import SIGNATURE, pixel_chunks, png_size
from pipelines.turbo import simplejpeg

MAX_PIXELS = 178_956_970  # above it Pillow sees a decompression bomb: 0.5 GB as RGB

# Only these are opened: the rest of Pillow's readers (some start other programs) stay out of reach.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")


def header(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, without decoding; the first KBs of a file are enough as a rule.

    Raises:
        BadImage: no image, no readable header, or more than MAX_PIXELS.
    """
    frame = _frame(data)
    if frame is not None:
        return frame.height, frame.width
    if data.startswith(SIGNATURE):
        height, width = png_size(data)
        _check_size(height, width)
        return height, width
    with _open(data) as image:
        _refuse_kind(image)
        return image.height, image.width


def is_plain_jpeg(data: bytes) -> bool:
    """Whether any JPEG decoder gives the policy's pixels: 8 bits, grey or ordinary YCbCr, and
    nothing odd in the header.

    What is not plain (CMYK, RGB stored as such, 12 bits, odd sampling, another format) has to go
    through `decode`. Takes a few microseconds.
    """
    try:
        frame = _frame(data)
    except BadImage:
        return False
    return frame is not None and frame.plain


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """RGB pixels, uint8 `[H, W, 3]`, contiguous and writable.

    Raises:
        BadImage: as `header`, and on data that is truncated or corrupt.
    """
    return decode_top(data, MAX_PIXELS)[0]


def decode_top(data: bytes, rows: int) -> tuple[npt.NDArray[np.uint8], int]:
    """At least the upper `rows` rows, uint8 `[≤H, W, 3]`, and the height H of the whole image.

    The rows are `decode`'s to the last bit. A sequential JPEG is decoded no further than needed:
    entropy decoding, the largest part of the work, cannot be done for a part in the middle.

    Raises:
        BadImage: as `header`, and on data that is truncated, or corrupt in the rows decoded.
    """
    frame = _frame(data)
    if frame is not None and frame.fast:
        if not frame.regular:
            data = with_clean_header(data)
            frame = _frame(data)
            assert frame is not None
        # Smooth upsampling of chroma that has half of the rows looks one row further down.
        seen = rows + 1 if frame.block > 8 else rows
        enough = -(-seen // frame.block) * frame.block
        if frame.one_scan and enough < frame.height:
            top = _turbo_top(data, frame, enough)
            if top is not None:
                return top, frame.height
        return _turbo_whole(data), frame.height
    if frame is not None:
        data = sound(data)
    with _open(data) as image:
        pixels = _pixels(image)
        return pixels, len(pixels)


def verify(data: bytes) -> tuple[int, int]:
    """Height and width of an image whose data was read strictly to its end.

    Raises:
        BadImage: `decode` would raise it, or damage lies in rows that it was not asked for.
    """
    frame = _frame(data)
    if frame is not None:
        data = sound(data)
        if frame.fast:
            return frame.height, frame.width
    with _open(data) as image:  # decoding a PNG checks its checksums
        height, width = _pixels(image).shape[:2]
    return height, width


def sound(data: bytes) -> bytes:
    """A JPEG that was decoded strictly to its end: `data` itself, or without what is odd in it.

    At 1/8 size in grey the entropy decoder, which finds the faults, still reads everything: 1190
    images/s a core of 110 KB, 910 at full size.

    Raises:
        BadImage: pixels are missing or damaged. Of a sampling that libjpeg-turbo does not know
            nothing is found.
    """
    frame = _frame(data)
    assert frame is not None, "only a JPEG can be decoded strictly"
    colours = "cmyk" if frame.components == 4 else "gray"

    def complaint_of(jpeg: bytes) -> str | None:
        try:
            _turbo(jpeg, colours, smallest=True)
        except ValueError as error:
            unknown = not frame.fast and "subsampling" in str(error)
            return None if unknown else str(error)
        return None

    if frame.regular and complaint_of(data) is None:
        return data
    return cleaned(data, complaint_of)


def _frame(data: bytes) -> Frame | None:
    """The frame of a JPEG of a usable size; None where the data is no JPEG."""
    frame = jpeg_frame(data)
    if frame is not None:
        _check_size(frame.height, frame.width)
    return frame


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise BadImage(f"an image of {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise BadImage(f"{height} x {width} pixels are more than the limit of {MAX_PIXELS:,}")


def _turbo(
    data: bytes | bytearray,
    colours: str,
    *,
    smallest: bool = False,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """libjpeg-turbo's pixels.

    Raises:
        ValueError: with its first warning, or its error.
        MemoryError: there is too little memory.
    """
    # simplejpeg reduces the size only where a smallest height and width are given too
    scale = {"min_factor": 8, "min_height": 1, "min_width": 1} if smallest else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, colours, strict=True, buffer=out, **scale)
    except ValueError as error:
        if "nsufficient memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    return cast("npt.NDArray[np.uint8]", pixels)


def _turbo_whole(data: bytes) -> npt.NDArray[np.uint8]:
    try:
        return _turbo(data, "rgb")
    except ValueError:
        data = sound(data)
    try:
        return _turbo(data, "rgb")
    except ValueError as error:
        raise BadImage(f"corrupt JPEG: {error}") from error


def _turbo_top(data: bytes, frame: Frame, rows: int) -> npt.NDArray[np.uint8] | None:
    """The upper `rows` rows of a sequential JPEG, `rows` being whole blocks: the decoder is told
    that the image ends there. None where only the whole can tell whether they are sound.

    libjpeg names the first thing it met. Left-over data is what we expect, but only behind the last
    row: with restart markers the data is cut there, so that none before a marker is expected.
    """
    end = frame.interval_end(data, rows)
    if end is not None and data.find(EOI, end) < 0:
        return None
    shorter = bytearray(data if end is None else data[:end] + EOI)
    shorter[frame.start + 5 : frame.start + 7] = rows.to_bytes(2, "big")
    pixels = np.empty((rows, frame.width, 3), dtype=np.uint8)
    try:
        return _turbo(shorter, "rgb", out=pixels)
    except ValueError as error:
        found = left_over(str(error))
        return pixels if found is not None and not 0xD0 <= found[1] <= 0xD7 else None


@contextmanager
def _as_bad_image() -> Iterator[None]:
    """Untrusted bytes make a reader raise nearly anything: all of it means a bad image."""
    try:
        yield
    except (BadImage, MemoryError, MissingBackend):
        raise
    except Exception as error:
        if "memory error" in str(error):  # as Pillow's decoders have it
            raise MemoryError(str(error)) from error
        raise BadImage(f"{type(error).__name__}: {error}") from error


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """The image behind `data`, not decoded yet, its size checked."""
    if not data:
        raise BadImage("an empty file")
    if data[:256].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise BadImage("a web page or XML text, not an image")
    if data.startswith(SIGNATURE):
        _check_size(*png_size(data))
        data = pixel_chunks(data)
    with _as_bad_image():
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            raise BadImage(kind_of(data)) from None
        with image:
            _check_size(image.height, image.width)
            yield image


def _refuse_kind(image: Image.Image) -> None:
    """Raises BadImage for what is known from the header to have no pixels of the policy."""
    if isinstance(image, TiffImageFile):
        tiff.prepare(image)
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F") and not sixteen:
        raise BadImage(f"32-bit pixels ({image.mode}) have no defined range: convert to 8 bits")


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pillow's decoded image as the policy's RGB."""
    _refuse_kind(image)
    if isinstance(image, TiffImageFile):
        with tiff.libtiff_errors():
            image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert("RGB") would clip these at 255; Pillow takes the high byte of 16-bit RGB as well
        if isinstance(image, TiffImageFile):
            grey = tiff.high_bytes(image)
        else:
            grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    image.load()
    image.info.pop("transparency", None)  # dropped without Pillow's warning
    return np.array(image.convert("RGB"), dtype=np.uint8)
