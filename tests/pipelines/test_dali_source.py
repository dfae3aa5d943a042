"""The DALI source: the same rows and windows as the torch source, one image policy, no crash."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.errors import MissingBackend
from pipelines.plan import Rows, centre_windows
from pipelines.sources import FILL, dali_available
from pipelines.sources.torch_source import TorchSource
from tests.pipelines import source_contract
from tests.pipelines.fake_store import SIZES, FakeStore, bad, encoded, picture, rows_of

pytestmark = [
    pytest.mark.dali,
    pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed"),
]
S = 32
GREY = torch.tensor(FILL, dtype=torch.uint8)


def make(store: FakeStore, size: int = S, **options: Any) -> Any:
    from pipelines.sources.dali_source import DaliSource

    return DaliSource(store, **{"image_size": size, "device": "cpu", "threads": 2, **options})


def by_torch(store: FakeStore, rows: list[Rows], size: int = S) -> list[torch.Tensor]:
    source = TorchSource(store, image_size=size, device="cpu", threads=1)
    crops = list(source.crops(rows))
    source.close()
    return crops


def deviation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.int() - b.int()).abs().float()


def corrupt(jpeg: bytes) -> bytes:
    """Whole and plain by its header, but its first component uses a table that is not there."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 12] + b"\x03" + jpeg[frame + 13 :]


def resident_mb() -> float:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def dali_threads() -> int:
    found = 0
    for path in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended just now
            found += (path / "comm").read_text().startswith("[DALI]")
    return found


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before, dali = set(threading.enumerate()), dali_threads()
    yield
    assert set(threading.enumerate()) == before and dali_threads() == dali


@pytest.fixture(scope="module")
def store() -> FakeStore:
    return FakeStore.of_jpegs()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every DALI pipeline that a test builds."""
    from pipelines.sources import dali_source

    built: list[Any] = []

    class Noted(dali_source.DaliGraph):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            built.append(self)

    monkeypatch.setattr(dali_source, "DaliGraph", Noted)
    return built


@pytest.mark.parametrize("size", [16, 96, 224])
def test_pixels_agree_with_the_torch_source(size: int) -> None:
    """Of 255 levels: 0.2 on average.

    Decoded pixels and kernel (cubic, a = -0.5, widened to antialias) are the same. Against exact
    arithmetic torch, which rounds and clips to whole levels between its two passes, is off by 0.19
    and DALI by 0.01. Where a few pixels are blown up 30 times and more, DALI's tabulated kernel is
    off by up to 0.9. Single pixels next to a saturated edge, where torch clips the overshoot,
    differ by some levels. A window one pixel beside the right one makes ten times the mean.
    """
    store = FakeStore.of_jpegs(SIZES * 2)
    rows = rows_of(store, [list(range(len(store)))], size)
    source = make(store, size)
    (crops,) = source.crops(rows)
    (expected,) = by_torch(store, rows, size)
    assert crops.shape == expected.shape and crops.dtype == torch.uint8
    difference = deviation(crops, expected)
    assert difference.mean() < 0.35 and difference.max() <= 12
    assert difference.mean((0, 2, 3, 4)).max() < 1.2  # of the worst image

    one_off = rows_of(store, [list(range(len(store)))], size)
    one_off[0].windows[..., :2] = np.maximum(one_off[0].windows[..., :2] - 1, 0)
    (moved,) = by_torch(store, one_off, size)
    assert deviation(moved, expected).mean() > 2
    source.close()


def test_pixels_outside_the_window_play_no_part() -> None:
    image, white = picture(60, 80), np.full((60, 80, 3), 255, np.uint8)
    white[20:45, 30:55] = image[20:45, 30:55]
    store = FakeStore([image, white])
    rows, source = rows_of(store, [[0, 1]]), make(store)
    rows[0].windows[:] = (20, 30, 25, 25)
    (crops,) = source.crops(rows)
    assert torch.equal(crops[:, 0], crops[:, 1])
    source.close()


def test_batches_come_in_order_and_may_differ_in_size_and_views(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1, 2], [3, 4], [5], [6, 7, 0, 1], [2]])
    ids = np.array([3, 1])
    centre = Rows(ids, centre_windows(store.sizes[ids]), np.zeros((2, 1, 10), np.float32))
    rows.insert(2, centre)
    source = make(store)
    crops = list(source.crops(rows))
    assert [tuple(c.shape[:2]) for c in crops] == [(2, 3), (2, 2), (1, 2), (2, 1), (2, 4), (2, 1)]
    for got, expected in zip(crops, by_torch(store, rows), strict=True):
        assert deviation(got, expected).mean() < 0.6
    source.close()


def test_whatever_is_not_a_plain_jpeg_follows_the_image_policy(graphs: list[Any]) -> None:
    image = picture(60, 80)
    images = [
        encoded(image, "PNG"),
        encoded(image, "PNG", mode="RGBA"),
        encoded(image, "PNG", mode="L"),
        encoded(image, "PNG", mode="P"),
        encoded(image, "JPEG", mode="CMYK"),
        encoded(image, "BMP"),
        encoded(image, "GIF"),  # which DALI cannot read
        encoded(image, "WEBP", lossless=1),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "JPEG", subsampling=0),
    ]
    store = FakeStore(images, sizes=[(60, 80)] * len(images))
    rows = rows_of(store, [list(range(len(images)))])
    source = make(store)
    (crops,) = source.crops(rows)
    difference = deviation(crops, by_torch(store, rows)[0]).mean((0, 2, 3, 4))
    assert difference.max() < 0.5 and source.bad == {}
    assert len(graphs) == 1  # nothing made DALI give up
    source.close()


def test_exif_orientation_is_ignored() -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = encoded(picture(60, 80), exif=exif.tobytes())
    store = FakeStore([turned], sizes=[(60, 80)])
    rows, source = rows_of(store, [[0]]), make(store)
    (crops,) = source.crops(rows)
    assert deviation(crops, by_torch(store, rows)[0]).mean() < 0.5
    source.close()


def test_arrays_go_without_a_decoder() -> None:
    base = picture(40, 50)
    base.setflags(write=False)
    store = FakeStore([base, base[::-1], np.asfortranarray(base), picture(90, 30)])
    rows, source = rows_of(store, [[0, 1, 2, 3], [2, 1]]), make(store)
    for got, expected in zip(source.crops(rows), by_torch(store, rows), strict=True):
        assert deviation(got, expected).mean() < 0.5
    source.close()


def test_rows_of_pixels_among_encoded_ones(graphs: list[Any]) -> None:
    """As a .beton holds them: the same crops as where all rows are pixels."""
    images = [picture(40, 50, seed=i) for i in range(4)]
    sizes = [(40, 50)] * 4
    mixed = FakeStore([encoded(images[0], "PNG"), images[1][::-1][::-1], *images[2:]], sizes)
    assert mixed.encoded
    rows = rows_of(mixed, [[0, 1], [2, 3], [3, 0]])
    source, plain = make(mixed), make(FakeStore(images))
    for got, wanted in zip(source.crops(rows), plain.crops(rows), strict=True):
        assert torch.equal(got, wanted)
    assert source.bad == {} and [graph.decoder is None for graph in graphs] == [False, True]
    source.close()
    plain.close()


def test_what_was_yielded_is_never_written_again(store: FakeStore) -> None:
    source = make(store)
    kept, copies = [], []
    for crops in source.crops(rows_of(store, [[0, 1, 2, 3], [4, 5, 6, 7]] * 5)):
        kept.append(crops)
        copies.append(crops.clone())
    source.close()  # it is the consumer's memory, DALI gone or not
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert torch.equal(kept[0], kept[8]) and not torch.equal(kept[0], kept[1])
    kept[0].zero_()


def test_crops_leave_dali_without_a_copy(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvidia.dali.pipeline import Pipeline

    share, given = Pipeline.share_outputs, []

    def noted(self: Pipeline, **options: Any) -> Any:
        given.append(share(self, **options))
        return given[-1]

    monkeypatch.setattr(Pipeline, "share_outputs", noted)
    source = make(store)
    (crops,) = source.crops(rows_of(store, [[0, 1, 2]]))
    (output,) = given[-1]
    assert crops.is_contiguous() and crops.shape == (2, 3, S, S, 3)
    assert crops.data_ptr() == ctypes.cast(output.as_tensor().data_ptr(), ctypes.c_void_p).value
    source.close()


def test_memory_does_not_grow(store: FakeStore) -> None:
    """Over 90 batches of 1.2 MB of crops, cut from 0.7 MB of pixels."""
    source, sizes = make(store, 160), []
    for _ in range(4):
        for crops in source.crops(rows_of(store, [list(range(8))] * 30, 160)):
            assert crops.shape[1] == 8
        sizes.append(resident_mb())
    assert sizes[-1] - sizes[0] < 15, sizes
    source.close()


def test_a_corrupt_jpeg_does_not_end_the_run(
    graphs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its frame is plain, so that only DALI's decoder finds out, with other batches in flight."""
    jpegs = [encoded(picture(48, 64, seed=i), quality=90) for i in range(4)]
    good = FakeStore(jpegs, sizes=[(48, 64)] * 4)
    broken = FakeStore([*jpegs[:2], corrupt(jpegs[2]), jpegs[3]], sizes=[(48, 64)] * 4)
    rows = rows_of(good, [[0, 1], [1, 3], [0, 2, 3], [3, 2], [1, 0], [3, 0]])
    reference, source = make(good), make(broken)
    expected = list(reference.crops(rows))
    with caplog.at_level(logging.WARNING):
        crops = list(source.crops(rows))
    assert len(crops) == len(expected)
    for batch, got, wanted in zip(rows, crops, expected, strict=True):
        for i, row in enumerate(batch.ids):
            shown = got[:, i]
            assert bool((shown == GREY).all()) if row == 2 else torch.equal(shown, wanted[:, i])
    assert list(source.bad) == [2]
    assert sum("picture-2 cannot be decoded" in r.getMessage() for r in caplog.records) == 1
    before = len(graphs)
    again = list(source.crops(rows))
    assert all(torch.equal(a, b) for a, b in zip(again, crops, strict=True))
    assert len(graphs) == before  # a known bad image is looked at before DALI sees it
    reference.close()
    source.close()


def test_bad_images_found_while_reading_cost_no_pipeline(graphs: list[Any]) -> None:
    """Truncated JPEGs are among them: they lack their end marker."""
    good = encoded(picture(48, 64))
    images = [good, bad("it is gone"), b"", b"<html>", encoded(picture(48, 63))]
    images += [good[: len(good) // 2], good[:-9], good[:-60] + b"\0" * 999]
    store = FakeStore(images, sizes=[(48, 64)] * 8)
    source = make(store)
    (crops,) = source.crops(rows_of(store, [list(range(8))]))
    assert [bool((crops[:, i] == GREY).all()) for i in range(8)] == [False] + [True] * 7
    assert source.bad[1] == "it is gone" and "48 x 63 pixels" in source.bad[4]
    assert set(source.bad) == set(range(1, 8)) and len(graphs) == 1
    source.close()


def test_a_bad_array_is_grey() -> None:
    store = FakeStore([picture(40, 50), bad("no such row")], sizes=[(40, 50)] * 2)
    source = make(store)
    (crops,) = source.crops(rows_of(store, [[0, 1]]))
    assert bool((crops[:, 1] == GREY).all()) and not bool((crops[:, 0] == GREY).all())
    source.close()


def test_dali_failing_on_sound_images_is_overcome_once(
    store: FakeStore, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.sources.dali_graph import DaliGraph

    rows = rows_of(store, [[0, 1, 2], [3, 4], [6, 7]])
    source = make(store)
    expected = list(source.crops(rows))
    submit, failing = DaliGraph.submit, [True]

    def fails(self: DaliGraph, *inputs: Any) -> None:
        submit(self, *inputs)
        if failing:
            failing.pop()
            raise RuntimeError("nvImageCodec failure: '#4'")

    monkeypatch.setattr(DaliGraph, "submit", fails)
    for got, wanted in zip(source.crops(rows), expected, strict=True):
        assert torch.equal(got, wanted)  # libjpeg-turbo either way: the same pixels
    assert source.bad == {} and len(graphs) == 2

    def always_fails(self: DaliGraph, *inputs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DaliGraph, "submit", always_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(source.crops(rows))
    source.close()


def test_an_error_of_the_store_reaches_the_consumer() -> None:
    jpeg = encoded(picture(48, 64))
    store = FakeStore([jpeg, jpeg, RuntimeError("the disk is on fire"), jpeg], [(48, 64)] * 4)
    source, seen = make(store), 0
    with pytest.raises(RuntimeError, match="the disk is on fire") as caught:
        for _ in source.crops(rows_of(store, [[0, 1]] * 4 + [[2, 3]] + [[0, 1]] * 3)):
            seen += 1
    assert seen == 4
    assert caught.value.__notes__ == ["while reading picture-2"]
    assert len(list(source.crops(rows_of(store, [[0, 1]])))) == 1
    source.close()


def test_a_consumer_may_stop_and_iterations_may_overlap(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1], [2, 3], [4, 5], [6, 7]] * 5)
    source_contract.may_stop_and_overlap(make(store), rows)


def test_closing_ends_an_iteration_with_an_error(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1]] * 50)
    source_contract.closing_ends_an_iteration(make(store), rows)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_rows_are_pulled_no_further_than_promised(store: FakeStore, prefetch: int) -> None:
    rows = rows_of(store, [[0, 1]] * 12)
    ahead = prefetch + 1  # one more is being read
    source_contract.pulls_rows_no_further_than(make(store, prefetch=prefetch), rows, ahead)


def test_waits_are_counted(store: FakeStore) -> None:
    source = make(store, 224)
    list(source.crops(rows_of(store, [list(range(8))] * 6, 224)))
    waits = source.waits
    assert set(waits) == {"decode", "read", "wait", "copy"}
    assert waits["decode"] > 0 and waits["wait"] > 0
    source.close()
    assert source.waits["decode"] >= waits["decode"]  # kept when DALI's threads are gone


def test_options_that_cannot_be(store: FakeStore) -> None:
    with pytest.raises(ValueError, match="'mixed' is on a GPU"):
        make(store, decode="mixed")
    with pytest.raises(ValueError, match=r"auto, cpu, mixed.*got 'gpu'"):
        make(store, decode="gpu")
    with pytest.raises(ValueError, match="prefetch must not be negative"):
        make(store, prefetch=-1)


def test_without_dali_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dali_source", "dali_graph"):
        monkeypatch.delitem(sys.modules, f"pipelines.sources.{module}", raising=False)
    for module in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert not dali_available()
    with pytest.raises(MissingBackend, match=r"pip install '\.\[dali\]'"):
        import pipelines.sources.dali_source  # noqa: F401
