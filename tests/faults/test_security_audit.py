"""The look for known vulnerabilities: it fails on a known one, and says when it could not."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

AUDIT: dict[str, Any] = runpy.run_path(str(ROOT / "launch" / "audit.py"))

HOLE = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-24747"], "fix_versions": ["2.10.0"]}
SOUND = {"name": "numpy", "version": "2.4.1", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}
HOLED = {"name": "torch", "version": "2.9.1", "vulns": [HOLE]}


@pytest.mark.parametrize(
    ("entries", "accepted", "text", "failed"),
    [
        ([SOUND], {}, "no known vulnerability (1 of 1 packages", False),
        ([SOUND, UNKNOWN], {}, "1 of 2 packages", False),
        ([UNKNOWN, UNKNOWN], {}, "skipped: ", False),  # pip-audit itself calls this a success
        ([SOUND, HOLED], {}, "torch 2.9.1: PYSEC-2026-1, CVE-2026-24747; fixed in 2.10.0", True),
        ([SOUND, HOLED], {"CVE-2026-24747": "not used"}, "1 accepted by name", False),
    ],
)
def test_what_the_report_means(
    entries: list[Any], accepted: dict[str, str], text: str, failed: bool
) -> None:
    said = AUDIT["verdict"]({"dependencies": entries}, accepted)
    assert text in said[0] and said[1] is failed


def run_with(folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    """The script with a `pip_audit` of ours in the place of the real one."""
    (folder / "pip_audit.py").write_text(module)
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "audit.py")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
    )


def test_the_script_fails_on_a_hole_and_never_for_want_of_a_network(tmp_path: Path) -> None:
    report = json.dumps({"dependencies": [HOLED]})
    found = run_with(tmp_path, f"print({report!r}); raise SystemExit(1)")
    assert found.returncode == 1 and "CVE-2026-24747" in found.stdout
    cut = run_with(tmp_path, "raise SystemExit('ConnectionError: no route to pypi.org')")
    assert cut.returncode == 0
    assert cut.stdout.startswith("skipped: ConnectionError: no route to pypi.org")


def test_without_pip_audit_it_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(AUDIT["audit"].__globals__, "find_spec", lambda name: None)
    assert AUDIT["audit"](tmp_path) == (
        "skipped: pip-audit is not installed (pip install pip-audit)",
        False,
    )


def test_the_checks_look_for_vulnerabilities() -> None:
    script = (ROOT / "launch" / "test.sh").read_text(encoding="utf-8")
    assert '"$PY" launch/audit.py' in script
    assert all(AUDIT["ACCEPTED"].values()), "a reason for each accepted id"
