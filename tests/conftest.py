"""Without a GPU Triton's kernels run in its interpreter: settled when Triton is imported."""

import os
from collections.abc import Generator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8: file names in them need not be that."""
    report = yield
    report.sections = [(_utf8(name), _utf8(text)) for name, text in report.sections]
    if report.longrepr is not None and (text := str(report.longrepr)) != _utf8(text):
        report.longrepr = _utf8(text)
    return report


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
