"""The scripts as people call them: through `sh`, from elsewhere, with relative and odd paths."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "launch/quickstart.sh",
    "launch/test.sh",
    "launch/torchrun.sh",
    "launch/install_ffcv.sh",
    "benchmarks/gpu.sh",
    ".ci/run",
]


def call(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "PYTHONPATH", "NNODES", "DRY", "DATA")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**env, **variables},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


def speaking_python(folder: Path) -> str:
    """An interpreter, by its path relative to `folder`, that says how it was called."""
    path = folder / "my env" / "python"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\necho "in $PWD with $PYTHONPATH: $0 $*"\n')
    path.chmod(0o755)
    return "my env/python"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_called_through_sh_is_run_by_bash(script: str, tmp_path: Path) -> None:
    words = ["--help"] if "quickstart" in script or "gpu" in script else []
    done = call("sh", ROOT / script, *words, cwd=tmp_path, PYTHON="no-such-python")
    said = done.stdout + done.stderr
    if words:
        assert script in said
    else:
        assert "PYTHON=no-such-python is not a command" in said
    assert "Illegal option" not in said and not list(tmp_path.iterdir())


def test_cd_that_prints_does_not_mislead(tmp_path: Path) -> None:
    done = call("bash", "launch/test.sh", cwd=ROOT, CDPATH=".:/", PYTHON="no-such-python")
    assert done.returncode == 1 and "is not a command" in done.stderr


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_python_may_be_relative_to_where_a_script_is_called(script: str, tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\necho Python 3.8.1\nexit 1\n")
    old.chmod(0o755)
    done = call("bash", ROOT / script, cwd=tmp_path, PYTHON="./old-python")
    assert done.returncode == 1 and "3.11 or newer is needed" in done.stderr


def test_torchrun_stays_where_it_was_called(tmp_path: Path) -> None:
    python = speaking_python(tmp_path)
    words = ("--data", "images", "--out", "a run")
    done = call(ROOT / "launch/torchrun.sh", *words, cwd=tmp_path, PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"in {tmp_path} with {ROOT}: ")
    assert f"{python} -m torch.distributed.run" in done.stdout
    assert done.stdout.endswith("-m byol_fast.pretrain --data images --out a run\n")


def test_gpu_script_takes_paths_from_where_it_was_called(tmp_path: Path) -> None:
    python = speaking_python(tmp_path)
    variables = {"DRY": "1", "PYTHON": python, "DATA": "my images"}
    done = call(ROOT / "benchmarks/gpu.sh", "out", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/my env/python benchmarks/fps.py" in done.stdout
    assert f"--data {tmp_path}/my images" in done.stdout


def test_gpu_script_takes_no_option_for_a_folder(tmp_path: Path) -> None:
    done = call(ROOT / "benchmarks/gpu.sh", "--quick", cwd=tmp_path, DRY="1")
    assert done.returncode == 2 and "benchmarks/gpu.sh OUT" in done.stdout


@pytest.fixture
def checks(tmp_path: Path) -> str:
    """An interpreter that has everything, and says which checks it is asked for; $BROKEN fails."""
    path = tmp_path / "python"
    path.write_text(r"""#!/bin/sh
case "$1" in
-c) case "$2" in *sys.executable*) echo "$0" ;; esac ;;
-m) echo "called: $*" && [ "$2" != "$BROKEN" ] ;;
-) cat >/dev/null ;;
esac
""")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "words", "chosen"),
    [
        ("launch/test.sh", [], ["-m", "not slow"]),
        ("launch/test.sh", ["-k", "a or b"], ["-m", "not slow", "-k", "a or b"]),
        ("launch/test.sh", ["-x", "--all", "tests/faults"], ["-x", "tests/faults"]),
        (".ci/run", [], []),
    ],
)
def test_which_tests_are_run(
    script: str, words: list[str], chosen: list[str], checks: str, tmp_path: Path
) -> None:
    done = call(ROOT / script, *words, cwd=tmp_path, PYTHON=checks, BROKEN="")
    assert done.returncode == 0, done.stderr
    (tests,) = (line for line in done.stdout.splitlines() if "-m pytest" in line)
    assert tests.endswith(" ".join([".xml", *chosen])), tests
    for check in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"called: -m {check}\n" in done.stdout
    assert done.stdout.endswith("lint, format, types, vulnerabilities and tests passed\n")


@pytest.mark.parametrize(("broken", "named"), [("mypy", "types"), ("pytest", "tests")])
def test_a_check_that_fails_is_named_and_the_others_are_made(
    broken: str, named: str, checks: str, tmp_path: Path
) -> None:
    done = call(ROOT / "launch/test.sh", cwd=tmp_path, PYTHON=checks, BROKEN=broken)
    assert done.returncode == 1
    assert done.stdout.endswith(f"== failed: {named}\n") and done.stdout.count("called: ") == 4
