"""One process owns a run folder; its small files are replaced in one step."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byol_fast.session.runfolder import RunFolder

HOLD = """
import sys
from byol_fast.session.runfolder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"), RunFolder(tmp_path):
        pass
    holder.communicate()
    with RunFolder(tmp_path) as folder:  # free again once the holder has ended
        assert folder.path == tmp_path


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder(tmp_path / "run") as folder:
        folder.status("running", step=0, total_steps=1)
    assert "has no locks" in caplog.text and str(tmp_path / "run") in caplog.text


def test_status_and_summary(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new" / "run") as folder:
        folder.status("preempted", step=3, total_steps=10, reason="SIGTERM at 3")
        folder.add_to_summary(knn_untrained=0.5)
        folder.add_to_summary(knn_trained=0.75)
        assert json.loads((folder.path / "status.json").read_text()) == {
            "state": "preempted",
            "step": 3,
            "total_steps": 10,
            "reason": "SIGTERM at 3",
        }
        assert folder.summary() == {"knn_untrained": 0.5, "knn_trained": 0.75}
        assert not list(folder.path.glob("*.tmp*"))


def test_what_a_killed_session_left_is_swept(tmp_path: Path) -> None:
    left = ("status.json.tmp7", "metrics.jsonl.tmp12", "exports/backbone.safetensors.tmp3")
    kept = ("status.json", "notes.tmp", "my.json.tmp", "exports/backbone.pth")
    (tmp_path / "exports").mkdir()
    for name in (*left, *kept):
        (tmp_path / name).touch()
    RunFolder(tmp_path).sweep()
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == set(kept)


def test_a_folder_that_cannot_be_made_is_named_with_a_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(ValueError, match=r"cannot be written.*--out"),
        RunFolder(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named_with_a_mend(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"), RunFolder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("content", ["", "[1]", '{"knn_trained": 0.'])
def test_a_damaged_summary_ends_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    folder = RunFolder(tmp_path)
    folder.add_to_summary(knn_trained=0.5)
    assert folder.summary() == {"knn_trained": 0.5}
