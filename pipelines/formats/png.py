"""PNG: the size from the header, and the chunks that the pixels are made of."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from pipelines.errors import BadImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3
_CHANNELS = {0: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


class _Header(NamedTuple):
    width: int
    height: int
    depth: int  # bits a channel
    colour: int
    packing: int
    filtering: int
    interlace: int


def png_size(data: bytes) -> tuple[int, int]:
    """Height and width of a PNG, from its first 33 bytes.

    Raises:
        BadImage: the header is truncated, corrupt, or states what no PNG may have.
    """
    header = _header(data)
    return header.height, header.width


def pixel_chunks(data: bytes) -> bytes:
    """The PNG with nothing but the chunks that its pixels need, their checksums checked.

    Text, times, profiles and thumbnails beside them are left out unread, whatever their size and
    checksums are; so is transparency, since alpha is dropped. Chunks behind the end are not looked
    at.

    Raises:
        BadImage: header, palette or image data are corrupt, or missing.
    """
    header = _header(data)
    palette, pixels, position, intact = b"", list[bytes](), 33, True
    while (kind := data[position + 4 : position + 8]) != b"IEND" and kind.isalpha():
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if kind == b"IDAT":
            pixels.append(data[position + 8 : end - 4])
            intact = intact and _intact(data, position, end)
        elif kind == b"PLTE" and header.colour == _PALETTE:
            palette = data[position:end]
            if not _intact(data, position, end):
                raise BadImage("corrupt PNG: the palette has another checksum")
        position = end
    if header.colour == _PALETTE and not palette:
        raise BadImage("corrupt PNG: the palette is missing")
    stream = b"".join(pixels)
    if not intact:  # whose own checksum may be whole
        _check_stream(stream, header)
    return data[:33] + palette + _chunk(b"IDAT", stream) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _intact(data: bytes, position: int, end: int) -> bool:
    checked = zlib.crc32(memoryview(data)[position + 4 : end - 4])
    return end <= len(data) and data[end - 4 : end] == checked.to_bytes(4, "big")


def _check_stream(stream: bytes, header: _Header) -> None:
    """Raises BadImage unless the image data end well and with the checksum of their content."""
    bits = header.depth * _CHANNELS[header.colour]
    most = header.height * (header.width * bits // 8 + 2) + 7 * (header.height + 1)  # 7 passes
    inflate = zlib.decompressobj()
    try:
        while stream and not inflate.eof and most > 0:
            most -= len(inflate.decompress(stream, 1 << 20))
            stream = inflate.unconsumed_tail
    except zlib.error:
        pass  # as it is not at its end
    if not inflate.eof:
        raise BadImage("corrupt PNG: the image data are truncated or have another checksum")


def _header(data: bytes) -> _Header:
    if data[12:16] == b"CgBI":
        raise BadImage(
            "a PNG in Apple's own format (CgBI): restore it with pngcrush -revert-iphone"
        )
    if len(data) < 33:
        raise BadImage("truncated PNG: the data ends inside the header")
    if data[8:16] != b"\0\0\0\rIHDR" or not _intact(data, 8, 33):
        raise BadImage("corrupt PNG: a damaged header")
    header = _Header(*struct.unpack_from(">IIBBBBB", data, 16))
    unusual = header.packing or header.filtering or header.interlace > 1
    if header.depth not in _DEPTHS.get(header.colour, ()) or unusual:
        raise BadImage("corrupt PNG: its header states what no PNG may have")
    return header
