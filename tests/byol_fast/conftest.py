"""Fixtures of the end-to-end tests: a folder of images, and the command run as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import ROOT, make_folder

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="session")
def pretrain() -> Command:
    """Runs `byol_fast.pretrain` as a user does; `ranks` starts it under torchrun."""

    def run(args: Sequence[str], *, ranks: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m"]
        if ranks:
            start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        return subprocess.run(
            [*start, "byol_fast.pretrain", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        )

    return run
