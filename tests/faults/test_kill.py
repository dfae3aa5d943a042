"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults.harness import SMALL, assert_same_run

EVERY = ("--checkpoint.every", "1", "--checkpoint.keep", "2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


def test_f6_kill_at_any_of_20_steps_ends_bitwise_the_same(runs, whole: Path, tmp_path: Path):
    assert runs(whole, *SMALL, *EVERY).wait() == 0
    for step in range(1, 21):
        run = runs(tmp_path / "run", *SMALL, *EVERY)
        run.wait_for_step(step)
        run.kill()
        assert run.wait() in (0, -signal.SIGKILL)
    assert runs(tmp_path / "run", *SMALL, *EVERY).wait() == 0
    assert_same_run(whole, tmp_path / "run")
