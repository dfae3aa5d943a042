"""Any data set as one `.beton` file: `python -m pipelines.convert DIR OUT.beton`.

Every image is decoded strictly on its way; what cannot be is left out, named and counted. The same
images, options and library versions give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.conversion.betoncheck import check_beton, check_text
from pipelines.conversion.runner import convert
from pipelines.conversion.storage import MODES, Storage
from pipelines.cores import worker_threads
from pipelines.errors import DataError, MissingBackend
from pipelines.index import positive

_EPILOG = """\
modes, for images that are not plain JPEGs of the wanted size already (those are copied):
  jpeg      encode them as JPEGs of --quality
  lossless  store their pixels: nothing is lost, in about 8 times the space of a JPEG
  raw       store the pixels of every image, JPEGs too: nothing is left to decode when training;
            for small images, or with --max-side where the disk is large enough
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0 done, 4 data refused, 130 and 143 interrupted."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.perf_counter()
    try:
        with _sigterm_interrupts() as interrupted:
            if args.check:
                report = check_beton(args.data, workers=args.workers)
                print(json.dumps(report, indent=2) if args.json else check_text(report))
                return 0 if report["sound"] else 4
            report = convert(
                args.data,
                args.out,
                storage=Storage(args.mode, args.quality, args.max_side),
                labels=not args.no_labels,
                workers=args.workers,
                force=args.force,
            )
    except DataError as error:
        print(error, file=sys.stderr)
        return 4
    except MissingBackend as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + (signal.SIGTERM if interrupted else signal.SIGINT)
    seconds = time.perf_counter() - start
    report |= {
        "out": str(args.out),
        "seconds": round(seconds, 3),
        "images_per_second": round(report["samples"] / max(seconds, 1e-9), 1),
    }
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.convert",
        description="Write a data set as one .beton file, or check such a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "data", metavar="DIR", help="folder of images, tar shards, .npz, ...; with --check a .beton"
    )
    add("out", type=Path, nargs="?", metavar="OUT.beton", help="file to write")
    add("--mode", choices=MODES, default="jpeg", help="see below (default: %(default)s)")
    add(
        "--max-side",
        type=positive,
        metavar="N",
        help="bring the longer side of larger images down to N pixels (default: keep all sizes)",
    )
    add(
        "--quality",
        type=_quality,
        default=90,
        metavar="Q",
        help="of JPEGs encoded here, 1 to 100 (default 90, as FFCV's ImageNet files have it: "
        "36 dB PSNR at 256 pixels; 95 gives 38 dB in 1.4 times the bytes)",
    )
    add("--no-labels", action="store_true", help="leave labels and classes out")
    add("--workers", type=positive, metavar="N", help="threads (default: every core)")
    add("--force", action="store_true", help="replace OUT.beton if it exists")
    add("--check", action="store_true", help="compare a .beton's sha256 and decode it strictly")
    add("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    if args.check:
        if args.out is not None:
            parser.error("--check takes one file")
        args.data = Path(args.data)
    elif args.out is None:
        parser.error("name the file to write: DIR OUT.beton")
    args.workers = args.workers or worker_threads()
    return args


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


@contextmanager
def _sigterm_interrupts() -> Iterator[list[int]]:
    """SIGTERM, entered in the list, ends the work as Ctrl-C does, so that no part file stays."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _text(report: dict[str, Any]) -> str:
    stored = ", ".join(f"{count:,} {how}" for how, count in report["stored"].items())
    height, width = report["height"], report["width"]
    classes, megabytes = len(report["classes"]), report["bytes"] / 1e6
    lines = [
        f"{report['out']}: {report['samples']:,} images ({stored}), {megabytes:,.1f} MB",
        f"classes: {classes}" if classes else "classes: none, the file is unlabelled",
        f"height {height['min']} to {height['max']}, mean {height['mean']}; "
        f"width {width['min']} to {width['max']}, mean {width['mean']} pixels",
        f"quarantined: {len(report['quarantined'])}",
        *(f"  {bad['name']}: {bad['reason']}" for bad in report["quarantined"]),
        f"{report['seconds']:.1f} s, {report['images_per_second']:,.0f} images/s; "
        f"sha256 {report['sha256'][:16]}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end it
    sys.exit(main())
