"""Packages that are asked for and missing, or there and broken: the cause, and no traceback."""

import importlib
import sys
from pathlib import Path

import pytest

from byol_fast.errors import Exit
from byol_fast.evaluate.__main__ import main as evaluate
from byol_fast.evaluate.dense import coco
from byol_fast.evaluate.svmfit import classifier
from byol_fast.interop import onnx
from byol_fast.watching import live, sinks
from pipelines import sources
from pipelines.errors import MissingBackend

NEEDED = {
    "wandb": sinks.require_wandb,
    "sklearn": lambda: classifier(1.0),
    "pycocotools": coco.need_pycocotools,
    "onnx": lambda: onnx.write(None, Path("x"), {}),
    "nvidia": lambda: importlib.import_module("pipelines.sources.dali_source"),
    "numba": lambda: importlib.import_module("pipelines.sources.ffcv_source"),
}
CAUSES = {
    "ImportError": "cannot import name 'Imports' from 'x.proto'",
    "AttributeError": "'NoneType' object has no attribute 'message_types_by_name'",
    "ModuleNotFoundError": "No module named 'google'",
    "RuntimeError": "compiled for another NumPy",
    "OSError": "libx.so.1: cannot open shared object file",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Puts a package in front of the installed one whose import raises."""

    def put(package, kind, text):
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("dali_source", "dali_graph", "ffcv_source", "ffcv_kernel", "ffcv_library"):
            monkeypatch.delitem(sys.modules, f"pipelines.sources.{name}", raising=False)
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise {kind}({text!r})\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return put


@pytest.mark.parametrize("kind", CAUSES)
@pytest.mark.parametrize("package", NEEDED)
def test_a_broken_package_is_named_with_its_own_cause(broken, package, kind):
    broken(package, kind, CAUSES[kind])
    with pytest.raises(MissingBackend) as caught:
        NEEDED[package]()
    said = str(caught.value)
    assert f"({kind}: {CAUSES[kind]})" in said and "not installed" not in said


@pytest.mark.parametrize("package", ["wandb", "sklearn", "pycocotools", "onnx"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package):
    for name in [n for n in sys.modules if n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingBackend, match=r"is not installed: pip install '\.\[\w+\]'"):
        NEEDED[package]()


def test_a_folder_of_wandb_s_runs_is_not_wandb(tmp_path, monkeypatch):
    """W&B keeps its runs in ./wandb, which Python takes for a package where W&B is missing."""
    for name in [n for n in sys.modules if n == "wandb" or n.startswith("wandb.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(MissingBackend, match=r"W&B is not installed, .*wandb is a folder"):
        sinks.require_wandb()


def test_the_command_ends_with_a_line(broken, capsys, tmp_path):
    broken("sklearn", "AttributeError", "no attribute 'x'")
    assert evaluate(["svm", "--weights", "w", "--data", "d"]) == Exit.USAGE
    assert "(AttributeError: no attribute 'x')" in capsys.readouterr().err


def test_a_broken_dali_is_no_dali(broken):
    broken("nvidia", "AttributeError", "another CUDA")
    assert not sources.dali_available()


def test_a_broken_panel_gives_way_to_lines(broken, monkeypatch):
    class Terminal:
        encoding = "utf-8"

        def isatty(self):
            return True

    broken("rich", "AttributeError", "old")
    assert isinstance(live.open_display(5, stream=Terminal()), live.Lines)
