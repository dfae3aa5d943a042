"""The quickstart's data and its last words: `python -m byol_fast.quickstart DIR | --summary RUN`.

The images are small squares cut from the photographs that ship inside scikit-image's wheel, so
nothing is downloaded but the package itself. The label of a square is the photograph it is from:
grass, gravel, brick, coins, tissue, galaxies, ... No two squares share a pixel.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.errors import DataError

Squares = npt.NDArray[np.uint8]  # [n, SIDE, SIDE, 3]

PHOTOGRAPHS = {  # class: file; public domain or CC0, as scikit-image documents each
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
SIDE = 32  # pixels
MOST = 256  # squares of a photograph
TEST_EVERY = 4  # every fourth square of a photograph is a test image
FLAT = 6.0  # grey levels: squares that vary less (black corners, empty sky) say nothing
MANIFEST = "quickstart.json"


def photographs() -> dict[str, Squares]:
    """The squares of each photograph, row by row.

    Raises:
        DataError: scikit-image is missing, or does not hold one of the photographs.
    """
    package = importlib.util.find_spec("skimage")  # found, not imported: that would take seconds
    if package is None or package.origin is None:
        raise DataError(
            "the quickstart's photographs ship inside scikit-image, which is not installed: "
            "pip install '.[quickstart]' in the checkout"
        )
    folder = Path(package.origin).parent / "data"
    try:
        return {
            name: squares(np.asarray(Image.open(folder / file).convert("RGB")))
            for name, file in PHOTOGRAPHS.items()
        }
    except OSError as error:
        raise DataError(
            f"scikit-image does not hold a photograph of the quickstart ({error}): "
            "install the version in requirements.lock"
        ) from error


def squares(photograph: Squares) -> Squares:
    """At most MOST squares of a photograph `[H, W, 3]` on a grid, flat ones left out."""
    rows, columns = photograph.shape[0] // SIDE, photograph.shape[1] // SIDE
    grid = photograph[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
    cells: Squares = grid.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    cells = cells[cells.std(axis=(1, 2)).mean(axis=1) > FLAT]
    if len(cells) > MOST:  # evenly spread over the photograph
        cells = cells[np.linspace(0, len(cells) - 1, MOST).astype(np.int64)]
    return cells


def prepare(folder: Path) -> bool:
    """Write the squares as PNG files to `folder`/train and `folder`/test, in class folders.

    The folder appears under its name only when it is complete; the same files come out every time.

    Returns:
        True if they were written, False if they were there already.

    Raises:
        DataError: the folder exists and was not made here, or the photographs cannot be had.
    """
    if _counts(folder) is not None:
        return False
    if folder.exists() and not (folder / MANIFEST).is_file() and _has_content(folder):
        raise DataError(
            f"{folder} exists and holds something else than the quickstart's images: "
            "name another folder, or move this one away"
        )
    images = photographs()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if partial.exists():  # what a killed run left
            shutil.rmtree(partial)
        _write(partial, images)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise DataError(f"cannot write the images to {folder}: {error}") from error
    return True


def _write(folder: Path, images: dict[str, Squares]) -> None:
    counts = {"train": 0, "test": 0}
    digest = hashlib.sha256()
    for name, cells in images.items():
        digest.update(cells.tobytes())
        for number, pixels in enumerate(cells):
            split = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "train"
            counts[split] += 1
            path = folder / split / name / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    manifest = {
        "images": f"squares of {SIDE} x {SIDE} pixels; the class is the photograph",
        "source": "scikit-image, skimage/data",
        "licence": "public domain or CC0; see the docstrings of skimage.data",
        "counts": counts,
        "pixels_sha256": digest.hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _has_content(folder: Path) -> bool:
    return not folder.is_dir() or any(folder.iterdir())


def _counts(folder: Path) -> dict[str, int] | None:
    """Images of a folder that `prepare` made and that is still whole; else None."""
    try:
        counts = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["counts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = {
        split: sum(path.stat().st_size > 0 for path in (folder / split).glob("*/*.png"))
        for split in ("train", "test")
    }
    return counts if found == counts else None


def summary(run: Path) -> str:
    """The closing block of a run: accuracies, speed, the report, the next command.

    Args:
        run: a run folder with `summary.json`; its accuracies are shares of 1.

    Raises:
        DataError: the file is missing or lacks a figure.
    """
    path = run / "summary.json"
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        raw, untrained, trained, rate, seconds = (
            float(figures[key])
            for key in (
                "knn_raw_pixels",
                "knn_untrained",
                "knn_trained",
                "images_per_second",
                "training_seconds",
            )
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not hold a finished run's figures ({type(error).__name__}: {error}): "
            "repeat the training command, which resumes it"
        ) from error
    lines = [
        "quickstart: done",
        f"  kNN accuracy, raw pixels         {raw:6.1%}",
        f"  kNN accuracy, untrained network  {untrained:6.1%}",
        f"  kNN accuracy, trained network    {trained:6.1%}",
        f"  training                         {seconds:.0f} s, {rate:,.0f} images/s",
        f"  report                           {figures.get('report') or run / 'report.html'}",
        "  next, your GPUs and your folder of images:",
        f"    {_next_command()}",
    ]
    if not trained > max(raw, untrained) or not math.isfinite(trained):
        lines.append("  The trained network is not the best of the three: the report shows why.")
    return "\n".join(lines)


def _next_command() -> str:
    torchrun = Path(sys.executable).with_name("torchrun")
    try:
        torchrun = torchrun.relative_to(Path.cwd())
    except ValueError:
        if shutil.which("torchrun") == str(torchrun):
            torchrun = Path("torchrun")
    return (
        f"{shlex.quote(str(torchrun))} --nproc_per_node={_gpus() or 8} -m byol_fast.pretrain "
        "--data /imagenet/train --epochs 300 --batch-size 4096"
    )


def _gpus() -> int:
    """How many GPUs the driver lists; importing torch for it would take seconds."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: done, 2: usage, 4: the data cannot be made or the run has no figures."""
    parser = argparse.ArgumentParser(prog="python -m byol_fast.quickstart", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", type=Path, help="where train/ and test/ are written")
    what.add_argument("--summary", metavar="RUN", type=Path, help="a run folder to sum up")
    args = parser.parse_args(argv)
    try:
        if args.summary is not None:
            print(summary(args.summary))
            return 0
        written = prepare(args.folder)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    state = "written" if written else "already there"
    counts = _counts(args.folder)
    assert counts is not None
    print(
        f"{args.folder}: {counts['train']:,} training and {counts['test']:,} test images "
        f"of {len(PHOTOGRAPHS)} photographs, {state}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
