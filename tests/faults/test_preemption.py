"""F10: SIGTERM, SIGINT, SIGUSR1 and SIGHUP, once and again, at any time, on one rank or on two."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from faults.harness import ENDLESS, SMALL, assert_same_run
from support import final

from byol_fast.watching import metrics

EVERY = ("--checkpoint.every", "1000")

# Signals itself in the middle of a step.
IN_A_STEP = """
import os, signal
from byol_fast import trainer
RANK = os.environ.get("RANK", "0")
real = trainer.train_step
calls = 0
def train_step(*args, **options):
    global calls
    calls += 1
    if calls == {step} and RANK in {ranks!r}:
        for number in {signals!r}:
            os.kill(os.getpid(), number)
    return real(*args, **options)
trainer.train_step = train_step
"""
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.parametrize("number", SIGNALS)
def test_f10_a_signal_in_a_step(runs, whole: Path, tmp_path: Path, number: signal.Signals):
    if not whole.exists():
        assert runs(whole, *SMALL, *EVERY).wait() == 0
    out = tmp_path / "run"
    fault = IN_A_STEP.format(step=6, ranks="0", signals=[int(number)])
    run = runs(out, *SMALL, *EVERY, fault=fault)
    assert run.wait() == 75, run.said
    assert run.status["state"] == "preempted" and number.name in run.status["reason"]
    assert final(out)["step"] == run.status["step"] == 6  # the step it came in was finished
    assert runs(out, *SMALL, *EVERY).wait() == 0
    assert_same_run(whole, out)


AGAIN_WHILE_SAVING = """
import os, signal
from byol_fast import checkpoint
real_save = checkpoint.save
def save(*args, **options):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return real_save(*args, **options)
checkpoint.save = save
"""


def test_f10_again_and_again(runs, tmp_path: Path):
    """Twice in the step, and three times more while the checkpoint is written."""
    out = tmp_path / "run"
    twice = IN_A_STEP.format(step=4, ranks="0", signals=[int(signal.SIGTERM), int(signal.SIGINT)])
    run = runs(out, *SMALL, *EVERY, fault=twice + AGAIN_WHILE_SAVING)
    assert run.wait() == 75, run.said
    assert run.status["state"] == "preempted" and "SIGTERM" in run.status["reason"]
    assert final(out)["step"] == 4


def test_f10_from_outside(runs, tmp_path: Path):
    out = tmp_path / "run"
    run = runs(out, *SMALL, *ENDLESS)
    run.wait_for_step(3)
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.said
    assert final(out)["step"] == run.status["step"] == run.step


@pytest.mark.dist
@pytest.mark.parametrize(
    "signalled",
    [pytest.param("0", marks=pytest.mark.slow), "1", pytest.param("01", marks=pytest.mark.slow)],
)
def test_f10_two_ranks_agree_on_the_step(runs, tmp_path: Path, signalled: str):
    out = tmp_path / "run"
    numbers = [int(signal.SIGTERM), int(signal.SIGTERM)]
    fault = IN_A_STEP.format(step=5, ranks=signalled, signals=numbers)
    run = runs(out, *SMALL, *EVERY, ranks=2, fault=fault)
    run.wait()
    assert run.codes == {0: 75, 1: 75}, run.said
    assert run.status["state"] == "preempted"
    assert final(out)["step"] == run.status["step"] == 5
    again = runs(out, *SMALL, *EVERY, ranks=2)
    again.wait()
    assert again.codes == {0: 0, 1: 0}, again.said
    assert final(out)["step"] == 24


# Signals itself while rank 0 works alone, at a place where it would go on for a minute.
IN_SETUP = """
import os, signal, time
from byol_fast.watching import online_eval
from pipelines import stores
PLACE = {place!r}
def wait_for_the_end():
    open(os.environ["READY"] + os.environ.get("RANK", "0"), "w").close()
    if {itself}:
        os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(600):
        time.sleep(0.1)
    raise SystemExit(99)
real_open = stores.open_store
def open_store(*args, **options):
    if PLACE == "indexing":
        wait_for_the_end()
    return real_open(*args, **options)
stores.open_store = open_store
real_pixels = online_eval.OnlineEvaluation.raw_pixels
def raw_pixels(self):
    if PLACE == "baselines":
        wait_for_the_end()
    return real_pixels(self)
online_eval.OnlineEvaluation.raw_pixels = raw_pixels
real_measure = online_eval.OnlineEvaluation.measure
def measure(self, backbone, probe=None):
    if PLACE == "evaluation" and probe is not None:
        wait_for_the_end()
    return real_measure(self, backbone, probe)
online_eval.OnlineEvaluation.measure = measure
"""


def assert_same_summary(one: Path, other: Path) -> None:
    """The same results, but for times and paths, and an end that the log tells once."""
    a, b = (json.loads((out / "summary.json").read_text()) for out in (one, other))
    assert a.keys() == b.keys()
    for name in ("knn_raw_pixels", "knn_untrained", "knn_trained", "images", "skipped_steps"):
        assert a[name] == b[name], name
    for out, summary in ((one, a), (other, b)):
        assert 0 < summary["training_seconds"] <= final(out)["seconds"]
    events = metrics.read(other / "metrics.jsonl").events
    assert [event.kind for event in events].count("end") == 1


DIE_AT_THE_END = """
import os, signal
from byol_fast import export, report
die = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
if {place!r} == "export":
    export.export_backbone = die
else:
    report.write = die
"""


@pytest.mark.parametrize("place", ["export", "report"])
def test_killed_after_the_last_step(runs, whole: Path, tmp_path: Path, place: str):
    """Nothing is left to train, but results are left to write."""
    if not whole.exists():
        assert runs(whole, *SMALL, *EVERY).wait() == 0
    out = tmp_path / "run"
    run = runs(out, *SMALL, *EVERY, fault=DIE_AT_THE_END.format(place=place))
    assert run.wait() == -signal.SIGKILL, run.said
    again = runs(out, *SMALL, *EVERY)
    assert again.wait() == 0, again.said
    assert again.status["state"] == "done" and (out / "report.html").exists()
    assert_same_run(whole, out)
    assert_same_summary(whole, out)


@pytest.mark.parametrize("place", ["indexing", "baselines", "evaluation"])
def test_f10_while_rank_0_works_alone(
    runs, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    if not whole.exists():
        assert runs(whole, *SMALL, *EVERY).wait() == 0
    out = tmp_path / "run"
    fault = f"import os; os.environ['READY'] = {str(tmp_path / 'ready')!r}\n"
    fault += IN_SETUP.format(place=place, itself=True)
    run = runs(out, *SMALL, *EVERY, fault=fault)
    assert run.wait() == 75, run.said
    assert run.status["state"] == "preempted"
    assert "SIGTERM" in run.status["reason"] or place == "evaluation"
    if place == "evaluation":
        assert final(out)["step"] == 24
    assert runs(out, *SMALL, *EVERY).wait() == 0
    assert runs(out, *SMALL, *EVERY).wait() == 0
    assert_same_run(whole, out)  # the evaluation that was cut short was made up for, once
    assert_same_summary(whole, out)


@pytest.mark.dist
@pytest.mark.parametrize("place", ["indexing", "baselines"])
def test_f10_two_ranks_while_one_works_and_one_waits(runs, tmp_path: Path, place: str):
    out = tmp_path / "run"
    fault = f"import os; os.environ['READY'] = {str(tmp_path / 'ready')!r}\n"
    fault += IN_SETUP.format(place=place, itself=False)
    run = runs(out, *SMALL, *EVERY, ranks=2, fault=fault)
    run.wait_for((tmp_path / "ready0").exists, "rank 0 works")
    run.signal(signal.SIGTERM)
    run.wait()
    assert run.codes == {0: 75, 1: 75}, run.said
    assert run.status["state"] == "preempted"
