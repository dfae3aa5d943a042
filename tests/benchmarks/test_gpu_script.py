"""gpu.sh: each command in it is one that its program takes; the missing is left out by name."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, augment, fps, kernels, loader, peers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def script(*arguments: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHON": sys.executable, **env},
    )


def test_each_part_is_a_command_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = script(str(tmp_path / "out"), DRY="1", DATA="/images with a space")
    assert done.returncode == 0, done.stderr
    programs = {"fps": fps, "peers": peers, "augment": augment, "ablation": ablation}
    programs["kernels"] = kernels
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
        if name not in ("step-64", "loader"):  # what the first part compiles serves them all
            assert words[words.index("--batch-size") + 1] == "256"
    assert seen[:3] == ["warm", "step-256", "tests"] and seen[-1] == "loader"
    assert {
        "kernels",
        "graph-256",
        "peers",
        "grouped",
        "step-64",
        "ablation",
        "augment",
        "e2e",
    } < set(seen)


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    done = script(str(tmp_path), "e2e", "warm", DRY="1")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["warm", "e2e"]
    done = script(str(tmp_path), "e3e", DRY="1")
    assert done.returncode == 2 and "there is no part e3e; there are: warm" in done.stderr


# A machine with PyTorch and little else: what is not there, and a GPU for the script's own check.
BARE = """
import os, sys
ABSENT = {"simplejpeg", "nvidia", "ffcv", "numba", "lightly", "byol_pytorch", "sklearn", "rich"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
if sys.argv[0] == "-":
    import torch
    torch.cuda.is_available = lambda: True
"""
SMALLER = """#!{python}
import os, sys
words = ["4" if word in ("256", "64") else word for word in sys.argv[1:]]
words = ["8" if word == "1024" else word for word in words]
os.execv({python!r}, [{python!r}, *words])
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_bare_machine_every_part_gives_a_row_or_a_named_reason(tmp_path: Path) -> None:
    """Behind the script's check there is no GPU: what takes a step runs small on the CPU, what is a
    GPU's says so. Its tests are collected without an error, and skipped."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    smaller = tmp_path / "python"
    smaller.write_text(SMALLER.format(python=sys.executable))
    smaller.chmod(0o755)
    out = tmp_path / "out"
    done = script(
        str(out),
        PYTHON=str(smaller),
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
        BUDGET="3000",
        DATA="",
        timeout=1200,
    )
    outcomes = {
        row["part"]: row["outcome"]
        for row in map(json.loads, (out / "parts.jsonl").read_text().splitlines())
    }
    for name in ("simplejpeg", "lightly", "ffcv", "nvidia.dali"):
        assert f"{name} is not installed: what needs it is left out" in done.stdout
    assert outcomes.pop("loader") == "left out, simplejpeg is not installed"
    for name, reason in {
        "graph-256": "there is no GPU",
        "step-64": "there is no GPU",
        "kernels": "there is none here",
    }.items():
        assert outcomes.pop(name) == "exit 2"
        assert reason in (out / f"{name}.log").read_text().splitlines()[-1]
    said = {name: (out / f"{name}.log").read_text()[-2000:] for name in outcomes}
    assert set(outcomes.values()) == {"exit 0"}, said
    assert done.returncode == 1 and "failed or left out: kernels graph-256 step-64" in done.stdout
    for name in ("warm", "step-256", "grouped", "e2e"):
        for row in json.loads((out / f"{name}.json").read_text())["modes"].values():
            assert row.get("engine_ran", "eager") == "eager"  # the CPU's, and asked for
    e2e = json.loads((out / "e2e.json").read_text())["modes"]["e2e"]
    assert (e2e["source"], e2e["decoder"]) == ("SyntheticSource", None)
    assert e2e["augmentation"] == "reference"
    assert json.loads((out / "ablation.json").read_text())["gains"]
    assert json.loads((out / "peers.json").read_text())["rows"]["byol_fast"]["n"] > 0
    suite = ElementTree.parse(out / "tests.xml").getroot().find("testsuite")
    assert suite is not None and int(suite.attrib["tests"]) > 50
    assert suite.attrib["errors"] == suite.attrib["failures"] == "0"


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
