"""Measuring the network while it is trained: rank 0 does, and the others wait."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from byol_fast.distributed import World
from byol_fast.errors import Preempted
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

    def baselines(self, signal: StopSignal, clock: Clock) -> None:
        """What the trained network has to beat: raw pixels, and itself before training."""
        with self._alone(signal, clock, "the untrained network was evaluated"):
            if self.evaluation is not None:
                untrained = self.evaluation.measure(self._backbone)["knn_accuracy"]
                self._folder.add_to_summary(
                    knn_raw_pixels=self.evaluation.raw_pixels(),
                    knn_untrained=untrained,
                    knn_data=self.evaluation.source,
                )
                self._runlog.log(0, {"epoch": 0.0, "knn_accuracy": untrained})

    def owes(self, step: int) -> bool:
        """Whether the evaluation of `step` is owed, and no session has made up for it since."""
        here = self.evaluation is not None and self._folder.summary().get("knn_step") != step
        (self.owed,) = self._world.any(self.owed and here)
        return self.owed

    def measure(self, step: int, signal: StopSignal, clock: Clock) -> None:
        """The network after `step` steps."""
        self.owed = True
        with self._alone(signal, clock, "the network was evaluated"):
            try:
                if self.evaluation is not None:
                    values = self.evaluation.measure(self._backbone, self._probe)
                    self._runlog.log(step, values)
                    self.evaluation.save_embedding(self._folder.path / "embedding.npz")
                    self._folder.add_to_summary(knn_trained=values["knn_accuracy"], knn_step=step)
                self.owed = False
            except (OSError, ValueError) as error:  # measuring is no reason not to train
                log.warning("the network was not evaluated: %s. Training goes on", error)
                self._runlog.event(step, "warning", f"the network was not evaluated: {error}")

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
