"""How `decode` is spelt, and how `auto` finds the fastest decoder while a run goes on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipelines.sources.dali_decode import (
    CANDIDATES,
    CPU,
    MIXED,
    PART,
    PARTS,
    STRIKES,
    WARMUP,
    Decoder,
    StreamClock,
    Trial,
    decoders,
)

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
HALF, ALL, NONE = Decoder("mixed", 0.5), Decoder("mixed", 1.0), Decoder("mixed")
TURN = WARMUP + PART * PARTS  # batches
BATCH = 32


class Hands:
    """A clock that a test moves. `late` marks are reached when it says so."""

    def __init__(self) -> None:
        self.now, self.late = 0.0, False

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float | None:
        return None if self.late else end - start


class Run:
    """A run in which a batch takes a second or what its decoder needs, whichever is longer.

    Args:
        costs: seconds a batch of each decoder.
        ahead: batches in DALI beside the one in use.
    """

    def __init__(self, costs: dict[Decoder, float], *, ahead: int = 2, step: float = 1.0) -> None:
        self.costs, self.ahead, self.step, self.clock = costs, ahead, step, Hands()
        self.trial = Trial(list(costs), self.clock)
        self.used: list[Decoder] = []
        self.flight: deque[Decoder] = deque()

    def go(self, batches: int) -> None:
        for _ in range(batches):
            while len(self.flight) <= self.ahead:
                self.flight.append(self.trial.decoder)
            decoder = self.flight.popleft()
            self.clock.now += max(self.step, self.costs[decoder])
            self.used.append(decoder)
            self.trial.taken(decoder, BATCH)


@pytest.mark.parametrize(
    ("word", "device", "expected"),
    [
        ("cpu", HOST, (CPU,)),
        ("cpu", GPU, (CPU,)),
        ("auto", HOST, (CPU,)),
        ("auto", GPU, CANDIDATES),
        ("mixed", GPU, (MIXED,)),
        ("mixed:0", GPU, (NONE,)),
        ("mixed:0.5", GPU, (HALF,)),
        ("mixed:1", GPU, (ALL,)),
    ],
)
def test_words(word: str, device: torch.device, expected: Sequence[Decoder]) -> None:
    assert decoders(word, device) == expected


@pytest.mark.parametrize("word", ["", "gpu", "mixed:", "mixed:1.1", "mixed:-1", "mixed:nan", "mix"])
def test_a_wrong_word_is_refused_with_the_right_ones(word: str) -> None:
    for device in (HOST, GPU):
        with pytest.raises(ValueError, match=r"auto, cpu, mixed, or mixed with .*mixed:0.65"):
            decoders(word, device)


def test_names_are_read_back() -> None:
    assert str(CANDIDATES[0]) == "mixed:0.65" and str(CPU) == "cpu"
    assert all(decoders(str(c), GPU) == (c,) for c in CANDIDATES)
    assert {c.needs for c in CANDIDATES} == {0, 1, 2}  # there is always something to fall back on


def test_the_fastest_stays_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    run = Run({HALF: 4.0, ALL: 2.0, NONE: 8.0, CPU: 16.0})
    with caplog.at_level(logging.INFO):
        run.go(4 * (TURN + 2) + 20)
    assert [r.getMessage() for r in caplog.records] == [
        "DALI decodes with mixed:1; images/s of the whole run: "
        "mixed:0.5 8, mixed:1 16, mixed:0 4, cpu 2"
    ]
    turns = [d for i, d in enumerate(run.used) if i == 0 or run.used[i - 1] != d]
    assert turns == [HALF, ALL, NONE, CPU, ALL]  # each had one turn, without going back and forth
    assert run.used.count(HALF) == TURN + run.ahead and run.trial.decoder == ALL


def test_where_the_training_is_the_slowest_the_first_is_kept() -> None:
    run = Run({HALF: 0.9, ALL: 0.2, CPU: 0.5})
    run.go(4 * TURN)
    assert run.trial.decoder == HALF
    close = Run({HALF: 2.02, ALL: 2.0, CPU: 5.0})
    close.go(4 * TURN)
    assert close.trial.decoder == HALF


def test_a_single_candidate_has_no_trial(caplog: pytest.LogCaptureFixture) -> None:
    run = Run({CPU: 4.0})
    with caplog.at_level(logging.INFO):
        run.go(3 * TURN)
    assert set(run.used) == {CPU} and not caplog.records


@pytest.mark.parametrize("seconds", [1000, -17])
def test_one_odd_part_does_not_decide(seconds: float) -> None:
    """A pause, as for a checkpoint, or batches that had been ready for long."""
    run = Run({HALF: 2.0, CPU: 3.0} if seconds > 0 else {HALF: 3.0, CPU: 2.0})
    run.go(WARMUP + 2)
    run.clock.now += seconds
    run.go(3 * TURN)
    assert run.trial.decoder == (HALF if seconds > 0 else CPU)


def test_time_between_epochs_is_not_counted() -> None:
    run = Run({HALF: 2.0, CPU: 3.0})
    for _ in range(20):  # epochs of two parts, with an evaluation after each
        run.go(WARMUP + 2 * PART)
        run.flight.clear()
        run.trial.pause()
        run.clock.now += 1000
        run.trial.pause()
    assert run.trial.decoder == HALF
    assert run.used[-1] == HALF and CPU in run.used


def test_epochs_too_short_to_time_keep_the_first() -> None:
    run = Run({HALF: 9.0, CPU: 3.0})
    for _ in range(20):
        run.go(WARMUP + PART - 1)
        run.trial.pause()
    assert set(run.used) == {HALF}


def test_marks_that_the_gpu_has_not_reached_hold_nothing_up() -> None:
    run = Run({HALF: 2.0, CPU: 3.0})
    run.clock.late = True
    run.go(2 * TURN + 10)
    assert run.used[-1] == CPU  # the last to be tried goes on
    run.clock.late = False
    run.go(run.ahead + 2)
    assert run.used[-1] == HALF


def test_what_does_not_work_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """First the JPEG engines, then nvJPEG; what else was measured is not lost."""
    trial = Trial([HALF, ALL, NONE, CPU], Hands())
    assert trial.drop(HALF, RuntimeError("no engine"))
    assert trial.decoder == NONE
    assert trial.drop(NONE, RuntimeError("no nvJPEG"))
    assert trial.decoder == CPU
    assert not trial.drop(CPU, RuntimeError("nothing works"))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "DALI cannot decode with mixed:0.5 and goes on with mixed:0: no engine",
        "DALI cannot decode with mixed:0 and goes on with cpu: no nvJPEG",
    ]

    run = Run({HALF: 2.0, NONE: 3.0, CPU: 2.5})
    run.go(4 * TURN)
    assert run.trial.decoder == HALF
    assert run.trial.drop(HALF, RuntimeError("it broke later"))
    assert run.trial.decoder == CPU


def test_a_few_failures_are_forgiven_a_certain_one_is_not() -> None:
    error = RuntimeError("nvImageCodec failure")
    trial = Trial([HALF, CPU], Hands())
    for _ in range(2):
        for _ in range(STRIKES):
            assert trial.failed(HALF, error, certain=False) and trial.decoder == HALF
        trial.taken(HALF, BATCH)
    for _ in range(STRIKES + 1):
        assert trial.failed(HALF, error, certain=False)
    assert trial.decoder == CPU
    assert Trial([HALF, CPU], Hands()).failed(HALF, error, certain=True)

    alone = Trial([HALF], Hands())  # asked for: nothing else is put in its place
    assert all(alone.failed(HALF, error, certain=False) for _ in range(STRIKES + 2))
    assert alone.decoder == HALF and not alone.failed(HALF, error, certain=True)


def test_without_a_gpu_the_clock_is_the_wall() -> None:
    clock = StreamClock(HOST)
    start = clock.mark()
    seconds: Any = clock.seconds(start, clock.mark())
    assert 0 <= seconds < 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_clock_is_the_stream() -> None:
    """Work that was queued counts where it is done, and nobody waits for it."""
    device = torch.device("cuda", torch.cuda.current_device())
    clock, busy = StreamClock(device), torch.ones(4096, 4096, device=device)
    (busy @ busy).sum().item()  # warm
    start = clock.mark()
    for _ in range(300):
        busy @ busy
    end = clock.mark()
    pending = clock.seconds(start, end)
    torch.cuda.synchronize(device)
    seconds = clock.seconds(start, end)
    assert pending is None and seconds is not None and seconds > 0.001
