"""Small image folders and settings, shared by the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# As small as a run of the real thing can be: 24 steps of a ResNet-18 on 16 images.
TINY = [
    *("--recipe", "quickstart", "--batch-size", "16", "--epochs", "6", "--device", "cpu"),
    *("--hidden-size", "32", "--log-every", "4", "--eval-every", "3", "--tracker", "none"),
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
