"""TensorBoard event files, written directly: no import of two seconds, no thread, no lost error.

TensorBoard's own writer works in a thread that dies when the disk is full, prints its traceback
into the run and can block the closing of the file. The format is small: records of length, checksum
of the length, data, checksum of the data (CRC-32C, rotated and offset), where data is an `Event`
message of protocol buffers. Field numbers are those of TensorBoard's event.proto, summary.proto and
tensor.proto.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_DT_STRING = 7
_SESSION_START = 1


class EventFile:
    """One event file in `folder`: scalars under their own names, events as text.

    With `resume_step` TensorBoard hides what earlier files in the folder hold after that step.

    Raises (also every method): OSError, and leaves whole records only.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname() or "host"
        name = f"events.out.tfevents.{time.time():.6f}.{host}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 - kept open for the run
        self._size = 0
        self._write(_event(0, _field(3, b"brain.Event:2")))
        if resume_step is not None:
            start = _field(7, _field(1, _SESSION_START))
            self._write(_event(resume_step + 1, start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        points = [
            _field(1, _field(1, name.encode()) + _field32(2, value))
            for name, value in values.items()
        ]
        self._write(_event(step, _field(5, b"".join(points))))

    def event(self, step: int, kind: str, text: str) -> None:
        """Add `text` (shown as Markdown) under the tag of its kind."""
        plugin = _field(1, _field(1, b"text"))
        tensor = (
            _field(1, _DT_STRING) + _field(2, _field(2, _field(1, 1))) + _field(8, text.encode())
        )
        value = _field(1, f"events/{kind}".encode()) + _field(9, plugin) + _field(8, tensor)
        self._write(_event(step, _field(5, _field(1, value))))

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        record = length + _checksum(length) + data + _checksum(data)
        try:
            written = self._file.write(record)
            if written != len(record):
                raise OSError("the disk is full")
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(record)


def _event(step: int, content: bytes) -> bytes:
    """An Event with the time of now: wall_time is field 1, step field 2."""
    clock = _varint(1 << 3 | _FIXED64) + struct.pack("<d", time.time())
    return clock + _field(2, step) + content


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _field32(number: int, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # beyond float32
        packed = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _varint(number << 3 | _FIXED32) + packed


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc_table() -> tuple[int, ...]:
    table = []
    for i in range(256):
        for _ in range(8):
            i = i >> 1 ^ (0x82F63B78 if i & 1 else 0)  # Castagnoli, reflected
        table.append(i)
    return tuple(table)


_TABLE = _crc_table()


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)
