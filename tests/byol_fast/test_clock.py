"""Seconds of training: counted up to a checkpoint, without evaluations; and when one is due."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from byol_fast.distributed import World
from byol_fast.session import clock as clock_module
from byol_fast.session import saving as saving_module
from byol_fast.session.async_checkpoint import CheckpointWriter
from byol_fast.session.clock import Clock
from byol_fast.session.saving import Saving


class Time:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock_module, "time", time)
    monkeypatch.setattr(saving_module, "time", time)
    return time


def test_seconds_count_between_two_lines_of_the_log(time: Time) -> None:
    clock = Clock(50.0, step=10)
    time.now += 3
    assert clock.so_far == 53 and clock.seconds == 50
    assert clock.lap(12) == 3
    time.now += 4
    assert (clock.so_far, clock.seconds, clock.step) == (57, 53, 12)


def test_an_evaluation_is_not_training(time: Time) -> None:
    clock = Clock()
    time.now += 1
    with clock.paused():
        time.now += 100
    time.now += 2
    assert clock.so_far == 3 and clock.lap(1) == 3


def test_what_comes_before_the_first_step_is_not_training(time: Time) -> None:
    clock = Clock(20.0)
    time.now += 60  # networks are compiled
    clock.lap()
    time.now += 1
    assert clock.so_far == 21


class Writer(CheckpointWriter):
    """One that is busy when it is told to be."""

    busy = False  # type: ignore[assignment]


def make(folder: Path, *, rank: int = 0, steps: int = 0, minutes: float = 30.0) -> Saving:
    world = World(rank, 1, torch.device("cpu"))
    return Saving(world, Writer(folder), every_steps=steps, every_minutes=minutes, keep_every=None)


def test_by_time_one_is_due_after_that_many_minutes(time: Time, tmp_path: Path) -> None:
    saving = make(tmp_path)
    time.now += 30 * 60
    assert not saving.due(5, 100)
    time.now += 1
    assert saving.due(6, 100)
    saving.save(6, None, wait=False)
    assert not saving.due(7, 100)
    time.now += 30 * 60 + 1
    assert saving.due(8, 100)


def test_by_time_and_busy_it_is_saved_once_that_is_over(time: Time, tmp_path: Path) -> None:
    saving = make(tmp_path)
    time.now += 31 * 60
    Writer.busy = True  # type: ignore[assignment]
    try:
        assert not saving.due(5, 100)
    finally:
        Writer.busy = False  # type: ignore[assignment]
    assert saving.due(6, 100)


def test_by_time_rank_0_alone_decides(time: Time, tmp_path: Path) -> None:
    saving = make(tmp_path, rank=1)
    time.now += 1e6
    assert not saving.due(5, 100)
    assert saving.due(100, 100), "but the end is everybody's"


def test_by_steps_time_does_not_count(time: Time, tmp_path: Path) -> None:
    saving = make(tmp_path, steps=4, minutes=float("inf"))
    time.now += 1e9
    assert [step for step in range(1, 10) if saving.due(step, 100)] == [4, 5, 6, 7, 8, 9]
    saving.save(9, None, wait=False)
    assert [step for step in range(10, 14) if saving.due(step, 100)] == [12, 13]


def test_a_checkpoint_that_is_there_is_not_saved_again_at_the_end(tmp_path: Path) -> None:
    saving = make(tmp_path)
    saving.resumed(100)
    assert not saving.due(100, 100)
