"""What is around a run: a disk without room, odd folders, a terminal that goes away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.harness import SMALL
from faults.test_checkpoints import AS_ANYBODY
from support import final

NO_ROOM_AT_THE_END = """
import errno
from byol_fast import export, report
def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
if {place!r} == "export":
    export.safetensors.torch.save_file = full
else:
    report.write = full
"""


@pytest.mark.parametrize("place", ["export", "report"])
def test_f2_no_room_for_the_results(runs, tmp_path: Path, place: str):
    """The run is not called done before its results are written; nothing is trained again."""
    out = tmp_path / "run"
    run = runs(out, *SMALL, fault=NO_ROOM_AT_THE_END.format(place=place))
    assert run.wait() == 1, run.said
    assert "No space left" in run.said and "repeat the command" in run.said
    assert "Traceback" not in run.said
    assert run.status["state"] == "failed" and "No space left" in run.status["reason"]
    again = runs(out, *SMALL)
    assert again.wait() == 0 and again.status["state"] == "done"
    assert (out / "exports" / "backbone.safetensors").exists() and (out / "report.html").exists()


@pytest.mark.parametrize("seed", [2**32 - 1, 2**63 - 1])
def test_any_seed_that_is_allowed_trains(runs, tmp_path: Path, seed: int):
    run = runs(tmp_path / "run", *SMALL, "--seed", seed, "--max-steps", 2)
    assert run.wait() == 0, run.said


# Whatever is written beside checkpoints and log finds no room once training has begun.
NO_ROOM_BESIDE = """
import errno
import numpy as np
from byol_fast import checkpoint
from byol_fast.session import divergence, runfolder
def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
armed = False
real_running = runfolder.RunFolder.running
def running(self, **options):
    runfolder.write_text = full
    real_running(self, **options)
runfolder.RunFolder.running = running
np.savez = full
"""


def test_f2_no_room_for_what_training_can_do_without(runs, tmp_path: Path):
    """Pictures and status are told of and left out; only a checkpoint's failure ends a run."""
    out = tmp_path / "run"
    words = (*SMALL, "--checkpoint.every", 4, "--eval-every", 1, "--max-steps", 20)
    run = runs(out, *words, fault=NO_ROOM_BESIDE)
    assert run.wait() == 0, run.said
    for name in ("status.json", "views.npz", "embedding.npz"):
        assert f"{out / name} " in run.said, name
    assert "not evaluated" in run.said  # summary.json
    assert "Traceback" not in run.said and final(out)["step"] == 20
    again = runs(out, *SMALL)
    assert again.wait() == 0 and again.status["state"] == "done", again.said
    assert "knn_trained" in (out / "summary.json").read_text()


EVALUATION_FAILS = """
from byol_fast.watching import online_eval
real = online_eval.OnlineEvaluation.measure
def measure(self, backbone, probe=None):
    if probe is not None:
        raise {error}
    return real(self, backbone, probe)
online_eval.OnlineEvaluation.measure = measure
"""


@pytest.mark.parametrize(
    "error",
    ["OSError(116, 'Stale file handle')", "ValueError('the backbone gave NaN')"],
)
def test_an_evaluation_that_fails_is_no_reason_not_to_train(runs, tmp_path: Path, error: str):
    out = tmp_path / "run"
    fault = EVALUATION_FAILS.format(error=error)
    run = runs(out, *SMALL, "--eval-every", 1, fault=fault)
    assert run.wait() == 0, run.said
    assert run.said.count("the network was not evaluated") >= 3 and "Traceback" not in run.said
    assert final(out)["step"] == 24 and final(out)["evaluation_owed"]
    again = runs(out, *SMALL, "--eval-every", 1)  # it is made up for
    assert again.wait() == 0, again.said
    assert "knn_trained" in json.loads((out / "summary.json").read_text())


FULL_AT_THE_START = """
import errno
from byol_fast import assemble
def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
assemble.checkpoint.write_text = full
"""


def test_f2_no_room_at_the_start(runs, tmp_path: Path):
    run = runs(tmp_path / "run", *SMALL, fault=FULL_AT_THE_START)
    assert run.wait() == 2, run.said
    assert f"the run folder {tmp_path / 'run'} cannot be written" in run.said
    assert "No space left" in run.said and "Traceback" not in run.said


@pytest.mark.parametrize("where", ["locked", "long", "a file"])
def test_f3_an_out_that_cannot_be_a_folder(runs, tmp_path: Path, where: str):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    (tmp_path / "file").touch()
    out = {"locked": locked / "run", "long": tmp_path / ("n" * 300), "a file": tmp_path / "file"}
    words = ("--out", out[where])  # the last one wins
    run = runs(tmp_path / "run", *SMALL, *words, fault=AS_ANYBODY)
    assert run.wait() == 2, run.said
    assert f"the run folder {out[where]} cannot be written" in run.said and "--out" in run.said
    assert "Traceback" not in run.said
    locked.chmod(0o755)


def test_wandb_asked_for_and_missing_is_told_in_a_line(runs, tmp_path: Path):
    fault = "import sys; sys.modules['wandb'] = None"
    run = runs(tmp_path / "run", *SMALL, "--tracker", "wandb", fault=fault)
    assert run.wait() == 2, run.said
    assert "pip install '.[wandb]'" in run.said and "Traceback" not in run.said
