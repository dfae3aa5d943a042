"""`byol-fast COMMAND …`: one console script over the packages' commands, each imported when run."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from byol_fast._version import __version__
from byol_fast.arguments import help_entry, help_text
from byol_fast.config import ACTIONS, FLAGS, Config, parse, to_yaml
from byol_fast.errors import Exit
from byol_fast.flags import UsageError, nearest
from byol_fast.recipes import fill

_ROW = re.compile(r"epoch=(\d{1,15}), ?index=(\d{1,15})")

COMMANDS = {
    "pretrain": ("byol_fast.pretrain", "learn a representation from a folder of images"),
    "evaluate": ("byol_fast.evaluate.__main__", "accuracy of learned weights, by many protocols"),
    "interop": ("byol_fast.interop.__main__", "weights from and to other projects"),
    "index": ("pipelines.index", "read a folder's image sizes, and check that all can be decoded"),
    "convert": ("pipelines.convert", "write a data set as one .beton file, or check such a file"),
    "doctor": ("byol_fast.doctor", "what this machine lacks for a run, and what mends it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the remaining arguments; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words else ""
    if command in ("--help", "-h"):
        print(_usage())
        return Exit.DONE
    if command == "--version":
        print(f"byol-fast {__version__}")
        return Exit.DONE
    if command not in COMMANDS:
        problem = f"unknown command {command!r}{nearest(command, COMMANDS)}" if command else ""
        print("\n".join(filter(None, [problem, _usage()])), file=sys.stderr)
        return Exit.USAGE
    return int(importlib.import_module(COMMANDS[command][0]).main(words))


def _usage() -> str:
    lines = [f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items()]
    head = "usage: byol-fast COMMAND …   (byol-fast COMMAND --help, byol-fast --version)"
    return "\n".join([head, "", *lines])


@dataclass(frozen=True, kw_only=True)
class PretrainCall:
    """What a pretraining command line asks for."""

    config: Config  # without the recipe's values
    dry_run: bool
    replay: tuple[int, int] | None = None  # epoch and index of a row to be drawn


def pretrain_arguments(argv: Sequence[str]) -> PretrainCall | int:
    """Understand the arguments of `byol_fast.pretrain`, without importing torch.

    Returns:
        What to do; or the exit code, where help, the settings or an error has been printed (by rank
        0 alone under torchrun).
    """
    actions = {"-h", "--help", "--print-config", "--dry-run"}
    asked = actions.intersection(argv)
    if asked & {"-h", "--help"}:
        _say(help_page())
        return Exit.DONE
    try:
        words, row = _take_replay([word for word in argv if word not in actions])
        config = parse(words)
        if "--print-config" in asked:
            _say(to_yaml(fill(config)), end="")
            return Exit.DONE
        if not config.data:
            raise UsageError("no images given: add --data FOLDER (--help lists all settings)")
    except UsageError as error:
        _say(f"error: {error}", file=sys.stderr)
        return Exit.USAGE
    return PretrainCall(config=config, dry_run="--dry-run" in asked, replay=row)


def _take_replay(words: list[str]) -> tuple[list[str], tuple[int, int] | None]:
    """The other words, and the row that `--replay epoch=3,index=1234` names."""
    rest, row = list[str](), None
    while words:
        word = words.pop(0)
        name, equals, given = word.partition("=")
        if name != "--replay":
            rest.append(word)
            continue
        given = given if equals else words.pop(0) if words else ""
        found = _ROW.fullmatch(given)
        if not found:
            raise UsageError(f"--replay needs a row such as epoch=3,index=1234, got {given!r}")
        row = int(found[1]), int(found[2])
    return rest, row


def help_page() -> str:
    """The text of `python -m byol_fast.pretrain --help`."""
    titles = {"": "Everyday settings"}
    for field in fields(Config):
        if isinstance(field.default_factory, type):
            titles[field.name] = (field.default_factory.__doc__ or "").rstrip(".")
    notes = [
        "usage: python -m byol_fast.pretrain --data FOLDER [--NAME VALUE …]",
        "",
        "Sections may be left out (--base-lr), dashes and underscores are the same, name=value",
        "works too, and switches are turned off by --no-NAME or --NAME false.",
        "",
        "Actions:",
    ]
    actions = [line for option, about in ACTIONS.items() for line in help_entry(option, about)]
    return help_text(FLAGS, titles, "\n".join(notes + actions))


def _say(text: str, **where: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, **where)  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
