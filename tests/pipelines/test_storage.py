"""What becomes of one image: copied byte by byte, encoded, or stored as its pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.storage import Storage
from pipelines.decode import decode, is_plain_jpeg, verify
from pipelines.errors import BadImage
from tests.pipelines.fake_store import encoded, picture

PIXELS = picture(120, 200)
JPEG = encoded(PIXELS, quality=92)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("mode", ["jpeg", "lossless"])
@pytest.mark.parametrize("jpeg", [JPEG, encoded(PIXELS, mode="L"), encoded(PIXELS, progressive=1)])
def test_a_plain_jpeg_is_copied(mode: str, jpeg: bytes) -> None:
    stored = Storage(mode)(jpeg)  # type: ignore[arg-type]
    assert (stored.how, stored.data) == ("copied", jpeg)
    assert (stored.height, stored.width) == (120, 200)
    assert Storage(mode, max_side=200)(jpeg).data == jpeg  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(encoded(PIXELS, "PNG"), id="png"),
        pytest.param(encoded(PIXELS, mode="CMYK"), id="cmyk"),
        pytest.param(encoded(PIXELS, "PNG", mode="P"), id="palette"),
        pytest.param(encoded(PIXELS, "PNG", mode="RGBA"), id="alpha"),
        pytest.param(PIXELS, id="pixels"),
        pytest.param(PIXELS[::-1, ::-1], id="a view"),
    ],
)
def test_what_is_no_plain_jpeg(image: bytes | np.ndarray) -> None:
    pixels = decode(image) if isinstance(image, bytes) else image
    lossless = Storage("lossless")(image)
    assert lossless.how == "raw"
    np.testing.assert_array_equal(lossless.data, pixels)
    stored = Storage("jpeg")(image)
    assert stored.how == "encoded" and isinstance(stored.data, bytes)
    assert is_plain_jpeg(stored.data)
    assert psnr(decode(stored.data), pixels) > 22  # a dithered palette is the worst
    assert (stored.height, stored.width) == (120, 200)
    assert stored.nbytes == len(stored.data) < lossless.nbytes == pixels.nbytes


def test_raw_leaves_nothing_to_decode() -> None:
    stored = Storage("raw")(JPEG)
    assert stored.how == "raw"
    np.testing.assert_array_equal(stored.data, decode(JPEG))


def test_quality() -> None:
    low, high = Storage(quality=30)(PIXELS), Storage(quality=95)(PIXELS)
    assert low.nbytes < high.nbytes
    assert psnr(decode(low.data), PIXELS) < psnr(decode(high.data), PIXELS)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(120, 200, (60, 100)), (200, 120, (100, 60)), (7, 300, (2, 100)), (1, 1000, (1, 100))],
)
def test_the_longer_side_is_brought_down(height: int, width: int, size: tuple[int, int]) -> None:
    stored = Storage("raw", max_side=100)(picture(height, width))
    assert (stored.height, stored.width) == np.asarray(stored.data).shape[:2] == size
    same = Storage("raw", max_side=max(height, width))(picture(height, width))
    assert (same.height, same.width) == (height, width)


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255  # too fine to be seen at a quarter of the size: grey, not black or white
    small = np.asarray(Storage("raw", max_side=100)(stripes).data)
    assert small[5:-5, 5:-5].std() < 3
    expected = Image.fromarray(PIXELS).resize((100, 60), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(Storage("raw", max_side=100)(PIXELS).data, np.asarray(expected))


@pytest.mark.parametrize("storage", [Storage(), Storage("raw"), Storage(max_side=50)])
@pytest.mark.parametrize("image", [JPEG, encoded(PIXELS, "PNG"), encoded(PIXELS, mode="CMYK")])
def test_corrupt_images_are_refused(storage: Storage, image: bytes) -> None:
    with pytest.raises(BadImage):
        storage(image[: len(image) * 2 // 3])
    with pytest.raises(BadImage):
        storage(b"<html>404</html>")


def test_a_cmyk_jpeg_that_only_verification_finds_corrupt() -> None:
    data = encoded(picture(200, 300), mode="CMYK")
    overlooked = 0
    for position in range(data.index(b"\xff\xda") + 20, len(data) - 2, 37):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            verify(bytes(flipped))
        except BadImage:
            with pytest.raises(BadImage):
                Storage()(bytes(flipped))
            overlooked += 1
    assert overlooked > 5


def test_a_side_too_long_for_the_format() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (70_000, 2)).save(buffer, "PNG")
    for storage in (Storage(), Storage("raw")):
        with pytest.raises(BadImage, match="a maximum side is needed"):
            storage(buffer.getvalue())
    assert Storage(max_side=1000)(buffer.getvalue()).width == 1000
