"""Fixtures of the fault tests: small data, and runs that do not outlive their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faults.harness import Run, Zygote

Runs = Callable[..., Run]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 noisy images of 12 pixels in 4 classes that a network can tell apart, as one .npz."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 4
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [160, 160, 30]])
    pixels = colours[labels][:, None, None] + rng.normal(0, 40, (64, 12, 12, 3))
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=pixels.clip(0, 255).astype(np.uint8), labels=labels)
    return path


@pytest.fixture
def runs(zygote: Zygote, images: Path) -> Iterator[Runs]:
    """Starts a run: `runs(out, *arguments, ranks=1, fault="")`; what is left is killed at the end.

    The data is `images` unless the arguments name other data.
    """
    started: list[Run] = []

    def start(out: Path, *arguments: object, ranks: int = 1, fault: str = "") -> Run:
        words = [str(a) for a in arguments]
        data = () if "--data" in words else ("--data", str(images))
        started.append(Run(zygote, out, [*data, *words], ranks, fault))
        return started[-1]

    yield start
    for run in started:
        if not run.poll():
            run.kill()
            run.wait()
