"""A small BYOL model, as a training checkpoint and as other projects' modules would save it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interop_support import HEADS, SIZE, shake

from byol_fast import checkpoint
from byol_fast.model import BYOL


@pytest.fixture(scope="session")
def model() -> BYOL:
    torch.manual_seed(0)
    model = BYOL("resnet18", image_size=SIZE, stem="cifar", **HEADS)
    shake(model.online)
    shake(model.target, seed=3)
    return model.eval()


@pytest.fixture(scope="session")
def run(model: BYOL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, of step 12."""
    folder = tmp_path_factory.mktemp("run")
    state = {"model": model.state_dict(), "hyper": model.hyper}
    checkpoint.save(folder / "checkpoints", 12, state)
    return folder


@pytest.fixture(scope="session")
def parts(model: BYOL) -> dict[str, dict[str, torch.Tensor]]:
    """The state of each network by itself."""
    return {
        "backbone": model.online.encoder.backbone.state_dict(),
        "projector": model.online.encoder.projector.state_dict(),
        "predictor": model.online.predictor.state_dict(),
        "target_backbone": model.target.backbone.state_dict(),
        "target_projector": model.target.projector.state_dict(),
    }
