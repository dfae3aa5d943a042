"""benchmarks/loader.py: its rivals do the same work, and it runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import loader
from pipelines.plan import Rows, RowStream
from pipelines.spec import AugmentSpec
from pipelines.stores import Store, open_store

ROOT = Path(__file__).resolve().parents[2]
SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loader.generate(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return open_store(folder, verify=False, progress=False)


@pytest.fixture(scope="module")
def rows(store: Store) -> list[Rows]:
    stream = RowStream(AugmentSpec(image_size=SIZE), seed=0, sizes=store.sizes, batch_size=3)
    return [stream.rows(step) for step in range(2)]


def test_generated_images_weigh_what_imagenets_do(store: Store) -> None:
    assert store.sizes.tolist() == [[375, 500]] * 6
    weight = np.mean([len(store.read(row)) for row in range(6)])
    assert 90_000 < weight < 130_000


def test_pillow_cuts_what_the_source_cuts(store: Store, rows: list[Rows]) -> None:
    ours = loader.Chain("torch crops", 1, store, rows, SIZE)
    theirs = loader.Chain("pil crops", 1, store, rows, SIZE)
    for a, b in zip(ours.batches(), theirs.batches(), strict=True):
        assert a.shape == b.shape == (2, 3, SIZE, SIZE, 3)
        assert (a.int() - b.int()).abs().max() <= 2  # the same but for roundings
    ours.source.close()


@pytest.mark.parametrize("kind", ["pil views", "our views"])
def test_views_are_normalised_batches(kind: str, store: Store, rows: list[Rows]) -> None:
    chain = loader.Chain(kind, 1, store, rows, SIZE)
    turn = chain.turn()
    assert turn["images"] == 6 and turn["seconds"] > 0 and turn["processor_seconds"] > 0
    for views in chain.batches():
        assert views.shape == (2, 3, 3, SIZE, SIZE) and views.dtype == torch.float32
        assert views.min() >= -2.2 and views.max() <= 2.7  # 0 and 1, normalised
        assert views.std() > 0.3
    if chain.source is not None:
        chain.source.close()


def test_percentiles_and_ratios_are_taken_within_a_round() -> None:
    def turn(seconds: float, processor: float) -> dict[str, float]:
        times = {"seconds": seconds, "processor_seconds": processor}
        return {"images": 100, "peak_mb": 10 * seconds, "imports_mb": 5, **times}

    slow, fast = [turn(4, 2), turn(8, 4), turn(2, 1)], [turn(1, 1), turn(2, 2), turn(0.5, 0.5)]
    result = loader.summarise({"pil crops, 1 thread": slow, "torch crops, 2 threads": fast})
    row = result["rows"]["torch crops, 2 threads"]
    assert row["images_per_second"][1] == 100 and row["n"] == 3 and row["peak_mb"] == 20
    ratio = result["ratios"]["torch crops, 2 threads / pil crops"]
    assert ratio == {"clock": [4.0] * 3, "core": [2.0] * 3}


@pytest.mark.slow
def test_it_runs_as_a_script(folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "out" / "loader.json"
    tiny = ["--image-size", "32", "--images", "6", "--batch-size", "3", "--seconds", "0"]
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--data", str(folder), *tiny]
    command += ["--only", "torch crops", "pil crops", "--threads", "1", "--json", str(result)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    written = json.loads(result.read_text())
    assert set(written["rows"]) == {"pil crops, 1 thread", "torch crops, 1 thread"}
    assert all(row["n"] >= 3 for row in written["rows"].values())
    assert written["command"].startswith("python benchmarks/loader.py --data")
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "torch crops, 1 thread / pil crops" in done.stdout
