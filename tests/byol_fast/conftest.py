"""Fixtures of the end-to-end tests: a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "train")
