"""Checkpoints beside the training: what is saved is the moment of `save`; errors are not lost."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from byol_fast import checkpoint
from byol_fast.errors import SaveError
from byol_fast.session.async_checkpoint import CheckpointWriter
from byol_fast.settings import CheckpointConfig


class Slow:
    """Holds the writer back until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.running, self.most = threading.Event(), 0, 0
        real = checkpoint.save

        def save(*args, **options):
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.go.wait(60)
            self.running -= 1
            return real(*args, **options)

        monkeypatch.setattr(checkpoint, "save", save)


def test_training_goes_on_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, done = Slow(monkeypatch), []
    writer = CheckpointWriter(tmp_path, after=done.append)
    weights = torch.ones(1000)
    writer.save(3, {"model": {"w": weights}, "list": [weights, 7]})
    assert writer.busy and not done and not list(tmp_path.glob("*.pt"))
    weights.fill_(2)  # the next step
    slow.go.set()
    writer.wait()
    assert not writer.busy and done == [3]
    state = checkpoint.latest(tmp_path)
    assert state is not None and torch.equal(state["model"]["w"], torch.ones(1000))
    assert torch.equal(state["list"][0], torch.ones(1000)) and state["list"][1] == 7


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, {"w": torch.zeros(1)})
    threading.Timer(0.1, slow.go.set).start()
    writer.save(2, {"w": torch.ones(1)})  # waits for the first
    writer.wait()
    assert slow.most == 1
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000001.pt", "step-00000002.pt"]


def test_an_error_is_kept_until_it_is_told_and_nothing_is_called_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    done: list[int] = []
    writer = CheckpointWriter(tmp_path / "checkpoints", after=done.append)
    writer.save(1, {"w": torch.zeros(1)})
    with pytest.raises(SaveError, match=r"step 1 was NOT saved"):
        writer.wait()
    assert "NOT saved" in caplog.text and done == []
    (tmp_path / "checkpoints").unlink()
    writer.save(2, {"w": torch.zeros(1)})
    writer.wait()
    assert done == [2]


def test_the_log_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path: Path) -> None:
    seen: list[list[Path]] = []
    writer = CheckpointWriter(tmp_path, before=lambda: seen.append(list(tmp_path.glob("*.pt"))))
    writer.save(1, {"w": torch.zeros(1)})
    writer.wait()
    assert seen == [[]]


@pytest.mark.parametrize(
    ("steps", "keep", "every", "stay"),
    [
        (range(1, 11), 2, None, [9, 10]),
        (range(1, 11), 1, 4, [4, 8, 10]),
        ([30, 90, 130, 160, 220], 1, 100, [130, 220]),  # the first of a span, where none is exact
        (range(1, 9), 2, Fraction(5, 2), [3, 5, 7, 8]),
    ],
)
def test_which_checkpoints_stay(tmp_path: Path, steps, keep: int, every, stay: list[int]) -> None:
    for step in steps:
        checkpoint.save(tmp_path, step, {}, keep=keep, keep_every=every)
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("*.pt")) == stay
    assert len(list(tmp_path.glob("*.sha256"))) == len(stay)


@pytest.mark.parametrize(
    ("given", "newest", "every"),
    [
        (3, 3, None),
        ("3", 3, None),
        ("2,every=5000", 2, 5000),
        ("1, every=10e", 1, Fraction(10 * 1000, 64)),
    ],
)
def test_keep_in_words(given: int | str, newest: int, every) -> None:
    config = CheckpointConfig(keep=given)
    assert config.keep_newest == newest
    assert config.keep_every(samples=1000, global_batch=64) == every


@pytest.mark.parametrize("given", ["two", "0", "2,every=0", "2,every=5x", "2.5"])
def test_a_keep_that_means_nothing_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"every=10e"):
        CheckpointConfig(keep=given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_twice(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    weights = torch.ones(1000, device="cuda")
    for step in (1, 2):
        writer.save(step, {"w": weights, "n": step})
        weights += 1
        writer.wait()
    for step in (1, 2):
        state = checkpoint.load(checkpoint.path_of(tmp_path, step))
        assert torch.equal(state["w"], torch.full((1000,), float(step)))
