"""Rows as processes that take turns: A B C A B C, after a turn each to warm up."""

from __future__ import annotations

import multiprocessing
import random
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from benchmarks.figures import Turns
from benchmarks.rows import Chain, Row, Work, open_chain, prepare
from benchmarks.usage import gpu_mb, host_mb, processor_seconds

LEAST_ROUNDS = 3


class Turner:
    """A row's process's side: makes the chain at the first turn, then runs through it."""

    def __init__(self, row: Row, work: Work) -> None:
        torch.set_num_threads(row.threads if row.work == "views" and not row.peer else 1)
        random.seed(0)
        torch.manual_seed(0)
        self.row, self.device = row, torch.device(work.device)
        self.job = prepare(row, work)
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)  # its context is not the loader's memory
        self.chain: Chain | None = None
        self.first_batch_seconds = self.grown_mb = 0.0
        self.imports_mb = host_mb()

    def turn(self) -> dict[str, float]:
        """One run through all images."""
        gpu = gpu_mb(self.device)
        clock, processor, images = time.perf_counter(), processor_seconds(), 0
        fresh = self.chain is None
        if self.chain is None:
            self.chain = open_chain(self.row, self.job)
        for batch in self.chain.batches():
            if self.device.type == "cuda" and not batch[0].is_cuda:
                batch = [view.to(self.device, non_blocking=True) for view in batch]
            images += len(batch[0])
            if fresh and images == len(batch[0]):
                self._wait()
                self.first_batch_seconds = time.perf_counter() - clock
        self._wait()
        self.grown_mb += gpu_mb(self.device) - gpu
        return {
            "images": images,
            "seconds": time.perf_counter() - clock,
            "processor_seconds": processor_seconds() - processor,
            "first_batch_seconds": self.first_batch_seconds,
            "host_mb": host_mb(),
            "imports_mb": self.imports_mb,
            "gpu_mb": self.grown_mb,
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rest(most: float = 20.0) -> None:
    """Waits until this process does nothing more: a loader that works ahead goes on for seconds
    after its turn, at the cost of the rows that follow."""
    until = time.perf_counter() + most
    before = -1.0
    while (now := processor_seconds()) - before > 0.02 and time.perf_counter() < until:
        before = now
        time.sleep(0.2)


def serve(pipe: Any, row: Row, work: Work) -> None:
    """A row's process: a turn for each message, until None."""
    turner = None
    try:
        try:
            turner = Turner(row, work)
        except (ImportError, OSError) as error:
            pipe.send({"left_out": str(error)})
            return
        pipe.send({"ready": True})
        while pipe.recv() is not None:
            turn = turner.turn()
            rest()
            pipe.send({"turn": turn})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {error}"})
    finally:
        if turner is not None and turner.chain is not None:
            turner.chain.close()


class Runner:
    """A row's process, seen from the outside."""

    def __init__(self, row: Row, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, row, work))
        self.process.start()
        theirs.close()  # so that a process that dies is an EOFError here, not a wait

    def answer(self) -> dict[str, Any]:
        """What the process says next."""
        try:
            answer: dict[str, Any] = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return {"failed": f"its process ended with code {self.process.exitcode}"}
        return answer

    def turn(self) -> dict[str, Any]:
        """Asks for a turn and waits for it."""
        with suppress(BrokenPipeError):  # `answer` says why
            self.pipe.send("go")
        return self.answer()

    def stop(self, *, wait: float = 30.0) -> None:
        """Ends the process, by force if it has not ended after `wait` seconds."""
        with suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(wait)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def measure(
    rows: list[Row],
    work: Work,
    seconds: float,
    each: Callable[[Turns], None] = lambda turns: None,  # sees the turns after each round
) -> tuple[Turns, dict[str, dict[str, str]]]:
    """Turns of every row, round by round, until the time is over; and who took no part, and why.

    KeyboardInterrupt ends it early: the rounds that are complete count.
    """
    lost: dict[str, dict[str, str]] = {"left_out": {}, "failed": {}}
    turns: Turns = {}
    runners = {row: Runner(row, work) for row in rows}  # imports run side by side

    def lose(row: Row, answer: dict[str, Any]) -> None:
        for kind in lost:
            if kind in answer:
                lost[kind][row.label] = answer[kind]
                runners.pop(row).stop()
                turns.pop(row, None)

    try:
        for row in rows:
            lose(row, runners[row].answer())
        turns.update({row: [] for row in runners})
        started, rounds = 0.0, -1
        while runners and (rounds < LEAST_ROUNDS or time.perf_counter() - started < seconds):
            for row in list(runners):
                answer = runners[row].turn()
                lose(row, answer)
                if rounds >= 0 and row in turns:  # the first is to warm up
                    turns[row].append(answer["turn"])
            rounds += 1
            if rounds == 0:
                started = time.perf_counter()
            elif turns:
                each(turns)
    except KeyboardInterrupt:
        complete = min(map(len, turns.values()), default=0)
        turns = {row: some[:complete] for row, some in turns.items() if complete}
        lost["left_out"]["the rounds after an interruption"] = f"{complete} were complete"
        for runner in runners.values():
            runner.stop(wait=0.0)
    finally:
        for runner in runners.values():
            runner.stop()
    return turns, lost
