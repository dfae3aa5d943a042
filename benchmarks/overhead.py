"""What guard, log, gauges and checkpoints cost a step: the same step in turns, in one process.

    python benchmarks/overhead.py --steps 10 --rounds 5 -- --recipe quickstart --batch-size 32

What follows `--` are settings of pretraining (its `--log-every` is how often a line is logged). The
views stay the same, so that data has no part in it. In turns A B C D A B C D, after a round to warm
up: the bare step, with the guard, as the trainer takes it with its log, and that with a checkpoint
in the turn, until that is on the disk. A ratio is a turn by the bare turn of its round; shown are
median, least and greatest, of wall time and of processor time (all threads), which a busy machine
disturbs less.

Ratios of whole turns are as noisy as the machine. `share of …` is not: the seconds of a logged turn
that are spent inside the guard's calls and inside the log's (gauges, alarms, files), by its seconds
as a whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout

import numpy as np
import torch

from byol_fast import config as configuration
from byol_fast import recipes
from byol_fast.assemble import assemble
from byol_fast.distributed import World
from byol_fast.session.opening import open_data
from byol_fast.session.signals import StopSignal
from byol_fast.step import AUTOCAST, train_step
from byol_fast.trainer import Trainer

NEVER = 1 << 40


class Watch:
    """Seconds inside calls, by group; a call within another counts with that one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._gpu, self._inside = device.type == "cuda", False

    def over(self, owner: object, name: str, group: str) -> None:
        """From now on time the method `name` of an object."""
        real = getattr(owner, name)
        self.seconds[group] = 0.0

        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return real(*args, **options)
            self._inside, began = True, self._now()
            try:
                return real(*args, **options)
            finally:
                self.seconds[group] += self._now() - began
                self._inside = False

        setattr(owner, name, timed)

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class Turns:
    """The kinds of step that take turns."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.signal = trainer, StopSignal()
        self.views = next(trainer.pipeline.steps(0, 1))
        self.stalls: list[float] = []
        self.watch = Watch(trainer.world.device)
        for name in ("begin", "seed", "gradient_norm", "end", "note", "read"):
            self.watch.over(trainer.guard, name, "guard")
        self.watch.over(trainer, "_log", "log")
        trainer.step = 1000 * trainer.plan.log_every

    def bare(self, steps: int, *, guarded: bool = False) -> None:
        """`train_step` alone."""
        t = self.trainer
        for step in range(steps):
            guard = t.guard if guarded else None
            output = train_step(
                t.model,
                t.networks,
                t.optimizer,
                [self.views.x] * t.pipeline.stream.accumulate,
                accumulate=t.pipeline.stream.accumulate,
                decay=0.99,
                autocast_dtype=AUTOCAST.get(t.plan.precision),
                guard=guard,
            )
            if t.probe is not None:
                t.probe.update(output.representation, self.views.label)
            if guard is not None and output.gradient_norm is not None:
                guard.note(step, output.gradient_norm.isfinite(), output.loss)
                if step % t.plan.log_every == t.plan.log_every - 1:
                    guard.read()
        if guarded:
            t.guard.read()

    def logged(self, steps: int, *, save: bool = False) -> None:
        """As the trainer takes them; with `save` a checkpoint falls due in the middle."""
        t = self.trainer
        endless = itertools.repeat(self.views)
        t.step -= t.step % t.plan.log_every
        middle = t.step + steps // 2
        t.saving.every_steps = middle if save else 0
        for _ in range(steps):
            output = t._one_step(endless)
            t.after_step(output, self.signal, NEVER)
        if save:
            self.stalls.append(t.saving.writer.stall_seconds)
            t.saving.writer.wait()


def measure(trainer: Trainer, *, steps: int, rounds: int) -> dict[str, Any]:
    """Ratios to the bare step, by kind."""
    turns = Turns(trainer)
    kinds: dict[str, Callable[[], None]] = {
        "bare": lambda: turns.bare(steps),
        "guard": lambda: turns.bare(steps, guarded=True),
        "guard and log": lambda: turns.logged(steps),
        "guard, log and a checkpoint": lambda: turns.logged(steps, save=True),
    }
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    shares: dict[str, list[float]] = {group: [] for group in turns.watch.seconds}
    for number in range(rounds + 1):
        for kind, call in kinds.items():
            inside = dict(turns.watch.seconds)
            wall, processor = time.perf_counter(), time.process_time()
            call()
            if trainer.world.device.type == "cuda":
                torch.cuda.synchronize()
            spent = time.perf_counter() - wall, time.process_time() - processor
            if number:
                seconds[kind].append(spent)
                for group, some in shares.items():
                    if kind == "guard and log":
                        some.append((turns.watch.seconds[group] - inside[group]) / spent[0])
    bare = np.array(seconds["bare"])
    result: dict[str, Any] = {
        "step_seconds": float(np.median(bare[:, 0])) / steps,
        "steps_in_a_turn": steps,
        "rounds": rounds,
        "log_every": trainer.plan.log_every,
        "checkpoint_stall_seconds": max(turns.stalls),
    }
    for group, values in shares.items():
        result[f"share of {group}"] = _three(np.array(values))
    for kind, turn in seconds.items():
        ratios = np.array(turn) / bare
        for column, clock in enumerate(("wall", "processor")):
            result[f"{kind}, {clock}"] = _three(ratios[:, column])
    return result


def _three(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Median, least and greatest."""
    return [float(f"{value:.4f}") for value in np.quantile(values, [0.5, 0, 1])]


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("settings", nargs="*", help="of pretraining, after --")
    given = parser.parse_args(argv)
    if given.steps < 2 or given.rounds < 1:
        parser.error("--steps is at least 2, --rounds at least 1")
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        words = ["--data", "synthetic:4096", "--tracker", "none", *given.settings]
        try:
            config = configuration.parse([*words, "--out", str(Path(out) / "run")])
            data = open_data(config, world, StopSignal())
            resolved = recipes.resolve(config, samples=data.parts.images, world_size=1)
        except ValueError as error:
            parser.error(str(error))
        log_every = resolved.config.monitor.log_every
        if given.steps < log_every:  # a turn without a line would say that the log costs nothing
            parser.error(
                f"--steps {given.steps}: a turn has at least --log-every {log_every} steps"
            )
        trainer, _ = assemble(resolved, data, world, stack)
        trainer.plan = dataclasses.replace(trainer.plan, total_steps=NEVER, eval_every=0)
        trainer.saving.every_minutes = math.inf
        print(json.dumps(measure(trainer, steps=given.steps, rounds=given.rounds), indent=1))


if __name__ == "__main__":
    main()
