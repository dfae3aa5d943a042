"""A file appears whole or not at all, whatever ends the writer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.conversion.partfile import PartFile
from pipelines.errors import DataError


def test_it_appears_when_it_is_published(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with PartFile(target) as part:
        part.file.write(b"all of it")
        assert not target.exists()
        part.publish()
        assert target.read_bytes() == b"all of it"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), PartFile(target) as part:
        part.file.write(b"new")
        raise RuntimeError("stop")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_writer_leaves_a_part_that_the_next_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "out"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from pipelines.conversion.partfile import PartFile\n"
        "with PartFile(Path(sys.argv[1])) as part:\n"
        "    part.file.write(b'x' * 1000); part.file.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, target], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert os.listdir(tmp_path) == [".out.part"]
    with PartFile(target) as part:
        part.file.write(b"short")
        part.publish()
    assert target.read_bytes() == b"short"
    assert os.listdir(tmp_path) == ["out"]


def test_two_at_once_are_kept_apart(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with PartFile(target) as part:
        part.file.write(b"first")
        with pytest.raises(DataError, match="being written by another process"), PartFile(target):
            pass
        part.publish()
    assert target.read_bytes() == b"first"


def test_one_that_is_published_between_opening_and_locking_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    first = PartFile(target)
    with first:
        first.file.write(b"first")
        first.file.flush()

        def publish_first(*_: object) -> None:
            monkeypatch.undo()
            first.publish()

        monkeypatch.setattr("fcntl.flock", publish_first)
        with pytest.raises(DataError, match="being written by another"), PartFile(target):
            pass
    assert target.read_bytes() == b"first"


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"keep")
    (tmp_path / ".out.part").symlink_to("precious")
    with pytest.raises(OSError), PartFile(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_bytes() == b"keep"
