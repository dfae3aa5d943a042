"""The members of a tar file, from its headers alone: ustar, GNU and PAX.

Not `tarfile`, because a million members are walked: it keeps an object for each, takes 42 us where
this takes 14, and older releases of it never end on a header with a negative size. Nothing is ever
extracted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipelines.errors import BadImage
from pipelines.stores.openfile import OpenFile

BLOCK = 512
_CHUNK = 1 << 20  # bytes of padding read at a time; a multiple of BLOCK
_MOST_HEADER = 1 << 20  # bytes: no sane name, nor all of a member's PAX records, is longer
_REGULAR = (b"0", b"\0", b"7")
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
}


class BadTar(Exception):
    """What is wrong with a tar file, and how to mend it."""

    def __init__(self, reason: str, mend: str = "copy it again, or remove it") -> None:
        super().__init__(f"{reason}: {mend}")


class Member(NamedTuple):
    """A file, or what else a tar holds."""

    name: bytes
    offset: int  # of its data
    length: int  # bytes
    kind: str  # "file", "sparse file", "link", or "" for what holds no data, such as a folder


class Further(NamedTuple):
    """What follows the mark that ends a tar."""

    offset: int
    waste: int  # bytes that are no tar; 0 where it is a further tar


def members(file: OpenFile, further: list[Further] | None = None) -> Iterator[Member]:
    """The members in their order, those behind an end mark too (`cat a.tar b.tar`).

    Args:
        further: what follows an end mark is entered here.

    Raises:
        BadTar: it is no tar file, is compressed, damaged, or ends inside a member.
    """
    size, offset = file.size, 0
    extra: dict[bytes, bytes] = {}  # what the headers before a member say of it
    _refuse_compressed(_read(file, 0, min(size, BLOCK)))
    while offset + BLOCK <= size:
        block = _read(file, offset, BLOCK)
        if not any(block):
            start = _next_data(file, offset + BLOCK, size)
            if start is None:
                return
            is_tar = start + BLOCK <= size and _is_header(_read(file, start, BLOCK))
            if further is not None:
                further.append(Further(start, 0 if is_tar else size - start))
            if not is_tar:
                return
            offset, extra = start, {}
            continue
        _check(block, offset)
        kind, data = block[156:157], offset + BLOCK
        length = 0 if kind in b"123456" else _number(block[124:136])  # links may state a size
        if kind not in b"xgLK" and extra.get(b"size"):  # one without a value says nothing
            length = _number(extra[b"size"], base=10)
        if length > size - data:
            raise BadTar(f"is truncated: a member at byte {offset:,} runs past the end")
        offset = data + length + -length % BLOCK
        if kind in b"LKxg":
            if length > _MOST_HEADER:
                raise BadTar(f"is damaged: a header of {length:,} bytes before byte {offset:,}")
            content = _read(file, data, length)
            if kind == b"x":
                extra |= _records(content)
            elif kind == b"L":
                extra[b"path"] = _text(content)
            continue
        if kind == b"S":  # GNU's sparse header may go on in further blocks, before the data
            more = block[482]
            while more:
                more = _read(file, data, BLOCK)[504]
                data, offset = data + BLOCK, offset + BLOCK
        yield Member(_name(block, extra), data, length, _kind(kind, extra))
        extra = {}
    if not size:
        raise BadTar("is an empty file")
    if offset != size:
        raise BadTar("is truncated: it ends inside a header or behind a member")
    raise BadTar(
        "has no end mark, so it may be truncated",
        "copy it again, or if it is whole, add the mark: head -c 1024 /dev/zero >> FILE",
    )


def _next_data(file: OpenFile, offset: int, size: int) -> int | None:
    """The first block from `offset` on that is not all zeros; None where there is none."""
    while offset < size:
        data = _read(file, offset, min(_CHUNK, size - offset))
        if rest := len(data.lstrip(b"\0")):
            return offset + (len(data) - rest) // BLOCK * BLOCK
        offset += len(data)
    return None


def _read(file: OpenFile, offset: int, length: int) -> bytes:
    try:
        return file.read(offset, length)
    except BadImage as error:
        raise BadTar(str(error)) from error


def _refuse_compressed(start: bytes) -> None:
    for magic, (name, program) in _COMPRESSED.items():
        if start.startswith(magic):
            raise BadTar(
                f"is compressed with {name}, so its images cannot be reached one by one",
                f"decompress it first ({program} FILE); images hardly shrink anyway",
            )


def _is_header(block: bytes) -> bool:
    # the sum counts its own field as blanks; some old programs summed signed bytes
    stated = _number(block[148:156])
    summed = sum(block) - sum(block[148:156]) + 8 * 32
    return stated in (summed, summed - 256 * sum(b > 127 for b in block))


def _check(block: bytes, offset: int) -> None:
    if not _is_header(block):
        if not offset:
            raise BadTar("is no tar file", "name the tar files, or remove it from the folder")
        raise BadTar(f"is damaged: no header where one has to be, at byte {offset:,}")


def _number(field: bytes, base: int = 8) -> int:
    """Digits, or binary where the first bit is set; what is none >= 0 exceeds any file's size."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        number = int(digits, base) if digits else 0
    except ValueError:
        return 1 << 63
    return number if number >= 0 else 1 << 63


def _records(content: bytes) -> dict[bytes, bytes]:
    """PAX records, `LENGTH KEY=VALUE` and a line feed each."""
    found, place = {}, 0
    while place < len(content) and content[place : place + 1] != b"\0":
        length, _, _ = content[place : place + 20].partition(b" ")
        if not length.isdigit() or int(length) < 5:
            raise BadTar("is damaged: a PAX header that cannot be read")
        key, _, value = content[place + len(length) + 1 : place + int(length) - 1].partition(b"=")
        found[key] = value
        place += int(length)
    return found


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _name(block: bytes, extra: dict[bytes, bytes]) -> bytes:
    for key in (b"GNU.sparse.name", b"path"):
        if extra.get(key):
            return extra[key]
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" if prefix else b"") + _text(block[:100])


def _kind(kind: bytes, extra: dict[bytes, bytes]) -> str:
    if kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in extra):
        return "sparse file"
    if kind in (b"1", b"2"):
        return "link"
    return "file" if kind in _REGULAR else ""
