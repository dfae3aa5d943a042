"""The DALI source on a GPU: the same policy, streams and memory in order, nothing that ends a run.

`decode` is cpu, nvJPEG on CUDA cores alone (mixed:0), on the JPEG engines alone where there are any
(mixed:1), or split between both.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.plan import Rows
from pipelines.sources import FILL, dali_available
from pipelines.sources.dali_decode import CANDIDATES, CPU, PART, PARTS, WARMUP, Decoder
from pipelines.sources.torch_source import TorchSource
from tests.pipelines.fake_store import SIZES, FakeStore, encoded, picture, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dali,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed"),
]
DECODE = ["cpu", "mixed:0", "mixed:0.65", "mixed:1"]
GREY = torch.tensor(FILL, dtype=torch.uint8)
S = 96


@pytest.fixture
def make() -> Iterator[Any]:
    """A source that is closed after the test."""
    sources: list[Any] = []

    def made(store: FakeStore, **options: Any) -> Any:
        from pipelines.sources.dali_source import DaliSource

        options = {"image_size": S, "device": "cuda", "threads": 4, **options}
        sources.append(DaliSource(store, **options))
        return sources[-1]

    yield made
    for source in sources:
        source.close()


@pytest.fixture(scope="module")
def store() -> FakeStore:
    return FakeStore.of_jpegs(SIZES * 2)


def by_torch(store: FakeStore, rows: list[Rows], size: int = S) -> list[torch.Tensor]:
    source = TorchSource(store, image_size=size, device="cpu", threads=1)
    crops = list(source.crops(rows))
    source.close()
    return crops


def deviation(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean, in levels of 255."""
    return (got.cpu().int() - wanted.cpu().int()).abs().float().mean().item()


def bound(decode: str) -> float:
    """As on the CPU; nvJPEG's inverse DCT and colours round differently, which is an estimate.

    Chroma that is not interpolated, as libjpeg's is, makes 2.0 to 2.2 of these pictures, and a
    faster inverse DCT 0.85 (both tried with libjpeg-turbo).
    """
    return 0.5 if decode == "cpu" else 1.5


@pytest.mark.parametrize("decode", DECODE)
def test_pixels_agree_with_the_torch_source(store: FakeStore, make: Any, decode: str) -> None:
    rows = rows_of(store, [list(range(8)), list(range(8, 16)), [3, 7]] * 3, S)
    source = make(store, decode=decode)
    for got, wanted in zip(source.crops(rows), by_torch(store, rows), strict=True):
        assert got.is_cuda and got.dtype == torch.uint8 and got.shape == wanted.shape
        assert deviation(got, wanted) < bound(decode)
    assert source.bad == {}


@pytest.mark.parametrize("decode", DECODE)
def test_one_policy_for_every_format_in_one_batch(make: Any, decode: str) -> None:
    """Grey, CMYK, palette and alpha, pixels as such; what nvJPEG cannot read comes as a PPM."""
    image = picture(60, 80)
    images: list[Any] = [
        encoded(image, "PNG"),
        encoded(image, "PNG", mode="RGBA"),
        encoded(image, "PNG", mode="P"),
        encoded(image, "JPEG", mode="CMYK"),
        encoded(image, "WEBP", lossless=1),
        image,
        image[::-1],
        encoded(image, mode="L", quality=90),
        encoded(image, progressive=True),
        encoded(image, subsampling=0),
        encoded(image, quality=90),
    ]
    store = FakeStore(images, sizes=[(60, 80)] * len(images))
    rows = rows_of(store, [list(range(len(images)))], S)
    source = make(store, decode=decode)
    (got,), (wanted,) = source.crops(rows), by_torch(store, rows)
    for item in range(len(images)):
        least = "cpu" if item < 7 else decode  # what we decode is exact
        assert deviation(got[:, item], wanted[:, item]) < bound(least), item
    assert source.bad == {}


def test_arrays_need_no_decoder(make: Any) -> None:
    images = [picture(40, 50), picture(90, 30), picture(33, 33)]
    store = FakeStore(images)
    rows = rows_of(store, [[0, 1, 2], [2, 1]], S)
    for got, wanted in zip(make(store).crops(rows), by_torch(store, rows), strict=True):
        assert deviation(got, wanted) < 0.5


@pytest.mark.parametrize("decode", DECODE)
def test_corrupt_jpegs_end_nothing(make: Any, decode: str) -> None:
    """One is truncated; of another the tables that it names are not there."""
    good = [encoded(picture(48, 64, seed=i), quality=90) for i in range(6)]
    frame, scan = good[2].index(b"\xff\xc0"), good[2].index(b"\xff\xda")
    without = bytearray(good[2])
    without[frame + 12], without[scan + 6] = 3, 0x33  # a quantisation table, two Huffman tables
    broken = [*good[:2], bytes(without), good[3], good[4][: len(good[4]) // 2], good[5]]
    sizes = [(48, 64)] * 6
    rows = rows_of(FakeStore(good, sizes), [[0, 1], [1, 2], [3, 4], [5, 3], [0, 2], [4, 5]], S)
    source = make(FakeStore(broken, sizes), decode=decode)
    crops = list(source.crops(rows))
    for batch, got, wanted in zip(rows, crops, by_torch(FakeStore(good, sizes), rows), strict=True):
        for item, row in enumerate(batch.ids):
            if row in (2, 4):
                assert bool((got[:, item].cpu() == GREY).all())
            else:
                assert deviation(got[:, item], wanted[:, item]) < bound(decode)
    assert set(source.bad) == {2, 4}


@pytest.mark.parametrize("decode", ["cpu", "mixed"])
def test_memory_is_not_taken_back_before_the_consumers_stream_is_done(
    store: FakeStore, make: Any, decode: str
) -> None:
    """The consumer's stream lags behind; its tensors are dropped while it has yet to read them."""
    rows = rows_of(store, [list(range(8)), list(range(8, 16))] * 15, S)
    source = make(store, decode=decode)
    expected = []
    for crops in source.crops(rows):
        expected.append(crops.clone())
        torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.current_stream()):
        seen = []
        with torch.cuda.stream(stream):
            for crops in source.crops(rows):
                torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
                seen.append(crops.clone())
                del crops
        torch.cuda.synchronize()
        for got, wanted in zip(seen, expected, strict=True):
            assert deviation(got, wanted) < (1e-6 if decode == "cpu" else bound(decode))


def test_crops_are_ready_on_the_stream_of_the_moment(store: FakeStore, make: Any) -> None:
    """Read at once on a stream of the consumer's, with no wait of its own."""
    rows = rows_of(store, [list(range(16))] * 10, S)
    source = make(store, decode="cpu")
    (wanted,) = {float(crops.float().mean()) for crops in source.crops(rows[:1])}
    side, means = torch.cuda.Stream(), []
    with torch.cuda.stream(side):
        for crops in source.crops(rows):
            means.append(crops.float().mean())
    side.synchronize()
    assert all(abs(float(mean) - wanted) < 1e-3 for mean in means)


def test_crops_leave_dali_without_a_copy(
    store: FakeStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvidia.dali.pipeline import Pipeline

    share, given = Pipeline.share_outputs, []

    def noted(self: Pipeline, **options: Any) -> Any:
        given.append(share(self, **options))
        return given[-1]

    monkeypatch.setattr(Pipeline, "share_outputs", noted)
    (crops,) = make(store, decode="cpu").crops(rows_of(store, [[0, 1, 2]], S))
    (output,) = given[-1]
    assert crops.is_contiguous()
    assert crops.data_ptr() == ctypes.cast(output.as_tensor().data_ptr(), ctypes.c_void_p).value


def test_iterations_overlap_and_end_early_and_what_was_kept_stays(
    store: FakeStore, make: Any
) -> None:
    rows = rows_of(store, [[0, 1], [2, 3], [4, 5], [6, 7]] * 3, S)
    source = make(store, decode="mixed")
    wanted = by_torch(store, rows)
    for a, b, expected in zip(source.crops(rows), source.crops(rows), wanted, strict=True):
        assert deviation(a, expected) < 1.5 and deviation(b, expected) < 1.5
    unfinished = source.crops(rows)
    kept = next(unfinished)
    unfinished.close()
    other = source.crops(rows)
    next(other)
    source.close()  # in the middle of an epoch
    with pytest.raises(RuntimeError, match="closed"):
        list(other)
    assert deviation(kept, wanted[0]) < 1.5


def test_the_device_without_a_number_is_the_current_one(store: FakeStore, make: Any) -> None:
    (crops,) = make(store, decode="cpu").crops(rows_of(store, [[0, 1]], S))
    assert crops.device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("decode", ["cpu", "mixed"])
def test_another_device_than_the_current_one(store: FakeStore, make: Any, decode: str) -> None:
    rows = rows_of(store, [[0, 1, 2]] * 4, S)
    source = make(store, decode=decode, device="cuda:1")
    for got, wanted in zip(source.crops(rows), by_torch(store, rows), strict=True):
        assert got.device == torch.device("cuda", 1)
        assert deviation(got, wanted) < bound(decode)
    assert torch.cuda.current_device() == 0


def test_auto_tries_all_in_one_run_and_chooses(
    store: FakeStore, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    turn = WARMUP + PART * PARTS
    rows = rows_of(store, [list(range(16))] * (len(CANDIDATES) * (turn + 3) + 40), S)
    source = make(store, decode="auto")
    (wanted,) = by_torch(store, rows[:1])
    with caplog.at_level(logging.INFO):
        off = [deviation(crops, wanted) for crops in source.crops(rows)]  # waits for the GPU too
    assert len(off) == len(rows) and max(off) < 1.5 and source.bad == {}
    lines = [m for m in (r.getMessage() for r in caplog.records) if "DALI decodes with" in m]
    assert len(lines) == 1 and all(f"{c} " in lines[0] for c in CANDIDATES), lines
    print(lines[0])


def test_auto_without_nvjpeg_is_the_cpu(
    store: FakeStore, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipelines.sources import dali_source

    class Without(dali_source.DaliGraph):
        def __init__(self, **options: Any) -> None:
            if options["decoder"] != CPU:
                raise RuntimeError("nvJPEG error")
            super().__init__(**options)

    monkeypatch.setattr(dali_source, "DaliGraph", Without)
    rows = rows_of(store, [list(range(8))] * 3, S)
    source = make(store, decode="auto")
    for got, wanted in zip(source.crops(rows), by_torch(store, rows), strict=True):
        assert deviation(got, wanted) < 0.5
    dropped = [Decoder("mixed", 0.65), Decoder("mixed")]  # with the engines, then without
    for decoder in dropped:
        assert sum(f"cannot decode with {decoder} " in r.getMessage() for r in caplog.records) == 1
    with pytest.raises(RuntimeError, match="nvJPEG error"):
        list(make(store, decode="mixed").crops(rows))  # asked for, so not replaced


@pytest.mark.parametrize("decode", ["cpu", "mixed", "auto"])
def test_gpu_memory_of_a_real_batch(make: Any, decode: str, capsys: Any) -> None:
    """At most 1.5 GB beside torch's for 256 images of 500 x 375 pixels, cut to 224.

    `auto` may have two pipelines at work while it tries; what counts is how it goes on.
    """
    from pipelines.pipeline import default_threads

    jpegs = [encoded(picture(375, 500, seed=i), quality=93) for i in range(16)]
    store = FakeStore(jpegs * 16, sizes=[(375, 500)] * 256)
    tries = len(CANDIDATES) * (WARMUP + PART * PARTS + 3) + 20 if decode == "auto" else 0
    rows = rows_of(store, [list(range(256))], 224) * (tries + 30)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    used: list[float] = []
    started = time.perf_counter()
    source = make(store, image_size=224, threads=default_threads(), decode=decode)
    for crops in source.crops(rows):
        assert crops.shape == (2, 256, 224, 224, 3)
        ours = torch.cuda.memory_reserved() - reserved
        used.append((before - torch.cuda.mem_get_info()[0] - ours) / 1e9)
    rate = 256 * len(used) / (time.perf_counter() - started)
    steady, trying = max(used[tries:]), max(used[:tries], default=0.0)
    with capsys.disabled():
        print(f"\n{decode}: {steady:.2f} GB ({trying:.2f} before), {rate:.0f} images/s")
    assert steady <= 1.5


def test_pictures_are_of_the_usual_weight() -> None:
    """What the test above stands for: ImageNet's files have about 110 KB."""
    size = len(encoded(picture(375, 500), quality=93))
    assert 20_000 < size < 300_000
    assert np.asarray(picture(375, 500)).shape == (375, 500, 3)
