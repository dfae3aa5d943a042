"""One policy for every kind of image, on every backend: the same pixels, or the same refusal."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from pipelines import decode, index
from pipelines.errors import BadImage
from pipelines.plan import Rows
from pipelines.sources import FILL, dali_available, ffcv_available
from pipelines.sources.torch_source import TorchSource, resize_crop
from pipelines.stores import Store, open_store
from tests.pipelines.fake_store import encoded, picture, rows_of
from tests.pipelines.test_decode import png

HEIGHT, WIDTH, SIZE = 60, 80, 32
GREY = torch.tensor(FILL, dtype=torch.uint8)
PHOTO = picture(HEIGHT, WIDTH)
LUMA = np.asarray(Image.fromarray(PHOTO).convert("L"))
FINE = PHOTO.astype(np.uint16) * 256 + np.arange(WIDTH, dtype=np.uint16)[:, None]  # 16 bits
INDEXED = Image.fromarray(PHOTO).quantize(32)

# 24 x 32 pixels by libjpeg-turbo with TJ_ARITHMETIC=1: Pillow reads such files, but writes none.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHB"
    "YWICwgIyYnKSopGR8tMC0oMCUoKSj/2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgo"
    "KCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/yQARCAAYACADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPw"
    "D9EN9gZyvZI0H4DtlMBJ1EA4wSOzOjyZnzkgGrqDi8NBj2cwz6s8xs4rvwstfBZjJOc2H8iRxwmAH+kQadYjl7ggvJ"
    "SoyFtARXP1O+UoaaJkZEv3fCKt4wq+AoLRYqSRwsYi7NO+4s8NV0tiQqtjsruvGFwrKVkdLMcDtWbyzamH4nlpWWKW"
    "xpw+RdS3u/aYw2VZdZpBXBErjHKlvK22z/AKM7DSTJul4mMBf7IdN6qEZOK86ju560r7B+bcPkcjetUp9iep0KH9oR"
    "gxd81U9i4oQWU9OfWR+ipiBiJwLDzVg2ZFmUd4tUBQjWeUxjlB8WA6Wz0ZY+NnAxFrYqVznXfVvmlygIpXlJdk7lYD"
    "Bl5d2CXHTab8YnCsLA45t9KPzTnctVlqak60E23UTQ/9k="
)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> np.ndarray:
    """As Pillow shows it, with nothing turned."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rotated(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(PHOTO, kind, exif=exif.tobytes())


def animated(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def bomb_png() -> bytes:
    return png(60_000, 60_000, 8, 2, b"\0" * 100)


def bomb_jpeg() -> bytes:
    data = bytearray(encoded(PHOTO))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def twelve_bits() -> bytes:
    data = bytearray(encoded(PHOTO))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


CMYK = np.array(Image.fromarray(PHOTO).convert("CMYK"))
RGBA = np.dstack([PHOTO, np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256]).astype(np.uint8)

# File name -> bytes, and the pixels it stands for where Pillow's own conversion is not the policy.
GOOD: dict[str, tuple[bytes, np.ndarray | None]] = {
    "alpha.png": (saved(Image.fromarray(RGBA), "PNG"), PHOTO),
    "animated.gif": (animated("GIF"), opened(encoded(PHOTO, "GIF"))),
    "animated.webp": (animated("WEBP", lossless=True), PHOTO),
    "arithmetic.jpg": (ARITHMETIC, None),
    "bmp.bmp": (encoded(PHOTO, "BMP"), PHOTO),
    "cmyk.jpg": (encoded(PHOTO, mode="CMYK"), None),
    "grey.jpg": (encoded(PHOTO, mode="L"), None),
    "grey.png": (encoded(PHOTO, "PNG", mode="L"), np.dstack([LUMA] * 3)),
    "grey_alpha.png": (encoded(PHOTO, "PNG", mode="LA"), np.dstack([LUMA] * 3)),
    "palette.png": (saved(INDEXED, "PNG"), np.asarray(INDEXED.convert("RGB"))),
    "palette_transparent.png": (
        saved(INDEXED, "PNG", transparency=bytes(range(0, 256, 8))),
        np.asarray(INDEXED.convert("RGB")),
    ),
    "photo.jpg": (encoded(PHOTO, quality=90), None),
    "photo_444.jpg": (encoded(PHOTO, quality=90, subsampling=0), None),
    "progressive.jpg": (encoded(PHOTO, progressive=True), None),
    "rgb_inside.jpg": (encoded(PHOTO, keep_rgb=True), None),
    "rotated.jpg": (rotated("JPEG"), None),
    "rotated.png": (rotated("PNG"), PHOTO),
    "sixteen_bit_colour.png": (
        png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in FINE)),
        PHOTO,
    ),
    "sixteen_bit_grey.png": (
        saved(Image.fromarray(LUMA.astype(np.uint16) * 256 + 99), "PNG"),
        np.dstack([LUMA] * 3),
    ),
    "tiff.tif": (encoded(PHOTO, "TIFF"), PHOTO),
    "webp.webp": (encoded(PHOTO, "WEBP", quality=80), None),
    "ycck.jpg": (simplejpeg.encode_jpeg(255 - CMYK, colorspace="CMYK"), None),
}

# File name -> bytes, and what the refusal says.
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb.jpg": (bomb_jpeg(), "65000 x 65000 pixels are more than the limit"),
    "bomb.png": (bomb_png(), "60000 x 60000 pixels are more than the limit"),
    "empty.jpg": (b"", "an empty file"),
    "html.jpg": (b"<!DOCTYPE html><html>404</html>", "a web page or XML text"),
    "text.png": (b"not found", "no image of a known format"),
    "truncated_header.jpg": (encoded(PHOTO)[:100], "truncated JPEG"),
    "twelve_bit.jpg": (twelve_bits(), "a JPEG of 12 bits a channel"),
}

# Their headers are sound: only decoding finds these out.
BROKEN: dict[str, tuple[bytes, str]] = {
    "truncated.gif": (encoded(PHOTO, "GIF")[:-900], "truncated"),
    "truncated.jpg": (encoded(PHOTO)[:-400], "corrupt JPEG|truncated"),
    "truncated.png": (encoded(PHOTO, "PNG")[:-900], "truncated|Error"),
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "good", GOOD)


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    return write(tmp_path / "everything", GOOD | REFUSED | BROKEN)


def expected(store: Store, rows: Rows) -> torch.Tensor:
    """The crops of what the files stand for."""
    out = torch.empty(2, len(rows), SIZE, SIZE, 3, dtype=torch.uint8)
    for i, row in enumerate(rows.ids.tolist()):
        data, pixels = list(GOOD.values())[row]
        pixels = opened(data) if pixels is None else pixels
        assert tuple(store.sizes[row]) == pixels.shape[:2]
        for view in range(2):
            out[view, i] = resize_crop(pixels, rows.windows[i, view].tolist(), SIZE)
    return out


def crops(source: Any, rows: Rows) -> torch.Tensor:
    (out,) = source.crops([rows])
    source.close()
    return out.cpu()


def source_of(backend: str, store: Store, **options: Any) -> Any:
    options = {"image_size": SIZE, "device": "cpu", "threads": 2, **options}
    match backend:
        case "torch":
            return TorchSource(store, **options)
        case "dali":
            if not dali_available():
                pytest.skip("NVIDIA DALI is not installed")
            from pipelines.sources.dali_source import DaliSource

            return DaliSource(store, **options)
        case _:
            if not ffcv_available():
                pytest.skip("FFCV is not installed (launch/install_ffcv.sh)")
            from pipelines.sources.ffcv_source import FfcvSource

            return FfcvSource(store, **options)


BACKENDS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.dali),
    pytest.param("ffcv", marks=pytest.mark.ffcv),
]

# Mean and largest deviation of one image's crops from the torch source's, in levels of 255: DALI's
# resampler rounds once where torch rounds twice, and FFCV decodes with libjpeg's fast transform.
BOUNDS = {"torch": (0.0, 0), "dali": (0.6, 12), "ffcv": (1.6, 12)}


def check(got: torch.Tensor, wanted: torch.Tensor, bounds: tuple[float, int]) -> None:
    difference = (got.int() - wanted.int()).abs().float()
    names = list(GOOD)
    for i, name in enumerate(names):
        mean, most = difference[:, i].mean().item(), int(difference[:, i].max())
        assert mean <= bounds[0] and most <= bounds[1], f"{name}: {mean:.2f} on average, {most}"


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_kind_gives_its_pixels_on_every_backend(backend: str, good: Path) -> None:
    store = open_store(good, progress=False)
    assert len(store) == len(GOOD) and store.quarantined == ()
    (rows,) = rows_of(store, [range(len(GOOD))], SIZE)
    source = source_of(backend, store)
    check(crops(source, rows), expected(store, rows), BOUNDS[backend])
    assert source.bad == {}


@pytest.mark.gpu
@pytest.mark.dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
def test_every_kind_gives_its_pixels_on_a_gpu(decoder: str, good: Path) -> None:
    """nvJPEG rounds otherwise than libjpeg-turbo: about a level on average."""
    store = open_store(good, progress=False)
    (rows,) = rows_of(store, [range(len(GOOD))], SIZE)
    source = source_of("dali", store, device="cuda", decode=decoder)
    bounds = BOUNDS["dali"] if decoder == "cpu" else (2.0, 40)
    check(crops(source, rows), expected(store, rows), bounds)
    assert source.bad == {}


@pytest.fixture(scope="module")
def beton(good: Path) -> Store:
    """The same images converted, what is no plain JPEG without loss."""
    from pipelines.convert import main

    out = good.with_suffix(".beton")
    assert main([str(good), str(out), "--mode", "lossless"]) == 0
    return open_store(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_gives_its_pixels_from_a_beton(backend: str, beton: Store) -> None:
    assert len(beton) == len(GOOD)
    (rows,) = rows_of(beton, [range(len(GOOD))], SIZE)
    source = source_of(backend, beton)
    check(crops(source, rows), expected(beton, rows), BOUNDS[backend])
    assert source.bad == {}


def test_verifying_quarantines_what_cannot_be_used_and_says_why(
    everything: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index.main([str(everything), "--verify", "--json"]) == 4  # a third is bad
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == len(GOOD) and report["verified"] and report["ignored"] == 0
    reasons = {bad["name"]: bad["reason"] for bad in report["quarantined"]}
    check_reasons(reasons, REFUSED | BROKEN)
    store = open_store(everything, max_bad_share=1.0, progress=False)
    assert {Path(name).name for name, _ in store.quarantined} == set(REFUSED | BROKEN)
    assert [Path(store.name(row)).name for row in range(len(store))] == list(GOOD)


def check_reasons(reasons: dict[str, str], files: dict[str, tuple[bytes, str]]) -> None:
    assert set(reasons) == set(files)
    for name, (_, reason) in files.items():
        assert re.search(reason, reasons[name]), f"{name}: {reasons[name]}"


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_what_only_decoding_finds_is_grey_with_the_same_reason(
    backend: str, everything: Path
) -> None:
    """Headers alone let it into the table: it shows itself in training."""
    store = open_store(everything, verify=False, max_bad_share=1.0, progress=False)
    check_reasons({Path(n).name: reason for n, reason in store.quarantined}, REFUSED)
    names = [Path(store.name(row)).name for row in range(len(store))]
    assert set(names) == set(GOOD | BROKEN)
    (rows,) = rows_of(store, [range(len(store))], SIZE)
    rows.windows[:] = whole(store.sizes)
    source = source_of(backend, store)
    shown = crops(source, rows)
    for row, name in enumerate(names):
        assert bool((shown[:, row] == GREY).all()) == (name in BROKEN), name
    by_torch = source_of("torch", store)
    crops(by_torch, rows)
    assert source.bad == by_torch.bad
    check_reasons({names[row]: reason for row, reason in source.bad.items()}, BROKEN)


def whole(sizes: np.ndarray) -> np.ndarray:
    """Windows `[n, 2, 4]` of all of each image, so that no damage lies outside them."""
    return np.stack([np.concatenate([0 * sizes, sizes], axis=1)] * 2, axis=1)


@pytest.mark.parametrize("check", [decode.header, decode.verify, decode.decode])
@pytest.mark.parametrize("bomb", ["bomb.jpg", "bomb.png"])
def test_a_bomb_is_refused_before_anything_is_decoded_or_allocated(
    check: Callable[[bytes], Any], bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decodes(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decodes)
    monkeypatch.setattr(Image.Image, "load", decodes)
    before = peak_mb()
    with pytest.raises(BadImage, match=REFUSED[bomb][1]):
        check(REFUSED[bomb][0])
    assert peak_mb() - before < 50  # its pixels would be 10 to 13 GB


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
