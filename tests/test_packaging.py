"""What a stranger relies on: the wheel, the scripts, the locks, the docs' commands."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("byol_fast", "pipelines")
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "RESULTS.md"])


def setup_value(name: str) -> Any:
    """A literal of setup.py: a top-level assignment, or a keyword of the call to setup()."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def version() -> str:
    return str(runpy.run_path(str(ROOT / "byol_fast" / "_version.py"))["__version__"])


def package_files(suffix: str) -> set[str]:
    found = (path for name in PACKAGES for path in (ROOT / name).rglob(f"*{suffix}"))
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_setup_lists_every_package() -> None:
    folders = {Path(file).parent.as_posix().replace("/", ".") for file in package_files(".py")}
    assert set(setup_value("packages")) == folders


@pytest.mark.parametrize("package", setup_value("packages"))
def test_a_package_is_regular(package: str) -> None:
    assert (ROOT / package.replace(".", "/") / "__init__.py").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    for tool in ("setuptools", "wheel", "pip"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"building a wheel without network needs {tool}")
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a copy: building leaves build/ and egg-info behind
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    built = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(tree)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    content = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert content == package_files(".py") | {f"{name}/py.typed" for name in PACKAGES}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(info).decode())
    assert metadata["Name"].replace("_", "-") == "byol-fast"
    assert metadata["Version"] == version()
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    requirements = metadata.get_all("Requires-Dist")
    assert requirements is not None and "torch>=2.10" in requirements
    assert {
        *("dali", "dali-cuda12", "evaluate", "ffcv", "onnx", "wandb", "quickstart", "dev", "peers")
    } == set(metadata.get_all("Provides-Extra") or [])
    points = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "byol-fast = byol_fast.cli:main" in points
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_version_is_the_package_s() -> None:
    import byol_fast

    assert byol_fast.__version__ == version()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_bash(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    if not script.name.startswith("_"):  # those are sourced
        assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
        assert os.access(script, os.X_OK), f"chmod +x {script}"


def test_quickstart_script_explains_itself() -> None:
    shown = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "--fresh" in shown.stdout and "set -euo" not in shown.stdout


@pytest.mark.parametrize(
    ("python", "message"),
    [("no-such-python", "is not a command"), ("old-python", "3.11 or newer is needed")],
)
def test_an_unusable_python_is_refused(tmp_path: Path, python: str, message: str) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\necho Python 3.8.1\nexit 1\n")
    old.chmod(0o755)
    refused = subprocess.run(
        ["bash", str(ROOT / "launch" / "test.sh")],
        env={**os.environ, "PYTHON": python, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert message in refused.stderr and python in refused.stderr


def test_missing_requirements_are_told_apart() -> None:
    missing = runpy.run_path(str(ROOT / "launch" / "missing.py"))
    assert missing["is_met"]("numpy>=1.0") is True
    assert missing["is_met"]("numpy>=1000") is False
    assert missing["is_met"]("no-such-package-of-byol-fast") is False
    assert missing["wanted"](["wandb"]) == [
        *setup_value("INSTALL"),
        *setup_value("EXTRAS")["wandb"],
    ]
    with pytest.raises(ValueError, match="no extra"):
        missing["wanted"](["dalli"])


def pins(file: str) -> list[tuple[str, str]]:
    """(normalised name, version) of a lock file; two of a name where Pythons differ."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return [(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found]


def test_lock_meets_setup() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    locked = pins("requirements.lock")
    extras = setup_value("EXTRAS")
    named = ("dev", "peers", "dali", "quickstart", "evaluate", "onnx")
    wanted = [*setup_value("INSTALL"), *(line for name in named for line in extras[name])]
    for line in wanted:
        requirement = requirements.Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        versions = [version for pinned, version in locked if pinned == name]
        assert versions, f"{line} is not in requirements.lock"
        assert all(requirement.specifier.contains(version) for version in versions), line


def test_hashed_lock_agrees_and_is_hashed() -> None:
    plain, hashed = pins("requirements.lock"), pins("requirements-hashed.lock")
    assert set(hashed) <= set(plain)
    text = (ROOT / "requirements-hashed.lock").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(hashed)
    assert all("--hash=sha256:" in entry for entry in entries)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command shown in a shell block or a table of the docs."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        cells = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
        for line in [*lines, *(cell for cell in cells if " " in cell or cell.endswith(".sh"))]:
            words = shlex.split(line.partition(" > ")[0], comments=True)
            words = words[next((i for i, w in enumerate(words) if "=" not in w), 0) :]
            if words:
                found.append((page.name, words))
    return found


def modules_called() -> list[tuple[str, list[str]]]:
    """(module, arguments) of the commands that start one of this repository's modules."""
    calls = []
    for _, words in commands():
        if "-m" in words and words[0] in ("python", "torchrun"):
            module, *arguments = words[words.index("-m") + 1 :]
            first = arguments[0].split("|") if arguments else []  # a row may show `knn|linear`
            calls += [(module, [each, *arguments[1:]]) for each in first] or [(module, arguments)]
    return calls


def test_docs_name_only_scripts_that_exist() -> None:
    named = [w for _, words in commands() for w in words if re.search(r"^[\w./]+\.(sh|py)$", w)]
    assert any(name.endswith("quickstart.sh") for name in named)
    for name in named:
        assert (ROOT / name).is_file(), name


def test_docs_show_pretraining_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from byol_fast.cli import PretrainCall, pretrain_arguments

    shown = [arguments for module, arguments in modules_called() if module == "byol_fast.pretrain"]
    assert len(shown) >= 3
    for arguments in shown:
        words = list(arguments)
        if "--config" in words:  # its file is made by the reader
            del words[(at := words.index("--config")) : at + 2]
        if "--data" not in words:
            words += ["--data", "DIR"]
        call = pretrain_arguments(words)
        assert isinstance(call, PretrainCall) or call == 0, (words, capsys.readouterr().err)


def test_docs_show_commands_that_exist() -> None:
    others = {
        (module, *(w for w in arguments[:1] if w.isalpha() and w.islower()))
        for module, arguments in modules_called()
        if module != "byol_fast.pretrain"
    }
    assert ("byol_fast.evaluate", "knn") in others and ("pipelines.index",) in others
    for command in others:
        helped = subprocess.run(
            [sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert helped.returncode == 0, helped.stderr
        shown = {
            flag
            for module, arguments in modules_called()
            if (module, *arguments[: len(command) - 1]) == command
            for flag in arguments
            if flag.startswith("--")
        }
        assert {flag for flag in shown if flag not in helped.stdout} == set(), command


def test_console_script_has_the_documented_commands() -> None:
    from byol_fast.cli import COMMANDS

    row = next(
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `byol-fast ")
    )
    named = set(re.findall(r"`(?:byol-fast )?(\w+)`", row))
    assert named and named <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("https://", "http://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_results_and_readme_claim_no_speed_without_a_row() -> None:
    rows = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    claims = re.findall(r"[\d,.]+ images/s", (ROOT / "README.md").read_text(encoding="utf-8"))
    if not re.search(r"^\| \d{4}-", rows, re.MULTILINE):
        assert claims == []
    assert "pip install apex" not in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["pipelines/__init__.py", "pipelines.py"])
@pytest.mark.parametrize("module", ["byol_fast.pretrain", "byol_fast.cli"])
def test_a_package_of_the_users_that_hides_ours_is_named(
    tmp_path: Path, name: str, module: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, "--help"]
    hidden = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert hidden.returncode == 1 and "PYTHONSAFEPATH=1" in hidden.stderr
    assert f"{tmp_path / name} hides byol_fast's own package" in hidden.stderr
    safe = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert safe.returncode == 0, safe.stderr


def test_a_folder_of_the_users_that_hides_nothing_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()  # no package, so Python looks further
    run = subprocess.run(
        [sys.executable, "-m", "byol_fast.cli", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 0
