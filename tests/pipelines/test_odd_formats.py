"""PNG and TIFF with something odd in them, and files that are no images at all."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import decode
from pipelines.errors import BadImage
from tests.pipelines.fake_store import encoded, picture

PHOTO = picture(40, 60)


def chunk(kind: bytes, body: bytes, *, spoil: bool = False) -> bytes:
    checksum = zlib.crc32(kind + body) ^ spoil
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNGS = {
    "colour": encoded(PHOTO, "PNG"),
    "palette": saved(Image.fromarray(PHOTO).quantize(16), "PNG"),
    "alpha": encoded(PHOTO, "PNG", mode="RGBA"),
}
BIG = zlib.compress(bytes(3 << 20))
BESIDE = {
    "a big text": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "a text with another checksum": chunk(b"tEXt", b"Comment\0hello", spoil=True),
    "a profile that is none": chunk(b"iCCP", b"x\0\0" + b"no zlib data"),
    "a bomb of a profile": chunk(b"iCCP", b"x\0\0" + BIG),
    "many texts": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000))) * 99,
    "a wrong gamma": chunk(b"gAMA", b""),
    "Exif that is none": chunk(b"eXIf", b"\1\2\3"),
    "an animation of no frames": chunk(b"acTL", bytes(8)),
    "a chunk nobody knows": chunk(b"abCd", bytes(99)),
}


@pytest.mark.parametrize("kind", PNGS)
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_the_pixels_of_a_png_plays_no_part(
    beside: str, place: bytes, kind: str
) -> None:
    data = PNGS[kind]
    at = data.index(place) - 4
    data = data[:at] + BESIDE[beside] + data[at:]
    np.testing.assert_array_equal(decode.decode(data), decode.decode(PNGS[kind]))
    assert decode.header(data) == decode.header(data[:64]) == decode.verify(data) == (40, 60)


def test_a_png_whose_checksum_alone_is_wrong_is_whole() -> None:
    data = bytearray(PNGS["colour"])
    data[data.index(b"IEND") - 8 : data.index(b"IEND") - 4] = bytes(4)
    np.testing.assert_array_equal(decode.decode(bytes(data)), PHOTO)


def test_no_flipped_bit_changes_the_pixels_of_a_png_unseen() -> None:
    """Pillow alone shows one in forty of them."""
    small = {
        kind: encoded(picture(9, 12), "PNG", mode=mode) for kind, mode in (("c", "RGB"), ("g", "L"))
    }
    small["p"] = saved(Image.fromarray(picture(9, 12)).quantize(5), "PNG")
    refused = 0
    for data in small.values():
        want = decode.decode(data)
        for position in range(8, len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            try:
                np.testing.assert_array_equal(decode.decode(bytes(damaged)), want)
            except BadImage:
                refused += 1
        for end in range(len(data) - 30):
            with pytest.raises(BadImage):
                decode.decode(data[:end])
    assert refused > 500


def test_pngs_that_cannot_be_read_say_so() -> None:
    palette = PNGS["palette"]
    start, end = palette.index(b"PLTE") - 4, palette.index(b"IDAT") - 4
    with pytest.raises(BadImage, match="palette is missing"):
        decode.decode(palette[:start] + palette[end:])
    with pytest.raises(BadImage, match="CgBI"):
        decode.header(PNGS["colour"][:8] + chunk(b"CgBI", bytes(4)) + PNGS["colour"][8:])
    sixteen_bit_palette = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 3, 0, 0, 0))
    for check in (decode.header, decode.decode):
        with pytest.raises(BadImage, match="no PNG may have"):
            check(PNGS["colour"][:8] + sixteen_bit_palette + PNGS["colour"][33:])


def tiff(
    strips: list[bytes], size: tuple[int, int], bits: list[int], photometric: int, **more: Any
) -> bytes:
    """An uncompressed TIFF; one strip, or one for each plane."""
    data, lengths = b"".join(strips), [len(strip) for strip in strips]
    offsets = [8 + sum(lengths[:i]) for i in range(len(strips))]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [size[1]]),
        257: (4, [size[0]]),
        258: (3, bits),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, offsets),
        277: (3, [len(bits)]),
        278: (4, [size[0]]),
        279: (4, lengths),
        284: (3, [more.get("planar", 1)]),
        **more.get("tags", {}),
    }
    at, extra, entries = 8 + len(data), b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        body = struct.pack(f"<{len(values)}{'HI'[kind - 3]}", *values)
        if len(body) > 4:
            extra, body = extra + body, struct.pack("<I", at + len(extra))
        entries += struct.pack("<HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, at + len(extra)) + data + extra + directory


GREY = PHOTO[:, :, 0]
GREY_RGB = np.dstack([GREY] * 3)
FINE = GREY.astype("<u2") * 257


def packed(values: np.ndarray) -> bytes:
    """Of 12 bits, two in three bytes."""
    a, b = values.reshape(-1, 2).astype(np.uint32).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("data", "want"),
    [
        pytest.param(tiff([GREY.tobytes()], GREY.shape, [8], 1), GREY_RGB, id="8 bits"),
        pytest.param(tiff([(255 - GREY).tobytes()], GREY.shape, [8], 0), GREY_RGB, id="0 is white"),
        pytest.param(tiff([FINE.tobytes()], GREY.shape, [16], 1), GREY_RGB, id="16 bits"),
        pytest.param(
            tiff([(65535 - FINE).tobytes()], GREY.shape, [16], 0), GREY_RGB, id="16, 0 is white"
        ),
        pytest.param(
            tiff([packed(GREY.astype(np.uint16) * 16)], GREY.shape, [12], 1), GREY_RGB, id="12 bits"
        ),
        pytest.param(
            tiff([(255 - GREY).tobytes()], GREY.shape, [8], 0, planar=2), GREY_RGB, id="one plane"
        ),
        pytest.param(
            tiff([FINE.tobytes()], GREY.shape, [16], 1, planar=2), GREY_RGB, id="one of 16 bits"
        ),
        pytest.param(
            tiff([PHOTO[:, :, i].tobytes() for i in range(3)], GREY.shape, [8] * 3, 2, planar=2),
            PHOTO,
            id="planes",
        ),
        pytest.param(
            tiff([GREY.tobytes()], GREY.shape, [8], 3, tags={320: (3, [*range(256)] * 3)}),
            GREY_RGB,
            id="a palette of 8 bits",
        ),
        pytest.param(
            tiff(
                [GREY.tobytes()],
                GREY.shape,
                [8],
                3,
                tags={320: (3, [256 * i for i in range(256)] * 3)},
            ),
            GREY_RGB,
            id="a palette",
        ),
    ],
)
def test_tiffs_give_their_pixels(data: bytes, want: np.ndarray) -> None:
    np.testing.assert_array_equal(decode.decode(data), want)
    assert decode.verify(data) == want.shape[:2]


def test_tiffs_that_pillow_takes_for_something_else_are_refused() -> None:
    fine = PHOTO.transpose(2, 0, 1).astype("<u2") * 257
    planes = tiff([plane.tobytes() for plane in fine], GREY.shape, [16] * 3, 2, planar=2)
    subsampled = tiff([bytes(GREY.size * 3 // 2)], GREY.shape, [8] * 3, 6)
    for data, reason in ((planes, "separate planes of 16 bits"), (subsampled, "subsampled YCbCr")):
        for check in (decode.decode, decode.verify):
            with pytest.raises(BadImage, match=reason):
                check(data)


@pytest.mark.parametrize("compression", ["group4", "tiff_ccitt"])
def test_what_libtiff_only_prints_is_damage(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = np.random.default_rng(0).integers(0, 2, (64, 96)).astype(bool)
    clean = saved(Image.fromarray(lines), "TIFF", compression=compression)
    np.testing.assert_array_equal(decode.decode(clean)[:, :, 0], lines * np.uint8(255))
    named = 0
    for position in range(20, len(clean) - 200, 31):
        damaged = bytearray(clean)
        damaged[position] ^= 0x55
        try:
            decode.verify(bytes(damaged))
        except BadImage as error:
            named += "Decode" in str(error)
    assert named > 5
    assert capfd.readouterr().err == ""


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(4) + brand + b"mif1" + bytes(40)


TAR = io.BytesIO(bytes(257) + b"ustar" + bytes(300)).getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (box(b"avif"), "AVIF"),
        (box(b"heic"), "HEIC"),
        (b"\0\0\0\x14ftypisom" + bytes(4) + b"mp41" + bytes(40), "video"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (gzip.compress(encoded(PHOTO)), "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b'{"error": "rate limit exceeded"}', "JSON"),
        (b'  [ {"a": 1} ]', "JSON"),
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\3\4" + bytes(30), "ZIP"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI video"),
        (b"\x1aE\xdf\xa3" + bytes(30), "WebM"),
        (b"8BPS\0\1", "Photoshop"),
        (bytes(5000), "5,000 zero bytes"),
        (TAR, "tar archive"),
        (b"\0\5\x16\7" + bytes(99), "macOS"),
        (b"404: Not Found", "plain text"),
        (b"II*\0" + bytes(30), "a TIFF that is damaged, or of a kind that is not read"),
        (b"\x07\x05\x99\x88", "no image of a known format"),
    ],
)
def test_what_is_no_image_is_named_for_what_it_is(data: bytes, what: str) -> None:
    checks: list[Callable[[bytes], Any]] = [decode.header, decode.decode, decode.verify]
    for check in checks:
        with pytest.raises(BadImage, match=what):
            check(data)
