"""Without simplejpeg everything imports, synthetic data runs, and images name what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines import convert, decode, index, turbo
from pipelines.conversion import storage
from pipelines.errors import MissingBackend
from pipelines.formats import jpeg_decode

WORDS = "simplejpeg is not installed (no module); pip install simplejpeg"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One image, and no simplejpeg."""
    missing = turbo._Missing(ImportError("no module"))
    for module in (jpeg_decode, storage):
        monkeypatch.setattr(module, "simplejpeg", missing)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "images" / "one.jpg")
    return tmp_path / "images"


def test_an_image_is_not_broken_where_its_decoder_is_missing(folder: Path) -> None:
    data = (folder / "one.jpg").read_bytes()
    assert decode.header(data) == (30, 20)
    for use in (decode.decode, decode.verify):
        with pytest.raises(MissingBackend, match="pip install simplejpeg"):
            use(data)


def test_the_commands_name_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index.main([str(folder), "--verify", "--workers", "1"]) == 2
    assert WORDS in capsys.readouterr().err
    out = folder.parent / "out.beton"
    assert convert.main([str(folder), str(out), "--mode", "raw", "--workers", "1"]) == 2
    assert WORDS in capsys.readouterr().err and not out.exists()


def test_all_is_imported_and_synthetic_data_runs_without_it() -> None:
    script = """
import sys
sys.modules["simplejpeg"] = None
from pipelines import build, decode
from pipelines.conversion import storage
from pipelines.sources import dali_available, ffcv_available, torch_source
from pipelines.spec import AugmentSpec
print(dali_available(), ffcv_available())
made = build("synthetic:8", spec=AugmentSpec(image_size=16), batch_size=4, device="cpu")
print(next(made.steps(0, 1)).x.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "torch.Size([2, 4, 3, 16, 16])" in done.stdout, done.stderr
