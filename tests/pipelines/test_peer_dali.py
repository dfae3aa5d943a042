"""benchmarks/peer_dali.py: two different views of every image, as networks get them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.sources import dali_available
from tests.pipelines.fake_store import encoded, picture

pytestmark = [
    pytest.mark.dali,
    pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        place = tmp_path / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        (place / f"{number}.jpg").write_bytes(encoded(picture(40, 56, seed=number)))
    return tmp_path


def test_two_normalised_views_as_often_as_asked(folder: Path) -> None:
    from benchmarks.peer_dali import TwoViews

    peer = TwoViews(folder, threads=1, size=32, batch_size=4, batches=5)
    for _ in range(2):
        batches = list(peer.batches())
        assert len(batches) == 5
        for first, second in batches:
            assert first.shape == second.shape == (4, 3, 32, 32) and first.dtype == torch.float32
            assert not torch.equal(first, second)
            assert first.abs().max() < 3 and 0.05 < first.std() < 3  # of normalised pixels
    copies = [view.clone() for batch in batches for view in batch]
    list(peer.batches())
    assert all(
        torch.equal(a, b)
        for a, b in zip(copies, (v for batch in batches for v in batch), strict=True)
    )
    peer.close()


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.peer_dali import main

    options = ["--device", "cpu", "--threads", "1", "--batch-size", "4", "--image-size", "32"]
    rate = main([str(folder), *options, "--batches", "2"])
    assert rate > 0 and "images/s, both views" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("decode", ["cpu", "mixed"])
def test_on_a_gpu(folder: Path, decode: str) -> None:
    from benchmarks.peer_dali import TwoViews

    options = {"threads": 2, "size": 32, "batch_size": 4, "batches": 3}
    peer = TwoViews(folder, **options, device="cuda", decode=decode)
    for views in peer.batches():
        assert all(view.is_cuda and view.abs().max() < 3 for view in views)
    peer.close()
