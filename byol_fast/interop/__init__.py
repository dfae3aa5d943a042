"""Weights from and to other projects; see docs/interop.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol_fast.interop.state import load_byol

__all__ = ["load_byol"]


def __getattr__(name: str) -> Any:
    if name == "load_byol":
        return importlib.import_module("byol_fast.interop.state").load_byol
    raise AttributeError(f"module 'byol_fast.interop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
