"""The pipeline from files to views, alone or with the step behind it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import hardware
from benchmarks.hardware import percentiles
from benchmarks.make_data import generate
from benchmarks.stepping import StepBench, StepSettings
from byol_fast.distributed import World
from byol_fast.graphed import WARM_UP
from pipelines.pipeline import ViewPipeline, build
from pipelines.spec import AugmentSpec

_DECODERS = {"TorchSource": "simplejpeg", "FfcvSource": "libffcv"}  # None: nothing is decoded
_GENERATED = 200  # images, or a batch: they are read again and again


def generated(scratch: Path, batch: int) -> str:
    """A folder of photograph-like JPEGs, at least `batch`, made at the first call."""
    folder = scratch / "images"
    if not folder.exists():
        folder.mkdir()
        generate(folder, max(_GENERATED, batch))
    return str(folder)


def measure(
    folder: str,
    settings: StepSettings,
    world: World,
    *,
    backend: str,
    steps: int,
    warm_up: int,
    train: bool,
) -> dict[str, Any]:
    """Images/s of the loader, or of training with it, and the share of time spent waiting."""
    bench = StepBench(settings, world) if train else None
    dtype = torch.float32 if bench is None else bench.views.dtype
    pipeline = build(
        folder,
        spec=AugmentSpec(image_size=settings.image_size),
        batch_size=settings.batch * world.size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        backend=backend,
        dtype=dtype,
    )
    try:
        return _measure(pipeline, bench, settings, world, steps, warm_up)
    finally:
        pipeline.close()


def what_ran(pipeline: ViewPipeline) -> dict[str, Any]:
    """Source, decoder and augmentation as they were used: `auto` may have chosen or fallen back."""
    source = pipeline.source
    trial = getattr(source, "_trial", None)
    augment: Any = pipeline._augment
    return {
        "source": type(source).__name__,
        "decoder": _DECODERS.get(type(source).__name__) if trial is None else str(trial.decoder),
        "augmentation": augment.func.__module__.rpartition(".")[2],
    }


def _measure(
    pipeline: ViewPipeline,
    bench: StepBench | None,
    settings: StepSettings,
    world: World,
    steps: int,
    warm_up: int,
) -> dict[str, Any]:
    if bench is not None and bench.graphed is not None:
        warm_up = max(warm_up, WARM_UP + 2)
    views = pipeline.steps(0, warm_up + steps)
    started = time.perf_counter()
    first = 0.0

    def step() -> None:
        batch = next(views)
        if bench is not None:
            bench.views = batch.x
            bench.step()

    for number in range(warm_up):
        step()
        if number == 0:
            hardware.wait(world.device)
            first = time.perf_counter() - started
    if bench is not None:
        bench.check_engine()
    hardware.wait(world.device)
    waited, begun = pipeline.stats()["wait"], time.perf_counter()
    seconds = hardware.step_seconds(step, world.device, steps)
    hardware.wait(world.device)
    elapsed = time.perf_counter() - begun
    stats = pipeline.stats()
    if bench is None:  # no work on the device between two events: the clock alone is right
        seconds = np.full(steps, elapsed / steps)
    rate = settings.batch * steps / elapsed
    return {
        "images_per_second_per_gpu": [
            float(f"{rate:.4g}") if bench is None else value
            for value in percentiles(settings.batch / seconds)
        ],
        "images_per_second": float(f"{rate * world.size:.5g}"),
        "step_ms": percentiles(1000 * seconds),
        "wait_share": (stats["wait"] - waited) / elapsed,
        "first_batch_seconds": first,
        "engine_ran": None if bench is None else bench.engine_ran,
        "compile_seconds": None if bench is None else bench.compile_seconds,
        **what_ran(pipeline),
        "bad": len(stats["bad"]),
        "n": steps,
    }
