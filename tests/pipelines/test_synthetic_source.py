"""The synthetic source: the right shapes, and pixels that depend on the sample alone."""

from __future__ import annotations

import pytest
import torch

from pipelines.sources.synthetic_source import SyntheticSource
from tests.pipelines.fake_store import FakeStore, bad, rows_of

STORE = FakeStore([bad()] * 300, sizes=[(64, 64)] * 300)


def crops_of(*batches: list[int]) -> list[torch.Tensor]:
    s = SyntheticSource(STORE, image_size=16, device="cpu")
    return list(s.crops(rows_of(STORE, list(batches), 16)))


def test_shape_and_type() -> None:
    first, second = crops_of([5, 6, 7], [8])
    assert first.shape == (2, 3, 16, 16, 3) and second.shape == (2, 1, 16, 16, 3)
    assert first.dtype == torch.uint8 and first.float().std() > 60  # noise over the whole range


def test_pixels_follow_the_sample() -> None:
    first, second = crops_of([5, 6, 7], [7, 5, 299])
    assert torch.equal(first[:, [0, 2]], second[:, [1, 0]])
    assert not torch.equal(first[0, 0], first[1, 0])  # two views
    assert not torch.equal(first[0, 0], first[0, 1])  # two samples
    assert torch.equal(first, crops_of([5, 6, 7])[0])


def test_it_reads_nothing_and_waits_for_nothing() -> None:
    s = SyntheticSource(STORE, image_size=16, device="cpu")
    next(s.crops(rows_of(STORE, [[0]], 16)))
    assert STORE.reads == 0 and s.bad == {}
    assert s.waits == {"decode": 0.0, "read": 0.0, "wait": 0.0, "copy": 0.0}
    s.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(s.crops(rows_of(STORE, [[0]], 16)))
