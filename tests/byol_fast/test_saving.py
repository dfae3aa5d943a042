"""When a checkpoint is due: by the clock, by steps, at the end, and once another is written."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from byol_fast.distributed import World
from byol_fast.session import saving
from byol_fast.session.saving import Saving

END = 1000


class Clock:
    """`time.monotonic` by hand, in minutes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.minutes = 100.0
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: 60 * self.minutes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Writer:
    """Takes checkpoints, and is as busy as it is told to be."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.busy, self.error = False, None

    def save(self, step: int, state: object) -> None:
        self.steps.append(step)

    def wait(self) -> None:
        pass


def make(*, rank: int = 0, steps: int = 0, minutes: float = math.inf, keep=None) -> Saving:
    return Saving(
        World(rank, 2, torch.device("cpu")),
        Writer(),  # type: ignore[arg-type]
        every_steps=steps,
        every_minutes=minutes,
        keep_every=keep,
    )


def train(it: Saving, clock: Clock, minutes_a_step: float, first: int, last: int) -> list[int]:
    """The steps that were saved."""
    saved = []
    for step in range(first, last + 1):
        clock.minutes += minutes_a_step
        if it.due(step, END):
            it.save(step, {}, wait=False)
            saved.append(step)
    return saved


def test_by_the_clock_counted_from_the_last_one(clock: Clock) -> None:
    it = make(minutes=30)
    assert train(it, clock, 11, 1, 10) == [3, 6, 9]  # after 33 minutes each
    clock.minutes += 500  # an evaluation: one checkpoint makes up for it
    assert train(it, clock, 11, 11, 16) == [11, 14]
    assert it.writer.steps == [3, 6, 9, 11, 14]  # type: ignore[attr-defined]


def test_not_before_the_time_is_over(clock: Clock) -> None:
    it = make(minutes=30)
    clock.minutes += 30
    assert not it.due(1, END)
    clock.minutes += 0.01
    assert it.due(2, END)


def test_a_checkpoint_at_a_stop_sets_the_clock_back(clock: Clock) -> None:
    it = make(minutes=30)
    clock.minutes += 29
    it.save(5, {}, wait=False)  # a signal
    clock.minutes += 29
    assert not it.due(6, END)
    clock.minutes += 2
    assert it.due(7, END)


def test_a_resumed_session_counts_from_its_own_start(clock: Clock) -> None:
    it = make(minutes=30)
    it.resumed(70)
    assert train(it, clock, 11, 71, 76) == [73, 76]


def test_by_steps_the_clock_plays_no_part(clock: Clock) -> None:
    assert train(make(steps=4), clock, 10_000, 1, 13) == [4, 8, 12]
    assert train(make(minutes=30, keep=Fraction(5)), clock, 1, 1, 11) == [5, 10]


def test_what_falls_due_while_another_is_written_is_saved_right_after(clock: Clock) -> None:
    it = make(minutes=30)
    assert train(it, clock, 31, 1, 1) == [1]
    it.writer.busy = True  # type: ignore[misc]
    assert train(it, clock, 31, 2, 4) == []
    it.writer.busy = False  # type: ignore[misc]
    assert train(it, clock, 0, 5, 8) == [5]


def test_the_other_ranks_clocks_play_no_part(clock: Clock) -> None:
    it = make(rank=1, minutes=30, steps=2)
    assert train(it, clock, 500, 1, 9) == []
    assert it.due(END, END)  # the end is everybody's


def test_the_last_step_is_saved_once(clock: Clock) -> None:
    it = make(minutes=30)
    assert it.due(END, END)
    it.save(END, {}, wait=True)
    clock.minutes += 500
    assert not it.due(END, END)
