"""F12: a rank that hangs is named by the others, which then end; nobody waits without end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults.harness import ENDLESS, SMALL

SECONDS = 5.0
SHORT = f"import os; os.environ['BYOL_FAST_TIMEOUT'] = '{SECONDS}'\n"


@pytest.mark.dist
@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_f12_a_stopped_rank_is_named(runs, tmp_path: Path, stopped: int):
    """Rank 0 also holds the store that the others would learn from."""
    run = runs(tmp_path / "run", *SMALL, *ENDLESS, ranks=2, fault=SHORT)
    run.wait_for_step(3)
    run.signal(signal.SIGSTOP, stopped)
    other = 1 - stopped
    run.wait_for(lambda: run.poll() or other in run.codes, "the other rank's end")
    assert run.codes[other] == 1
    assert f"rank {stopped}" in run.said and "silent" in run.said, run.said
    if stopped == 1:  # rank 0 keeps the status
        assert run.status["state"] == "failed"
    run.kill(stopped)


# Rank 1's main thread waits for nothing, while its other threads go on.
STUCK = (
    SHORT
    + """
import time
from pipelines.pipeline import ViewPipeline
real = ViewPipeline._views
def _views(self, crops, rows):
    while os.environ["RANK"] == "1" and self.stream.rank == 1 and rows is not None:
        _views.calls += 1
        if _views.calls < 4:
            break
        time.sleep(0.1)
    return real(self, crops, rows)
_views.calls = 0
ViewPipeline._views = _views
"""
)


@pytest.mark.slow
@pytest.mark.dist
def test_f12_a_rank_stuck_in_the_loader_is_placed(runs, tmp_path: Path):
    run = runs(tmp_path / "run", *SMALL, *ENDLESS, ranks=2, fault=STUCK)
    run.wait()
    assert set(run.codes.values()) == {1}
    assert "where the ranks are" in run.said, run.said
    assert "rank 1 in steps (pipeline.py:" in run.said


@pytest.mark.dist
def test_f12_the_time_limit_is_checked(runs, tmp_path: Path):
    fault = SHORT.replace(str(SECONDS), "soon")
    run = runs(tmp_path / "run", *SMALL, fault=fault)
    assert run.wait() == 2
    assert "BYOL_FAST_TIMEOUT must be a number of seconds" in run.said


SLOW_END = (
    SHORT
    + """
import time
from byol_fast.session import outcome
real = outcome.finish
def finish(trainer, folder):
    time.sleep(10)
    real(trainer, folder)
outcome.finish = finish
"""
)


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_has_finished_is_not_taken_for_one_that_hangs(runs, tmp_path: Path):
    """Rank 0 exports and reports for longer than a rank may be silent."""
    run = runs(tmp_path / "run", *SMALL, ranks=2, fault=SLOW_END)
    run.wait()
    assert run.codes == {0: 0, 1: 0}, run.said
    assert "silent" not in run.said
