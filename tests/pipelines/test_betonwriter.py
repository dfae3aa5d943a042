"""Files written here: page rules, and that FFCV's own loader reads every image."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.conversion.betonwriter import PAGE_SIZE, BetonWriter
from pipelines.sources import ffcv_available
from pipelines.stores.betonfile import HEADER, load
from tests.pipelines.fake_store import encoded, picture

Image = bytes | np.ndarray


def write(path: Path, images: list[tuple[Image, int, int]], labelled: bool = True) -> Path:
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(images) + 3, labelled=labelled)  # three never come
        for row, (data, height, width) in enumerate(images):
            writer.add(data, height, width, row % 5)
        assert len(writer) == len(images)
        writer.finish()
    return path


def blank(height: int, width: int) -> tuple[Image, int, int]:
    pixels = np.full((height, width, 3), height % 251, np.uint8)
    pixels[0, 0] = (1, 2, 3)
    return pixels, height, width


@pytest.mark.parametrize(
    ("images", "page"),
    [
        ([blank(10, 10)] * 4, PAGE_SIZE),
        ([blank(1500, 1000), blank(1200, 1000), blank(10, 10), blank(1000, 1000)], PAGE_SIZE),
        ([blank(10, 10), blank(2000, 2000), blank(20, 20), blank(1500, 1500)], 2 * PAGE_SIZE),
        ([blank(2048, 4096), blank(10, 10), blank(1200, 1000)], 4 * PAGE_SIZE),
        ([blank(1 << 10, 1 << 10), blank(1 << 11, 1 << 10), blank(8, 8)], PAGE_SIZE),
    ],
)
def test_no_image_crosses_a_page(
    tmp_path: Path, images: list[tuple[Image, int, int]], page: int
) -> None:
    file = load(write(tmp_path / "a.beton", images))
    assert file.page_size == page
    assert (file.offsets[0]) % PAGE_SIZE == 0
    ends = file.offsets + file.lengths
    assert (file.offsets // page == (ends - 1) // page).all()
    assert (file.offsets[1:] >= ends[:-1]).all()
    assert file.lengths.tolist() == [3 * height * width for _, height, width in images]
    content = (tmp_path / "a.beton").read_bytes()
    for row, (data, _, _) in enumerate(images):
        there = content[file.offsets[row] : ends[row]]
        assert there == np.asarray(data).tobytes()


def test_the_header_is_written_last(tmp_path: Path) -> None:
    with open(tmp_path / "a.beton", "wb") as file:
        writer = BetonWriter(file, 2, labelled=False)
        for _ in range(2):
            writer.add(*blank(10, 10), -1)
        file.flush()
        there = (tmp_path / "a.beton").read_bytes()
        assert len(there) > PAGE_SIZE and there[: HEADER.itemsize] == bytes(HEADER.itemsize)
        writer.finish()
    assert len(load(tmp_path / "a.beton")) == 2


@pytest.mark.ffcv
@pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed (launch/install_ffcv.sh)")
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcvs_loader_reads_every_image(tmp_path: Path, os_cache: bool) -> None:
    """Also those after a page that had to grow; without the cache it reads whole pages."""
    from ffcv import Loader
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import OrderOption

    pixels = [picture(64 + i, 96, seed=i) for i in range(9)]
    pixels[4] = np.repeat(np.repeat(picture(64, 96), 25, 0), 25, 1)  # 11.5 MB
    pixels[6] = np.repeat(np.repeat(picture(64, 96, seed=9), 20, 0), 20, 1)
    data = [encoded(p, quality=95) if i % 2 else p for i, p in enumerate(pixels)]
    images = [(d, *p.shape[:2]) for d, p in zip(data, pixels, strict=True)]
    path = write(tmp_path / "ours.beton", images)
    loader = Loader(
        str(path),
        batch_size=4,
        num_workers=1,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [CenterCropRGBImageDecoder((64, 64), 1.0)], "label": [IntDecoder()]},
    )
    batches = [(crops.copy(), labels.copy()) for crops, labels in loader]
    crops = np.concatenate([crops for crops, _ in batches])
    assert np.concatenate([labels for _, labels in batches]).ravel().tolist() == [
        row % 5 for row in range(9)
    ]
    for row, image in enumerate(pixels):
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        centre = image[top : top + side, left : left + side].astype(int)
        mean = centre.reshape(-1, 3).mean(0)
        assert np.abs(crops[row].reshape(-1, 3).mean(0) - mean).max() < 2
