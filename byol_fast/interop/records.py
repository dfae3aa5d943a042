"""What a pickle says, as records: names that were never looked up, objects that were not built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from byol_fast.errors import CheckpointError


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; only its name, it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Opaque:
    """An object the file describes and this program does not build."""

    of: Any  # a Name; or another Opaque, for a class that the file makes up
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.of) if isinstance(self.of, Name) else "a class made up in the file"


class Refused(CheckpointError):
    """The pickle is damaged, or asks for something that no weights file needs."""


# Said aloud when met. Safety does not rest on these lists: what is not on them is not run either.
# (getattr is not: mmengine's history buffers pickle their methods with it.)
_HARMFUL_MODULES = {
    *("os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "ctypes", "runpy"),
    *("importlib", "webbrowser", "marshal", "pip"),
    *("commands", "popen2"),  # Python 2's subprocess, as protocols 0 to 2 call it
}
_HARMFUL = {
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("eval", "exec", "execfile", "compile", "open", "__import__", "breakpoint")
    ),
    *("io.open", "_io.open", "io.FileIO", "_io.FileIO", "io.open_code"),
}


def named(module: str, attribute: str) -> Name:
    """A `Name`, unless it would run programs or open files.

    Raises:
        Refused: it would, if this were Python's unpickler.
    """
    name = f"{module}.{attribute}"
    if name in _HARMFUL or module.partition(".")[0] in _HARMFUL_MODULES:
        raise Refused(
            f"its pickle asks to run {name}, which no weights file needs: it may "
            "have been made to do harm; do not open it with other programs either"
        )
    return Name(module, attribute)


def mapping(value: Any) -> dict[Any, Any] | None:
    """The dict that a value is, or that an opaque object wraps (haiku's and omegaconf's do)."""
    for _ in range(8):  # mappings wrapped in mappings; a file may also point at itself
        if isinstance(value, dict):
            return value
        if not isinstance(value, Opaque):
            return None
        if value.items:
            return value.items
        inner = value.args[0] if value.args else value.state
        if isinstance(inner, tuple) and inner:  # (state of __dict__, state of __slots__)
            inner = next((part for part in inner if isinstance(part, dict)), None)
        if isinstance(inner, dict) and isinstance(inner.get("_mapping"), dict):
            inner = inner["_mapping"]
        value = inner
    return None


def opaque_names(tree: Any) -> list[str]:
    """The names of all opaque objects below `tree`, sorted."""
    found, seen, todo = set(), set(), [tree]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Opaque):
            found.add(str(value))
            todo += [value.of, *value.args, value.state, value.items]
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
    return sorted(found)
