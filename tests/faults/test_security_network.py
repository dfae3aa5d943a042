"""No socket leaves the machine: a whole run in a network that leads nowhere, watched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.data_support import ROOT, TINY, command, ended, make_folder, without_network

WATCHED = ROOT / "tests" / "faults" / "watched.py"


def watched(tmp_path: Path, *commands: list[str]) -> tuple[Any, dict[str, Any]]:
    """How the commands ended, and what they tried."""
    report, words = tmp_path / "seen.json", list[str]()
    for one in commands:
        words += ["--", *one]
    start = [*without_network(), sys.executable, str(WATCHED), str(report)]
    end = ended([*start, *words[1:]])
    return end, json.loads(report.read_text())


@pytest.mark.parametrize(
    ("code", "packets", "calls"),
    [
        ("import socket; socket.socket().connect_ex(('192.0.2.1', 9))", 1, 1),
        ("import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError: pass", 0, 1),
        # past Python: libc's own connect
        (
            "import ctypes, socket, struct; c = ctypes.CDLL(None); s = socket.socket(); "
            "c.connect(s.fileno(), struct.pack('=HH4s8x', 2, 9, bytes([192, 0, 2, 1])), 16)",
            1,
            0,
        ),
        ("import socket; socket.socketpair(); socket.gethostname()", 0, 0),
    ],
    ids=["connect", "name", "libc", "none"],
)
def test_the_watch_sees_what_leaves(tmp_path: Path, code: str, packets: int, calls: int) -> None:
    end, seen = watched(tmp_path, [sys.executable, "-c", code])
    assert end.code == 0, end.err
    assert seen["packets"] >= packets and len(seen["calls"]) >= calls
    if not packets and not calls:
        assert seen == {"packets": 0, "calls": []}


@pytest.mark.slow
def test_pretraining_and_evaluation_open_no_connection(tmp_path: Path) -> None:
    """The default tracker too, which is TensorBoard's files; and the import of every module."""
    folder, out = make_folder(tmp_path / "images", images=32), tmp_path / "run"
    tiny = [*TINY, "--max-steps", "2", "--eval-every", "1"]
    tiny += ["--tracker", "tensorboard"]
    end, seen = watched(
        tmp_path,
        command("byol_fast.pretrain", "--data", folder, "--out", out, *tiny),
        command("byol_fast.evaluate", "knn", "--weights", out, "--data", folder, "--k", "3"),
    )
    assert end.code == 0, end.err[-3000:]
    assert (out / "report.html").is_file() or (out / "checkpoints").is_dir()
    assert seen == {"packets": 0, "calls": []}
