"""What a checkpoint is about, in whole runs: its time, dropout's draws, and buffers under DDP."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from faults.harness import SMALL, assert_same_run
from support import final

# Rank 0's clock, as far as checkpoints go by it: a step takes 11 minutes. Rank 1's stands still. A
# checkpoint is waited for, so that none is late because of the one before.
ELEVEN_MINUTES = """
import os
from types import SimpleNamespace
from byol_fast import trainer
from byol_fast.session import async_checkpoint, saving
minutes = 0
saving.time = SimpleNamespace(monotonic=lambda: 60 * minutes)
real_step = trainer.Trainer._one_step
def one_step(self, views):
    global minutes
    minutes += 11 if os.environ.get("RANK", "0") == "0" else 0
    return real_step(self, views)
trainer.Trainer._one_step = one_step
real_save = async_checkpoint.CheckpointWriter.save
def save(self, step, state):
    real_save(self, step, state)
    self.wait()
async_checkpoint.CheckpointWriter.save = save
"""


def saved(out: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (out / "checkpoints").glob("*.pt"))


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_by_the_clock(runs, tmp_path: Path, ranks: int):
    out = tmp_path / "run"
    words = (*SMALL, "--checkpoint.every", "30m", "--checkpoint.keep", 20)
    run = runs(out, *words, "--max-steps", 11, ranks=ranks, fault=ELEVEN_MINUTES)
    run.wait()
    assert set(run.codes.values()) == {0}, run.said
    assert saved(out) == [3, 6, 9, 11]  # every 33 minutes, and the end
    run = runs(out, *words, ranks=ranks, fault=ELEVEN_MINUTES)
    run.wait()
    assert set(run.codes.values()) == {0}, run.said
    assert "resumed at step 11 of 24" in run.said
    assert saved(out) == [3, 6, 9, 11, 14, 17, 20, 23, 24]  # counted from the resumption


# A dropout that prints a digest of what it drops; each forward pass of a step is one line.
DROPOUT = """
import hashlib, os
import command, torch
from torch import nn
from torchvision.models import _api
from byol_fast import trainer
class Dropout(nn.Module):
    def forward(self, x):
        kept = torch.rand_like(x) < 0.8  # from torch's generator, as nn.Dropout draws
        if self.training and step >= 0:
            digest = hashlib.sha256(kept.numpy().tobytes()).hexdigest()[:16]
            words = (os.environ.get("RANK", "0"), step, digest)
            print("dropout", *words, end="\\n", flush=True)
        return x * kept / 0.8 if self.training else x
def tiny(*, weights=None):
    layers = list(command.tiny())
    return nn.Sequential(*layers[:3], Dropout(), *layers[3:])
tiny.__module__ = command.tiny.__module__
_api.BUILTIN_MODELS[command.BACKBONE] = tiny
step = -1
real_step = trainer.Trainer._one_step
def one_step(self, views):
    global step
    step = self.step
    return real_step(self, views)
trainer.Trainer._one_step = one_step
"""


def dropped(said: str) -> dict[tuple[int, int], list[str]]:
    """Digests by rank and step."""
    found: dict[tuple[int, int], list[str]] = {}
    for rank, step, digest in re.findall(r"dropout (\d) (\d+) (\w{16})", said):
        found.setdefault((int(rank), int(step)), []).append(digest)
    return found


def test_dropout_draws_anew_each_step_and_resumes_bitwise(runs, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = runs(whole, *SMALL, fault=DROPOUT)
    assert run.wait() == 0, run.said
    wanted = dropped(run.said)
    assert sorted(wanted) == [(0, step) for step in range(24)]
    assert len({digest for some in wanted.values() for digest in some}) == sum(
        map(len, wanted.values())
    )  # no two steps, nor the two networks of one, drop the same
    for stop in (5, 24):
        run = runs(parts, *SMALL, "--max-steps", stop, fault=DROPOUT)
        assert run.wait() == 0, run.said
        first = 0 if stop == 5 else 5
        assert dropped(run.said) == {(0, step): wanted[0, step] for step in range(first, stop)}
    assert_same_run(whole, parts)
    other = runs(tmp_path / "other", *SMALL, "--seed", 1, "--max-steps", 2, fault=DROPOUT)
    assert other.wait() == 0, other.said
    assert dropped(other.said)[0, 0] != wanted[0, 0]


@pytest.mark.dist
def test_dropout_differs_between_ranks(runs, tmp_path: Path):
    run = runs(tmp_path / "run", *SMALL, "--max-steps", 4, ranks=2, fault=DROPOUT)
    run.wait()
    assert run.codes == {0: 0, 1: 0}, run.said
    found = dropped(run.said)
    assert sorted(found) == [(rank, step) for rank in range(2) for step in range(4)]
    digests = [digest for some in found.values() for digest in some]
    assert len(set(digests)) == len(digests)


# Each rank writes its buffers when a session has loaded its checkpoint, and at its end.
BUFFERS = """
import json, os
from byol_fast import trainer
real = trainer.Trainer.run
def write(self, when):
    found = {{name: value.tolist() for name, value in self.model.named_buffers()}}
    with open(f"{path}-{{when}}{{os.environ.get('RANK', '0')}}.json", "w") as file:
        json.dump(found, file)
def run(self, signal):
    write(self, "start")
    done = real(self, signal)
    write(self, "end")
    return done
trainer.Trainer.run = run
"""


@pytest.mark.dist
@pytest.mark.parametrize("sync", ["--bn-sync", "--no-bn-sync"])
def test_running_statistics_of_two_ranks(runs, tmp_path: Path, sync: str):
    """Shared they are one; else each rank has its own, and rank 0's are saved, for both to go on
    from. DDP must not overwrite them in between."""

    def buffers(session: str, when: str) -> list[dict[str, list]]:
        files = [tmp_path / f"{session}-{when}{rank}.json" for rank in range(2)]
        return [json.loads(file.read_text()) for file in files]

    out = tmp_path / "run"
    for session, stop in (("first", 5), ("second", 9)):
        fault = BUFFERS.format(path=tmp_path / session)
        run = runs(out, *SMALL, sync, "--max-steps", stop, ranks=2, fault=fault)
        run.wait()
        assert run.codes == {0: 0, 1: 0}, run.said
        one, two = buffers(session, "end")
        running = [name for name in one if name.endswith(("running_mean", "running_var"))]
        assert len(running) >= 8
        assert all((one[name] == two[name]) == (sync == "--bn-sync") for name in running)
        state = final(out)["model"]
        assert {name: state[name].tolist() for name in one} == one
        if session == "first":
            saved_by_rank_0 = one
    assert buffers("second", "start") == [saved_by_rank_0] * 2
