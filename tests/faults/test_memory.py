"""F26: too little memory for a step, or for an evaluation beside the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.harness import SMALL
from support import final

from byol_fast.watching import metrics

# A convolution has memory for so many rows; only in training, on one rank, from some step on.
LIMIT = """
import os, torch
from byol_fast import trainer
from byol_fast import assemble
assemble.trim = lambda model: None  # it has a forward of its own
step = [0]
real_step = trainer.Trainer._one_step
def one_step(self, views):
    step[0] = self.step + 1
    return real_step(self, views)
trainer.Trainer._one_step = one_step
real = torch.nn.Conv2d.forward
def forward(self, x):
    here = self.training and os.environ.get("RANK", "0") == "{rank}"
    if here and len(x) > {rows} and step[0] >= {first}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return real(self, x)
torch.nn.Conv2d.forward = forward
"""

IN_THE_TRIAL = """
from byol_fast import compiled
def try_out(model, networks, images, *_):
    if os.environ.get("RANK", "0") == "{rank}":
        raise torch.OutOfMemoryError("CUDA out of memory.")
compiled.try_out = try_out
"""


def test_f26_a_step_that_does_not_fit_names_what_does(runs, tmp_path: Path):
    out = tmp_path / "run"
    fault = LIMIT.format(rows=8, first=1, rank=0)
    run = runs(out, *SMALL, fault=fault)
    assert run.wait() == 1, run.said
    assert "out of memory in step 1, rank 0: CUDA out of memory" in run.said
    assert "4 images fit: use --input.accumulate 2" in run.said
    assert "Traceback" not in run.said
    assert run.status["state"] == "failed" and "--input.accumulate 2" in run.status["reason"]
    again = runs(out, *SMALL, "--input.accumulate", "2", fault=fault)
    assert again.wait() == 0, again.said
    assert final(out)["step"] == 24


@pytest.mark.dist
def test_f26_a_step_that_does_not_fit_on_one_rank_ends_all(runs, tmp_path: Path):
    out = tmp_path / "run"
    run = runs(out, *SMALL, ranks=2, fault=LIMIT.format(rows=4, first=4, rank=1))
    run.wait()
    assert set(run.codes.values()) == {1}, run.said
    assert "error on rank 1: out of memory in step 4, rank 1" in run.said
    assert "2 images fit: use --input.accumulate 2" in run.said
    assert "rank 1 failed first: OutOfMemory" in run.said  # what rank 0 says
    assert run.status["state"] == "failed"


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_f26_out_of_memory_in_the_trial_ends_all_ranks(runs, tmp_path: Path, ranks: int):
    """As it was called a compiler's failure, training went on in the mode that needs more."""
    fault = LIMIT.format(rows=8 // ranks, first=0, rank=ranks - 1) + IN_THE_TRIAL.format(
        rank=ranks - 1
    )
    run = runs(tmp_path / "run", *SMALL, "--engine", "compile", ranks=ranks, fault=fault)
    run.wait()
    assert set(run.codes.values()) == {1}, run.said
    assert f"out of memory in the trial before training, rank {ranks - 1}: " in run.said
    assert "use --input.accumulate 2" in run.said
    assert "Traceback" not in run.said and "torch.compile failed" not in run.said


NO_MEMORY_TO_EVALUATE = """
import torch
from byol_fast.watching import online_eval
def measure(self, backbone, probe=None):
    raise {error}
online_eval.OnlineEvaluation.measure = measure
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "error"),
    [
        pytest.param(1, "MemoryError()", marks=pytest.mark.slow),
        (2, "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9.00 GiB.')"),
    ],
)
def test_f26_an_evaluation_without_memory_is_left_out_and_counted(
    runs, tmp_path: Path, ranks: int, error: str
):
    """It ended the run, and so it did again after each resume."""
    out, words = tmp_path / "run", (*SMALL, "--eval-every", "1")
    fault = NO_MEMORY_TO_EVALUATE.format(error=error)
    run = runs(out, *words, "--max-steps", 8, ranks=ranks, fault=fault)
    assert run.wait() == 0, run.said
    run = runs(out, *words, ranks=ranks, fault=fault)  # begins with the one it owes
    assert run.wait() == 0, run.said
    assert set(run.codes.values()) == {0} and "Traceback" not in run.said
    assert final(out)["step"] == 24 and run.status["state"] == "done"
    events = metrics.read(out / "metrics.jsonl").events
    texts = [e.text for e in events if "not evaluated" in e.text]
    assert "the untrained network was not evaluated (1 evaluations left out so far)" in texts[0]
    assert all("out of memory" in text for text in texts)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["evaluations_left_out"] == len(texts) == 5  # before, 8 twice, 16, 24
    assert "knn_trained" not in summary
    again = runs(out, *words, ranks=ranks)  # with memory the last one is made up for
    assert again.wait() == 0, again.said
    assert "knn_trained" in json.loads((out / "summary.json").read_text())
