"""The header of a JPEG: its size, its colours, and whether any decoder reads it alike."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.errors import BadImage

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
DHT, DAC, SOS, DQT, DNL, DRI = 0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, DAC}
SEQUENTIAL_FRAMES = frozenset({0xC0, 0xC1, 0xC9})
_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_KNOWN_FRAMES = _HUFFMAN_FRAMES | {0xC9, 0xCA}  # arithmetic coding too
_STANDALONE = frozenset(range(0xD0, 0xD8)) | {0x01}  # markers without a length
_LUMA_SAMPLING = frozenset({0x11, 0x21, 0x22, 0x12, 0x41})  # 444 422 420 440 411, chroma at 1x1
_MARKER = re.compile(rb"\xff([^\x00\xff])")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_DNL = re.compile(rb"\xff\xdc\x00\x04(..)", re.DOTALL)
_NO_FRAME = "corrupt JPEG: no frame header before the image data"
_CUT = "truncated JPEG: the data ends inside the header"


class Segment(NamedTuple):
    """One marker with what belongs to it."""

    marker: int
    start: int  # of the marker
    end: int  # behind the last byte that its length covers; may lie behind the data
    junk: bool  # bytes that belong to nothing stand before it


@dataclass(frozen=True, slots=True)
class Frame:
    """What a JPEG states before the data of its first scan."""

    height: int
    width: int
    components: int
    fast: bool  # libjpeg-turbo gives the policy's pixels: Huffman-coded, 8 bits, usual sampling
    plain: bool  # fast, and every other decoder gives them too
    regular: bool  # False: `jpeg_clean.with_clean_header` is needed before it is decoded
    start: int  # where the frame header begins
    scan: int  # where the data of the first scan begins
    block: int  # rows that are coded together
    interval: int  # MCUs between restart markers, 0 without them
    one_scan: bool  # sequential, all components in one scan: rows come from top to bottom
    across: int  # MCUs in a line of the first scan

    def interval_end(self, data: bytes, rows: int) -> int | None:
        """Where the restart interval ends that completes the upper `rows` rows, whole blocks.

        None where no restart marker follows them.
        """
        if not self.interval:
            return None
        mcus = rows // self.block * self.across
        wanted = -(-mcus // self.interval)
        for number, found in enumerate(RESTART.finditer(data, self.scan), start=1):
            if number == wanted:
                return found.start()
        return None


def segments(data: bytes, position: int = 2) -> Iterator[Segment]:
    """The segments from `position` on, to a start of scan or end of image included.

    Bytes that are no marker are skipped, as libjpeg does.

    Raises:
        BadImage: the data ends, or a length is impossible.
    """
    while True:
        found = _MARKER.search(data, position)
        if found is None:
            raise BadImage(_CUT)
        junk = bool(data[position : found.start()].strip(b"\xff"))
        marker, body = found[1][0], found.end()
        if marker in _STANDALONE or marker == EOI[1]:
            yield Segment(marker, body - 2, body, junk)
            if marker == EOI[1]:
                return
            position = body
            continue
        if body + 2 > len(data):
            raise BadImage(_CUT)
        length = data[body] << 8 | data[body + 1]
        if marker == SOI[1] or length < 2:
            raise BadImage(_NO_FRAME)
        position = body + length
        yield Segment(marker, body - 2, position, junk)
        if marker == SOS:
            return


def jpeg_frame(data: bytes) -> Frame | None:
    """The frame of a JPEG, from its data or enough of its beginning; None if it is no JPEG.

    Raises:
        BadImage: the header is truncated or corrupt, or the pixels are not of 8 bits.
    """
    if data[:2] != SOI:
        return None
    start, transform, interval, regular = 0, -1, 0, data[2:3] == b"\xff"
    for marker, begin, end, junk in segments(data):
        body, regular = data[begin + 4 : end], regular and not junk
        if marker == SOS:
            if not start:
                raise BadImage(_NO_FRAME)
            if begin + 5 > len(data):
                raise BadImage(_CUT)
            regular = regular and _usual_scan(data[start + 1], body)
            return _frame_at(data, start, end, transform, interval, body[0], regular)
        if marker in START_OF_FRAME:
            start = begin
        elif marker == DRI:
            interval = int.from_bytes(body[:2], "big")
        elif marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
            regular = regular and body[5] == 1
        elif marker == 0xEE and body[:5] == b"Adobe" and end >= begin + 16:
            if len(body) < 12:
                raise BadImage(_CUT)
            transform = body[11]
            regular = regular and transform in (0, 1, 2)
        elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0":
            regular = regular and len(body) >= 14 and 1 <= body[12] <= body[13]
    raise BadImage(_NO_FRAME)


def _usual_scan(sof: int, body: bytes) -> bool:
    """Whether a scan header states the only parameters that a sequential scan can have."""
    return sof not in SEQUENTIAL_FRAMES or body[-3:] in (b"\0\x3f\0", b"")


def _frame_at(
    data: bytes, start: int, scan: int, transform: int, interval: int, scanned: int, regular: bool
) -> Frame:
    """The frame header at `start`; `transform` is Adobe's colour flag, -1 where there is none,
    and `scanned` the number of components in the first scan."""
    length = data[start + 2] << 8 | data[start + 3]  # so much is there: a scan begins behind it
    if length < 8 or length != 8 + 3 * data[start + 9]:
        raise BadImage("corrupt JPEG: a frame header of the wrong length")
    sof, precision, components = data[start + 1], data[start + 4], data[start + 9]
    height, width = struct.unpack_from(">HH", data, start + 5)
    if height == 0 and (stated := _DNL.search(data, scan)):  # the height follows the first scan
        height, regular = int.from_bytes(stated[1], "big"), False
    if precision != 8:  # no decoder here reads it
        raise BadImage(f"a JPEG of {precision} bits a channel: convert it to 8")
    if sof not in _KNOWN_FRAMES:
        raise BadImage("a lossless or hierarchical JPEG: convert it to an ordinary one or to PNG")
    if components not in (1, 3, 4):
        raise BadImage(f"a JPEG of {components} channels: convert it to grey, RGB or CMYK")
    usual = sof in _HUFFMAN_FRAMES
    parts = data[start + 10 : start + 10 + 3 * components]
    fast, is_rgb = usual and components == 1, False
    if components == 3:
        sampled = parts[1] in _LUMA_SAMPLING and parts[4] == parts[7] == 0x11
        is_rgb = transform == 0 or parts[0::3] == b"RGB"
        fast = usual and sampled
    alone = components == 1  # then an MCU is a block, whatever the sampling
    tall = 1 if alone else max(1, *(part & 15 for part in parts[1::3]))
    wide = 1 if alone else max(1, *(part >> 4 for part in parts[1::3]))
    return Frame(
        height=height,
        width=width,
        components=components,
        fast=fast,
        plain=fast and not is_rgb and regular,
        regular=regular,
        start=start,
        scan=scan,
        block=8 * tall,
        interval=interval,
        one_scan=sof in SEQUENTIAL_FRAMES and scanned == components,
        across=-(-width // (8 * wide)),
    )
