"""What a pickle from elsewhere may use: bounds far above those of any real weights file.

Without them a few bytes ask for gigabytes, or for hours: a set of deeply nested tuples ends the
interpreter (`hash` of a tuple recurses in C without a check), `list(x)` copies `x` for four bytes,
and thirty tuples of two, each holding the one before twice, take 2^30 steps to hash.
"""

from __future__ import annotations

import io
from typing import IO, Any

from byol_fast.interop.records import Name, Refused

MEMORY = 1 << 28  # bytes of objects, besides 16 for each byte of the file
_OPCODE = 64  # bytes: a rough mean of what one opcode leaves behind
_LONGEST_KEY = 1 << 16  # characters
_LARGEST_KEY = 1 << 60  # integers above collide modulo 2^61 - 1 at will
_KEY_PARTS = 64  # values in a tuple that is a key
_BITS = 1 << 13  # of an integer


class Budget:
    """Bytes that a pickle of `size` bytes may still ask for."""

    def __init__(self, size: int) -> None:
        self.left = MEMORY + 16 * size

    def spend(self, nbytes: int = _OPCODE) -> None:
        """Raises Refused where nothing is left."""
        self.left -= nbytes
        if self.left < 0:
            raise Refused(
                "its pickle asks for more memory than its size explains: it is damaged or was "
                "made to exhaust this machine"
            )


class Window:
    """The rest of a file, for `pickletools.genops`: a read never asks for more than is there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, at = file, file.tell()
        self.end = file.seek(0, io.SEEK_END)
        self.size = self.end - at
        file.seek(at)
        self.tell, self.readline = file.tell, file.readline

    def read(self, count: int) -> bytes:
        return self._file.read(max(min(count, self.end - self.tell()), 0))


def number(value: Any) -> Any:
    """A number out of a pickle. Raises Refused for an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise Refused("its pickle is damaged (an integer of thousands of digits)")
    return value


def key(value: Any) -> Any:
    """`value`, which can be hashed and compared in bounded time; raises Refused for others."""
    if type(value) is str and len(value) <= _LONGEST_KEY:
        return value
    todo, parts = [value], 1
    while todo:
        match todo.pop():
            case bool() | float() | None | Name():
                pass
            case int(whole) if abs(whole) < _LARGEST_KEY:
                pass
            case str(text) | bytes(text) if len(text) <= _LONGEST_KEY:
                pass
            case tuple(inner) | frozenset(inner) if (parts := parts + len(inner)) <= _KEY_PARTS:
                todo.extend(inner)
            case str() | bytes() | int() | tuple() | frozenset():
                raise Refused(
                    "its pickle has a key of a dict or set that no weights file needs (deeply "
                    "nested, or too large)"
                )
            case other:  # records hash by identity, lists and dicts not at all
                hash(other)
    return value
