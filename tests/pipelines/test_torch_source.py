"""The torch source: the plan's windows, exactly, in order, whatever the threads do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.decode import decode
from pipelines.plan import Rows, centre_windows
from pipelines.sources import FILL
from pipelines.sources.torch_source import TorchSource, resize_crop
from pipelines.sources.transfer import HostToDevice, Recycled
from tests.pipelines import source_contract
from tests.pipelines.fake_store import FakeStore, bad, encoded, picture, rows_of

S = 32


def source(store: FakeStore, *, threads: int = 2, prefetch: int = 2, size: int = S) -> TorchSource:
    return TorchSource(store, image_size=size, device="cpu", threads=threads, prefetch=prefetch)


@pytest.fixture(scope="module")
def store() -> FakeStore:
    return FakeStore.of_jpegs()


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    "window", [(0, 0, 97, 131), (40, 50, 20, 31), (96, 130, 1, 1), (3, 4, 7, 90)]
)
@pytest.mark.parametrize("size", [8, 33, 224])
def test_resize_is_pillows_bicubic(window: tuple[int, int, int, int], size: int) -> None:
    """Same kernel and passes; torch keeps weights in 16 bits, so a rounding may fall otherwise."""
    image = picture(97, 131)
    top, left, height, width = window
    crop = Image.fromarray(image[top : top + height, left : left + width])
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(resize_crop(image, window, size).numpy().astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.02


def test_pixels_outside_the_window_play_no_part() -> None:
    image, window = picture(60, 80), (20, 30, 25, 25)
    inside = np.full_like(image, 255)
    inside[20:45, 30:55] = image[20:45, 30:55]
    assert torch.equal(resize_crop(image, window, S), resize_crop(inside, window, S))


def test_crops_are_the_plans_windows(store: FakeStore) -> None:
    batches = [[3, 0, 5], [1, 2, 4], [7, 6]]  # the last one smaller
    rows = rows_of(store, batches)
    s = source(store)
    crops = list(s.crops(rows))
    assert [tuple(c.shape) for c in crops] == [(2, len(b), S, S, 3) for b in batches]
    for batch, got in zip(rows, crops, strict=True):
        assert got.dtype == torch.uint8
        for i, row in enumerate(batch.ids):
            for view in range(2):
                expected = resize_crop(decode(store.read(row)), batch.windows[i, view], S)
                assert torch.equal(got[view, i], expected)
    s.close()


def test_threads_and_prefetch_change_nothing(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1, 2, 3], [4, 5, 6, 7]] * 3)

    def run(threads: int, prefetch: int) -> torch.Tensor:
        s = source(store, threads=threads, prefetch=prefetch)
        crops = torch.stack(list(s.crops(rows)))
        s.close()
        return crops

    first = run(1, 0)
    assert all(torch.equal(first, run(*how)) for how in [(1, 2), (3, 1), (4, 5)])


def test_one_view_for_evaluation(store: FakeStore) -> None:
    ids = np.arange(len(store))
    windows = centre_windows(store.sizes)
    s = source(store)
    (crops,) = s.crops([Rows(ids, windows, np.zeros((len(ids), 1, 10), np.float32))])
    assert crops.shape == (1, len(ids), S, S, 3)
    expected = resize_crop(decode(store.read(2)), windows[2, 0], S)
    assert torch.equal(crops[0, 2], expected)
    s.close()


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_arrays_may_be_read_only_and_of_any_layout() -> None:
    base = picture(40, 50)
    frozen = base.copy()
    frozen.setflags(write=False)
    store = FakeStore([base, frozen, base[::-1, ::-1][::-1, ::-1], np.asfortranarray(base)])
    assert not store.encoded
    rows = rows_of(store, [[0, 1, 2, 3]])
    rows[0].windows[:] = rows[0].windows[0]
    s = source(store)
    (crops,) = s.crops(rows)
    assert all(torch.equal(crops[:, 0], crops[:, i]) for i in range(1, 4))
    s.close()


def test_a_window_may_be_the_whole_of_an_array_of_planes() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8).transpose(1, 2, 0)
    whole = (0, 0, 40, 40)
    wanted = resize_crop(np.ascontiguousarray(planes), whole, 32)
    assert torch.equal(resize_crop(planes, whole, 32), wanted)


def test_rows_are_pulled_no_further_than_prefetch(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1]] * 10)
    source_contract.pulls_rows_no_further_than(source(store, prefetch=3), rows, 3)


def test_what_was_yielded_is_never_written_again(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1, 2, 3], [4, 5, 6, 7]] * 6)
    s = source(store)
    kept, copies = [], []
    for number, crops in enumerate(s.crops(rows)):
        copies.append(crops.clone())
        kept.append(crops[1] if number % 2 else crops.numpy()[0])  # a view is enough to keep it
    for number, (view, copy) in enumerate(zip(kept, copies, strict=True)):
        assert torch.equal(torch.as_tensor(view), copy[number % 2])
    s.close()


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    pool = Recycled(keep=2)
    first = pool.empty(4, 5)
    place, part = first.data_ptr(), first[1:, ::2]
    del first
    assert pool.empty(4, 5).data_ptr() != place
    del part
    again = pool.empty(5, 4)
    assert again.data_ptr() == place
    assert pool.empty(3, 3).shape == (3, 3)


def test_on_a_cpu_a_batch_is_used_where_it_was_written() -> None:
    transfer = HostToDevice(torch.device("cpu"), keep=1)
    host = transfer.empty(2, 3)
    assert transfer.send(host) is host and transfer.seconds() == 0.0


def test_a_bad_image_is_grey_entered_and_warned_of_once(
    caplog: pytest.LogCaptureFixture, no_thread_left: None
) -> None:
    whole = encoded(picture(48, 64), quality=90)
    images = [whole, whole[:900], bad("it is gone"), b"<html>", encoded(picture(48, 63))]
    store = FakeStore(images, sizes=[(48, 64)] * 5)
    s, rows = source(store), rows_of(store, [[0, 1, 2], [3, 4]])
    with caplog.at_level(logging.WARNING):
        first, second = [list(s.crops(rows)) for _ in range(2)]
    fill = torch.tensor(FILL, dtype=torch.uint8)
    for crops in (*first, *second):
        for i in range(crops.shape[1]):
            sound = i == 0 and (crops is first[0] or crops is second[0])
            assert bool((crops[:, i] == fill).all()) != sound
    assert set(s.bad) == {1, 2, 3, 4}
    assert s.bad[2] == "it is gone"
    assert "48 x 63 pixels, but had 48 x 64" in s.bad[4]
    told = [record.getMessage() for record in caplog.records]
    assert [sum(f"picture-{i} " in line for line in told) for i in range(5)] == [0, 1, 1, 1, 1]
    s.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_store_reaches_the_consumer(threads: int, no_thread_left: None) -> None:
    jpeg = encoded(picture(48, 64))
    store = FakeStore([jpeg, jpeg, RuntimeError("the disk is on fire"), jpeg], [(48, 64)] * 4)
    s, seen = source(store, threads=threads), 0
    with pytest.raises(RuntimeError, match="the disk is on fire") as caught:
        for _ in s.crops(rows_of(store, [[0, 1]] * 3 + [[2, 3]] + [[0, 1]] * 3)):
            seen += 1
    assert seen == 3  # the batches before it came out
    assert caught.value.__notes__ == ["while reading picture-2"]
    assert len(list(s.crops(rows_of(store, [[0, 1]])))) == 1  # the source itself goes on
    s.close()


def test_an_error_of_the_rows_reaches_the_consumer(store: FakeStore, no_thread_left: None) -> None:
    def feed() -> Iterator[Rows]:
        yield from rows_of(store, [[0, 1]])
        raise IndexError("no such step")

    s = source(store, prefetch=0)
    with pytest.raises(IndexError, match="no such step"):
        list(s.crops(feed()))
    s.close()


def test_a_consumer_may_stop_at_any_time(store: FakeStore, no_thread_left: None) -> None:
    rows = rows_of(store, [[0, 1, 2, 3]] * 50)
    s = source(store)
    for crops in s.crops(rows):
        first = crops
        break
    iterator = s.crops(rows)
    assert torch.equal(next(iterator), first)
    iterator.close()
    reads = store.reads
    time.sleep(0.05)
    assert store.reads == reads  # nothing goes on behind the consumer's back
    s.close()


def test_iterations_may_overlap(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1], [2, 3], [4, 5]])
    s = source(store)
    expected = list(s.crops(rows))
    for a, b, wanted in zip(s.crops(rows), s.crops(rows), expected, strict=True):
        assert torch.equal(a, wanted) and torch.equal(b, wanted)
    s.close()


def test_closing_ends_an_iteration_with_an_error(store: FakeStore, no_thread_left: None) -> None:
    s = source(store)
    iterator = s.crops(rows_of(store, [[0, 1]] * 50))
    next(iterator)
    s.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(iterator)
    with pytest.raises(RuntimeError, match="closed"):
        next(s.crops(rows_of(store, [[0]])))


def test_slow_storage_shows_as_reading_and_waiting(store: FakeStore) -> None:
    class Slow(FakeStore):
        def read(self, row: int) -> bytes | np.ndarray:
            time.sleep(0.05)
            return super().read(row)

    slow = Slow(store.images, store.sizes)
    s = source(slow, threads=1, prefetch=0)
    list(s.crops(rows_of(slow, [[4, 5], [4, 5]])))
    waits = s.waits
    assert set(waits) == {"decode", "read", "wait", "copy"}
    assert waits["read"] >= 0.2 and waits["wait"] >= 0.2 > waits["decode"] > 0
    s.close()


def test_prefetch_must_not_be_negative(store: FakeStore) -> None:
    with pytest.raises(ValueError, match="prefetch must not be negative, got -1"):
        source(store, prefetch=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_crops_are_the_same(store: FakeStore) -> None:
    rows = rows_of(store, [[0, 1, 2, 3], [4, 5, 6, 7]] * 8)
    s = source(store)
    expected = list(s.crops(rows))
    on_gpu = TorchSource(store, image_size=S, device="cuda", threads=2)
    for crops, wanted in zip(on_gpu.crops(rows), expected, strict=True):
        assert crops.is_cuda and torch.equal(crops.cpu(), wanted)
    assert on_gpu.waits["copy"] > 0
    s.close()
    on_gpu.close()
