"""Images per second from files to two views: this package's sources beside Pillow chains.

`python benchmarks/loader.py [--data DIR] [--image-size 224] [--threads 1 2] [--json FILE]`

- `pil crops`: what `ImageFolder` and two `RandomResizedCrop`s do (Pillow, bicubic), with the
  plan's windows, into a uint8 batch. `torch crops`, `dali crops`: the same by this package.
- `pil views`: the transform that lightly and solo-learn run for each view (crop, flip, jitter,
  grey, blur, solarize, tensor, normalise), twice. `our views`: crops and all colours by this
  package on the CPU.

Every row is a process of its own, so that its memory is its own; they take turns over the same
images, A B C A B C, after a turn each to warm up. Two figures: images per second on the clock, and
images per second of processor time, which is the figure per core and hardly minds other load on
the machine. One image is one sample, both views. Without --data JPEGs are generated.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

try:
    import pipelines  # noqa: F401
except ImportError:  # run in a checkout: its root is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as F

from pipelines.augment import reference
from pipelines.plan import Rows, RowStream
from pipelines.sources import dali_available
from pipelines.spec import IMAGENET_MEAN, IMAGENET_STD, AugmentSpec
from pipelines.stores import Store, open_store

BICUBIC = F.InterpolationMode.BICUBIC
LEAST_ROUNDS = 3
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "nvidia-dali-cuda130")


def pil_crops(store: Store, rows: list[Rows], size: int) -> Iterator[Tensor]:
    """Pillow with the plan's windows: uint8 `[2, B, S, S, 3]`, as the sources give."""
    for batch in rows:
        out = np.empty((2, len(batch), size, size, 3), dtype=np.uint8)
        for i, row in enumerate(batch.ids):
            image = load(store.name(int(row)))
            for view, window in enumerate(batch.windows[i].tolist()):
                out[view, i] = F.resized_crop(image, *window, [size, size], BICUBIC)
        yield torch.from_numpy(out)


def pil_views(store: Store, rows: list[Rows], size: int) -> Iterator[Tensor]:
    """The usual transform, twice, with draws of its own: float32 `[2, B, 3, S, S]`."""
    chains = [chain(size, blur=1.0, solarize=0.0), chain(size, blur=0.1, solarize=0.2)]
    for batch in rows:
        images = [load(store.name(int(row))) for row in batch.ids]
        yield torch.stack([torch.stack([c(image) for image in images]) for c in chains])


def load(path: str) -> Image.Image:
    """As torchvision's `ImageFolder` loads a file."""
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def chain(size: int, *, blur: float, solarize: float) -> T.Compose:
    """One view of BYOL as the Pillow-based packages write it."""
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([jitter], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([_blur], p=blur),
            T.RandomApply([ImageOps.solarize], p=solarize),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Chain:
    """A row of the table: runs through the same batches again and again.

    Args:
        kind: the row's name without its threads.
        threads: of the source; the Pillow chains have one.
    """

    def __init__(self, kind: str, threads: int, store: Store, rows: list[Rows], size: int) -> None:
        self.kind, self.store, self.rows, self.size = kind, store, rows, size
        self.spec = AugmentSpec(image_size=size)
        self.source: Any = None
        options = {"image_size": size, "device": "cpu", "threads": threads}
        if kind in ("torch crops", "our views"):
            from pipelines.sources.torch_source import TorchSource

            self.source = TorchSource(store, **options)
        elif kind == "dali crops":
            from pipelines.sources.dali_source import DaliSource

            self.source = DaliSource(store, **options)

    def batches(self) -> Iterator[Tensor]:
        """What the row makes of every batch."""
        match self.kind:
            case "pil crops":
                yield from pil_crops(self.store, self.rows, self.size)
            case "pil views":
                yield from pil_views(self.store, self.rows, self.size)
            case "our views":
                for crops, batch in zip(self.source.crops(self.rows), self.rows, strict=True):
                    yield reference.apply(crops, torch.from_numpy(batch.colours), self.spec)
            case _:
                yield from self.source.crops(self.rows)

    def turn(self) -> dict[str, float]:
        """One run through all batches."""
        clock, processor, images = time.perf_counter(), time.process_time(), 0
        for batch in self.batches():
            images += batch.shape[1]
        return {
            "images": images,
            "seconds": time.perf_counter() - clock,
            "processor_seconds": time.process_time() - processor,
        }


def serve(pipe: Any, kind: str, threads: int, options: argparse.Namespace) -> None:
    """A row's process: a turn for each message, until None."""
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    store = open_store(options.data, verify=False, progress=False)
    images = min(options.images, len(store))
    stream = RowStream(
        AugmentSpec(image_size=options.image_size),
        seed=0,
        sizes=store.sizes,
        batch_size=min(options.batch_size, images),
    )
    rows = [stream.rows(step) for step in range(max(1, images // stream.batch_size))]
    before = _peak_mb()
    chain = Chain(kind, threads, store, rows, options.image_size)
    while pipe.recv() is not None:
        pipe.send({**chain.turn(), "peak_mb": _peak_mb(), "imports_mb": before})
    if chain.source is not None:
        chain.source.close()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Turns of every row, round by round, until the time is over."""
    kinds: list[tuple[str, int]] = [("pil crops", 1)]
    kinds += [("torch crops", n) for n in options.threads]
    kinds += [("dali crops", n) for n in options.threads if dali_available()]
    kinds += [("pil views", 1), ("our views", 1)]
    if options.only:
        kinds = [(kind, n) for kind, n in kinds if kind in options.only]
    context = multiprocessing.get_context("spawn")
    rows: dict[str, tuple[Any, Any]] = {}
    for kind, threads in kinds:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, kind, threads, options), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies is an EOFError here, not a wait
        rows[f"{kind}, {threads} thread{'s' * (threads > 1)}"] = ours, process
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    started, rounds = 0.0, -1
    while rounds < LEAST_ROUNDS or time.perf_counter() - started < options.seconds:
        for name, (pipe, _) in rows.items():
            pipe.send("go")
            turn = pipe.recv()
            if rounds >= 0:  # the first is to warm up
                turns[name].append(turn)
        rounds += 1
        if rounds == 0:
            started = time.perf_counter()
    for pipe, process in rows.values():
        pipe.send(None)
        process.join()
    return turns


def summarise(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Percentiles of every row, and of the ratios within a round."""
    rates = {
        name: {
            "clock": np.array([t["images"] / t["seconds"] for t in all_turns]),
            "core": np.array([t["images"] / t["processor_seconds"] for t in all_turns]),
        }
        for name, all_turns in turns.items()
    }
    rows = {
        name: {
            "images_per_second": _percentiles(rate["clock"]),
            "images_per_core_second": _percentiles(rate["core"]),
            "peak_mb": round(max(t["peak_mb"] for t in turns[name])),
            "imports_mb": round(turns[name][0]["imports_mb"]),
            "n": len(turns[name]),
        }
        for name, rate in rates.items()
    }
    ratios = {}
    for name, rate in rates.items():
        for rival in ("pil crops, 1 thread", "pil views, 1 thread"):
            # crops beside full views: what a loader's cores save when colours are the GPU's work
            if (
                rival in rates
                and not name.startswith("pil")
                and ("crops" in name or "views" in rival)
            ):
                ratios[f"{name} / {rival.partition(',')[0]}"] = {
                    unit: _percentiles(rate[unit] / rates[rival][unit]) for unit in rate
                }
    return {"rows": rows, "ratios": ratios}


def _percentiles(values: np.ndarray) -> list[float]:
    """p20, p50, p80."""
    return [float(f"{v:.4g}") for v in np.percentile(values, [20, 50, 80])]


def generate(folder: Path, images: int) -> Path:
    """JPEGs of ImageNet's usual size, 500 x 375, and weight, about 110 KB."""
    (folder / "generated").mkdir()
    for number in range(images):
        rng = np.random.default_rng(number)
        pixels = np.full((375, 500, 3), 120.0)
        for cell, strength in ((1, 18), (4, 12), (16, 25), (64, 45)):
            small = (375 // cell + 1, 500 // cell + 1)
            for channel in range(3):
                layer = Image.fromarray(rng.normal(0, strength, small).astype(np.float32))
                pixels[..., channel] += np.asarray(
                    layer.resize((500, 375), Image.Resampling.BICUBIC)
                )
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
        (folder / "generated" / f"{number:04}.jpg").write_bytes(file.getvalue())
    return folder


def conditions(options: argparse.Namespace, data: str) -> dict[str, Any]:
    """What a reader needs to repeat the figures."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((n.partition(": ")[2] for n in lines if n.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "mode": "loader",
        "command": shlex.join(["python", "benchmarks/loader.py", *options.argv]),
        "commit": commit or None,
        "data": data,
        "image_size": options.image_size,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def show(result: dict[str, Any]) -> None:
    """The table on stdout."""
    print(f"{'':24}{'images/s':>20}{'images/s a core':>22}{'peak MB':>9}{'n':>4}")
    for name, row in result["rows"].items():
        clock, core = (
            "{:.0f} ({:.0f}-{:.0f})".format(*(row[unit][i] for i in (1, 0, 2)))
            for unit in ("images_per_second", "images_per_core_second")
        )
        print(f"{name:24}{clock:>20}{core:>22}{row['peak_mb']:>9}{row['n']:>4}")
    print("\nratios, median (p20-p80) over the rounds, on the clock and a core")
    for name, units in result["ratios"].items():
        clock, core = (
            "{1:.2f} ({0:.2f}-{2:.2f})".format(*units[unit]) for unit in ("clock", "core")
        )
        print(f"{name:48}{clock:>20}{core:>20}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns what --json writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", help="a folder of images; without it JPEGs are generated")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a crop's side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the sources")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=384, help="images of a turn")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all rounds together")
    parser.add_argument("--only", nargs="+", help="rows, such as 'pil crops' 'torch crops'")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or "generated JPEGs, 500 x 375"
        if options.data is None:
            options.data = str(generate(Path(scratch), min(options.images, 100)))
        open_store(options.data, verify=False)  # indexed once, before the rows start
        result = {**conditions(options, data), **summarise(measure(options))}
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
