"""The variables that a launcher such as torchrun sets for each process, checked. Without torch."""

from __future__ import annotations

import os

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOW = "start with torchrun, which sets all of them, or unset {} for one process"


def number(name: str, *, least: int = 0, most: int | None = None) -> int | None:
    """The whole number in an environment variable; None where it is not set or empty.

    Raises ValueError, with the variable's name, for anything else and for a number out of bounds.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    value = int(text) if text.isdecimal() else -1
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(
            f"the environment variable {name} must be a whole number {bounds}, got {text!r}: "
            + _HOW.format(name)
        )
    return value


def placed() -> bool:
    """Whether this process is one of a launcher's; False: it is the only one.

    Variables that are empty are removed: they mean the same as none, to torch as well.

    Raises ValueError for variables that are wrong, do not fit each other or are there by halves.
    """
    for name in NAMES:
        if not os.environ.get(name, "-").strip():
            del os.environ[name]
    size = number("WORLD_SIZE", least=1)
    rank = number("RANK", most=None if size is None else size - 1)
    of_node = number("LOCAL_WORLD_SIZE", least=1)
    local = number("LOCAL_RANK", most=None if of_node is None else of_node - 1)
    if rank is None and size in (None, 1):
        if local:  # more than one process, each of which would be rank 0
            raise ValueError(f"LOCAL_RANK is {local} but RANK is not set: {_HOW.format('it')}")
        return False
    have = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": os.environ.get("MASTER_ADDR")}
    have["MASTER_PORT"] = number("MASTER_PORT", least=1, most=65535)
    if missing := [name for name, value in have.items() if value is None]:
        there = [name for name, value in have.items() if value is not None]
        raise ValueError(
            f"{' and '.join(there)} set, but not {' and '.join(missing)}: "
            + _HOW.format(" and ".join(there))
        )
    return True
