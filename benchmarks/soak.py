"""A run that is killed, stopped, paused and moved to other ranks for as long as you like.

    nice python benchmarks/soak.py --minutes 20 --json soak.json

Three parts, with a tiny network on the CPU, two ranks, and faults drawn from a seed:

1. two ranks, started again after each fault (40 % of the time);
2. two ranks without a fault to the step where part 1 ended: what that is compared with, and
   processes old enough to show what grows;
3. the first with one or two ranks, drawn each time (what is left of the time, at least 20 %).

Then: part 1 is bitwise what part 2 is (weights, target, momentum, BatchNorm, log); every row that
any rank was given in parts 1 and 3 is the plan's; logs have neither gaps nor repeats; memory, file
handles and threads of part 2 have not grown; every rank had ended a minute after a fault.
Exit status 1 says which of these is not so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run in a checkout
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from faults.harness import ENDLESS, SMALL, Run, Zygote, assert_same_run

from byol_fast import config as configuration
from byol_fast.recipes import fill
from byol_fast.watching import metrics
from pipelines.plan import RowStream
from pipelines.stores import open_store

LOG_EVERY = 10
WORDS = (*SMALL, *ENDLESS, "--log-every", str(LOG_EVERY), "--checkpoint.every", "25")
FAULTS = ("kill one", "kill all", "SIGTERM to one", "SIGTERM to all", "SIGUSR1 to one", "pause")
PATIENCE = 600.0  # seconds for what has no limit of its own; a busy machine needs some of them
ENDING = 60.0  # seconds from a fault to the end of every rank

# Every rank writes what it was given: step, first place in the batch, images, digest of the rows.
ROWS = """
import hashlib
from pipelines.plan import RowStream
real = RowStream.rows
def rows(self, step, micro=0):
    got = real(self, step, micro)
    first = (self.rank * self.accumulate + micro) * self.micro_batch
    digest = hashlib.sha256(got.ids.tobytes() + got.windows.tobytes() + got.colours.tobytes())
    with open({path!r}, "a") as file:
        file.write(f"{{step}} {{first}} {{len(got)}} {{digest.hexdigest()}}\\n")
    return got
RowStream.rows = rows
"""


@dataclass
class Soak:
    """What is going on, and what has been seen."""

    zygote: Zygote
    folder: Path
    images: Path
    dice: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    changes: int = 0  # of the number of ranks
    endings: list[float] = field(default_factory=list)  # seconds from a fault to every rank's end

    def start(self, name: str, ranks: int, *words: object) -> Run:
        """Start or resume a run."""
        arguments = ["--data", self.images, *WORDS, *words]
        rows = ROWS.format(path=str(self.folder / f"{name}.rows"))
        return Run(self.zygote, self.folder / name, [str(w) for w in arguments], ranks, rows)

    def finish(self, name: str, ranks: int, step: int) -> None:
        """Take a run to `step` without faults."""
        run = self.start(name, ranks, "--max-steps", step)
        run.wait(PATIENCE)
        assert set(run.codes.values()) == {0}, run.said[-3000:]

    def batter(self, name: str, seconds: float, ranks: tuple[int, ...]) -> int:
        """Fault after fault; returns a step that the run has not passed."""
        until, before = time.monotonic() + seconds, ranks[0]
        out = self.folder / name
        while True:
            now = before if step_of(out) < 0 else self.dice.choice(ranks)
            self.changes += now != before
            before, at = now, step_of(out)
            run = self.start(name, now)
            run.wait_for(lambda at=at: step_of(out) > at, "a step", PATIENCE)
            self._linger(min(self.dice.expovariate(1 / 4.0), 15.0, until - time.monotonic()))
            self._strike(run, self.dice.choice(FAULTS))
            if time.monotonic() > until:
                return step_of(out) + LOG_EVERY

    @staticmethod
    def _linger(seconds: float) -> None:
        time.sleep(max(0.0, seconds))

    def _strike(self, run: Run, fault: str) -> None:
        """One fault, and the end of the session."""
        self.faults[fault] += 1
        victim = self.dice.randrange(run.ranks)
        if fault == "pause":
            run.signal(signal.SIGSTOP, victim)
            self._linger(self.dice.uniform(0.2, 3.0))
            run.signal(signal.SIGCONT, victim)
            at = step_of(run.out)
            run.wait_for(lambda: step_of(run.out) > at, "going on after a pause", PATIENCE)
            fault = "SIGTERM to all"  # to go on with other faults
        one = fault.endswith("one")
        number = next(
            n for n in ("SIGTERM", "SIGUSR1", "SIGKILL") if n[3:].lower() in fault.lower()
        )
        began = time.monotonic()
        run.signal(signal.Signals[number], victim if one else None)
        run.wait(PATIENCE)
        self.endings.append(time.monotonic() - began)
        codes = set(run.codes.values())
        if number != "SIGKILL":
            assert codes == {75}, (fault, run.codes, run.said[-3000:])
            assert run.status["state"] == "preempted"
        else:
            assert run.codes[victim] == -signal.SIGKILL and 0 not in codes, (fault, run.codes)

    def watched(self, name: str, step: int) -> list[dict[str, float]]:
        """A run to `step` without a fault, looked at twice a second."""
        run = self.start(name, 2, "--max-steps", step)
        looks = []
        while not run.poll():
            looks += [look for pid in run.pids if (look := look_at(pid)) is not None]
            time.sleep(0.5)
        assert set(run.codes.values()) == {0}, run.said[-3000:]
        return looks


def step_of(out: Path) -> int:
    """The newest step in the log, from its last lines alone; -1 before the first."""
    try:
        with open(out / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            tail = metrics.parse(file.read().decode(errors="replace").splitlines())
    except FileNotFoundError:
        return -1
    return max((int(row["step"] or 0) for row in tail.rows if "loss" in row), default=-1)


def look_at(pid: int) -> dict[str, float] | None:
    """Memory of its own in MB, file handles and threads of a process; None if it has just ended."""
    process = Path(f"/proc/{pid}")
    try:
        maps = (process / "smaps_rollup").read_text().splitlines()
        handles, threads = (len(os.listdir(process / name)) for name in ("fd", "task"))
    except OSError:
        return None
    kilobytes = sum(int(line.split()[1]) for line in maps if line.startswith("Private_"))
    return {"pid": pid, "mb": kilobytes / 1e3, "handles": handles, "threads": threads}


def growth(looks: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the second and the last quarter of each process's life; the first is a start."""
    found: dict[str, Any] = {}
    for rank, pid in enumerate(sorted({look["pid"] for look in looks})):
        mine = [look for look in looks if look["pid"] == pid]
        quarter = len(mine) // 4
        assert quarter, "the run without faults was too short to look at: more --minutes"
        for what in ("mb", "handles", "threads"):
            early, late = (
                statistics.median(look[what] for look in part)
                for part in (mine[quarter : 2 * quarter], mine[-quarter:])
            )
            found[f"rank {rank}, {what}"] = [round(early, 1), round(late, 1)]
    return found


def refuse_growth(found: dict[str, Any]) -> None:
    """AssertionError for what has grown; memory may by 5 % and 8 MB, as allocators do."""
    for what, (early, late) in found.items():
        allowed = early * 1.05 + 8 if what.endswith("mb") else early
        assert late <= allowed, f"{what} grew from {early} to {late}"


def check_rows(path: Path, images: Path, step: int) -> int:
    """Every row that a rank was given is the plan's; returns how many micro-batches that are."""
    config = fill(configuration.parse([*WORDS, "--data", str(images)]))
    sizes, spec = open_store(str(images)).sizes, configuration.spec(config)
    batch, seen, given = config.batch_size, set(), 0
    streams: dict[int, RowStream] = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) != 4 or len(words[3]) != 64:  # torn by a kill
            continue
        at, first, count = map(int, words[:3])
        if count not in streams:
            streams[count] = RowStream(
                *(spec,), seed=config.seed, sizes=sizes, batch_size=batch, accumulate=batch // count
            )
        rows = streams[count].rows(at, first // count)
        digest = hashlib.sha256(
            rows.ids.tobytes() + rows.windows.tobytes() + rows.colours.tobytes()
        )
        assert digest.hexdigest() == words[3], f"{path.name}: other rows in step {at}: {line}"
        seen |= {(at, place) for place in range(first, first + count)}
        given += 1
    missing = {(s, place) for s in range(step) for place in range(batch)} - seen
    assert not missing, f"{path.name}: rows that no rank was given: {sorted(missing)[:5]}"
    return given


def check_log(out: Path, step: int) -> None:
    """A line for each step that is due, once."""
    steps = [
        int(row["step"] or 0) for row in metrics.read(out / "metrics.jsonl").rows if "loss" in row
    ]
    due = sorted({1, step, *range(LOG_EVERY, step + 1, LOG_EVERY)})
    assert steps == due, f"{out.name}: gaps or repeats: {sorted(set(due) ^ set(steps))[:10]}"
    assert not list((out / "checkpoints").glob("*.tmp*")), f"{out.name}: temporary files are left"


def soak(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Go through the three parts; AssertionError where something promised is not so."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(64) % 4)
    began, zygote = time.monotonic(), Zygote()
    try:
        state = Soak(zygote, folder, folder / "images.npz", random.Random(seed))
        same = state.batter("same", 0.4 * seconds, (2,))
        state.finish("same", 2, same)
        looks = state.watched("whole", same)
        left = began + seconds - time.monotonic()
        other = state.batter("other", max(left, 0.2 * seconds), (1, 2))
        state.finish("other", 2, other)
    finally:
        zygote.close()
    assert_same_run(folder / "same", folder / "whole")
    rows = sum(
        check_rows(folder / f"{name}.rows", state.images, step)
        for name, step in (("same", same), ("other", other))
    )
    for name, step in (("same", same), ("other", other), ("whole", same)):
        check_log(folder / name, step)
    found = growth(looks)
    refuse_growth(found)
    assert max(state.endings) <= ENDING, f"{max(state.endings):.0f} s from a fault to the end"
    return {
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "faults": dict(state.faults),
        "changes_of_ranks": state.changes,
        "steps": {"same ranks": same, "other ranks": other},
        "micro_batches_checked": rows,
        "longest_end_seconds": round(max(state.endings), 1),
        "median_end_seconds": round(statistics.median(state.endings), 1),
        "second_and_last_quarter": found,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Soak as the command line says; print a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            result = soak(60 * given.minutes, given.seed, Path(folder))
        except AssertionError as error:
            sys.exit(f"error: {error}")
    text = json.dumps(result, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
