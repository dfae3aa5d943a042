"""F24: two runs in one folder, a port that is in use. (TensorBoard's disk: test_monitor.py.)"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import ENDLESS, ROOT, SMALL


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as owner:
        owner.bind(("", 0))
        owner.listen()
        yield owner.getsockname()[1]


def test_f24_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(runs, tmp_path: Path):
    first = runs(tmp_path / "run", *SMALL, *ENDLESS)
    first.wait_for_step(2)
    at, said = first.step, first.output
    second = runs(tmp_path / "run", *SMALL, *ENDLESS)
    assert second.wait() == 2
    assert f"in use by process {first.pids[0]}" in second.output[len(said) :]
    first.wait_for_step(at + 3)
    assert not first.poll()


@pytest.mark.dist
def test_f24_a_port_in_use_is_named(runs, tmp_path: Path, taken: int):
    """Rank 0 of two, started by hand with a port that is another program's."""
    fault = "import os; os.environ.update(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', "
    fault += f"MASTER_ADDR='127.0.0.1', MASTER_PORT='{taken}')"
    run = runs(tmp_path / "run", *SMALL, fault=fault)
    assert run.wait() == 2
    assert f"cannot meet at 127.0.0.1:{taken}: set MASTER_PORT to a free port" in run.said
    assert "Traceback" not in run.said


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({}, "in use: set MASTER_PORT to another one"),
        ({"NODE_RANK": ""}, "set NODE_RANK"),
        ({"MASTER_ADDR": ""}, "set MASTER_ADDR"),
    ],
)
def test_f24_torchrun_sh_names_what_is_wrong(taken: int, missing: dict[str, str], message: str):
    meeting = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "NPROC": "1"}
    refused = subprocess.run(
        [str(ROOT / "launch" / "torchrun.sh")],
        env={**os.environ, **meeting, "MASTER_PORT": str(taken), "PYTHON": "false", **missing},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and message in refused.stderr
