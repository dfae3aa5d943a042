"""From a folder of images to pairs of augmented views on the device: `pipelines.build(...)`.

The names below are loaded when they are first used, so that reading a specification or a plan, or
printing help, does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.errors import BadImage, DataError, MissingBackend
    from pipelines.pipeline import ViewPipeline, Views, build

__all__ = ["BadImage", "DataError", "MissingBackend", "ViewPipeline", "Views", "build"]

_HOMES = {
    "BadImage": "errors",
    "DataError": "errors",
    "MissingBackend": "errors",
    "ViewPipeline": "pipeline",
    "Views": "pipeline",
    "build": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"pipelines.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
