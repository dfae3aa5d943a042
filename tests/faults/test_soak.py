"""benchmarks/soak.py: a short soak, and that its checks can fail."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from faults.harness import ROOT

SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
@pytest.mark.dist
def test_a_short_soak(tmp_path: Path):
    """The command itself; the last long one is in docs/reliability.md."""
    result = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--minutes", "0.6", "--seed", "3", "--json", str(result)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(result.read_text())
    assert sum(said["faults"].values()) >= 2 and said["micro_batches_checked"] > 0
    assert said["longest_end_seconds"] <= 60


def test_it_sees_what_grows(soak: dict):
    def looks(mb: float, handles: int) -> list[dict[str, float]]:
        return [
            {"pid": 1, "mb": 100 + mb * i, "handles": 20 + handles * i, "threads": 9}
            for i in range(40)
        ]

    soak["refuse_growth"](soak["growth"](looks(0.1, 0)))
    for leak in (looks(2.0, 0), looks(0.0, 1)):
        with pytest.raises(AssertionError, match=r"rank 0, (mb|handles) grew from"):
            soak["refuse_growth"](soak["growth"](leak))


def test_it_sees_other_rows_and_missing_ones(soak: dict, images: Path, tmp_path: Path):
    """Against what two ranks are given by the plan, in either split."""
    config = soak["fill"](soak["configuration"].parse([*soak["WORDS"], "--data", str(images)]))
    path, lines = tmp_path / "rows", []
    for step in range(3):
        ranks, accumulate = (2, 1) if step else (1, 2)
        for rank in range(ranks):
            stream = soak["RowStream"](
                soak["configuration"].spec(config),
                seed=config.seed,
                sizes=soak["open_store"](str(images)).sizes,
                batch_size=config.batch_size,
                accumulate=accumulate,
                rank=rank,
                world_size=ranks,
            )
            for micro in range(accumulate):
                rows = stream.rows(step, micro)
                parts = (rows.ids, rows.windows, rows.colours)
                digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
                lines.append(f"{step} {4 * (rank * accumulate + micro)} 4 {digest}")
    path.write_text("\n".join(lines))
    assert soak["check_rows"](path, images, 3) == 6
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(AssertionError, match="no rank was given"):
        soak["check_rows"](path, images, 3)
    path.write_text("\n".join([*lines[:-1], lines[-1].replace("2 4 4", "2 0 4")]))
    with pytest.raises(AssertionError, match="other rows in step 2"):
        soak["check_rows"](path, images, 3)
