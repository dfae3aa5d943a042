"""Measuring the network while it is trained: rank 0 does, and the others wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

from torch import nn

from byol_fast.distributed import World
from byol_fast.errors import Preempted
from byol_fast.memory import is_out_of_memory, release
from byol_fast.monitor import RunLog
from byol_fast.session.clock import Clock
from byol_fast.session.runfolder import RunFolder
from byol_fast.session.signals import StopSignal
from byol_fast.watching.online_eval import OnlineEvaluation
from byol_fast.watching.probe import OnlineProbe

log = logging.getLogger(__name__)


class Measuring:
    """kNN and the probe's accuracy before, during and after training. Every rank has to call it.

    A measurement that a signal cut short, or that failed, stays `owed`, and goes with the
    checkpoint.

    Args:
        evaluation: rank 0's images; None on other ranks, and where there are no labels.
        backbone: whose features are measured.
    """

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        runlog: RunLog,
        *,
        evaluation: OnlineEvaluation | None,
        probe: OnlineProbe | None,
        backbone: nn.Module,
    ) -> None:
        self._world, self._folder, self._runlog = world, folder, runlog
        self.evaluation = evaluation if world.is_main else None
        self._probe, self._backbone = probe, backbone
        self.owed = False
        self.failed = 0  # evaluations of this run

    def baselines(self, signal: StopSignal, clock: Clock) -> None:
        """What the trained network has to beat: raw pixels, and itself before training."""
        with self._alone(signal, clock, "the untrained network was evaluated"):
            if self.evaluation is not None:
                self._try(0, "the untrained network", partial(self._baselines, self.evaluation))

    def _baselines(self, evaluation: OnlineEvaluation) -> None:
        untrained = evaluation.measure(self._backbone)["knn_accuracy"]
        self._runlog.log(0, {"epoch": 0.0, "knn_accuracy": untrained})
        self._folder.add_to_summary(knn_untrained=untrained, knn_data=evaluation.source)
        self._folder.add_to_summary(knn_raw_pixels=evaluation.raw_pixels())

    def owes(self, step: int) -> bool:
        """Whether the evaluation of `step` is owed, and no session has made up for it since."""
        here = self.evaluation is not None and self._folder.summary().get("knn_step") != step
        (self.owed,) = self._world.any(self.owed and here)
        return self.owed

    def measure(self, step: int, signal: StopSignal, clock: Clock) -> None:
        """The network after `step` steps."""
        self.owed = True
        with self._alone(signal, clock, "the network was evaluated"):
            self.owed = self.evaluation is not None and not self._try(
                step, "the network", partial(self._measure, self.evaluation, step)
            )

    def _measure(self, evaluation: OnlineEvaluation, step: int) -> None:
        values = evaluation.measure(self._backbone, self._probe)
        self._runlog.log(step, values)
        evaluation.save_embedding(self._folder.path / "embedding.npz")
        self._folder.add_to_summary(knn_trained=values["knn_accuracy"], knn_step=step)

    def _try(self, step: int, what: str, measure: Callable[[], None]) -> bool:
        """Whether an evaluation succeeded. One that fails is counted and is no reason not to train.

        Raises:
            RuntimeError: it failed for something else than the disk, the images or memory.
        """
        try:
            measure()
            return True
        except (OSError, ValueError) as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"out of memory: {error}".partition("\n")[0]
        # Here the error is gone, and with it what its frames kept in memory.
        release(self._world.device)
        self.failed += 1
        text = f"{what} was not evaluated ({self.failed} evaluations left out so far): {reason}"
        log.warning("%s. Training goes on", text)
        self._runlog.event(step, "warning", text)
        with suppress(OSError):  # a full disk may be the reason
            self._folder.add_to_summary(evaluations_left_out=self.failed)
        return False

    @contextmanager
    def _alone(self, signal: StopSignal, clock: Clock, doing: str) -> Iterator[None]:
        """Rank 0 works while the others wait; the time does not count as training.

        A signal to rank 0 ends the block early. All ranks then learn of it where they agree.
        """
        with clock.paused():
            try:
                with signal.interrupting(doing) if self._world.is_main else nullcontext():
                    yield
            except Preempted as error:
                log.warning("%s: left unfinished", error)
            self._world.barrier()
