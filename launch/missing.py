"""Print what setup.py asks for and this interpreter's environment lacks, one requirement a line.

    python launch/missing.py [EXTRA ...]        exit status 0: nothing is missing, 1: something is

setup.py is read as text, so it needs neither setuptools nor anything else of the project.
"""

import ast
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def wanted(extras: list[str]) -> list[str]:
    """The requirements of the package and of the named extras, as setup.py writes them."""
    tables = {}
    for node in ast.parse(SETUP.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("INSTALL", "EXTRAS"):
                tables[name] = ast.literal_eval(node.value)
    unknown = sorted(set(extras) - set(tables["EXTRAS"]))
    if unknown:
        raise ValueError(f"setup.py has no extra {unknown}; it has {sorted(tables['EXTRAS'])}")
    return [*tables["INSTALL"], *(line for extra in extras for line in tables["EXTRAS"][extra])]


def is_met(line: str) -> bool:
    """Whether the installed version of the requirement `line` satisfies it."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # an environment without packaging cannot have torch either
        return False
    requirement = Requirement(line)
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    missing = [line for line in wanted(sys.argv[1:]) if not is_met(line)]
    print("\n".join(missing))
    sys.exit(bool(missing))
