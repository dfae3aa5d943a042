"""F25: a damaged checkpoint is set aside, and never makes a good one superfluous."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from byol_fast import checkpoint, checkpoint_files
from byol_fast.errors import CheckpointError, SaveError, UnreadableError
from byol_fast.session.async_checkpoint import CheckpointWriter


def save(folder: Path, *steps: int, keep: int = 2, every: int | None = None) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"value": torch.ones(50) * step}, keep=keep, keep_every=every)


def steps(folder: Path) -> list[int]:
    return sorted(map(checkpoint_files.step_of, checkpoint_files.found(folder)))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_hash(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


def cut_hash(path: Path) -> None:
    path.with_name(path.name + ".sha256").write_bytes(b"0123")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "truncated": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "its hash missing": lose_hash,
    "its hash truncated": cut_hash,
}


@pytest.fixture(params=DAMAGE)
def damage(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return DAMAGE[request.param]


def unreadable(monkeypatch: pytest.MonkeyPatch, *names: str, code: int = errno.EIO) -> None:
    """From here on the system fails to read files of these names."""
    real = checkpoint_files.file_hash

    def file_hash(path: Path) -> str:
        if path.name in names:
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint_files, "file_hash", file_hash)


def test_the_good_one_before_a_damaged_one_outlives_the_next_save(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """5 is good and 6 is damaged: after a resume and a save of 9, 5 and 9 are there."""
    save(tmp_path, 5, 6)
    damage(checkpoint.path_of(tmp_path, 6))
    state = checkpoint.latest(tmp_path, rename_damaged=True)
    assert state is not None and state["step"] == 5
    assert (tmp_path / "step-00000006.pt.damaged").exists()
    assert "step-00000006.pt was set aside as step-00000006.pt.damaged" in caplog.text
    save(tmp_path, 9)
    assert steps(tmp_path) == [5, 9]
    flip(checkpoint.path_of(tmp_path, 9))  # and so damage to 9 is not the end
    state = checkpoint.latest(tmp_path)
    assert state is not None and state["step"] == 5


def test_a_save_itself_meets_the_damaged_one(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Damage while a run goes on: nobody has asked for the latest checkpoint since."""
    save(tmp_path, 5, 6)
    damage(checkpoint.path_of(tmp_path, 6))
    save(tmp_path, 9)
    assert steps(tmp_path) == [5, 9]
    assert (tmp_path / "step-00000006.pt.damaged").exists()
    assert "step-00000006.pt was set aside" in caplog.text


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_several_damaged_ones(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=5)
    for step in (2, 4, 5):
        flip(checkpoint.path_of(tmp_path, step))
    state = checkpoint.latest(tmp_path, rename_damaged=True)
    assert state is not None and state["step"] == 3
    save(tmp_path, 6, keep=keep)
    assert steps(tmp_path) == [1, 3, 6][-keep:]


def test_damage_after_a_file_was_found_whole_is_seen_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = checkpoint_files.time.time_ns
    monkeypatch.setattr(checkpoint_files.time, "time_ns", lambda: now() + 10**10)  # 10 s later
    save(tmp_path, 5, 6, 7, keep=3)
    save(tmp_path, 8, keep=3)  # has read 6 and 7, and knows them
    assert steps(tmp_path) == [6, 7, 8]
    read: list[str] = []
    real = checkpoint_files.file_hash
    monkeypatch.setattr(checkpoint_files, "file_hash", lambda p: read.append(p.name) or real(p))
    save(tmp_path, 9, keep=3)
    assert read == ["step-00000008.pt"], "7 is known, so it is not read again"
    flip(checkpoint.path_of(tmp_path, 8))
    save(tmp_path, 10, keep=3)
    assert steps(tmp_path) == [7, 9, 10]


def test_the_first_of_a_span_stays_only_if_it_is_whole(tmp_path: Path) -> None:
    """20 would stay for good, and 22 go, but 20 is damaged: 22 takes its place."""
    save(tmp_path, 10, 20, 22, 24, 31, every=10, keep=4)
    flip(checkpoint.path_of(tmp_path, 20))
    save(tmp_path, 33, every=10, keep=2)
    assert steps(tmp_path) == [10, 22, 31, 33]
    assert (tmp_path / "step-00000020.pt.damaged").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_one_that_the_system_cannot_read_is_left_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    save(tmp_path, 5, 6)
    with monkeypatch.context() as failing:
        unreadable(failing, "step-00000006.pt", code=code)
        state = checkpoint.latest(tmp_path, rename_damaged=True)
        assert state is not None and state["step"] == 5
        assert f"step-00000006.pt: cannot be read: {os.strerror(code)}" in caplog.text
        assert "step-00000006.pt stays where it is" in caplog.text
        save(tmp_path, 9)
        assert steps(tmp_path) == [5, 6, 9]
    state = checkpoint.load(checkpoint.path_of(tmp_path, 6))  # the disk is back
    assert state["step"] == 6


def test_an_error_while_the_content_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def load(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UnreadableError, match=r"step-00000005\.pt: cannot be read"):
        checkpoint.load(checkpoint.path_of(tmp_path, 5))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_does_not_make_a_checkpoint_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 5, 6)

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)):
        checkpoint.latest(tmp_path, rename_damaged=True)
    assert steps(tmp_path) == [5, 6]


def test_if_none_is_whole_nothing_is_renamed(tmp_path: Path) -> None:
    """Renamed, the next session would find no checkpoint and begin at step 0."""
    save(tmp_path, 5, 6)
    for step in (5, 6):
        flip(checkpoint.path_of(tmp_path, step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"(?s)step-00000006.*step-00000005"):
            checkpoint.latest(tmp_path, rename_damaged=True)
    assert steps(tmp_path) == [5, 6]


def test_a_reader_renames_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5, 6)
    flip(checkpoint.path_of(tmp_path, 6))
    before = sorted(tmp_path.iterdir())
    state = checkpoint.latest(tmp_path)
    assert state is not None and state["step"] == 5
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_twice_at_the_same_step(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for _ in range(2):
        save(tmp_path, 6)
        flip(checkpoint.path_of(tmp_path, 6))
        checkpoint.latest(tmp_path, rename_damaged=True)
    names = {p.name for p in tmp_path.glob("*damaged*")}
    assert {"step-00000006.pt.damaged", "step-00000006.pt.damaged1"} <= names
    checkpoint.prepare(tmp_path)  # sweeps
    assert {p.name for p in tmp_path.glob("*damaged*")} == names


def test_one_that_cannot_be_renamed_is_not_counted_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5, 6)
    flip(checkpoint.path_of(tmp_path, 6))

    def no_target(path: Path, target: Path) -> None:
        if "damaged" in str(target):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(path, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", no_target)
    state = checkpoint.latest(tmp_path, rename_damaged=True)
    assert state is not None and state["step"] == 5
    assert "could not be renamed" in caplog.text
    save(tmp_path, 9)
    assert steps(tmp_path) == [5, 6, 9]


def test_a_folder_of_that_name_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-00000006.pt").mkdir()
    state = checkpoint.latest(tmp_path, rename_damaged=True)
    assert state is not None and state["step"] == 5
    assert (tmp_path / "step-00000006.pt").is_dir()


def test_a_disk_that_loses_what_was_written_is_found_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, 6)
    monkeypatch.setattr(checkpoint, "_read_back", lambda path: "0" * 64)
    with pytest.raises(SaveError, match=r"NOT saved.*does not read back"):
        save(tmp_path, 9, keep=1)
    assert steps(tmp_path) == [5, 6]
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_writer_beside_the_training_rotates_in_the_same_way(tmp_path: Path) -> None:
    save(tmp_path, 5, 6)
    flip(checkpoint.path_of(tmp_path, 6))
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(9, {"value": torch.ones(50)})
    writer.wait()
    assert steps(tmp_path) == [5, 9]


def test_a_reader_beside_a_run_that_rotates_finds_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file that was listed is gone when its turn comes; the run has saved others."""
    save(tmp_path, 1, 2)
    real, rounds = checkpoint.load, iter(range(3, 100, 2))

    def load(path: Path, **options: object) -> dict[str, object]:
        if (step := next(rounds)) < 8:
            save(tmp_path, step, step + 1)
        return real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "load", load)
    state = checkpoint.latest(tmp_path)
    assert state is not None and state["step"] == 8
