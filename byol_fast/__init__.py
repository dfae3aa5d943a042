"""byol_fast: BYOL pretraining on images, from a folder to an exported backbone.

The names below are loaded when they are first used, so that `--help` does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
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


def _refuse_another_pipelines() -> None:
    """Python looks into the working directory first, where a user may have a `pipelines` too.

    Raises:
        ImportError: `pipelines` is not the package that came with this one.
    """
    own = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pipelines")
    loaded = sys.modules.get("pipelines")
    spec = importlib.util.find_spec("pipelines") if loaded is None else None
    found = (spec and spec.origin) or getattr(loaded, "__file__", None)
    if not found or not os.path.isdir(own):
        return
    if os.path.realpath(os.path.dirname(found)) != os.path.realpath(own):
        raise ImportError(
            f"{found} hides byol_fast's own package of that name, {own}, as Python looks into the "
            "working or the script's folder and PYTHONPATH first: start in another folder, rename "
            "that one, or set PYTHONSAFEPATH=1 (the byol-fast command needs none of these unless "
            "PYTHONPATH names the folder)"
        )


_refuse_another_pipelines()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"byol_fast.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'byol_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
