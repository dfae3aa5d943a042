"""What the shipped sources may not do, read from them without running anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

FILES = sorted(p for package in ("byol_fast", "pipelines") for p in (ROOT / package).rglob("*.py"))

# Formats whose reading runs what the file says, and parsers that write where an archive says.
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("tarfile", "torch.hub", "torch.package"),
    *("urllib.request", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "socket"),
    *("xmlrpc", "telnetlib", "huggingface_hub", "gdown", "code", "codeop", "pty"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url", "numpy.lib.format.read_array"),
    *("torch.distributed.broadcast_object_list", "torch.distributed.all_gather_object"),
    *("torch.distributed.gather_object", "torch.distributed.scatter_object_list"),
    *("torch.distributed.recv_object_list", "torch.distributed.send_object_list"),
}
METHODS = {"extractall", "unsafe_load"}
MUST_SAY = {  # a call, the keyword it must have, and its value
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}

# (file, what it does): why it may.
ALLOWED = {
    (
        "byol_fast/watching/tfevents.py",
        "imports socket",
    ): "gethostname alone, for the name of a file",
    (
        "byol_fast/distributed.py",
        "calls torch.distributed.broadcast_object_list",
    ): "ranks of one run trust each other (SECURITY.md)",
    (
        "byol_fast/distributed.py",
        "calls torch.distributed.all_gather_object",
    ): "as above",
    ("byol_fast/evaluate/svm.py", "imports joblib"): "its own worker processes; loads no file",
    (
        "byol_fast/interop/exporting.py",
        "imports pickle",
    ): "writes arrays for detectron2",
}


def offences(source: str) -> Iterator[str]:
    """What a source does that it may not, in words."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # a local name: what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield from _module(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _module(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _call(node, names)


def _module(name: str) -> Iterator[str]:
    parts = name.split(".")
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    yield from (f"imports {module}" for module in sorted(prefixes & MODULES))
    if name in CALLS:
        yield f"imports {name}"


def _call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    called = _dotted(node.func, names)
    keywords = {k.arg: k.value for k in node.keywords if k.arg}
    if called in CALLS:
        yield f"calls {called}"
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield f"calls .{node.func.attr}"
    if called in MUST_SAY:
        keyword, value = MUST_SAY[called]
        given = keywords.get(keyword)
        if not (isinstance(given, ast.Constant) and given.value is value):
            yield f"calls {called} without {keyword}={value}"
    for keyword, harmless in (("shell", False), ("allow_pickle", False), ("weights_only", True)):
        given = keywords.get(keyword)
        if given is not None and not (isinstance(given, ast.Constant) and given.value is harmless):
            yield f"passes {keyword}={ast.unparse(given)}"


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("import urllib.request as u", "imports urllib.request"),
        ("from torch import hub", "imports torch.hub"),
        ("import torch\ntorch.load(f)", "calls torch.load without weights_only=True"),
        ("import torch as t\nt.load(f, weights_only=False)", "passes weights_only=False"),
        ("from torch import load as l\nl(f, weights_only=w)", "passes weights_only=w"),
        ("import numpy as np\nnp.load(f)", "calls numpy.load without allow_pickle=False"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "passes allow_pickle=True"),
        ("import yaml\nyaml.load(f, yaml.SafeLoader)", "calls yaml.load"),
        ("from yaml import unsafe_load", "imports yaml.unsafe_load"),
        ("t.extractall(p)", "calls .extractall"),
        ("eval(s)", "calls eval"),
        ("import subprocess\nsubprocess.run(c, shell=True)", "passes shell=True"),
        ("import os\nos.system(c)", "calls os.system"),
        ("import torch.distributed as dist\ndist.gather_object(o)", "calls torch.distributed."),
    ],
)
def test_the_reader_sees_what_is_forbidden(source: str, offence: str) -> None:
    assert any(found.startswith(offence) for found in offences(source)), list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "net.eval()",
        "import re\nre.compile(p)",
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(f, mmap_mode='r', allow_pickle=False)",
        "import yaml\nyaml.safe_load(f)",
        "import subprocess\nsubprocess.run(['a', 'b'])",
    ],
)
def test_the_reader_lets_the_rest_pass(source: str) -> None:
    assert list(offences(source)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_shipped_runs_what_a_file_says(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = set(offences(path.read_text(encoding="utf-8")))
    allowed = {what for file, what in ALLOWED if file == name}
    assert found - allowed == set(), f"{name}: another way, or an entry in ALLOWED with its reason"
    assert allowed - found == set(), f"{name}: these entries of ALLOWED have no use any more"


def test_allowed_files_exist() -> None:
    assert all((ROOT / file).is_file() and reason for (file, _), reason in ALLOWED.items())


def test_no_page_or_script_installs_nvidias_apex_from_the_package_index() -> None:
    """There, `apex` is a package of somebody else's."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*"), ROOT / "setup.py"]
    for page in pages:
        if page.is_file():
            text = page.read_text(encoding="utf-8")
            assert not re.search(r"pip3? install[^\n`]*\bapex\b", text), page.name
    assert not re.search(r'"apex[<>=~"\[]', (ROOT / "setup.py").read_text(encoding="utf-8"))


def locked(name: str) -> dict[str, str]:
    """Entry by `name==version` (and marker) of a lock file."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines() if "==" in line)
    return {re.split(r"\s+--hash", line)[0].strip(): line for line in lines}


def test_every_line_of_the_hashed_lock_has_its_hashes() -> None:
    entries = locked("requirements-hashed.lock")
    assert len(entries) > 40
    for entry, line in entries.items():
        hashes = re.findall(r"--hash=sha256:([0-9a-f]+)", line)
        assert hashes and all(len(digest) == 64 for digest in hashes), entry
    text = (ROOT / "requirements-hashed.lock").read_text(encoding="utf-8")
    assert not re.search(r"git\+|https?://|--(extra-)?index-url|--find-links", text)


def test_the_hashed_lock_is_complete() -> None:
    """`--require-hashes` refuses a package that another needs and the lock does not hold."""
    metadata = pytest.importorskip("importlib.metadata")
    requirements = pytest.importorskip("packaging.requirements")

    def normal(text: str) -> str:
        return re.sub(r"[-_.]+", "-", text).lower()

    held = {
        normal(entry.split("==")[0].split("[")[0]) for entry in locked("requirements-hashed.lock")
    }
    for name in sorted(held):
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another Python or system
            continue
        for need in map(requirements.Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert normal(need.name) in held, f"{name} needs {need.name}, which is not locked"
