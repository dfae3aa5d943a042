"""No test leaves an index in the user's cache."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYOL_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
