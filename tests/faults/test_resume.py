"""A run that was killed goes on as if it had not been (F6); one that was changed does not (F9)."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from faults.harness import SMALL, assert_same_run
from support import final

EVERY = ("--checkpoint.every", "1")

# kill -9 of itself when `step` updates have been made, at one place of the next one.
DIE = """
import os, signal
from byol_fast import checkpoint, monitor, optim, trainer
STEP, PLACE = {step}, {place!r}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

armed = reached = False
real_step = trainer.Trainer._one_step
def one_step(self, views):
    global armed, reached
    armed, reached = self.step == STEP, self.step >= STEP
    if armed and PLACE == "before the step":
        die()
    output = real_step(self, views)
    if armed and PLACE == "after the step":
        die()
    return output
trainer.Trainer._one_step = one_step

real_update = optim.LARS.step
def update(self, closure=None):
    real_update(self, closure)
    if armed and PLACE == "between weights and target":
        die()
optim.LARS.step = update

real_write = monitor.LineFile.write
def write(self, record):
    if armed and PLACE == "in a line of the log":
        os.write(self._file.fileno(), b'{{"step": 99, "lo')
        die()
    real_write(self, record)
monitor.LineFile.write = write

real_replace = os.replace
def replace(a, b):
    if reached and PLACE == "before the checkpoint's name" and str(b).endswith(".pt"):
        die()
    real_replace(a, b)
os.replace = replace
"""
PLACES = (
    "before the step",
    "between weights and target",
    "after the step",
    "in a line of the log",
    "before the checkpoint's name",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.slow
def test_f6_kill_at_any_of_20_steps_ends_bitwise_the_same(runs, whole: Path, tmp_path: Path):
    assert runs(whole, *SMALL, *EVERY).wait() == 0
    for step in range(1, 21):
        fault = DIE.format(step=step, place=PLACES[step % len(PLACES)])
        run = runs(tmp_path / "run", *SMALL, *EVERY, fault=fault)
        assert run.wait() == -signal.SIGKILL, run.said
    last = runs(tmp_path / "run", *SMALL, *EVERY)
    assert last.wait() == 0
    assert "resumed at step" in last.said
    assert_same_run(whole, tmp_path / "run")


def test_f6_killed_from_outside(runs, tmp_path: Path):
    """As above, at whatever moment the signal comes."""
    assert runs(tmp_path / "whole", *SMALL, *EVERY).wait() == 0
    for step in (1, 9, 17):
        run = runs(tmp_path / "run", *SMALL, *EVERY)
        run.wait_for_step(step)
        run.kill()
        assert run.wait() in (0, -signal.SIGKILL)
    assert runs(tmp_path / "run", *SMALL, *EVERY).wait() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


GROUPS = """
from byol_fast import trainer
real = trainer.Trainer.run
def run(self, signal):
    groups = [(group["weight_decay"], group["adapt"]) for group in self.optimizer.param_groups]
    print("groups", groups, flush=True)
    return real(self, signal)
trainer.Trainer.run = run
"""


def test_f9_an_allowed_change_of_the_optimizer_takes_effect(runs, tmp_path: Path):
    """Its state is the checkpoint's, its settings are not."""
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 4).wait() == 0
    changed = ("--weight-decay", "0.5", "--optim.variant", "sgd", "--allow-config-change")
    run = runs(out, *SMALL, *changed, fault=GROUPS)
    assert run.wait() == 0, run.said
    assert "groups [(0.5, False), (0.0, False)]" in run.said


def test_f9_a_changed_setting_is_shown_and_refused_unless_allowed(runs, tmp_path: Path):
    out = tmp_path / "run"
    assert runs(out, *SMALL, "--max-steps", 4).wait() == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    changed = ("--base-lr", "0.01", "--seed", "1")
    refused = runs(out, *SMALL, *changed)
    assert refused.wait() == 2
    assert "seed: 0 → 1" in refused.said and "optim.base_lr: " in refused.said
    assert "--checkpoint.allow-config-change" in refused.said and "Traceback" not in refused.said
    assert {p: p.read_bytes() for p in before} == before
    allowed = runs(out, *SMALL, *changed, "--allow-config-change")
    assert allowed.wait() == 0, allowed.said
    assert "seed: 0 → 1" in allowed.said
    assert final(out)["step"] == 24


# Each step takes a second, all else nothing; kill -9 of itself after the checkpoint of step 10.
SECONDS = """
import os, signal, types
from byol_fast import checkpoint, trainer
from byol_fast.session import clock
now = [0.0]
clock.time = types.SimpleNamespace(perf_counter=lambda: now[0])
real_step = trainer.Trainer._one_step
def one_step(self, views):
    now[0] += 1.0
    if {die} and self.step == 12:
        self.saving.settle()
        os.kill(os.getpid(), signal.SIGKILL)
    return real_step(self, views)
trainer.Trainer._one_step = one_step
"""


def test_seconds_of_an_interrupted_run_are_those_of_its_steps(runs, tmp_path: Path):
    """They stopped at the last line of the log, so that the run seemed to have been faster."""
    out, words = tmp_path / "run", (*SMALL, "--log-every", "1000", "--checkpoint.every", "10")
    run = runs(out, *words, fault=SECONDS.format(die=True))
    assert run.wait() == -signal.SIGKILL, run.said
    assert (final(out)["step"], final(out)["seconds"]) == (10, 10.0)
    assert runs(out, *words, fault=SECONDS.format(die=False)).wait() == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (final(out)["seconds"], summary["training_seconds"]) == (24.0, 24.0)
    assert summary["images_per_second"] == 8.0
