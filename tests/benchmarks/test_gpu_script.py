"""gpu.sh: each command in it is one that its program takes; the missing is left out by name."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, augment, fps, loader, peers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHON": sys.executable, **env},
    )


def test_each_part_is_a_command_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = script(str(tmp_path / "out"), DRY="1", DATA="/images with a space")
    assert done.returncode == 0, done.stderr
    programs = {"fps": fps, "peers": peers, "augment": augment, "ablation": ablation}
    seen: list[str] = []
    for line in done.stdout.splitlines():
        name, _, command = line.partition(": ")
        seen.append(name)
        command = command.replace("/images with a space", "/images")
        command = command.replace("torch views dali views", "'torch views' 'dali views'")
        python, *words = shlex.split(command)
        assert python == sys.executable
        if name == "tests":
            files = [word for word in words if word.endswith(".py")]
            assert len(files) > 5 and all((ROOT / file).exists() for file in files)
            assert words[words.index("gpu") - 1 : words.index("gpu") + 1] == ["-m", "gpu"]
            continue
        program = {**programs, "loader": loader}[Path(words[0]).stem]
        options = program.arguments(words[1:])
        assert options.json.parent == tmp_path / "out"
    assert seen[:3] == ["step-256", "tests", "peers"] and seen[-1] == "step-512"
    assert {"step-64", "ablation", "augment", "e2e", "loader"} < set(seen)


def test_without_a_gpu_or_a_folder_it_says_so(tmp_path: Path) -> None:
    assert script().returncode == 2
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script(str(tmp_path))
    assert done.returncode == 1 and "sees no GPU" in done.stdout


def test_a_test_file_whose_package_is_missing_is_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "test_missing.py").write_text("import no_such_package\n")
    (tmp_path / "test_there.py").write_text("def test_one():\n    assert True\n")
    (tmp_path / "test_own.py").write_text("import byol_fast.no_such_module\n")
    run = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "benchmarks.leave_out"]
    done = subprocess.run(
        [*run, "--continue-on-collection-errors"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "no_such_package is not installed" in done.stdout
    assert "1 passed, 1 skipped, 1 error" in done.stdout  # a mistake of ours stays an error
    assert done.returncode != 0
