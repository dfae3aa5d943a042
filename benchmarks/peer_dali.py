"""A DALI pipeline of the kind that solo-learn pretrains with, which many projects have copied.

`python benchmarks/peer_dali.py DIR [--device cuda] [--threads 16] [--batch-size 256]`

What makes it that kind: DALI's reader and its own shuffling; an image is decoded once and each view
cut from the decoded image; every colour operation is computed for all images, and a coin then mixes
its result with what it was given; the views are float32, and cloned when they have left DALI. The
decoder is told to expect ImageNet's largest image, which takes 211 MB of the GPU for each thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import pipelines  # noqa: F401
except ImportError:  # run in a checkout: its root is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from torch import Tensor

from pipelines.spec import IMAGENET_MEAN, IMAGENET_STD, VIEW1, VIEW2, ViewSpec

LARGEST = {"device_memory_padding": 211_025_920, "host_memory_padding": 140_544_512}
NAMES = ["view1", "view2", "label"]


def mixed(probability: float, changed: Any, plain: Any) -> Any:
    """`changed` with a probability, else `plain`; both have been computed."""
    coin = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.BOOL)
    return coin * changed + (coin ^ True) * plain


def uniform(low: float, high: float) -> Any:
    """One number for each image."""
    return fn.random.uniform(range=[low, high])


def view(image: Any, spec: ViewSpec, size: int) -> Any:
    """Crop, jitter, grey, blur, solarize, flip and normalise: float32 `[3, S, S]`."""
    image = fn.random_resized_crop(
        image, size=[size, size], random_area=list(spec.crop_area), interp_type=types.INTERP_CUBIC
    )
    jittered = fn.color_twist(
        image,
        brightness=uniform(1 - spec.brightness, 1 + spec.brightness),
        contrast=uniform(1 - spec.contrast, 1 + spec.contrast),
        saturation=uniform(1 - spec.saturation, 1 + spec.saturation),
        hue=uniform(-360 * spec.hue, 360 * spec.hue),  # in degrees
    )
    image = mixed(spec.jitter, jittered, image)
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    image = mixed(spec.grey, fn.cat(grey, grey, grey, axis=2), image)
    if spec.blur:
        blurred = fn.gaussian_blur(image, window_size=23, sigma=uniform(*spec.blur_sigma))
        image = mixed(spec.blur, blurred, image)
    if spec.solarize:
        bright = image >= 128
        solarized = bright * (255 - image) + (bright ^ True) * image
        image = mixed(spec.solarize, solarized, image)
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in IMAGENET_MEAN],
        std=[255 * s for s in IMAGENET_STD],
        mirror=fn.random.coin_flip(probability=spec.flip),
    )


class TwoViews:
    """The pipeline behind DALI's iterator for torch.

    Args:
        folder: of class folders.
        threads: DALI's.
        size: S, pixels.
        batch_size: images of a batch, no more than the folder has.
        batches: of one pass; more than the folder has begin it again.
        device: `cpu`, or the GPU on which everything but the reading is done.
        decode: `cpu` keeps decoding off the GPU.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        size: int,
        batch_size: int,
        batches: int,
        device: str = "cpu",
        decode: str = "mixed",
    ) -> None:
        self._batches, where = batches, torch.device(device)
        gpu = where.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=(where.index or 0) if gpu else None,
            seed=12,
        )
        with pipeline:
            files, label = fn.readers.file(
                file_root=str(folder), shuffle_after_epoch=True, name="Reader"
            )
            nvjpeg = gpu and decode != "cpu"
            image = fn.decoders.image(
                files,
                device="mixed" if nvjpeg else "cpu",
                output_type=types.RGB,
                **(LARGEST if nvjpeg else {}),
            )
            if gpu:
                image, label = image.gpu(), label.gpu()
            views = [view(image, spec, size) for spec in (VIEW1, VIEW2)]
            pipeline.set_outputs(*views, fn.cast(label, dtype=types.INT64))
        self._iterator: Any = DALIGenericIterator(
            pipeline,
            NAMES,
            reader_name="Reader",
            last_batch_policy=LastBatchPolicy.DROP,
            auto_reset=True,
        )

    def batches(self) -> Iterator[list[Tensor]]:
        """The two views of each batch, float32 `[B, 3, S, S]`."""
        left = self._batches
        while left > 0:
            try:
                (batch,) = next(self._iterator)
            except StopIteration:  # an epoch's end; the next call begins another
                continue
            left -= 1
            yield [batch[name].detach().clone() for name in NAMES[:2]]

    def close(self) -> None:
        """Ends DALI's threads."""
        self._iterator = None


def main(argv: list[str] | None = None) -> float:
    """Prints and returns images per second, both views."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="class folders of images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decode", default="mixed", choices=["cpu", "mixed"], help="on a GPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", type=int, default=20, help="timed, after as many to warm up")
    options = parser.parse_args(argv)
    peer = TwoViews(
        options.folder,
        threads=options.threads,
        size=options.image_size,
        batch_size=options.batch_size,
        batches=options.batches,
        device=options.device,
        decode=options.decode,
    )
    started = 0.0
    for _ in range(2):  # the first to warm up
        started = time.perf_counter()
        for views in peer.batches():
            assert len(views) == 2
        if options.device != "cpu":
            torch.cuda.synchronize()
    rate = options.batches * options.batch_size / (time.perf_counter() - started)
    peer.close()
    print(f"{rate:.0f} images/s, both views ({options.threads} threads, {options.device})")
    return rate


if __name__ == "__main__":
    main()
