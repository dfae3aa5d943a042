"""A pytest plugin for machines with little installed: `python -m pytest -p benchmarks.leave_out`.

A test file that imports a package which is not there is skipped by name instead of being an error.
Not for a project's own checks: there everything is installed, and a failing import is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

OWN = ("byol_fast", "pipelines", "benchmarks", "tests", "support")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turns a failed import of somebody else's package into a skip."""
    report = yield
    found = re.search(r"No module named '([\w.]+)'|import of ([\w.]+) halted", str(report.longrepr))
    missing = found and (found[1] or found[2])
    if report.outcome == "failed" and missing and missing.partition(".")[0] not in OWN:
        report.outcome = "skipped"
        where = str(getattr(collector, "path", collector.nodeid))
        report.longrepr = (where, 0, f"Skipped: {missing} is not installed")
    return report
