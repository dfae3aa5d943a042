"""`python -m byol_fast.interop import|export|inspect`: weights from and to other projects."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from byol_fast.errors import CheckpointError, Exit

NETWORKS = ["online", "target"]


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit code of `errors.Exit`."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        {"inspect": _inspect, "import": _import, "export": _export}[args.task](args)
    except CheckpointError as error:
        return _failed(Exit.NO_CHECKPOINT, error)
    except (ValueError, ImportError, OSError) as error:
        return _failed(Exit.USAGE, error)
    return Exit.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m byol_fast.interop",
        description="Weights from and to other projects. docs/interop.md lists the layouts.",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="inspect|import|export")

    add = tasks.add_parser("inspect", help="say what a weights file holds").add_argument
    add("file", type=Path, help="any weights file; nothing in it is executed")
    add("--keys", action="store_true", help="every tensor with its shape")

    add = tasks.add_parser(
        "import", help="another project's file to a byol_fast export"
    ).add_argument
    add("file", type=Path, help="the file")
    add("out", type=Path, help="where to write, without suffix")
    add(
        "--from",
        dest="layout",
        metavar="LAYOUT",
        help="its layout, where it should not be guessed, or a prefix such as encoder_q.",
    )
    add("--network", choices=NETWORKS, default="online", help="whose backbone")
    add("--backbone", help="torchvision name, where the shapes do not tell")
    add("--stem", choices=["imagenet", "cifar"], help="where the shapes do not tell")
    flag = argparse.BooleanOptionalAction
    about = "of the stem, where the keys do not tell, or tell what its forward does not do"
    add("--stem-relu", action=flag, help=f"ReLU after the first BatchNorm {about}")
    add("--max-pool", action=flag, help=f"max-pool {about}")
    add("--stem-stride", type=int, help=f"stride of the first convolution {about}")
    add("--padding", choices=["symmetric", "same", "wide-stem"], help="what its convolutions pad")
    add("--image-size", type=int, help="pixels it is used at; else 224, or 32 with a cifar stem")
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of its normalisation, in 0–1")
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of its normalisation, in 0–1")
    add("--full", action="store_true", help="OUT.byol.safetensors too: both networks, the heads")

    add = tasks.add_parser("export", help="byol_fast's weights to another project").add_argument
    add("source", type=Path, help="run folder, checkpoint, exported backbone or full state")
    add("out", type=Path, help="where to write; the layout's suffix is added")
    add("--to", dest="layout", required=True, metavar="LAYOUT", help="whose layout")
    add("--network", choices=NETWORKS, default="online", help="whose backbone")
    add(
        "--ignore-padding",
        action="store_true",
        help="write it although that project computes with another padding",
    )
    return parser


def _inspect(args: argparse.Namespace) -> None:
    from byol_fast.interop import describe, networks

    print(describe.describe(networks.read(args.file), keys=args.keys))


def _import(args: argparse.Namespace) -> None:
    from byol_fast.interop.describe import printable
    from byol_fast.interop.importing import import_file
    from byol_fast.networks.stem import described

    options = {key: value for key, value in vars(args).items() if key != "task"}
    done = import_file(options.pop("file"), options.pop("out"), **options)
    about = done.meta
    stem = described(about["stem"], about.get("stem_changes", {}))
    print(f"{done.networks.about}: the {args.network} {about['backbone']}, {stem}")
    for note in done.notes:
        print(f"note: {printable(note)}")
    for path in done.files:
        print(f"written: {path}")


def _export(args: argparse.Namespace) -> None:
    from byol_fast.interop.exporting import export_file

    for path in export_file(
        args.source,
        args.out,
        args.layout,
        network=args.network,
        ignore_padding=args.ignore_padding,
    ):
        print(f"written: {path}")


def _failed(code: Exit, error: BaseException) -> int:
    from byol_fast.interop.describe import printable

    print(f"error: {printable(str(error))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
