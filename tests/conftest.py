"""What is settled by what is imported first: for Triton its interpreter, where there is no GPU.

FFCV imports distutils: setuptools comes first, so that Inductor, which needs it, finds one of them.
"""

import importlib.util
import os
from collections.abc import Generator

import pytest
import torch

if importlib.util.find_spec("setuptools"):
    import setuptools  # noqa: F401
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
