"""Images per second from files to two views: this package's sources beside other people's chains.

`python benchmarks/loader.py [--data DIR] [--stores folder beton tar] [--threads 1 2]
 [--device cuda] [--needed 3000] [--json FILE] [--chart FILE.svg]`

Crops, uint8, cut by the plan's windows from an image decoded once:
- `torch crops`, `dali crops`, `ffcv crops`: this package's sources; `synthetic crops`: none at all.
- `pil crops`: the same with Pillow. `ffcv two specs`: FFCV as shipped, which decodes for each view.
Views, whole: cropped, coloured, normalised:
- `torch views`, and on a GPU `dali views` and `ffcv views`: this package's pipeline.
- `lightly transform`: the BYOL transform of the installed package. `pil views`: what it and others
  write out of torchvision's transforms. `torchvision v2`: the same on tensors.
- `dali as solo-learn`: a DALI graph of the kind that solo-learn runs.

Every row is a process of its own, so that its memory is its own. They take turns over the same
images, A B C A B C, after a turn each to warm up. Two figures: images per second on the clock, and
images per second of processor time, which is the figure per core and hardly minds other load on
the machine. One image is one sample, both views. The time to the first batch runs from the
construction of the source to its first batch, imports and the opening of the store excluded. Host
memory is the process's peak, and what its worker processes hold for themselves; GPU memory is what
the device's use grew by during the row's turns, so nothing else may run there. What is not
installed is named and left out. Without --data JPEGs are generated. Ctrl-C and SIGTERM end it
after the rounds it has had.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import torch

from benchmarks import chart
from benchmarks.conditions import as_json, conditions, write
from benchmarks.figures import Turns, show, summarise
from benchmarks.make_data import STORES, generate, make_stores
from benchmarks.rows import Work, all_rows
from benchmarks.turns import measure
from pipelines.errors import DataError
from pipelines.sources.dali_decode import decoders
from pipelines.stores import open_store


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", help="a folder of images; without it JPEGs are generated")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=["folder"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--decode", nargs="+", help="of DALI: cpu, mixed, mixed:0.8, auto")
    parser.add_argument("--device", default="cpu", help="where the views are wanted: cpu or cuda")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a crop's side")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=384, help="images of a turn")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all rounds together")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name holds one")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--needed", type=float, help="images/s that a rank's GPU would take")
    parser.add_argument("--json", type=Path, help="where the result is written")
    parser.add_argument("--chart", type=Path, help="where a picture of it is written, as .svg")
    options = parser.parse_args(argv)
    options.argv = argv
    sizes = (*options.threads, options.batch_size, options.image_size)
    if min(sizes) < 1 or options.images < options.batch_size:
        parser.error("--threads and sizes are at least 1, --images at least a batch")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here")
    if options.decode is None:
        options.decode = ["cpu"] if options.device == "cpu" else ["cpu", "mixed"]
    for decode in options.decode:
        try:
            decoders(decode, torch.device(options.device))
        except ValueError as error:
            parser.error(f"--decode {decode}: {error}")
    rows = all_rows(options.stores, options.threads, options.decode, options.device)
    for text in options.only or ():
        if not any(text in row.label for row in rows):
            parser.error(f"--only {text!r} is in no row's name; --list names them")
    options.rows = [r for r in rows if not options.only or any(t in r.label for t in options.only)]
    return options


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Makes the data, measures, and puts the result together."""
    data = options.data or "generated JPEGs, 500 x 375"
    folder = options.data or str(
        generate(scratch, min(options.images, max(100, options.batch_size)))
    )
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder: --data names a folder of images")
    found = len(open_store(folder, verify=False))  # what is wrong with it is said at once
    if found < options.batch_size:
        raise DataError(f"{folder} holds {found} images: use --batch-size {found} or less")
    stores, missing = make_stores(folder, list(dict.fromkeys(["folder", *options.stores])), scratch)
    work = Work(stores, options.device, options.image_size, options.batch_size, options.images)
    rows = [row for row in options.rows if row.store in stores]
    where = conditions(
        "loader",
        ["python", "benchmarks/loader.py", *options.argv],
        torch.device(options.device),
    )
    where |= {
        "data": data,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "images_a_turn": work.steps * options.batch_size,
    }

    def each(turns: Turns) -> None:  # a run may be ended from outside
        write(options.json, as_json({**where, **summarise(turns, options.needed)}))

    turns, lost = measure(rows, work, options.seconds, each)
    lost["left_out"].update({f"the {name} store": reason for name, reason in missing.items()})
    if not turns:
        reasons = [f"{n}: {r}" for kind in lost.values() for n, r in kind.items()]
        raise DataError("no row is left to measure:\n  " + "\n  ".join(reasons))
    return {**where, **summarise(turns, options.needed), **lost}


def out_of_time(number: int, frame: FrameType | None) -> None:
    """SIGTERM, which `timeout` sends twice: what has been measured is to be shown."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if a row failed, 2 for wrong usage, 4 if there is nothing to measure."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    if options.list:
        print("\n".join(row.label for row in options.rows))
        return 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = run(options, Path(scratch))
    except DataError as error:
        print(error, file=sys.stderr)
        return 4
    show(result)
    write(options.json, as_json(result))
    if options.chart:
        write(options.chart, chart.draw(result))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, out_of_time)
    sys.exit(main())
