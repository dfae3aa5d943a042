"""Class and score of images, by a classifier that linear or transfer evaluation saved."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from byol_fast.evaluate.commands import common
from pipelines.errors import DataError
from pipelines.scan import printable

if TYPE_CHECKING:
    from byol_fast.classifier import Prediction


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMG", help="image files, or folders of them")
    add("--head", required=True, help="the .head.safetensors that linear or transfer wrote")
    common.weights_flags(parser)
    add("--top", type=int, default=5, help="classes shown for each image")
    add("--batch-size", type=int, default=64, help="images of one forward pass")
    add("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> None:
    """Raises as `Classifier.load`, and DataError once all others are done if an image is broken."""
    if args.top < 1 or args.batch_size < 1:
        raise ValueError("--top and --batch-size must be at least 1")
    from byol_fast.classifier import Classifier
    from byol_fast.evaluate.files import expand

    paths = expand(args.images)
    if not paths:
        raise DataError(f"{', '.join(args.images)} holds no images")
    classifier = Classifier.load(
        args.weights,
        args.head,
        backbone=args.backbone,
        stem=args.stem,
        image_size=args.image_size,
        device=common.device_of(args.device),
    )
    found, bad = classifier.predict_files(
        paths,
        batch_size=args.batch_size,
        threads=args.threads,
        backend=args.backend,
        most=args.top,
    )
    print(_as_json(paths, found, bad) if args.json else _as_table(paths, found))
    for path, reason in bad.items():
        print(f"{printable(path)}: {reason}", file=sys.stderr)
    if bad:
        raise DataError(f"{len(bad)} of {len(set(paths))} images could not be read, see above")


def _as_json(paths: list[Path], found: dict[Path, Prediction], bad: dict[Path, str]) -> str:
    entries = [
        {"image": printable(path), **(found[path] if path in found else {"error": bad[path]})}
        for path in paths
    ]
    return json.dumps(entries, indent=1, ensure_ascii=False)


def _as_table(paths: list[Path], found: dict[Path, Prediction]) -> str:
    lines = []
    for path in paths:
        if path in found:
            each = found[path]
            lines.append(f"{printable(path)}: {each['pred_class']} {each['pred_score']:.4f}")
            width = max(len(name) for name, _ in each["top"])
            lines += [f"    {name.ljust(width)}  {score:.4f}" for name, score in each["top"]]
    return "\n".join(lines)
