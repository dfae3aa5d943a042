"""The FFCV source: the plan's rows and windows from a `.beton`, pixels near the torch source's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.conversion.betonwriter import BetonWriter
from pipelines.errors import DataError, MissingBackend
from pipelines.plan import Rows, RowStream, centre_windows
from pipelines.sources import FILL, ffcv_available
from pipelines.sources.torch_source import TorchSource
from pipelines.spec import AugmentSpec
from pipelines.stores.beton import BetonStore
from tests.pipelines import source_contract
from tests.pipelines.fake_store import SIZES, FakeStore, encoded, picture, rows_of

pytestmark = [
    pytest.mark.ffcv,
    pytest.mark.skipif(
        not ffcv_available(), reason="FFCV is not installed (launch/install_ffcv.sh)"
    ),
]
ROOT = Path(__file__).parents[2]
S = 32
GREY = torch.tensor(FILL, dtype=torch.uint8)
LARGE = [(600, 800), (431, 1000), (300, 300)]


def make(store: Any, size: int = S, **options: Any) -> Any:
    from pipelines.sources.ffcv_source import FfcvSource

    return FfcvSource(store, **{"image_size": size, "device": "cpu", "threads": 2, **options})


def cut(source: Any, rows: list[Rows]) -> list[torch.Tensor]:
    """All crops of a source, which is closed."""
    crops = list(source.crops(rows))
    source.close()
    return crops


def by_torch(store: Any, rows: list[Rows], size: int = S) -> list[torch.Tensor]:
    return cut(TorchSource(store, image_size=size, device="cpu", threads=1), rows)


def deviation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.int() - b.int()).abs().float()


def of_images(deviation: torch.Tensor) -> torch.Tensor:
    """[B]: the mean of each image."""
    return deviation.mean((0, 2, 3, 4))


def write(
    path: Path, images: Sequence[bytes | np.ndarray], sizes: Sequence[tuple[int, int]]
) -> BetonStore:
    """Images as they are in a `.beton`; the label is the row."""
    with path.open("wb") as file:
        writer = BetonWriter(file, len(images), labelled=True)
        for row, (image, size) in enumerate(zip(images, sizes, strict=True)):
            writer.add(image, *map(int, size), row)
        writer.finish()
    return BetonStore.open(path)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    threads, torch_threads = set(threading.enumerate()), torch.get_num_threads()
    yield
    assert set(threading.enumerate()) == threads and torch.get_num_threads() == torch_threads


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> BetonStore:
    """JPEGs, every fourth one grey."""
    sizes = [*SIZES, *LARGE]
    jpegs = FakeStore.of_jpegs(sizes)
    path = tmp_path_factory.mktemp("ffcv") / "jpegs.beton"
    return write(path, [jpegs.read(row) for row in range(len(jpegs))], sizes)


FFCV_WRITES = """
import sys
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from tests.pipelines.fake_store import picture

class Pictures:
    def __len__(self):
        return 8
    def __getitem__(self, row):
        return 100 - row, picture(90 + row, 140 - 7 * row, seed=row)

if __name__ == "__main__":
    np.random.seed(0)  # the writer's process is a fork, and tosses a coin for each picture
    image = RGBImageField(write_mode="proportion", compress_probability=0.5)
    fields = {"label": IntField(), "image": image}
    DatasetWriter(sys.argv[1], fields, num_workers=1).from_indexed_dataset(Pictures())
"""


@pytest.mark.slow
def test_a_file_that_ffcv_wrote_of_jpegs_and_raw_pixels(tmp_path: Path) -> None:
    script, path = tmp_path / "write.py", tmp_path / "ffcv.beton"
    script.write_text(FFCV_WRITES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1"}  # saves 6 s
    command = [sys.executable, str(script), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    store = BetonStore.open(path)
    raw = store.file.raw
    assert 0 < raw.sum() < 8 and store.labels.tolist() == list(range(100, 92, -1))
    rows = rows_of(store, [[5, 0, 3], [1, 2, 7, 4], [6]], 64)
    crops, expected = (
        torch.cat(cut(make(store, 64), rows), 1),
        torch.cat(by_torch(store, rows, 64), 1),
    )
    is_raw = torch.from_numpy(raw[np.concatenate([batch.ids for batch in rows])])
    difference = of_images(deviation(crops, expected))
    assert difference[is_raw].max() < 0.35 and difference[~is_raw].max() < 1.4
    drawn = picture(90 + 5, 140 - 7 * 5, seed=5)  # and it is the picture that was written
    (from_pixels,) = by_torch(
        FakeStore([drawn] * 8),
        [Rows(rows[0].ids[:1], rows[0].windows[:1], rows[0].colours[:1])],
        64,
    )
    assert deviation(crops[:, :1], from_pixels).mean() < 4


@pytest.mark.parametrize("size", [16, 96, 224])
def test_pixels_agree_with_the_torch_source(store: BetonStore, size: int) -> None:
    """Of 255 levels: 1 on average and 1.6 for the worst image; reduced, 2 and 4.

    The kernel is the same; torch rounds and clips between its passes, which makes 0.2. libffcv asks
    for libjpeg's fast inverse DCT, which is 0.7 too dark: on 400 photographs 0.95 on average, 1.15
    for the worst and 20 for single pixels. At reduced size the block's high frequencies are left
    out instead of averaged: photographs 1.0 to 2.0 on average, 5.8 for the worst.
    A window one pixel beside the right one makes more than 5.
    """
    from pipelines.sources.ffcv_source import reductions

    rows = rows_of(store, [list(range(len(store)))] * 2, size)
    rows[1].windows[:] = rows[1].windows[:, ::-1]
    crops, expected = cut(make(store, size), rows), by_torch(store, rows, size)
    assert torch.equal(crops[0], crops[1].flip(0))
    assert crops[0].shape == expected[0].shape and crops[0].dtype == torch.uint8
    difference = deviation(crops[0], expected[0])
    reduced = torch.from_numpy(reductions(rows[0].windows, size) > 1)
    assert reduced.any() and not reduced.all()
    whole, less = difference[:, ~reduced], difference[:, reduced]
    assert whole.mean() < 1.2 and of_images(whole).max() < 1.6 and whole.max() <= 12
    assert less.mean() < 2 and of_images(less).max() < 4 and less.max() <= 30

    rows[0].windows[..., :2] = np.maximum(rows[0].windows[..., :2] - 1, 0)
    assert deviation(by_torch(store, rows[:1], size)[0], expected[0]).mean() > 5


@pytest.mark.parametrize("shrink", [1, 2, 8])
@pytest.mark.parametrize("size", [7, 64])
def test_the_kernel_is_exact_on_pixels(shrink: int, size: int) -> None:
    """Against bicubic weights in float64, written down anew; windows off the reduced grid too."""
    from pipelines.sources.ffcv_kernel import compile_cut

    image = picture(-(-301 // shrink), -(-399 // shrink))
    windows = np.array([[[17, 33, 250, 301], [0, 0, 301, 399], [13, 5, 3, 1]]], np.int64)
    if shrink > 1:
        windows = windows[:, :2].copy()
    views = windows.shape[1]
    out = np.zeros((views, 1, size, size, 3), np.uint8)
    addresses = (image.ctypes.data, windows.ctypes.data, out.ctypes.data)
    assert compile_cut()(0, 0, 301, 399, shrink, *addresses, (views, 1, size), 0) == 0
    for view, (top, left, height, width) in enumerate(windows[0].tolist()):
        down = weights(top / shrink, height / shrink, len(image), size)
        across = weights(left / shrink, width / shrink, image.shape[1], size)
        exact = np.tensordot(across, np.tensordot(down, image.astype(float), 1), (1, 1))
        exact = exact.transpose(1, 0, 2).clip(0, 255)
        assert np.abs(out[view, 0] - exact).max() < 0.501


def weights(start: float, length: float, pixels: int, size: int) -> np.ndarray:
    """[size, pixels]: what each output takes of each pixel that the window touches."""
    scale = length / size
    wide = max(scale, 1)
    centres = start + (np.arange(size) + 0.5) * scale
    x = np.abs(np.arange(pixels) + 0.5 - centres[:, None]) / wide
    cubic = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    inside = np.arange(pixels) >= np.floor(start), np.arange(pixels) < np.ceil(start + length)
    cubic = np.where((x < 2) & inside[0] & inside[1], cubic, 0)
    return cubic / cubic.sum(1, keepdims=True)


def test_pixels_outside_the_window_play_no_part(tmp_path: Path) -> None:
    image, white = picture(60, 80), np.full((60, 80, 3), 255, np.uint8)
    white[20:45, 30:55] = image[20:45, 30:55]
    store = write(tmp_path / "a.beton", [image, white], [(60, 80)] * 2)
    rows = rows_of(store, [[0, 1]])
    rows[0].windows[:] = (20, 30, 25, 25)
    (crops,) = cut(make(store), rows)
    assert torch.equal(crops[:, 0], crops[:, 1])


def test_when_an_image_is_decoded_at_reduced_size(store: BetonStore) -> None:
    from pipelines.sources.ffcv_source import reductions

    def of(*sides: tuple[int, int]) -> int:
        """`sides`: height and width of each view's window."""
        return int(reductions(np.array([[(5, 9, *side) for side in sides]]), 224)[0])

    assert of((448, 448), (600, 900)) == 2
    assert of((447, 900)) == of((448, 448), (900, 447)) == of((223, 100)) == 1
    assert of((896, 896)) == 4 and of((1792, 1800), (1792, 1792)) == 8 and of((9000, 9000)) == 8
    assert of((1792, 1791)) == 4 and of((896, 895)) == 2

    seen = []
    source = make(store)
    decode = source._cut
    source._cut = lambda *inputs: seen.append(inputs[4]) or decode(*inputs)
    rows = rows_of(store, [[8]])
    rows[0].windows[:] = (0, 0, 70, 200), (3, 5, 140, 300)
    cut(source, rows)
    assert seen == [2]


def test_batches_come_in_order_and_may_differ_in_size_and_views(store: BetonStore) -> None:
    rows = rows_of(store, [[0, 1, 2], [3, 4], [5], [6, 7, 0, 1], [2]])
    ids = np.array([3, 1])
    centre = Rows(ids, centre_windows(store.sizes[ids]), np.zeros((2, 1, 10), np.float32))
    rows.insert(2, centre)
    crops = cut(make(store), rows)
    assert [tuple(c.shape[:2]) for c in crops] == [(2, 3), (2, 2), (1, 2), (2, 1), (2, 4), (2, 1)]
    for got, expected in zip(crops, by_torch(store, rows), strict=True):
        assert of_images(deviation(got, expected)).max() < 4


def test_threads_and_prefetch_change_nothing(store: BetonStore) -> None:
    rows = rows_of(store, [[0, 1, 2, 3, 8], [4, 5, 6, 7, 9]] * 3)
    first = torch.stack(cut(make(store, threads=1, prefetch=0), rows))
    for threads, prefetch in [(1, 2), (3, 1), (4, 5)]:
        crops = cut(make(store, threads=threads, prefetch=prefetch), rows)
        assert torch.equal(torch.stack(crops), first)


def test_whatever_is_not_a_plain_jpeg_follows_the_image_policy(tmp_path: Path) -> None:
    image = picture(60, 80)
    images = [
        encoded(image, "PNG"),
        encoded(image, "PNG", mode="RGBA"),
        encoded(image, "JPEG", mode="CMYK"),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "JPEG", subsampling=0),
        encoded(image, "JPEG", mode="L"),
        np.ascontiguousarray(image[::-1]),
    ]
    store = write(tmp_path / "a.beton", images, [(60, 80)] * len(images))
    rows, source = rows_of(store, [list(range(len(images)))]), make(store)
    (crops,), (expected,) = cut(source, rows), by_torch(store, rows)
    difference = of_images(deviation(crops, expected))
    assert difference.max() < 1.6 and difference[[0, 1, 2, 6]].max() < 0.35 and source.bad == {}


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = encoded(picture(60, 80), exif=exif.tobytes())
    store = write(tmp_path / "a.beton", [turned], [(60, 80)])
    rows = rows_of(store, [[0]])
    assert deviation(cut(make(store), rows)[0], by_torch(store, rows)[0]).mean() < 1.6


def test_what_libffcv_refuses_is_decoded_by_the_policy(store: BetonStore) -> None:
    rows, source = rows_of(store, [[2, 7]]), make(store)
    decode = source._cut
    source._cut = lambda data, *inputs: -1 if data else decode(data, *inputs)
    (crops,) = cut(source, rows)
    assert deviation(crops, by_torch(store, rows)[0]).mean() < 0.35 and source.bad == {}


def damage(store: BetonStore, row: int, kind: str) -> None:
    """Spoils one image of a file."""
    file = store.file
    start, length = int(file.offsets[row]), int(file.lengths[row])
    with file.path.open("r+b") as beton:
        if kind == "pointer":  # the table says that the image is shorter than it is
            beton.seek(-24 * (len(store) - row) + 16, os.SEEK_END)
            beton.write((length // 2).to_bytes(8, "little"))
            return
        beton.seek(start + (length // 2 if kind == "middle" else 0))
        beton.write({"middle": b"\xff\xd9" * 40, "start": b"<html>", "size": SMALLER}[kind])


SMALLER = encoded(picture(40, 60), quality=90)


@pytest.mark.parametrize("kind", ["middle", "start", "size", "pointer"])
def test_a_corrupt_image_is_grey_and_its_neighbours_are_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """One thread and images of one size: what libffcv leaves behind is the image before."""
    jpegs = [encoded(picture(48, 64, seed=row), quality=95) for row in range(6)]
    good = write(tmp_path / "good.beton", jpegs, [(48, 64)] * 6)
    damage(write(tmp_path / "bad.beton", jpegs, [(48, 64)] * 6), 2, kind)
    broken = BetonStore.open(tmp_path / "bad.beton")
    rows = rows_of(good, [[0, 1, 2], [3, 2], [4, 5]])
    expected, source = cut(make(good), rows), make(broken, threads=1)
    with caplog.at_level(logging.WARNING):
        for got in (list(source.crops(rows)), list(source.crops(rows))):
            for batch, crops, wanted in zip(rows, got, expected, strict=True):
                for item, row in enumerate(batch.ids):
                    right = GREY.expand(2, S, S, 3) if row == 2 else wanted[:, item]
                    assert torch.equal(crops[:, item], right)
    assert set(source.bad) == {2} and source.bad[2]
    told = [line for line in caplog.messages if "bad.beton[2] cannot be decoded" in line]
    assert len(told) == 1
    source.close()


def test_a_run_goes_on_in_mid_epoch_with_exactly_its_rows(store: BetonStore) -> None:
    def stream(rank: int = 0, ranks: int = 1) -> RowStream:
        spec = AugmentSpec(image_size=S)
        return RowStream(spec, seed=3, sizes=store.sizes, batch_size=4, rank=rank, world_size=ranks)

    steps = list(range(6))
    rows = [stream().rows(step) for step in steps]
    source = make(store)
    whole = list(source.crops(rows))
    iterator = source.crops(rows)
    for _ in range(2):
        next(iterator)
    source.close()  # killed after two steps
    rest = cut(make(store), [stream().rows(step) for step in steps[2:]])
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))
    halves = [cut(make(store), [stream(rank, 2).rows(step) for step in steps]) for rank in (0, 1)]
    for both, expected in zip(zip(*halves, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(both, 1), expected)


def test_what_was_yielded_is_never_written_again(store: BetonStore) -> None:
    source = make(store)
    kept, copies = [], []
    for crops in source.crops(rows_of(store, [[0, 1, 2, 3], [4, 5, 6, 7]] * 5)):
        kept.append(crops)
        copies.append(crops.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert torch.equal(kept[0], kept[8]) and not torch.equal(kept[0], kept[1])
    source.close()


def test_a_consumer_may_stop_and_iterations_may_overlap(store: BetonStore) -> None:
    rows = rows_of(store, [[0, 1], [2, 3], [4, 5], [6, 7]] * 5)
    source_contract.may_stop_and_overlap(make(store), rows)


def test_closing_ends_an_iteration_with_an_error(store: BetonStore) -> None:
    rows = rows_of(store, [[0, 1]] * 50)
    source_contract.closing_ends_an_iteration(make(store), rows)


def test_a_window_outside_its_image_is_refused(store: BetonStore) -> None:
    source = make(store)
    for window in [(0, 0, 49, 64), (0, 1, 48, 64), (-1, 0, 5, 5), (0, 0, 0, 5)]:
        rows = rows_of(store, [[0, 1]])
        rows[0].windows[0, 1] = window
        with pytest.raises(ValueError, match="outside its image"):
            list(source.crops(rows))
    source.close()


def test_waits_are_counted(store: BetonStore) -> None:
    source = make(store, 224)
    cut(source, rows_of(store, [list(range(8))] * 2, 224))
    waits = source.waits
    assert set(waits) == {"decode", "read", "wait", "copy"}
    assert waits["decode"] > 0 and waits["wait"] > 0 and waits["read"] > 0


def test_another_store_is_refused_with_the_command_that_mends_it() -> None:
    with pytest.raises(DataError, match=r"FakeStore.*python -m pipelines\.convert DIR OUT\.beton"):
        make(FakeStore.of_jpegs())


@pytest.mark.parametrize("package", ["ffcv", "numba"])
def test_without_ffcv_the_install_command_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for module in ("ffcv_source", "ffcv_kernel", "ffcv_library"):
        monkeypatch.delitem(sys.modules, f"pipelines.sources.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert not ffcv_available()
    with pytest.raises(MissingBackend, match=rf"{package}.*launch/install_ffcv\.sh"):
        import pipelines.sources.ffcv_source  # noqa: F401


def test_ffcv_itself_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes seconds and sets the thread counts of torch and numba."""
    for module in ("ffcv_source", "ffcv_kernel", "ffcv_library"):
        monkeypatch.delitem(sys.modules, f"pipelines.sources.{module}", raising=False)
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    import pipelines.sources.ffcv_source  # noqa: F401

    assert "ffcv" not in sys.modules


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_crops_are_the_same(store: BetonStore) -> None:
    rows = rows_of(store, [[0, 1, 2, 3], [4, 5, 6, 7]] * 8)
    on_gpu = make(store, device="cuda")
    for crops, wanted in zip(on_gpu.crops(rows), cut(make(store), rows), strict=True):
        assert crops.is_cuda and torch.equal(crops.cpu(), wanted)
    on_gpu.close()


def test_a_selection_of_rows_is_still_a_beton(store: BetonStore) -> None:
    """As every labelled set of an evaluation is one."""
    from byol_fast.evaluate.data import Subset
    from pipelines.pipeline import choose_backend

    order = np.array([5, 2, 7, 2])
    some = Subset(Subset(store, np.arange(len(store))[::-1]), len(store) - 1 - order)
    assert choose_backend("auto", some, torch.device("cpu")) == "ffcv"
    windows, colours = centre_windows(store.sizes[order], 1.0), np.zeros((4, 1, 0), np.float32)
    (crops,) = cut(make(some), [Rows(np.arange(4), windows, colours)])
    (wanted,) = cut(make(store), [Rows(order, windows, colours)])
    assert torch.equal(crops, wanted)
    with pytest.raises(DataError, match="this is a FakeStore"):
        make(Subset(FakeStore([picture(8, 9)]), np.array([0])))
