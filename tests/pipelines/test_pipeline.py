"""build(): one plan through any backend, any number of ranks, from any step."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines
from pipelines.augment import reference
from pipelines.errors import DataError
from pipelines.plan import RowStream
from pipelines.spec import AugmentSpec

SPEC = AugmentSpec(image_size=32)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (50, 5, 6, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return {"images": smooth.astype(np.uint8), "labels": np.arange(50, dtype=np.int32) % 3}


@pytest.fixture(scope="module")
def data(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays)
    return str(path)


def collect(data: str, steps: tuple[int, int], **options: object) -> list[pipelines.Views]:
    options = {"spec": SPEC, "batch_size": 8, "backend": "torch", "threads": 1, **options}
    pipeline = pipelines.build(data, **options)
    try:
        return list(pipeline.steps(*steps))
    finally:
        pipeline.close()


def test_views_have_the_promised_shape_and_belong_to_their_rows(
    data: str, arrays: dict[str, np.ndarray]
) -> None:
    (views,) = collect(data, (0, 1))
    assert views.x.shape == (2, 8, 3, 32, 32) and views.x.dtype == torch.float32
    for view in views.x:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert views.index.dtype == torch.int64
    assert torch.equal(views.label, torch.from_numpy(arrays["labels"]).long()[views.index])


def test_the_pixels_are_the_plans(data: str, arrays: dict[str, np.ndarray]) -> None:
    """Each view again, by hand: the plan's window, torch's resize, the reference's colours."""
    (views,) = collect(data, (3, 4))
    rows = RowStream(SPEC, seed=0, sizes=[(40, 48)] * 50, batch_size=8).rows(3)
    crops = torch.empty(2, 8, 32, 32, 3, dtype=torch.uint8)
    for i, row in enumerate(rows.ids):
        for v in range(2):
            top, left, height, width = rows.windows[i, v]
            window = arrays["images"][row, top : top + height, left : left + width]
            crops[v, i] = torch.nn.functional.interpolate(
                torch.from_numpy(window).permute(2, 0, 1)[None],
                size=(32, 32),
                mode="bicubic",
                antialias=True,
            )[0].permute(1, 2, 0)
    expected = reference.apply(crops, torch.from_numpy(rows.colours), SPEC)
    assert torch.equal(views.index, torch.from_numpy(rows.ids))
    torch.testing.assert_close(views.x, expected, atol=1.01 / 255 / 0.224, rtol=0)


def test_starting_at_any_step_gives_the_same_as_going_there(data: str) -> None:
    whole = collect(data, (0, 14))  # over two epochs of 50 images
    for start in (1, 6, 7, 13):
        later = collect(data, (start, 14))
        assert len(later) == 14 - start
        for a, b in zip(whole[start:], later, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.x, b.x)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_ranks_and_accumulation_share_one_sequence(
    data: str, world_size: int, accumulate: int
) -> None:
    whole = torch.cat([v.index for v in collect(data, (0, 7))])
    parts = [
        torch.stack(
            [
                v.index
                for v in collect(
                    data, (0, 7), rank=rank, world_size=world_size, accumulate=accumulate
                )
            ]
        ).view(7, -1)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(parts, dim=1).flatten(), whole)


def test_an_epoch_shows_every_image_once_though_the_batch_does_not_divide_it(data: str) -> None:
    pipeline = pipelines.build(data, spec=SPEC, batch_size=8, backend="torch", threads=1)
    counts = torch.zeros(50, dtype=torch.int64)
    for epoch in range(4):  # 4 × 50 = 25 × 8
        for views in pipeline.epoch(epoch):
            counts += torch.bincount(views.index, minlength=50)
    pipeline.close()
    assert counts.tolist() == [4] * 50
    assert pipeline.steps_per_epoch == 7


def test_epoch_can_start_in_the_middle(data: str) -> None:
    pipeline = pipelines.build(data, spec=SPEC, batch_size=8, backend="torch", threads=1)
    whole = [v.index for v in pipeline.epoch(1)]
    late = [v.index for v in pipeline.epoch(1, start=4)]
    pipeline.close()
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], late, strict=True))


def test_threads_and_prefetch_change_nothing(data: str) -> None:
    one = collect(data, (0, 5), threads=1, prefetch=1)
    many = collect(data, (0, 5), threads=3, prefetch=4)
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, many, strict=True))


def test_auto_is_torch_on_a_cpu_and_synthetic_for_synthetic_data(data: str) -> None:
    assert [len(v.index) for v in collect(data, (0, 2), backend="auto")] == [8, 8]
    views = collect("synthetic:100", (0, 2), backend="auto")
    assert views[0].x.shape == (2, 8, 3, 32, 32)
    assert views[0].label.tolist() == [-1] * 8


def test_a_batch_larger_than_the_data_is_refused_with_a_mend(data: str) -> None:
    with pytest.raises(DataError, match=r"larger than the data set \(50 images\).*--batch-size"):
        collect(data, (0, 1), batch_size=64)


def test_a_batch_that_ranks_cannot_share_is_refused(data: str) -> None:
    with pytest.raises(ValueError, match="multiple of ranks x accumulate"):
        collect(data, (0, 1), world_size=3)


def test_an_unknown_backend_is_refused(data: str) -> None:
    with pytest.raises(ValueError, match="auto, torch, dali, ffcv or synthetic"):
        collect(data, (0, 1), backend="tfrecord")


def test_broken_images_turn_grey_and_are_counted(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(1)
    for name in range(20):
        pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name:02}.jpg", quality=90)
    pipeline = pipelines.build(str(tmp_path), spec=SPEC, batch_size=20, backend="torch", threads=2)
    (tmp_path / "07.jpg").unlink()  # after it was indexed
    (views,) = pipeline.steps(0, 1)
    bad = pipeline.stats()["bad"]
    pipeline.close()
    assert [pipeline.store.name(row)[-6:] for row in bad] == ["07.jpg"]
    assert views.x.isfinite().all()


def test_auto_says_why_it_is_not_ffcv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from byol_fast.evaluate.data import Subset
    from pipelines import sources
    from pipelines.conversion.betonwriter import BetonWriter
    from pipelines.pipeline import choose_backend
    from pipelines.stores import open_store

    with open(tmp_path / "a.beton", "wb") as file:
        writer = BetonWriter(file, 1, labelled=True)
        writer.add(np.zeros((8, 9, 3), np.uint8), 8, 9, 0)
        writer.finish()
    store = Subset(open_store(tmp_path / "a.beton"), np.array([0]))
    monkeypatch.setattr(sources, "ffcv_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert choose_backend("auto", store, torch.device("cpu")) == "torch"
    assert "FFCV is not installed, so torch decodes the .beton" in caplog.text


def test_a_selection_of_synthetic_images_is_synthetic() -> None:
    from byol_fast.evaluate.data import spread
    from pipelines.pipeline import choose_backend
    from pipelines.stores import open_store

    some = spread(open_store("synthetic:9"), 3)
    assert choose_backend("auto", some, torch.device("cpu")) == "synthetic"
