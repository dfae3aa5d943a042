"""Small image folders, settings and comparisons of runs, shared by the end-to-end tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byol_fast import checkpoint
from pipelines.sources import dali_available, ffcv_available

ROOT = Path(__file__).resolve().parents[1]

# As small as a run of the real thing can be: 24 steps of a ResNet-18 on 16 images.
TINY = [
    *("--recipe", "quickstart", "--batch-size", "16", "--epochs", "6", "--device", "cpu"),
    *("--hidden-size", "32", "--log-every", "4", "--eval-every", "3", "--tracker", "none"),
]


# Those that not every machine has; a test's own list begins with "torch".
OPTIONAL_BACKENDS = [
    pytest.param(
        "dali",
        marks=[
            pytest.mark.dali,
            pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed"),
        ],
    ),
    pytest.param(
        "ffcv",
        marks=[
            pytest.mark.ffcv,
            pytest.mark.skipif(
                not ffcv_available(), reason="FFCV is not installed (launch/install_ffcv.sh)"
            ),
        ],
    ),
]


def make_folder(path: Path, *, images: int = 64, classes: int = 4, seed: int = 0) -> Path:
    """Class folders of noisy stripes: a direction a class."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:36, 0:40]
    for number in range(images):
        label = number % classes
        angle = np.pi * label / classes
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.8 + rng.uniform(0, 6))
        pixels = (wave[..., None] * 90 + 128 + rng.normal(0, 15, (36, 40, 3))).clip(0, 255)
        folder = path / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=92)
    return path


def final(out: Path) -> dict[str, Any]:
    """The newest checkpoint of a run folder."""
    state = checkpoint.latest(out / "checkpoints")
    assert state is not None
    return state


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise, through nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
