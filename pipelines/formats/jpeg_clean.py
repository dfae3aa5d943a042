"""A JPEG without whatever does not concern its pixels, so that what a strict decoder still finds
is damage to them.

libjpeg warns of odd metadata and of damage alike, and tells the first warning only. So what is
harmless is taken out, one kind after the other, and the rest has to decode without any warning:

- the header is written anew from the tables, the frame and the two markers that decide the colours;
- the parameters of a sequential scan, of which only 0, 63, 0 are possible, are set to these;
- a missing end marker is added where every scan is there;
- bytes left over before a marker are removed where they cannot be what damage left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pipelines.errors import BadImage
from pipelines.formats.jpeg import (
    DAC,
    DHT,
    DNL,
    DQT,
    DRI,
    EOI,
    SEQUENTIAL_FRAMES,
    SOI,
    SOS,
    START_OF_FRAME,
    jpeg_frame,
    segments,
)
from pipelines.formats.jpeg_scan import can_scan, without_left_over

_KEPT = frozenset({DQT, DHT, DRI, DAC}) | START_OF_FRAME
_NEXT = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # the marker that ends a scan
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_ROUNDS = 64  # places with bytes left over, at most
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # its colour transform follows


def left_over(complaint: str) -> tuple[int, int] | None:
    """Of libjpeg's warning of bytes left over: how many, and the marker behind them."""
    found = _LEFT_OVER.search(complaint)
    return (int(found[1]), int(found[2], 16)) if found else None


def with_clean_header(data: bytes) -> bytes:
    """The JPEG with the header written anew; all behind the first scan's header is as it was.

    Raises:
        BadImage: the header is truncated or corrupt.
    """
    return b"".join(_header(data)[0])


def cleaned(data: bytes, complaint_of: Callable[[bytes], str | None]) -> bytes:
    """The JPEG without what does not concern its pixels, which a strict decoder accepts.

    Args:
        complaint_of: the first warning of a strict decoder that reads all of a JPEG, or None.

    Raises:
        BadImage: pixels are missing or damaged.
    """
    scanned, clean = False, with_clean_header(data)
    try:
        clean = _rewritten(data)
    except BadImage as error:  # something between the scans: libjpeg's reason names it better
        raise BadImage(f"corrupt JPEG: {complaint_of(clean) or error}") from error
    for _ in range(_ROUNDS):
        complaint = complaint_of(clean)
        if complaint is None:
            return clean
        found, shorter = left_over(complaint), None
        if found is not None and not can_scan(clean):
            shorter = _without_run(clean, *found)
        elif found is not None and not scanned:
            shorter, scanned = without_left_over(clean), True
        if shorter is None:
            break
        clean = shorter
    raise BadImage(f"corrupt JPEG: {complaint}")


def _header(data: bytes) -> tuple[list[bytes], int]:
    """The parts of the JPEG with a new header, and where in `data` the first scan begins."""
    frame = jpeg_frame(data)
    assert frame is not None, "only a JPEG can be cleaned"
    kept, jfif, transform = list[bytes](), False, -1
    for marker, start, end, _ in segments(data):
        body = data[start + 4 : end]
        if marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            transform = body[11]
        elif marker in START_OF_FRAME:
            height = frame.height.to_bytes(2, "big")  # it may have stood behind the scan
            kept.append(data[start : start + 5] + height + data[start + 7 : end])
        elif marker in _KEPT:
            kept.append(data[start:end])
        elif marker == SOS:
            kept.append(_scan_header(data, start, end, data[frame.start + 1]))
    if transform not in (-1, 0, 1, 2):  # libjpeg takes an unknown one for YCbCr or YCCK
        transform = 2 if frame.components == 4 else 1
    colours = [_JFIF] if jfif else []
    colours += [_ADOBE + bytes([transform])] if transform >= 0 else []
    return [SOI, *colours, *kept, data[frame.scan :]], frame.scan


def _scan_header(data: bytes, start: int, end: int, sof: int) -> bytes:
    if end > len(data) or end - start < 8:
        raise BadImage("truncated JPEG: the data ends inside the header")
    if sof in SEQUENTIAL_FRAMES:
        return data[start : end - 3] + b"\x00\x3f\x00"
    return data[start:end]


def _rewritten(data: bytes) -> bytes:
    """All scans behind a new header, without metadata between them or anything behind them."""
    parts, position = _header(data)
    parts.pop()  # the scans, which follow one by one
    frame = jpeg_frame(data)
    assert frame is not None
    scans, sof = [parts[-1]], data[frame.start + 1]
    while True:
        found = _NEXT.search(data, position)
        if found is None:
            parts.append(data[position:].rstrip(b"\xff"))
            break
        parts.append(data[position : found.start()].rstrip(b"\xff"))
        marker = found[1][0]
        if marker == EOI[1]:
            return b"".join([*parts, EOI])
        if marker not in (DHT, DQT, DRI, DAC, SOS, DNL) and not 0xE0 <= marker <= 0xFE:
            break
        for each in segments(data, found.start()):
            if each.marker == EOI[1]:
                return b"".join([*parts, EOI])
            if each.marker == SOS:
                scans.append(_scan_header(data, each.start, each.end, sof))
                parts.append(scans[-1])
            elif each.marker in _KEPT:
                parts.append(data[each.start : each.end])
            position = each.end
    _refuse_missing_scans(data[frame.start : frame.scan], frame.components, scans)
    return b"".join([*parts, EOI])


def _refuse_missing_scans(header: bytes, components: int, scans: list[bytes]) -> None:
    """Without an end marker a JPEG is whole only if its scans give every bit of every coefficient.

    Raises:
        BadImage: a scan is missing.
    """
    lowest = {header[10 + 3 * i]: [99] * 64 for i in range(components)}
    for scan in scans:
        count = scan[4]
        first, last, bits = scan[-3], scan[-2], scan[-1]
        for component in scan[5 : 5 + 2 * count : 2]:
            levels = lowest.get(component, [0] * 64)
            for k in range(first, min(last, 63) + 1):
                levels[k] = bits & 15
    if any(any(levels) for levels in lowest.values()):
        raise BadImage("truncated JPEG: it ends before its last scan")


def _without_run(data: bytes, count: int, marker: int) -> bytes | None:
    """The JPEG without the run of equal bytes, at least `count`, before `marker`, as padding has
    them; None if there is none, or only a single byte that is not 0.

    All of the run: where a part of it was taken for pixels, as in a tail of zeros, they are missing
    then.
    """
    sign, at = bytes([0xFF, marker]), 0
    while (at := data.find(sign, at + 1)) >= 0:
        start = at - 1
        while data[start - 1] == data[at - 1]:
            start -= 1
        if data[start - 1 : start + 1] == b"\xff\0":  # a stuffed byte, which is data
            start += 1
        length = at - start
        if length >= count and (length > 1 or data[start] == 0):
            return data[:start] + data[at:]
    return None
