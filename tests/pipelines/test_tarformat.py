"""Tar headers: the same members as Python's own reader, and damage that is named."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.stores.openfile import OpenFile
from pipelines.stores.tarformat import BLOCK, BadTar, Member, members

NAMES = [
    "a.jpg",
    "folder/b.png",
    "x" * 99 + ".jpg",
    "long/" * 50 + "c.jpg",
    "ü☃/é.jpg",
    "y" * 140 + "/" + "z" * 90 + ".jpg",  # needs the prefix field of ustar
    "empty.cls",
]


def write(path: Path, format: int, names: list[str] = NAMES) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            data = b"" if name.startswith("empty") else bytes([number]) * (300 * number + 1)
            info.size, info.mtime = len(data), 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
    return path


def found(path: Path) -> list[Member]:
    return list(members(OpenFile(path)))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_pythons_reader(tmp_path: Path, format: int) -> None:
    names = NAMES if format != tarfile.USTAR_FORMAT else [n for n in NAMES if n[0] not in "xl"]
    path = write(tmp_path / "a.tar", format, names)
    with tarfile.open(path) as tar:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in tar]
    assert [(m.name, m.offset, m.length) for m in found(path)] == expected
    assert all(m.kind == "file" for m in found(path))
    content = path.read_bytes()
    for number, member in enumerate(found(path)):
        data = content[member.offset : member.offset + member.length]
        assert set(data) <= {number} and len(data) == member.length


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            *(("d", tarfile.DIRTYPE), ("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)),
            *(("pipe.jpg", tarfile.FIFOTYPE), ("old.jpg", tarfile.AREGTYPE)),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "target"
            info.size = 600 if kind == tarfile.LNKTYPE else 0  # stated, though no data follows
            tar.addfile(info)
        info = tarfile.TarInfo("after.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    kinds = {m.name.decode(): m.kind for m in found(path)}
    assert kinds == {
        **{"d/": "", "soft.jpg": "link", "hard.jpg": "link", "pipe.jpg": "", "old.jpg": "file"},
        "after.jpg": "file",
    }


def pax(name: str, **records: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = {key.replace("__", "."): value for key, value in records.items()}
    return info


def test_sparse_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = pax("GNUSparseFile.0/a.jpg", GNU__sparse__major="1", GNU__sparse__name="a.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"12345"))
        tar.addfile(tarfile.TarInfo("b.jpg"))
    assert [(m.name, m.kind) for m in found(path)] == [
        (b"a.jpg", "sparse file"),
        (b"b.jpg", "file"),
    ]


def header(name: bytes, size: int, kind: bytes, *, more: bool = False) -> bytes:
    info = tarfile.TarInfo(name.decode())
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if more:
        block[482] = 1
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_old_sparse_headers_with_more_blocks_are_walked_over(tmp_path: Path) -> None:
    first, last = bytearray(BLOCK), bytearray(BLOCK)
    first[504] = 1
    path = tmp_path / "a.tar"
    path.write_bytes(
        header(b"a.jpg", 700, tarfile.GNUTYPE_SPARSE, more=True)
        + first
        + last
        + bytes(2 * BLOCK)
        + header(b"b.jpg", 0, b"0")
        + bytes(BLOCK)
    )
    with tarfile.open(path) as tar:
        assert [m.name for m in tar] == ["a.jpg", "b.jpg"]
    assert [(m.name, m.kind) for m in found(path)] == [
        (b"a.jpg", "sparse file"),
        (b"b.jpg", "file"),
    ]


def test_sizes_from_pax_records_and_in_binary(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = pax("a.jpg", size="1000")
        info.size = 1000
        tar.addfile(info, io.BytesIO(bytes([7]) * 1000))
        tar.addfile(tarfile.TarInfo("b.jpg"))
    content = bytearray(path.read_bytes())
    place = content.index(b"a.jpg", 2 * BLOCK - 1)
    content[place + 124 : place + 136] = b"00000000000\0"  # only the record tells
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + BLOCK])
    path.write_bytes(content)
    assert [(m.name, m.length) for m in found(path)] == [(b"a.jpg", 1000), (b"b.jpg", 0)]
    block = bytearray(header(b"c.jpg", 0, b"0"))
    block[124:136] = b"\x80" + (600).to_bytes(11, "big")
    path.write_bytes(summed(block) + bytes(1024 + BLOCK))
    assert [(m.name, m.length) for m in found(path)] == [(b"c.jpg", 600)]


def summed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sized(field: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        block = bytearray(content[:BLOCK])
        block[124:136] = field
        return summed(block) + content[BLOCK:]

    return change


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "is an empty file"),
    "less than a header": (lambda c: c[:300], "ends inside a header"),
    "cut between members": (lambda c: c[: 2 * BLOCK], "has no end mark.*head -c 1024"),
    "cut in the padding": (lambda c: c[: 2 * BLOCK - 100], "is truncated"),
    "cut in the data": (lambda c: c[: 3 * BLOCK], "a member at byte 1,024 runs past the end"),
    "cut in a header": (lambda c: c[: 2 * BLOCK + 100], "ends inside a header"),
    "no tar": (lambda c: b"\xff\xd8\xff" + c[3:], "is no tar file"),
    "a flipped bit": (lambda c: c[:1030] + b"?" + c[1031:], "no header where one .* byte 1,024"),
    "gzip": (lambda c: b"\x1f\x8b" + c[2:], "compressed with gzip.*gunzip FILE"),
    "zstd": (lambda c: b"\x28\xb5\x2f\xfd" + c[4:], "compressed with zstd.*unzstd"),
    "bzip2": (lambda c: b"BZh" + c[3:], "compressed with bzip2"),
    "xz": (lambda c: b"\xfd7zXZ" + c[5:], "compressed with xz"),
    "negative": (sized(b"\xff" * 12), "runs past the end"),
    "huge": (sized(b"\x80" + b"\xff" * 11), "runs past the end"),
    "no number": (sized(b"many bytes\0\0"), "runs past the end"),
    "minus": (sized(b"-0000000001\0"), "runs past the end"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.tar", tarfile.USTAR_FORMAT, ["a.jpg", "b.jpg"])
    harm, message = DAMAGES[damage]
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(BadTar, match=message) as caught:
        found(path)
    assert ": " in str(caught.value)  # and how to mend it


@pytest.mark.parametrize("size", ["-600", "x", "99999999999", "9" * 30])
def test_damaged_pax_sizes_end_too(tmp_path: Path, size: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(pax("a.jpg", size=size))
    with pytest.raises(BadTar, match="runs past the end"):
        found(path)


@pytest.mark.parametrize("records", [b"x", b"0 a=b\n", b"-1 a=b\n", b"4 a\n"])
def test_damaged_pax_records(tmp_path: Path, records: bytes) -> None:
    path = tmp_path / "a.tar"
    block = header(b"pax", len(records), b"x")
    path.write_bytes(block + records.ljust(BLOCK, b"\0") + bytes(BLOCK))
    with pytest.raises(BadTar, match="a PAX header that cannot be read"):
        found(path)
    path.write_bytes(header(b"pax", 2 << 20, b"x") + bytes(3 << 20))
    with pytest.raises(BadTar, match="a header of 2,097,152 bytes"):
        found(path)


def test_a_pax_record_without_a_value_is_walked_over(tmp_path: Path) -> None:
    path, records = tmp_path / "a.tar", b"8 size=\n8 path=\n"
    before = header(b"pax", len(records), b"x") + records.ljust(BLOCK, b"\0")
    path.write_bytes(before + header(b"a.jpg", 3, b"0") + bytes(2 * BLOCK))
    assert [(m.name, m.length) for m in found(path)] == [(b"a.jpg", 3)]


def test_one_empty_block_is_an_end_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tarfile.USTAR_FORMAT, ["a.jpg", "b.jpg"])
    path.write_bytes(path.read_bytes()[: 5 * BLOCK])
    assert len(found(path)) == 2
