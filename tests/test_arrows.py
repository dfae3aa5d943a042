"""Arrows go one way: what may import what, read from the sources without importing them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("byol_fast", "pipelines") for p in (ROOT / package).rglob("*.py"))
METHOD = [
    *("model", "step", "optim", "norm", "loss", "schedules", "compiled", "graphed"),
    *("updates/lars_updates", "updates/fused_update", "updates/apex_update"),
    *("networks/predictors", "networks/groupnorm", "networks/backbone", "networks/norm_ops"),
]
LIGHT = [
    "config",
    "recipes",
    "settings",
    "session/split",
    "cli",
    "flags",
    "arguments",
    "errors",
    "ranks",
    "_version",
]

# Packages that an installation may lack, and the files that exist to use them.
OPTIONAL = {"nvidia", "ffcv", "numba", "llvmlite", "apex", "wandb", "triton", "sklearn", "joblib"}
BACKENDS = {
    f"pipelines/sources/{module}.py"
    for module in ("dali_source", "dali_graph", "ffcv_source", "ffcv_kernel", "ffcv_library")
}
BACKENDS |= {f"pipelines/augment/{module}.py" for module in ("fused", "fused_kernels")}
BACKENDS |= {"byol_fast/updates/fused_update.py"}


def imports(source: str, *, here: str = "", module_level: bool = False) -> set[str]:
    """Dotted names of all that a source imports; `from a import b` gives both a and a.b.

    Args:
        here: the dotted name of the package the source lies in, for relative imports.
        module_level: only what importing the module imports, so nothing inside functions or under
            `if TYPE_CHECKING`.
    """
    names: set[str] = set()
    for node in _nodes(ast.parse(source), module_level):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _nodes(tree: ast.AST, module_level: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if module_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node, module_level)


def of(path: Path, *, module_level: bool = False) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imports(path.read_text(encoding="utf-8"), here=package, module_level=module_level)


def within(names: set[str], packages: set[str]) -> set[str]:
    return {n for n in names if any(n == p or n.startswith(f"{p}.") for p in packages)}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_reader_sees_imports() -> None:
    source = """
import a.b
from c import d
from . import e
from ..f import g
if TYPE_CHECKING:
    import h
try:
    import i
except ImportError:
    pass
class C:
    import j
    def method(self):
        import k
"""
    always = {"a.b", "c", "c.d", "p.q", "p.q.e", "p.f", "p.f.g", "i", "j"}
    assert imports(source, here="p.q", module_level=True) == always
    assert imports(source, here="p.q") == always | {"h", "k"}
    assert within({"pipelines", "pipelines.x", "pipelines2"}, {"pipelines"}) == {
        "pipelines",
        "pipelines.x",
    }


@pytest.mark.parametrize("path", [p for p in FILES if name(p).startswith("pipelines/")], ids=name)
def test_pipelines_knows_nothing_of_byol_fast(path: Path) -> None:
    assert not within(of(path), {"byol_fast"})


def _modules(names: set[str]) -> set[str]:
    """The files of byol_fast among dotted names, as LIGHT spells them."""
    here = ROOT / "byol_fast"
    paths = {n.partition(".")[2].replace(".", "/") for n in within(names, {"byol_fast"})}
    return {path for path in paths if (here / f"{path}.py").is_file()}


@pytest.mark.parametrize("module", METHOD)
def test_the_method_knows_nothing_of_pipelines(module: str) -> None:
    assert not within(of(ROOT / "byol_fast" / f"{module}.py"), {"pipelines"})


@pytest.mark.parametrize("module", LIGHT)
def test_the_command_line_is_light(module: str) -> None:
    """No torch, nor what would bring it: the help is to answer at once."""
    found = of(ROOT / "byol_fast" / f"{module}.py", module_level=True)
    heavy = {"torch", "torchvision", "numpy", "pipelines"}
    assert not within(found, heavy)
    assert _modules(found) <= set(LIGHT)  # so what it imports is light as well


def test_importing_byol_fast_is_light() -> None:
    found = of(ROOT / "byol_fast" / "__init__.py", module_level=True)
    assert not within(found, {"torch", "torchvision", "pipelines"})
    assert _modules(found) <= set(LIGHT)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    found = of(path, module_level=True)
    backends = {file.removesuffix(".py").replace("/", ".") for file in BACKENDS}
    if name(path) not in BACKENDS:
        assert not within(found, OPTIONAL | backends)
