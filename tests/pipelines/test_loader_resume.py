"""Killed in mid-epoch, or started again on another number of ranks: not a row lost or repeated."""

from __future__ import annotations

import multiprocessing
import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from pipelines import convert
from pipelines.spec import AugmentSpec
from tests.support import OPTIONAL_BACKENDS, make_folder

IMAGES, BATCH, STEPS = (
    37,
    8,
    14,
)  # 4.6 steps an epoch: three epochs, each with a step across its end
SIZE = 32
Step = tuple[int, list[int], int]  # number, sample ids, checksum of views and labels


BACKENDS = [
    "torch",
    "synthetic",
    *OPTIONAL_BACKENDS,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", images=IMAGES)


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    """What each backend reads: the same images, in a file of FFCV's where it is FFCV."""
    beton = folder.with_suffix(".beton")
    assert convert.main([str(folder), str(beton)]) == 0
    return {
        "torch": str(folder),
        "dali": str(folder),
        "ffcv": str(beton),
        "synthetic": f"synthetic:{IMAGES}",
    }


def build(data: str, backend: str, **options: Any) -> pipelines.ViewPipeline:
    spec = AugmentSpec(image_size=SIZE)
    options = {"batch_size": BATCH, "seed": 5, "threads": 2, **options}
    return pipelines.build(data, spec=spec, backend=backend, **options)


def steps(data: str, backend: str, first: int, stop: int) -> Iterator[Step]:
    pipeline = build(data, backend)
    for number, views in enumerate(pipeline.steps(first, stop), first):
        pixels = zlib.crc32(views.x.contiguous().numpy().tobytes())
        yield number, views.index.tolist(), zlib.crc32(views.label.numpy().tobytes(), pixels)
    pipeline.close()


def train(pipe: Any, room: Any, data: str, backend: str, first: int) -> None:
    """A training process: reports each step that it has had."""
    for step in steps(data, backend, first, STEPS):
        room.acquire()
        pipe.send(step)
    pipe.close()


def run(data: str, backend: str, first: int, *, kill_after: int | None = None) -> list[Step]:
    """A process's steps from `first` on; with `kill_after` it is killed once it has had so many.

    It can get two steps further than that, while its workers are busy with batches ahead of it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pipelines.pipeline"])  # imported once for all
    ours, theirs = context.Pipe(duplex=False)
    room = context.Semaphore(STEPS if kill_after is None else kill_after + 2)
    process = context.Process(target=train, args=(theirs, room, data, backend, first))
    process.start()
    theirs.close()
    had: list[Step] = []
    try:
        while True:
            had.append(ours.recv())
            if len(had) == kill_after and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
    except (EOFError, OSError):  # OSError: killed in the middle of a message
        process.join()
    assert process.exitcode == (0 if kill_after is None else -signal.SIGKILL)
    return had


@pytest.mark.parametrize(
    "backend",
    [
        *BACKENDS[:2],
        *(pytest.param(*b.values, marks=[*b.marks, pytest.mark.slow]) for b in BACKENDS[2:]),
    ],
)
def test_a_killed_loader_goes_on_with_exactly_its_remaining_rows(
    backend: str, data: dict[str, str]
) -> None:
    whole = list(steps(data[backend], backend, 0, STEPS))
    assert [number for number, _, _ in whole] == list(range(STEPS))
    assert len({checksum for _, _, checksum in whole}) == STEPS  # a repeated step would show
    had = run(data[backend], backend, 0, kill_after=7)
    assert 7 <= len(had) < STEPS - 2
    rest = run(data[backend], backend, len(had))
    assert had + rest == whole


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("before", "after"), [(8, 4), (2, 1)])
def test_another_number_of_ranks_goes_on_with_the_same_global_sequence(
    backend: str, before: int, after: int, data: dict[str, str]
) -> None:
    ids, pixels = of_all_ranks(data[backend], backend, 1, 0, STEPS)
    first = of_all_ranks(data[backend], backend, before, 0, 6)  # in the second epoch
    then = of_all_ranks(data[backend], backend, after, 6, STEPS)
    assert torch.equal(torch.cat([first[0], then[0]]), ids)
    assert torch.equal(torch.cat([first[1], then[1]]), pixels)
    assert len(ids.unique()) == IMAGES


def of_all_ranks(
    data: str, backend: str, ranks: int, first: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[steps, BATCH]` and views `[steps, 2, BATCH, ...]`, rank beside rank."""
    ids, pixels = [], []
    for rank in range(ranks):
        pipeline = build(data, backend, rank=rank, world_size=ranks, threads=1)
        views = list(pipeline.steps(first, stop))
        pipeline.close()
        ids.append(torch.stack([v.index for v in views]))
        pixels.append(torch.stack([v.x for v in views]))
    return torch.cat(ids, dim=1), torch.cat(pixels, dim=2)
