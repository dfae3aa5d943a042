"""What a weights file says about its network, checked before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from byol_fast.errors import CheckpointError
from byol_fast.networks.backbone import Norm, Stem
from byol_fast.networks.padding import Padding
from byol_fast.networks.stem import check_changes

LARGEST_IMAGE = 4096  # pixels a side: a size from a file is run through the network to try it
_LONGEST = 200  # characters of a name


def checked(meta: Any, file: Path) -> dict[str, Any]:
    """`meta` itself, a dict. Keys that nothing is built from are not looked at.

    Raises:
        CheckpointError: a value that byol_fast does not write; with its key.
    """
    if not isinstance(meta, dict) or not all(isinstance(key, str) for key in meta):
        raise CheckpointError(
            f"{file} describes its network with a {type(meta).__name__} that byol_fast did not "
            "write: it is damaged. Export it again"
        )
    for key, fits in _CHECKS.items():
        if key in meta and meta[key] is not None and not fits(meta[key]):
            raise CheckpointError(
                f"{file} describes its network with a {key} that byol_fast does not write "
                f"({_short(meta[key])}): it is damaged or from elsewhere. Export it again"
            )
    return meta


def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST


def _side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_IMAGE


def _sides(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_side, value))
    return _side(value) or pair


def _colours(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= 64
        and all(type(each) in (int, float) and math.isfinite(each) for each in value)
    )


def _changes(value: Any) -> bool:
    try:
        check_changes(value)
    except ValueError:
        return False
    return True


def _one_of(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in get_args(kind)


def _short(value: Any) -> str:
    if isinstance(value, str | int | float):
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 64 else "huge"
        return text if len(text) <= 60 else text[:60] + "…"
    return type(value).__name__


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "backbone": _name,
    "stem": _one_of(Stem),
    "hidden_layer": lambda value: type(value) is int or _name(value),
    "image_size": _sides,
    "norm": _one_of(Norm),
    "padding": _one_of(Padding),
    "mean": _colours,
    "std": _colours,
    "stem_changes": _changes,
}
