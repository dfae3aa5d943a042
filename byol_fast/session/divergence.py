"""What becomes of steps that were not finite: skipped and counted, named for replay, or the end.

`guard.py` has kept them from the weights; here the host learns of them, whenever it waits for the
device anyway.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from byol_fast import checkpoint
from byol_fast.distributed import World
from byol_fast.errors import Diverged
from byol_fast.guard import Guard
from byol_fast.monitor import RunLog
from pipelines.pipeline import ViewPipeline

log = logging.getLogger(__name__)

FILE = "diverged-step.json"
LIMIT = 20  # skipped steps in succession: what follows them would be skipped too
KEPT_STEPS = 5  # the newest ones whose rows are in the file


class NonFinite:
    """Counts the skipped steps of a run; `total` goes with its checkpoints.

    Args:
        stop: end the run at the first one.
    """

    def __init__(
        self,
        world: World,
        guard: Guard,
        pipeline: ViewPipeline,
        folder: Path,
        runlog: RunLog,
        *,
        stop: bool,
    ) -> None:
        self.total = 0
        self._world, self._guard, self._pipeline = world, guard, pipeline
        self._folder, self._runlog, self._stop = folder, runlog, stop
        self._in_succession = 0
        self._described: list[dict[str, Any]] = []

    def look(self) -> None:
        """Learn of the steps since the last look, on all ranks together. Waits for the device.

        Raises:
            Diverged: a step was skipped and `stop` was asked for, or `LIMIT` of them in succession.
        """
        skipped, own, steps = self._guard.read()
        (any_skipped,) = self._world.any(bool(skipped))
        if not any_skipped:
            self._in_succession = 0 if steps else self._in_succession
            return
        on_ranks = self._world.gather((skipped, own))  # under fp16 only losses tell, rank by rank
        every = sorted({step for theirs, _ in on_ranks for step in theirs})
        self._count(every, steps)
        steps_rows = self._world.gather([self._rows(step) for step in every[-KEPT_STEPS:]])
        if self._world.is_main:
            self._write(every, [losses for _, losses in on_ranks], steps_rows)
        text = self._text(every)
        ending = self._stop or self._in_succession >= LIMIT
        self._runlog.event(every[-1] + 1, "diverged" if ending else "skipped", text)
        if ending:
            raise Diverged(
                f"{text}. The weights and the checkpoints are from before. Try a lower "
                f"--optim.base-lr, more warm-up, or --precision fp32"
            )

    def _count(self, every: list[int], steps: int) -> None:
        self.total += len(every)
        if len(every) == steps:
            self._in_succession += steps
            return
        tail = 1
        while tail < len(every) and every[-tail - 1] == every[-tail] - 1:
            tail += 1
        self._in_succession = tail

    def _text(self, every: list[int]) -> str:
        shown = ", ".join(str(step + 1) for step in every[:5]) + (", …" if len(every) > 5 else "")
        plural = "s" if len(every) > 1 else ""
        return (
            f"loss or gradient not finite at step{plural} {shown}: skipped, {self.total} so far; "
            f"the rows of the batch are in {self._folder / FILE}"
        )

    def _write(
        self, every: list[int], losses: list[list[int]], on_ranks: list[list[list[dict[str, Any]]]]
    ) -> None:
        stream, seed = self._pipeline.stream, self._pipeline.stream.seed
        for number, step in enumerate(every[-KEPT_STEPS:]):
            ranks = [rank for rank, theirs in enumerate(losses) if step in theirs]
            rows = [row for theirs in on_ranks for row in theirs[number]]
            self._described.append(
                {"step": step + 1, "ranks_with_a_loss_not_finite": ranks, "rows": rows}
            )
        self._described = self._described[-KEPT_STEPS:]
        first = self._described[-1]["rows"][0]
        config = shlex.quote(str(self._folder / "config.yaml"))
        content = {
            "seed": seed,
            "image_size": stream.spec.image_size,
            "skipped_steps": self.total,
            "steps": self._described,
            "replay": f"python -m byol_fast.pretrain --config {config} "
            f"--replay epoch={first['epoch']},index={first['index']}",
        }
        try:
            checkpoint.write_text(self._folder / FILE, json.dumps(content) + "\n")
        except OSError as error:  # the step was skipped all the same
            log.warning("%s was not written: %s", self._folder / FILE, error)

    def _rows(self, step: int) -> list[dict[str, Any]]:
        """This rank's rows of a step: where each stands, and its name, which the rank alone may
        know (`index` is the sample's id, over all parts of the data)."""
        stream, store, rank = self._pipeline.stream, self._pipeline.store, self._world.rank
        return [
            {
                "epoch": plan.epoch,
                "index": plan.first + row,
                "rank": rank,
                "name": store.name(row),
            }
            for micro in range(stream.accumulate)
            for plan, ids in stream.spans(step, micro)
            for row in ids.tolist()
        ]
