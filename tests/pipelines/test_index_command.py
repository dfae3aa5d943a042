"""`python -m pipelines.index`: its report, its refusals, its progress."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import indexbuild, listing, progress
from pipelines.index import main, open_index
from tests.pipelines.index_folders import (
    fill,
    three_classes,
)

# The command and its progress


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"{'ab'[i % 2]}/{i:02d}.jpg": (b"" if i == 7 else None) for i in range(40)}
    root = fill(tmp_path / "data", names)
    assert main([str(root), "--verify", "--json", "--workers", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 39
    assert report["classes"] == ["a", "b"]
    assert report["quarantined"] == [{"name": "b/07.jpg", "reason": "an empty file"}]
    assert report["read"] == 40
    assert report["images_per_second"] > 0
    assert main([str(root)]) == 0
    text = capsys.readouterr().out
    for part in ("39 images (verified)", "classes: 2 (a, b)", "b/07.jpg: an empty file", "read 0"):
        assert part in text


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing")]) == 4
    assert "is not a folder" in capsys.readouterr().err
    root = fill(tmp_path / "data", {"a.jpg": b"", "b.jpg": None})
    assert main([str(root)]) == 4
    answer = capsys.readouterr()
    assert "a.jpg: an empty file" in answer.out  # named before it refuses
    assert "1 of 2 images cannot be used" in answer.err


@pytest.mark.parametrize("workers", ["0", "-3", "x"])
def test_command_takes_no_such_number_of_workers(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(three_classes(tmp_path / "data")), f"--workers={workers}"])
    assert caught.value.code == 2 and "at least 1" in capsys.readouterr().err


def test_command_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(indexbuild, "measure", interrupted)
    assert main([str(three_classes(tmp_path / "data"))]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_command_as_a_module(tmp_path: Path) -> None:
    broken = {os.fsdecode(b"a/\xff.jpg"): b"", "a/é.jpg": b""}
    root = fill(tmp_path / "data", broken | {f"{c}/1.jpg": None for c in "abcdeü"})
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.index", str(root)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
    )
    assert result.returncode == 4
    assert "\\udcff.jpg: an empty file" in result.stdout
    assert "\\xe9.jpg: an empty file" in result.stdout
    assert "classes: 6 (a, b, c, d, e, \\u2026)" in result.stdout
    assert "Traceback" not in result.stderr


def test_plain_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with progress.Progress("verifying", 200) as bar:
        bar.advance(50)
        assert bar.line(10.0) == "verifying: 50 of 200 images (25.0%), 5/s, 30 s left"
        assert bar.line(4000.0).endswith("3 h 20 min left")
    assert capsys.readouterr().err.startswith("verifying: 50 of 200 images (25.0%)")
    with progress.Progress("listing", None, unit="files") as bar:
        bar.advance(7)
        assert bar.line(7.0) == "listing: 7 files, 1/s"
    capsys.readouterr()
    with progress.Progress("verifying", 200, enabled=False) as bar:
        bar.advance(50)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress("verifying", 20) as bar:
        bar.advance(20)
    assert "verifying" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()


def test_listing_shows_progress_and_build_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = three_classes(tmp_path / "data")
    with caplog.at_level(logging.INFO):
        open_index(root, progress=False)
    assert "index written to" in caplog.text
    bar = progress.Progress("listing", None, enabled=False)
    assert len(listing.walk(os.fsencode(root), bar).names) == bar.done == 12
    assert indexbuild.root_listing(os.fsencode(root)) != indexbuild.root_listing(b"/")


def test_command_on_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = three_classes(tmp_path / "data")
    (root / "list.txt").write_text("cat/0.jpg\ncat/0.jpg\n")
    assert main([str(root / "list.txt")]) == 0
    text = capsys.readouterr().out
    assert "list.txt: 2 images" in text and "note: in doubt: 1 image listed before" in text
    (root / "list.txt").write_text("cat/9.jpg\n")
    assert main([str(root / "list.txt")]) == 4
    assert "1 of 1 listed images cannot be used" in capsys.readouterr().err
