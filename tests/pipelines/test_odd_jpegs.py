"""JPEGs with something odd beside their pixels are used; those whose pixels are damaged are not."""

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines import decode
from pipelines.conversion.storage import Storage
from pipelines.errors import BadImage
from pipelines.sources import FILL
from pipelines.sources.reader import Reader
from pipelines.sources.torch_source import TorchSource
from tests.pipelines.fake_store import FakeStore, encoded, picture, rows_of

PHOTO = picture(120, 160)


def jpeg(kind: str) -> bytes:
    options: dict[str, Any] = {
        "baseline": {"quality": 85},
        "restarts": {"restart_marker_rows": 1},
        "fine": {"subsampling": 0, "quality": 95},
        "progressive": {"progressive": True},
        "grey": {"mode": "L"},
        "cmyk": {"mode": "CMYK"},
        "rgb": {"keep_rgb": True},
    }[kind]
    return encoded(PHOTO, **options)


KINDS = ["baseline", "restarts", "fine", "progressive", "grey", "cmyk", "rgb"]


def scan_header(data: bytes) -> tuple[int, int]:
    """Where the first scan's header begins, and where its data does."""
    at = 2
    while data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def app(number: int, body: bytes) -> bytes:
    return bytes([0xFF, number]) + struct.pack(">H", len(body) + 2) + body


def before(sign: bytes, junk: bytes) -> Callable[[bytes], bytes]:
    """Puts `junk` before the first such marker."""
    return lambda data: data[: data.index(sign)] + junk + data[data.index(sign) :]


def at_start(segment: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:2] + segment + data[2:]


def at_end(junk: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:-2] + junk + data[-2:]


def scan_parameters(data: bytes) -> bytes:
    end = scan_header(data)[1]
    return data[: end - 3] + bytes(3) + data[end:]


def height_behind_the_scan(data: bytes) -> bytes:
    frame = data.index(b"\xff\xc0")
    height = data[frame + 5 : frame + 7]
    return (
        data[: frame + 5] + bytes(2) + data[frame + 7 : -2] + b"\xff\xdc\0\4" + height + data[-2:]
    )


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "junk before the tables": before(b"\xff\xdb", b"\x12\x34"),
    "zeros before the codes": before(b"\xff\xc4", bytes(64)),
    "junk before the scan": before(b"\xff\xda", b"pad"),
    "junk behind the first marker": at_start(b"\0\0"),
    "JFIF of version 2": at_start(app(0xE0, b"JFIF\0\2\0\0\0\1\0\1\0\0")),
    "an ICC profile 3 of 1": at_start(app(0xE2, b"ICC_PROFILE\0\3\1" + bytes(99))),
    "an ICC profile 1 of 2": at_start(app(0xE2, b"ICC_PROFILE\0\1\2" + bytes(99))),
    "Exif that is none": at_start(app(0xE1, b"Exif\0\0" + bytes(range(200)))),
    "no end marker": lambda data: data[:-2],
    "half an end marker": lambda data: data[:-1],
    "something behind the end": lambda data: data + b"\xff" + bytes(5000) + b"JUNK",
    "another JPEG behind the end": lambda data: data + encoded(picture(40, 50)),
    "a comment before the end": at_end(app(0xFE, b"a comment")),
    "fill bytes before the end": at_end(b"\xff" * 9),
    "zeros before the end": at_end(bytes(70)),
    "equal bytes before the end": at_end(b"\x11" * 40),
}
OF_SOME: dict[str, tuple[Callable[[bytes], bytes], set[str]]] = {
    "scan parameters 0, 0, 0": (scan_parameters, set(KINDS) - {"progressive"}),
    "unknown Adobe transform": (
        lambda data: at_start(app(0xEE, b"Adobe\0\x64\0\0\0\0\3"))(data),
        {"baseline", "restarts", "fine", "grey"},
    ),
    "the height behind the scan": (height_behind_the_scan, {"baseline", "fine", "grey"}),
    "stuffing before a restart": (before(b"\xff\xd2", b"\x11" * 40), {"restarts"}),
    "zeros before two restarts": (
        lambda data: before(b"\xff\xd1", bytes(30))(before(b"\xff\xd3", bytes(9))(data)),
        {"restarts"},
    ),
    "words before the end": (at_end(b"webcam v1.0, frame 00017"), {"baseline"}),
}
ODD = [(name, kind) for name in HARMLESS for kind in KINDS]
ODD.remove(("JFIF of version 2", "rgb"))  # with JFIF the same bytes are YCbCr
ODD += [(name, kind) for name, (_, kinds) in OF_SOME.items() for kind in sorted(kinds)]


def odd(name: str, kind: str) -> bytes:
    change = HARMLESS.get(name) or OF_SOME[name][0]
    return change(jpeg(kind))


@pytest.mark.parametrize(("name", "kind"), ODD)
def test_pixels_that_are_all_there_are_used(name: str, kind: str) -> None:
    data, want = odd(name, kind), decode.decode(jpeg(kind))
    assert data != jpeg(kind)
    np.testing.assert_array_equal(decode.decode(data), want)
    assert decode.header(data) == decode.verify(data) == want.shape[:2]
    top, height = decode.decode_top(data, 30)
    assert height == len(want)
    np.testing.assert_array_equal(top[:30], want[:30])


@pytest.mark.parametrize(
    ("name", "kind"), [each for each in ODD if each[1] in ("baseline", "restarts", "cmyk")]
)
def test_what_is_converted_is_free_of_it(name: str, kind: str) -> None:
    """So that FFCV and every other reader of the file sees nothing odd."""
    stored = Storage("lossless")(odd(name, kind))
    if kind == "cmyk":
        np.testing.assert_array_equal(stored.data, decode.decode(jpeg(kind)))
        return
    assert stored.how == "copied" and isinstance(stored.data, bytes)
    assert decode.is_plain_jpeg(stored.data) and decode.sound(stored.data) is stored.data
    np.testing.assert_array_equal(decode.decode(stored.data), decode.decode(jpeg(kind)))


def tail_of_zeros(data: bytes) -> bytes:
    half = (scan_header(data)[1] + len(data)) // 2
    return data[:half] + bytes(len(data) - half)


def without_a_restart(data: bytes) -> bytes:
    at = data.index(b"\xff\xd3")
    return data[:at] + data[at + 2 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half of it": lambda data: data[: (scan_header(data)[1] + len(data)) // 2],
    "half, and an end marker": lambda data: data[: len(data) * 3 // 4] + b"\xff\xd9",
    "a tail of zeros": tail_of_zeros,
    "a tail of zeros, and an end marker": lambda data: tail_of_zeros(data) + b"\xff\xd9",
    "without the last bytes": lambda data: data[:-9],
}
HIDING = ["junk before the tables", "JFIF of version 2", "an ICC profile 3 of 1"]


@pytest.mark.parametrize("hidden", ["", *HIDING])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_whatever_odd_hides_it(damage: str, kind: str, hidden: str) -> None:
    data = DAMAGE[damage](jpeg(kind))
    data = HARMLESS[hidden](data) if hidden else data
    for check in (decode.decode, decode.verify):
        with pytest.raises(BadImage):
            check(data)


@pytest.mark.parametrize(
    "change", [without_a_restart, lambda d: before(b"\xff\xd2", b"\x11" * 40)(d)[:-900]]
)
def test_damage_behind_a_restart_marker(change: Callable[[bytes], bytes]) -> None:
    data = change(jpeg("restarts"))
    for check in (decode.decode, decode.verify, lambda data: decode.decode_top(data, 90)):
        with pytest.raises(BadImage):
            check(data)


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused() -> None:
    """Its pixels are there, but coarse: nothing in the data itself is wrong."""
    data = jpeg("progressive")
    scans = [found.start() for found in re.finditer(b"\xff\xda", data)]
    for scan in scans[1:]:
        tables = data.rfind(b"\xff\xc4", 0, scan)
        with pytest.raises(BadImage, match=r"ends before its last scan|corrupt"):
            decode.decode(data[:tables])


def test_the_upper_rows_of_a_jpeg_with_restart_markers_need_no_more_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(data: bytes) -> bytes:
        raise AssertionError("the whole was decoded")

    monkeypatch.setattr(decode, "sound", refuse)
    for interval in (1, 3, 7, 10, 64):
        data = encoded(PHOTO, restart_marker_blocks=interval)
        for rows in (1, 20, 64, 100):
            top, _ = decode.decode_top(data, rows)
            np.testing.assert_array_equal(top[:rows], decode.decode(data)[:rows])


def test_flips_are_hardly_ever_taken_for_stuffing() -> None:
    """Whatever a strict decoder complains of after a flipped bit stays refused."""
    refused = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        data = bytearray(encoded(picture(64, 96, seed), quality=int(random.integers(60, 96))))
        start = scan_header(bytes(data))[1]
        data[random.integers(start, len(data) - 2)] ^= 1 << int(random.integers(8))
        try:
            decode.verify(bytes(data))
        except BadImage:
            refused += 1
        else:
            assert decode.sound(bytes(data)) == bytes(data)
    assert refused > 20


@pytest.mark.parametrize("backend", ["torch", pytest.param("dali", marks=pytest.mark.dali)])
def test_every_source_shows_the_odd_and_refuses_the_damaged(backend: str) -> None:
    good = [odd(name, "restarts") for name, kind in ODD if kind == "restarts"]
    bad = [make(jpeg("restarts")) for make in DAMAGE.values()]
    store = FakeStore([*good, *bad, jpeg("restarts")], [PHOTO.shape[:2]] * (len(good + bad) + 1))
    (rows,) = rows_of(store, [range(len(store))])
    rows.windows[:] = (0, 0, *PHOTO.shape[:2])
    source: Any
    if backend == "torch":
        source = TorchSource(store, image_size=32, device="cpu", threads=1)
    else:
        source = pytest.importorskip("pipelines.sources.dali_source").DaliSource(
            store, image_size=32, device="cpu", threads=1
        )
    (shown,) = source.crops([rows])
    source.close()
    for row in range(len(good)):
        assert bool((shown[:, row] == shown[:, -1]).all()), ODD[row]
    assert set(source.bad) == set(range(len(good), len(good + bad)))
    assert bool((shown[:, len(good) : -1].reshape(-1, 3) == shown.new_tensor(FILL)).all())


def test_what_was_verified_is_not_decoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore([jpeg("baseline")] * 2, [PHOTO.shape[:2]] * 2)
    judged: list[bytes] = []

    def sound(data: bytes) -> bytes:
        judged.append(data)
        return data

    monkeypatch.setattr("pipelines.sources.reader.sound", sound)
    reader = Reader(store)
    for row in (0, 1, 0, 1):
        reader.whole(row, jpeg("baseline"))
    assert len(judged) == 2  # once each
    store.verified = True  # type: ignore[attr-defined]
    Reader(store).whole(0, jpeg("baseline"))
    assert len(judged) == 2
