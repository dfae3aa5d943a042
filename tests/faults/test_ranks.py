"""F14: an exception on one rank ends all of them, and its traceback is the one to be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.harness import HERE, LIMIT, ROOT, SMALL, free_port, wait_until

RAISES = """
import os, time
from byol_fast import trainer
real = trainer.Trainer._one_step
def one_step(self, views):
    if self.step == 3 and os.environ["RANK"] == "{rank}":
        open({mark!r}, "w").close()
        raise ZeroDivisionError("a fault of rank {rank}")
    if self.step == 3 and {stuck}:
        while True:
            time.sleep(1)
    return real(self, views)
trainer.Trainer._one_step = one_step
"""


def assert_root_first(said: str, rank: int) -> None:
    """The first traceback is the root's; the other rank names it in a line."""
    head, _, rest = said.partition("Traceback (most recent call last)")
    assert f"ZeroDivisionError: a fault of rank {rank}" in rest.partition("error on rank")[0]
    assert "error on rank" not in head
    assert f"error on rank {1 - rank}" in rest
    assert f"rank {rank} failed first: ZeroDivisionError: a fault of rank {rank}" in rest


@pytest.mark.dist
@pytest.mark.parametrize(
    ("rank", "stuck"),
    [(0, False), (1, False), *(pytest.param(r, True, marks=pytest.mark.slow) for r in (0, 1))],
)
def test_f14_an_exception_on_one_rank(runs, tmp_path: Path, rank: int, stuck: bool):
    """The other rank waits in a collective, or (stuck) where no collective will ever wake it."""
    mark = tmp_path / "raised"
    fault = RAISES.format(rank=rank, mark=str(mark), stuck=stuck)
    run = runs(tmp_path / "run", *SMALL, ranks=2, fault=fault)
    run.wait_for(mark.exists, "the exception")
    run.wait()
    assert set(run.codes.values()) == {1}
    if stuck and rank == 0:  # the store has died with it
        assert "a fault of rank 0" in run.said and "error on rank 1: still waiting" in run.said
    else:
        assert_root_first(run.said, rank)
        assert run.said.count("Traceback (most recent call last)") == 1
    assert run.status["state"] == "failed"
    assert f"a fault of rank {rank}" in run.status["reason"]


@pytest.mark.dist
@pytest.mark.slow
def test_f14_under_torchrun(images: Path, tmp_path: Path):
    mark, out = tmp_path / "raised", tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *(f"--master_port={free_port()}", str(HERE / "command.py")),
        *("--out", str(out), "--data", str(images), *SMALL),
    ]
    output = tmp_path / "output"
    fault = RAISES.format(rank=1, mark=str(mark), stuck=False)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault}
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
    try:

        def raised() -> bool:
            assert process.poll() is None, output.read_text()
            return mark.exists()

        wait_until(raised, "the exception")
        assert process.wait(LIMIT) == 1
    finally:
        process.kill()
        process.wait()
    assert_root_first(output.read_text(), 1)
