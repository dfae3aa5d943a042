"""Command lines and configuration files to values, and the help text, for any set of flags.

A section may be left out (`--base-lr` for `--optim.base-lr`), since leaf names are unique.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_fast.flags import FALSE, TRUE, Flag, UsageError, nearest


def find(name: str, flags: Mapping[str, Flag]) -> Flag | None:
    """The flag of that dotted name or that leaf name, of today or formerly; dashes count as
    underscores."""
    name = name.replace("-", "_")
    by_name = {flag.formerly: flag for flag in flags.values() if flag.formerly} | dict(flags)
    leaves = {key.rpartition(".")[2]: flag for key, flag in by_name.items()}
    return by_name.get(name) or leaves.get(name)


def parse(
    argv: Sequence[str], flags: Mapping[str, Flag], others: Collection[str]
) -> tuple[list[str], dict[str, Any]]:
    """Read `--name value`, `--name=value`, `name=value`, `--switch` and `--no-switch`.

    Args:
        others: further options that exist (`--dry-run`), for messages only.

    Returns:
        The files named by `--config`, in order, and the values by dotted name; the last one wins.
    """
    files: list[str] = []
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, given = word.removeprefix("--").partition("=")
        flag = find(name, flags)
        if not word.startswith("--") and not equals:
            raise UsageError(
                f"unexpected {word!r}: settings are --name value (a folder: --data {word})"
            )
        if name == "config":
            files.append(given if equals else _next(words, "--config", "a YAML file"))
            continue
        if flag is None:
            off = find(name[3:], flags) if name[:3] in ("no-", "no_") else None
            if equals and f"--{name}" in others:
                raise UsageError(f"--{name} takes no value")
            if off is None or not off.is_switch or equals:
                shown = word.partition("=")[0]
                raise UsageError(f"unknown flag {shown}{_near_option(name, flags, others)}")
            values[off.name] = off.convert(False, off.option)
        elif equals:
            values[flag.name] = flag.convert(given, flag.option)
        elif flag.is_switch:
            follows = bool(words) and words[0].lower() in (*TRUE, *FALSE, *flag.choices)
            values[flag.name] = flag.convert(words.pop(0) if follows else True, flag.option)
        else:
            values[flag.name] = flag.convert(_next(words, flag.option, flag.expects), flag.option)
    return files, values


def _next(words: list[str], option: str, expects: str) -> str:
    if not words or words[0].startswith("--"):
        raise UsageError(f"{option} needs a value: {expects}")
    return words.pop(0)


def _near_option(name: str, flags: Mapping[str, Flag], others: Iterable[str]) -> str:
    options = [flag.option[2:] for flag in flags.values()]
    known = options + [o.rpartition(".")[2] for o in options if "." in o]
    known += [other.removeprefix("--") for other in others]
    near = nearest(name.replace("_", "-"), known)
    return near.replace("mean ", "mean --") if near else "; --help lists all"


def flatten(
    tree: Mapping[Any, Any], flags: Mapping[str, Flag], where: str, prefix: str = ""
) -> dict[str, Any]:
    """Values by dotted name out of nested mappings, converted and checked.

    Args:
        where: the file, for messages.
    """
    sections = {name.partition(".")[0] for name in flags if "." in name}
    renamed = {flag.formerly: name for name, flag in flags.items() if flag.formerly}
    values: dict[str, Any] = {}
    for key, raw in tree.items():
        name = f"{prefix}{key}".replace("-", "_")
        name = renamed.get(name, name)
        if name in sections and (raw is None or isinstance(raw, Mapping)):
            values.update(flatten(raw or {}, flags, where, f"{name}."))
        elif name in sections:
            raise UsageError(
                f"{name} in {where} is a section: its settings go below it, indented, not {raw!r}"
            )
        elif name not in flags:
            leaves = {flag.rpartition(".")[2]: flag for flag in flags}
            known = leaves.get(name.rpartition(".")[2], "")
            near = f": did you mean {known}?" if known else nearest(name, flags)
            raise UsageError(f"unknown key {name} in {where}{near or '; --help lists all'}")
        else:
            values[name] = flags[name].convert(raw, f"{name} in {where}")
    return values


def help_text(flags: Mapping[str, Flag], titles: Mapping[str, str], head: str) -> str:
    """The help of all flags, grouped by section. `titles` maps a section's name to its title."""
    lines = [head]
    for section, title in titles.items():
        lines += ["", f"{title}:"]
        for flag in flags.values():
            if flag.name.rpartition(".")[0] == section:
                kind = "|".join(flag.choices) or "|".join(k.__name__ for k in flag.kinds)
                default = flag.unset if flag.default is None else _plain(flag.default)
                about = f"{flag.help} [{kind}; default: {default}]"
                lines += help_entry(flag.option, about)
    return "\n".join(lines)


def help_entry(option: str, about: str) -> list[str]:
    """The lines of one option, at most 100 columns wide."""
    body = _wrap(about, width=70)
    first = f"  {option:<28}"
    if len(option) > 26:
        return [f"  {option}"] + [" " * 30 + line for line in body]
    return [first + body[0]] + [" " * 30 + line for line in body[1:]]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces and behind a `|`, never in a name."""
    lines = [""]
    for word in re.findall(r"\s+|[^\s|]+\|?|\|", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word if lines[-1] else word.lstrip()
    return [line.rstrip() for line in lines]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def load(path: Path) -> Mapping[Any, Any]:
    """The mapping that a YAML file holds; empty for an empty file. Raises UsageError."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2026-02-30
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UsageError(
            f"--config {path} must hold settings such as 'epochs: 100', one a line, "
            f"not a {type(tree).__name__}"
        )
    return tree
