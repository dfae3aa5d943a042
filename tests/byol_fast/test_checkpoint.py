"""A checkpoint is whole or it is not there, and nothing in it is ever executed."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch

from byol_fast import checkpoint
from byol_fast.errors import CheckpointError


def state(value: float) -> dict[str, object]:
    return {"weights": torch.full((1000,), value), "config": {"epochs": 3}, "note": "a"}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, state(1.5))
    loaded = checkpoint.latest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"], torch.full((1000,), 1.5))
    assert loaded["config"] == {"epochs": 3}


def test_nothing_saved_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "never") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000004.pt",
        "step-00000004.pt.sha256",
        "step-00000005.pt",
        "step-00000005.pt.sha256",
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_hash(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


@pytest.mark.parametrize("damage", [flip, cut, empty, lose_hash])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(
    tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    damage(checkpoint.save(tmp_path, 2, state(2)))
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.latest(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    assert "step-00000002.pt" in caplog.text


def test_no_loadable_checkpoint_is_an_error_that_names_all(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    for step in (1, 2):
        flip(tmp_path / f"step-{step:08d}.pt")
    with pytest.raises(CheckpointError, match=r"(?s)step-00000002.*step-00000001"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_newer_ones_do_not_crowd_out_the_one_just_saved(tmp_path: Path, keep: int) -> None:
    """A run that had to go back to step 1 goes on saving while 8 and 9 are still there."""
    for step in (1, 8, 9):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    for step in (8, 9):
        empty(tmp_path / f"step-{step:08d}.pt")
    for step in range(2, 12):
        assert checkpoint.save(tmp_path, step, state(step), keep=keep).exists()
        loaded = checkpoint.latest(tmp_path)
        assert loaded is not None and loaded["step"] == step
    assert len(list(tmp_path.glob("*.pt"))) == keep


def test_what_cannot_be_removed_is_told_and_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-00000001.pt").mkdir()
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, state(step), keep=1)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000001.pt", "step-00000004.pt"]
    assert "step-00000001.pt could not be removed" in caplog.text


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_payload_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    trap, path = tmp_path / "executed", tmp_path / "step-00000001.pt"
    if writer == "torch":
        torch.save({"format": 1, "step": 1, "bad": _Payload(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"format": 1, "step": 1, "bad": _Payload(trap)}))
    path.with_name(path.name + ".sha256").write_text(checkpoint.file_hash(path))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        checkpoint.load(path)
    assert not trap.exists()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"weights": torch.zeros(1)}, path)
    path.with_name(path.name + ".sha256").write_text(checkpoint.file_hash(path))
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        checkpoint.load(path)


def test_leftovers_of_an_interrupted_save_are_swept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / "step-00000002.tmp123").write_bytes(b"half")
    (tmp_path / "step-00000002.pt.sha256").write_text("0" * 64)
    checkpoint.save(tmp_path, 3, state(3))
    assert {p.name.split(".")[0] for p in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_full_disk_is_loud_and_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # smaller than the 4 kB of weights
    try:
        with pytest.raises(OSError, match=r"NOT saved.*step-00000002"):
            checkpoint.save(tmp_path, 2, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    loaded = checkpoint.latest(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    assert not list(tmp_path.glob("*.tmp*"))
