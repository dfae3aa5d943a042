"""The quickstart's images and its closing block."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from byol_fast import quickstart
from pipelines.errors import DataError

NAMES = ("brick", "cat", "grass")


def shipped() -> dict[str, npt.NDArray[np.uint8]]:
    """Stand-in for the photographs: eight squares of each, each its own number."""
    return {
        name: np.full((8, 32, 32, 3), 10 * label, np.uint8)
        + np.arange(8, dtype=np.uint8)[:, None, None, None]
        for label, name in enumerate(NAMES)
    }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "photographs", shipped)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.usefixtures("fake")
def test_files_are_stratified_disjoint_and_complete(tmp_path: Path) -> None:
    folder = tmp_path / "squares"
    assert quickstart.prepare(folder)
    for label, name in enumerate(NAMES):
        numbers = {}
        for split in ("train", "test"):
            for path in (folder / split / name).glob("*.png"):
                with Image.open(path) as image:
                    assert image.size == (32, 32)
                    numbers[int(np.asarray(image)[0, 0, 0])] = split
        assert sorted(numbers) == [10 * label + i for i in range(8)]
        assert [n % 10 for n, split in sorted(numbers.items()) if split == "test"] == [3, 7]


def test_squares_tile_the_photograph_and_leave_out_what_is_flat() -> None:
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (100, 70, 3)).astype(np.uint8)  # 3 × 2 squares
    photograph[32:64, :32] = 7
    found = quickstart.squares(photograph)
    assert found.shape == (5, 32, 32, 3)
    assert np.array_equal(found[1], photograph[:32, 32:64])
    assert np.array_equal(found[2], photograph[32:64, 32:64])
    many = quickstart.squares(rng.integers(0, 256, (640, 640, 3)).astype(np.uint8))
    assert len(many) == quickstart.MOST < 400


@pytest.mark.usefixtures("fake")
def test_it_is_repeatable_and_reuses_what_is_complete(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert quickstart.prepare(one) and quickstart.prepare(two)
    assert listing(one) == listing(two)
    before = (one / "train" / "cat" / "0000.png").stat().st_mtime_ns
    assert not quickstart.prepare(one)
    assert (one / "train" / "cat" / "0000.png").stat().st_mtime_ns == before


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "squares"
    quickstart.prepare(folder)
    whole = listing(folder)
    victim = folder / "test" / "grass" / "0007.png"
    victim.unlink() if damage == "missing" else victim.write_bytes(b"")
    assert quickstart.prepare(folder)
    assert listing(folder) == whole


@pytest.mark.usefixtures("fake")
def test_a_killed_run_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "squares"
    with monkeypatch.context() as patch:
        patch.setattr(quickstart.json, "dumps", lambda *a, **k: 1 / 0)  # after the last image
        with pytest.raises(ZeroDivisionError):
            quickstart.prepare(folder)
    assert not folder.exists()
    assert quickstart.prepare(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["squares"]


@pytest.mark.usefixtures("fake")
def test_somebody_else_s_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "holiday.png"
    mine.write_bytes(b"precious")
    assert quickstart.main([str(tmp_path)]) == 4
    assert mine.read_bytes() == b"precious"
    assert str(tmp_path) in capsys.readouterr().err


def test_the_real_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("scikit-image, which ships the photographs, is not installed")
    images = quickstart.photographs()
    assert set(images) == set(quickstart.PHOTOGRAPHS)
    assert all(40 <= len(cells) <= quickstart.MOST for cells in images.values())
    colourful = [name for name, cells in images.items() if (np.ptp(cells, axis=3) > 20).any()]
    assert {"astronaut", "cat", "coffee", "retina", "tissue"} <= set(colourful)
    assert quickstart.main([str(tmp_path / "squares")]) == 0
    total = sum(map(len, images.values()))
    files = list((tmp_path / "squares").glob("*/*/*.png"))
    assert len(files) == total > 1500
    assert "written" in capsys.readouterr().out


def test_missing_photographs_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    assert quickstart.main([str(tmp_path / "squares")]) == 4
    assert "pip install '.[quickstart]' in the checkout" in capsys.readouterr().err


FIGURES = {
    "knn_raw_pixels": 0.5,
    "knn_untrained": 0.25,
    "knn_trained": 0.875,
    "images_per_second": 1234.4,
    "training_seconds": 61.0,
    "report": "runs/x/report.html",
}


def test_summary_shows_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(FIGURES))
    assert quickstart.main(["--summary", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for text in ("50.0%", "25.0%", "87.5%", "1,234 images/s", "61 s", "runs/x/report.html"):
        assert text in shown
    assert "torchrun --nproc_per_node=" in shown and "not the best" not in shown


def test_summary_admits_a_run_that_learned_nothing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**FIGURES, "knn_trained": 0.5}))
    assert "not the best" in quickstart.summary(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"knn_trained": 0.9}'])
def test_summary_of_an_unfinished_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=r"summary\.json"):
        quickstart.summary(tmp_path)
