"""Commands run as a user runs them, and the data they are given, for the faults of data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import OPTIONAL_BACKENDS, ROOT, TINY, make_folder

__all__ = ["BACKENDS", "ROOT", "TINY", "Ended", "command", "ended", "make_folder", "pictures"]

NO_HANG = 600.0  # s: only a hang takes longer

BACKENDS = [
    "torch",
    *OPTIONAL_BACKENDS,
]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # exit status; negative: the signal
    out: str
    err: str

    def clear_error(self, code: int, *texts: str) -> None:
        """It ended with `code` and a message that has all of `texts`, and no traceback."""
        assert self.code == code, self.err[-2000:]
        assert "Traceback" not in self.err, self.err[-2000:]
        for text in texts:
            assert text in self.err, self.err[-2000:]


def command(module: str, *args: Any) -> list[str]:
    return [sys.executable, "-m", module, *map(str, args)]


def ended(words: Sequence[str], *, limit: float = NO_HANG, **env: str) -> Ended:
    """Runs a command to its end; one that hangs fails the test after `limit` seconds."""
    run = subprocess.run(
        words,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=limit,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
    )
    return Ended(run.returncode, run.stdout, run.stderr)


def pictures(folder: Path, number: int) -> list[Path]:
    """The first images of a folder of `make_folder`, in the order of the rows."""
    found = sorted(path for path in folder.rglob("*.jpg") if path.is_file())
    return found[:number]


def without_network() -> list[str]:
    """What to put before a command for a network of its own that leads nowhere.

    Skips the test where the kernel or the container does not allow it.
    """
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("unshare (util-linux) is not installed")
    for options in (["-n"], ["-rn"]):  # as root, or with a user namespace
        tried = subprocess.run([program, *options, "true"], capture_output=True)
        if tried.returncode == 0:
            return [program, *options]
    pytest.skip("no network namespace may be made here")
