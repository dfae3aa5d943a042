"""The image policy: what pixels any file gives, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipelines import decode
from pipelines.errors import BadImage


def picture(height: int = 53, width: int = 77, seed: int = 0) -> np.ndarray:
    """A smooth random picture, uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG from raw scan lines, for kinds Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts)


def same(data: bytes, want: np.ndarray) -> None:
    """`data` gives exactly these pixels, and header and verify agree on its size."""
    got = decode.decode(data)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert got.flags.writeable
    np.testing.assert_array_equal(got, want)
    assert decode.header(data) == decode.verify(data) == want.shape[:2]


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
def test_jpeg_gives_the_pixels_of_pillow(sampling: str) -> None:
    data = simplejpeg.encode_jpeg(picture(), quality=90, colorsubsampling=sampling)
    assert decode.is_plain_jpeg(data)
    same(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 2}])
def test_progressive_and_restart_markers(options: dict[str, object]) -> None:
    data = encode(picture(), "JPEG", **options)
    assert decode.is_plain_jpeg(data)
    same(data, np.asarray(Image.open(io.BytesIO(data))))


def test_grey_jpeg_has_three_equal_channels() -> None:
    data = encode(Image.fromarray(picture()).convert("L"), "JPEG")
    assert decode.is_plain_jpeg(data)
    grey = np.asarray(Image.open(io.BytesIO(data)))
    same(data, np.stack([grey] * 3, axis=2))


def test_cmyk_jpeg_goes_through_pillow_and_is_close_to_its_source() -> None:
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=98)
    assert not decode.is_plain_jpeg(data)
    same(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decode.decode(data).astype(int) - picture()).mean() < 4


def test_rgb_stored_as_such_is_not_plain_but_right() -> None:
    data = encode(picture(), "JPEG", keep_rgb=True, quality=98)
    assert not decode.is_plain_jpeg(data)
    same(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decode.decode(data).astype(int) - picture()).mean() < 2


def test_odd_sampling_is_left_to_pillow() -> None:
    data = bytearray(encode(picture(16, 16), "JPEG", subsampling=0))
    start = data.index(b"\xff\xc0")
    for component in range(3):  # 2x2 for all three is 4:4:4 written in another way
        data[start + 11 + 3 * component] = 0x22
    assert not decode.is_plain_jpeg(bytes(data))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(picture(20, 40), kind, exif=exif)
        assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
        same(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert decode.header(data) == (20, 40)


@pytest.mark.filterwarnings("error:Palette images")
def test_palette_and_its_transparency() -> None:
    image = Image.fromarray(picture()).quantize(16)
    want = np.asarray(image.convert("RGB"))
    same(encode(image, "PNG"), want)
    same(encode(image, "PNG", transparency=bytes(range(0, 160, 10))), want)


@pytest.mark.filterwarnings("error:Palette images")
def test_alpha_is_dropped() -> None:
    alpha = np.linspace(0, 255, 53 * 77).astype(np.uint8).reshape(53, 77, 1)
    rgba = np.concatenate([picture(), alpha], axis=2)
    same(encode(rgba, "PNG"), picture())
    grey_alpha = rgba[:, :, 2:]
    same(encode(Image.fromarray(grey_alpha, "LA"), "PNG"), np.repeat(grey_alpha[:, :, :1], 3, 2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(40, 30)
    want = (values >> 8).astype(np.uint8)
    assert want.max() == 255
    assert len(np.unique(want)) == 256
    same(encode(values, kind), np.repeat(want[:, :, None], 3, axis=2))


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 4, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    same(png(4, 5, 16, 2, rows), (values >> 8).astype(np.uint8))


def test_one_bit_and_two_bit_png() -> None:
    same(encode(Image.fromarray(picture()[:, :, 0] > 99), "PNG"), two_levels())
    grey = np.array([[0, 85, 170, 255]], dtype=np.uint8)
    same(png(4, 1, 2, 0, b"\0\x1b"), np.repeat(grey[:, :, None], 3, axis=2))


def two_levels() -> np.ndarray:
    return np.repeat((picture()[:, :, :1] > 99) * np.uint8(255), 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(picture(), kind, **options)
    assert not decode.is_plain_jpeg(data)
    same(data, picture())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.fromarray(np.full((9, 8, 3), value, np.uint8)) for value in (40, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    same(data, np.full((9, 8, 3), 40, np.uint8))


def test_tiff_orientation_is_part_of_the_layout() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    same(encode(picture(20, 40), "TIFF", exif=exif), np.rot90(picture(20, 40), 3))


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (4000, 3), (8, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_shapes(size: tuple[int, int], kind: str) -> None:
    data = encode(picture(*size), kind)
    same(data, np.asarray(Image.open(io.BytesIO(data))))


def test_floating_point_pixels_are_refused() -> None:
    data = encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(BadImage, match="32-bit"):
        decode.decode(data)


@pytest.mark.parametrize("check", [decode.header, decode.decode, decode.verify])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>", "web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "web page"),
        (b"not an image at all", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "truncated"),
        (b"\xff\xd8\xff\xd9\x00\x00", "no frame header"),
        (b"\xff\xd8\xff\xe0\x00\x02\x00\x00\x00\x00", "truncated"),
        (b"\xff\xd8\xff\xc0\x00\x02\xff\xda\x00\x03\x01", "a frame header of the wrong length"),
    ],
)
def test_what_is_no_image_is_named(check: object, data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        check(data)  # type: ignore[operator]
    assert not decode.is_plain_jpeg(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_refused_and_not_half_grey(kind: str) -> None:
    data = encode(picture(), kind)
    for share in (0.3, 0.6, 0.95):
        cut = data[: int(len(data) * share)]
        for check in (decode.decode, decode.verify):
            with pytest.raises(BadImage):
                check(cut)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_cut_anywhere_in_its_header_is_refused(options: dict[str, object]) -> None:
    data = encode(picture(), "JPEG", **options)
    scan = data.index(b"\xff\xda")
    for end in range(1, scan + 20):
        for check in (decode.decode, decode.verify):
            with pytest.raises(BadImage):
                check(data[:end])
        if end <= scan + 4:  # not even the size can be told
            with pytest.raises(BadImage):
                decode.header(data[:end])
            assert not decode.is_plain_jpeg(data[:end])


def test_bit_flips_that_pillow_does_not_see() -> None:
    data = encode(picture(200, 300), "JPEG", quality=90)
    start = data.index(b"\xff\xda") + 20
    missed = found = 0
    for position in range(start, len(data) - 2, 37):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            simplejpeg.decode_jpeg(bytes(flipped), strict=True)
        except ValueError:
            found += 1
            for check in (decode.verify, decode.decode):
                with pytest.raises(BadImage, match="corrupt JPEG"):
                    check(bytes(flipped))
            missed += pillow_size(bytes(flipped)) is not None
        else:
            assert decode.verify(bytes(flipped)) == (200, 300)
    assert found >= 10
    assert missed > found / 2


def test_bit_flips_in_a_cmyk_jpeg_are_found_by_verify() -> None:
    data = encode(Image.fromarray(picture(200, 300)).convert("CMYK"), "JPEG")
    overlooked = 0
    for position in range(data.index(b"\xff\xda") + 20, len(data) - 2, 37):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            simplejpeg.decode_jpeg(bytes(flipped), "cmyk", strict=True)
        except ValueError:
            with pytest.raises(BadImage):
                decode.verify(bytes(flipped))
            overlooked += decode.header(bytes(flipped)) == pillow_size(bytes(flipped))
    assert overlooked > 5


def pillow_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of what Pillow decodes without a complaint."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.height, image.width
    except OSError:
        return None


def test_png_checksums_are_verified() -> None:
    data = encode(picture(), "PNG")
    for position in range(20, len(data) - 12, 101):
        flipped = bytearray(data)
        flipped[position] ^= 4
        with pytest.raises(BadImage):
            decode.verify(bytes(flipped))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_378, 20_000, 65_535])
def test_bombs_are_refused_from_the_header(side: int) -> None:
    jpeg = bytearray(encode(picture(16, 16), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", side, side)
    for data in (bytes(jpeg), png(side, side, 8, 2, b"")):
        for check in (decode.header, decode.decode, decode.verify):
            with pytest.raises(BadImage, match=r"more than the limit|DecompressionBomb"):
                check(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_itself_is_allowed() -> None:
    assert 13_377 * 13_377 <= decode.MAX_PIXELS < 13_378 * 13_378
    assert decode.header(png(13_377, 13_377, 8, 2, b"")) == (13_377, 13_377)


def test_header_of_a_prefix() -> None:
    data = encode(picture(200, 300), "JPEG")
    assert decode.header(data[:1000]) == (200, 300)
    metadata = b"\xff\xe1\xff\xff" + bytes(65533)
    padded = data[:2] + metadata + data[2:]
    with pytest.raises(BadImage, match="truncated"):
        decode.header(padded[: 64 << 10])
    assert decode.header(padded) == (200, 300)
    assert decode.is_plain_jpeg(padded)


def test_a_thumbnail_inside_the_metadata_is_not_taken_for_the_image() -> None:
    thumbnail = encode(picture(16, 16), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = encode(picture(50, 60), "JPEG")
    assert decode.header(data[:2] + segment + data[2:]) == (50, 60)


def test_twelve_bit_jpeg_is_not_plain() -> None:
    data = bytearray(encode(picture(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert not decode.is_plain_jpeg(bytes(data))
    with pytest.raises(BadImage):
        decode.decode(bytes(data))


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_bad_image_or_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random damage of every format raises nothing but BadImage."""
    monkeypatch.setattr(decode, "MAX_PIXELS", 10**6)  # a damaged size costs seconds otherwise
    random = np.random.default_rng(0)
    outcomes = {"ok": 0, "bad": 0}
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        clean = encode(picture(24, 24), kind)
        for _ in range(60):
            data = bytearray(clean)
            for position in random.integers(0, min(len(data), 200), 4):
                data[position] = random.integers(0, 256)
            for check in (decode.header, decode.decode, decode.verify):
                try:
                    check(bytes(data))
                    outcomes["ok"] += 1
                except BadImage as error:
                    assert str(error)
                    outcomes["bad"] += 1
    assert min(outcomes.values()) > 50


def test_reasons_do_not_name_memory_addresses() -> None:
    with pytest.raises(BadImage) as caught:
        decode.decode(b"GIF89a" + bytes(3))
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "grey", "rgb"])
def test_the_upper_rows_are_those_of_the_whole(sampling: str) -> None:
    image = picture(133, 77)
    if sampling == "grey":
        data = encode(Image.fromarray(image).convert("L"), "JPEG")
    elif sampling == "rgb":
        data = encode(image, "JPEG", keep_rgb=True)
    else:
        data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=sampling)
    whole = decode.decode(data)
    decoded = []
    for rows in range(1, 134):
        top, height = decode.decode_top(data, rows)
        assert height == 133
        assert len(top) >= rows
        np.testing.assert_array_equal(top[:rows], whole[:rows])
        decoded.append(len(top))
    assert decoded[0] <= 16  # it does stop early
    assert decoded[-1] == 133


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"restart_marker_rows": 1}]
)
def test_upper_rows_of_other_jpegs_and_of_a_png(options: dict[str, object]) -> None:
    data = encode(picture(100, 60), "JPEG" if options else "PNG", **options)
    top, height = decode.decode_top(data, 20)
    assert height == 100
    np.testing.assert_array_equal(top[:20], decode.decode(data)[:20])


def test_upper_rows_of_a_jpeg_in_several_scans() -> None:
    """Its first scan holds only one component: it has to be read to the end."""
    data = encode(picture(100, 60), "JPEG", progressive=True)
    frame = data.index(b"\xff\xc2")
    separate = data[:frame] + b"\xff\xc0" + data[frame + 2 :]
    frame_of = decode._frame(separate)
    assert frame_of is not None
    assert frame_of.one_scan  # the first scan of Pillow's progressive files holds all three
    scan = separate.index(b"\xff\xda")
    one = separate[: scan + 4] + b"\x01" + separate[scan + 5 :]
    frame_of = decode._frame(one)
    assert frame_of is not None
    assert not frame_of.one_scan


def test_damage_in_the_rows_shown_is_found_and_truncation_everywhere() -> None:
    data = simplejpeg.encode_jpeg(picture(256, 64), quality=95)
    scan = data.index(b"\xff\xda")
    early = scan + (len(data) - scan) // 10
    broken = data[:early] + b"\xff\xd9" + data[early + 2 :]  # an end long before the end
    with pytest.raises(BadImage, match="corrupt JPEG"):
        decode.decode_top(broken, 128)
    late = len(data) - 100
    with pytest.raises(BadImage, match="corrupt JPEG"):
        decode.decode_top(data[:late], 32)
    broken = data[:late] + b"\xff\xd9" + data[late + 2 :]
    np.testing.assert_array_equal(decode.decode_top(broken, 32)[0][:32], decode.decode(data)[:32])
    with pytest.raises(BadImage, match="corrupt JPEG"):
        decode.decode(broken)
