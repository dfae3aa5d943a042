"""Result files that other tasks wrote, as one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from byol_fast.evaluate.table import Row, render_all


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "results", nargs="+", type=Path, help="result files, or folders that hold some"
    )


def run(args: argparse.Namespace) -> None:
    """Raises ValueError where a file is no result, or a folder holds none."""
    print(render_all([line for path in _files(args.results) for line in _read(path)]))


def _files(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist: name result files, or a folder of some")
        some = sorted(p for p in path.rglob("*.json") if _is_result(p)) if path.is_dir() else [path]
        if not some:
            raise ValueError(f"{path} holds no results: run an evaluation first")
        found += some
    return found


def _is_result(path: Path) -> bool:
    try:
        _read(path)
    except ValueError:
        return False
    return True


def _read(path: Path) -> list[tuple[Row, str, str]]:
    """The rows of a result file, each with weights and data."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not JSON, not text
        raise ValueError(f"{path} is no result of an evaluation: {error}") from error
    if not isinstance(content, dict) or not {"rows", "weights", "data"} <= content.keys():
        raise ValueError(f"{path} is no result of an evaluation: it has no rows")
    try:
        weights, data = content["weights"]["file"], content["data"]["train"]
        return [(Row.from_dict(row), weights, data) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this version's evaluation: {error!r}") from error
