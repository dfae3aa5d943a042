"""byol_fast: BYOL pretraining on images, from a folder to an exported backbone.

The names below are loaded when they are first used, so that `--help` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from byol_fast._version import __version__

if TYPE_CHECKING:
    from byol_fast.classifier import Classifier
    from byol_fast.export import load_backbone
    from byol_fast.learner import BYOL
    from byol_fast.optim import LARS

__all__ = ["BYOL", "LARS", "Classifier", "__version__", "load_backbone"]

_HOMES = {
    "BYOL": "learner",
    "Classifier": "classifier",
    "LARS": "optim",
    "load_backbone": "export",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"byol_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'byol_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
