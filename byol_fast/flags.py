"""Flags out of dataclasses: fields are the only source of names, types, defaults, bounds and help.

A root dataclass holds plain fields and sections (other `Section` classes); a field `base_lr` of the
section `optim` is the flag `--optim.base-lr`. Nothing here knows what the settings mean:
`byol_fast.config` does, and `byol_fast.arguments` reads command lines and files.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


class UsageError(ValueError):
    """A command line or a configuration file that cannot be understood (exit code 2)."""


def setting(
    text: str,
    *,
    default: Any,
    unset: str = "",  # what None stands for, in the words of the help text; "" forbids None
    switch: tuple[str, str] | None = None,  # choices that false and true stand for
    free: bool = False,  # may differ when a run is resumed
    formerly: str = "",  # its name in earlier versions, still understood
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help, its bounds, and whether a resumed run may change it."""
    bounds = {"at least": at_least, "at most": at_most, "above": above}
    metadata = {"help": text, "unset": unset, "switch": switch, "free": free, "bounds": bounds}
    metadata["formerly"] = formerly
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One setting: how it is spelled, what it accepts, what it is unless set."""

    name: str  # dotted, with underscores: "optim.base_lr"
    kinds: tuple[type, ...]  # tried in this order
    choices: tuple[str, ...]
    default: Any
    help: str
    unset: str
    switch: tuple[str, str] | None
    free: bool
    bounds: Mapping[str, float | None]
    formerly: str  # dotted; "" if it had no other

    @property
    def is_switch(self) -> bool:
        """Whether it can stand alone on a command line, as `--name` and as `--no-name`."""
        return self.kinds == (bool,) or self.switch is not None

    @property
    def option(self) -> str:
        """As it is shown: `--optim.base-lr`."""
        return "--" + self.name.replace("_", "-")

    @property
    def expects(self) -> str:
        """In words: `an integer`, `one of bf16, fp16`."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return " or ".join(_KINDS[kind] for kind in self.kinds)

    def convert(self, raw: object, shown: str) -> Any:
        """The value that a word of the command line or a YAML scalar stands for.

        Args:
            shown: how messages name the setting and where it was found.

        Raises:
            UsageError: `raw` is of another type, or not one of the choices.
        """
        if raw is None or (self.unset and isinstance(raw, str) and raw in ("none", "null")):
            if self.unset:
                return None
            raise UsageError(f"{shown} must be {self.expects}; it cannot be empty")
        if self.switch is not None and str(raw).lower() in TRUE + FALSE:
            raw = self.switch[str(raw).lower() in TRUE]
        for kind in self.kinds:
            value = _as_kind(raw, kind)
            if value is not None:
                break
        else:
            mend = ": put it in quotes" if self.kinds == (str,) else ""
            raise UsageError(f"{shown} must be {self.expects}, got {raw!r}{mend}")
        self.check(value, shown)
        return value

    def check(self, value: object, shown: str) -> None:
        """Raise UsageError unless `value` has the right type and lies within the bounds."""
        if value is None and self.unset:
            return
        if not isinstance(value, self.kinds) or (
            isinstance(value, bool) and bool not in self.kinds
        ):
            raise UsageError(f"{shown} must be {self.expects}, got {value!r}")
        if self.choices and value not in self.choices:
            near = nearest(str(value), self.choices)
            raise UsageError(f"{shown} must be {self.expects}, got {value!r}{near}")
        if not isinstance(value, int | float):
            return
        low, high, above = (self.bounds[k] for k in ("at least", "at most", "above"))
        fits = (
            (isinstance(value, int) or math.isfinite(value))
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
        )
        if not fits:
            words = [
                f"{word} {bound:g}" for word, bound in self.bounds.items() if bound is not None
            ]
            raise UsageError(f"{shown} must be {' and '.join(words) or 'finite'}, got {value!r}")


def _as_kind(raw: object, kind: type) -> Any:
    """`raw` as `kind`, or None where it is not one. YAML reads 1e-6 as a text: so texts count."""
    if kind is bool and isinstance(raw, str):
        word = raw.lower()
        return True if word in TRUE else False if word in FALSE else None
    if isinstance(raw, bool):  # an int to Python, but not to us
        return raw if kind is bool else None
    if isinstance(raw, kind):
        return raw
    readable = isinstance(raw, str) and kind is not str
    try:
        return kind(raw) if readable or (kind is float and isinstance(raw, int)) else None
    except (ValueError, OverflowError):
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of every group of settings: checks each field when it is made."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, flag in flags_of(cls, self.prefix).items():
            if "." not in name or self.prefix:
                flag.check(getattr(self, name.rpartition(".")[2]), flag.option)


@functools.cache
def flags_of(cls: type[Any], prefix: str = "") -> Mapping[str, Flag]:
    """Every flag of a dataclass and its sections by dotted name, in the order of definition."""
    hints = typing.get_type_hints(cls)
    flags: dict[str, Flag] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            section: Any = hint  # mypy would narrow it to type[Section], whose hash it doubts
            flags.update(flags_of(section, field.name))
            continue
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        name = f"{prefix}.{field.name}" if prefix else field.name
        old = field.metadata["formerly"]
        flags[name] = Flag(
            name=name,
            formerly=f"{prefix}.{old}" if prefix and old else old,
            kinds=(str,) if choices else tuple(p for p in parts if p is not types.NoneType),
            choices=choices,
            default=field.default,
            **{k: field.metadata[k] for k in ("help", "unset", "switch", "free", "bounds")},
        )
    return types.MappingProxyType(flags)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`: did you mean x?`, or nothing where no candidate is near."""
    names = list(candidates)
    same_part = [name for name in names if word in re.split(r"[._-]", name)]  # lr: base-lr
    close = same_part or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""
