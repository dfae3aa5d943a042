"""When a run's checkpoints are due, and how the ranks agree on one."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

from byol_fast.distributed import World
from byol_fast.errors import SaveError
from byol_fast.session.async_checkpoint import CheckpointWriter


class Saving:
    """The cadence of one session. Rank 0 decides and writes; the end of a session is everybody's.

    Args:
        writer: of rank 0's checkpoints.
        every_steps: 0: by time alone.
        every_minutes: infinite: by steps alone.
        keep_every: steps after which a checkpoint stays for good, so that it is due then.
    """

    def __init__(
        self,
        world: World,
        writer: CheckpointWriter,
        *,
        every_steps: int,
        every_minutes: float,
        keep_every: Fraction | None,
    ) -> None:
        self.writer, self.every_steps, self.every_minutes = writer, every_steps, every_minutes
        self._world, self._keep_every = world, keep_every
        self._step, self._at = -1, time.monotonic()  # of the last checkpoint
        self._owed = False

    @property
    def failed(self) -> bool:
        """Whether rank 0's last checkpoint could not be written."""
        return self.writer.error is not None

    def resumed(self, step: int) -> None:
        """The checkpoint of `step` is there already."""
        self._step = step

    def due(self, step: int, stop: int) -> bool:
        """Whether `step` is to be saved now, as far as this rank knows; at `stop` it is."""
        if step == stop:
            return self._step != step
        if not self._world.is_main:
            return False
        spans = (self.every_steps, self._keep_every)
        by_steps = any(step // span > (step - 1) // span for span in spans if span)
        by_time = time.monotonic() - self._at > 60 * self.every_minutes
        # One at a time: what falls due while another is being written is saved right after it.
        self._owed |= by_steps or by_time
        return self._owed and not self.writer.busy

    def save(self, step: int, state: dict[str, Any] | None, *, wait: bool) -> None:
        """Hand a checkpoint (None on other ranks than 0) to the writer; `wait` till it is on disk.

        Raises:
            SaveError: on every rank, as `settle`.
        """
        if state is not None:
            self.writer.save(step, state)
        self._step, self._at, self._owed = step, time.monotonic(), False
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait for rank 0's writer.

        Raises:
            SaveError: on every rank, if the checkpoint could not be written.
        """
        error = None
        if self._world.is_main:
            try:
                self.writer.wait()
            except Exception as caught:  # whatever the thread met
                error = str(caught)
        if message := self._world.share(error):
            raise SaveError(message)
