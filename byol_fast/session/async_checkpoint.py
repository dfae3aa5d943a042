"""Checkpoints written beside the training: the step waits for a copy in memory, not for the disk.

On a GPU the state is cloned on the device, copied to pinned host memory on a stream of its own and
written by a thread; on a CPU the clone is a plain copy. At most one is being written at a time.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byol_fast import checkpoint

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves checkpoints of one run folder in a thread.

    An error of the thread is logged at once and stays in `error` until `wait` raises it; what it
    was about is never called saved. The thread is not a daemon: a program that ends by itself
    finishes what is being written.

    Args:
        folder: the run's `checkpoints` folder.
        keep, keep_every: as `checkpoint.save` takes them.
        before: called by the thread before a checkpoint gets its name.
        after: called by the thread with the step of a checkpoint that is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_every: int | Fraction | None = None,
        before: Callable[[], None] | None = None,
        after: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.error: Exception | None = None
        self.stall_seconds = 0.0  # how long the last `save` kept the caller waiting
        self._before, self._after = before, after
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pinned: list[Tensor] = []

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state` and write it in the background; the caller may change it at once.

        Waits for an earlier checkpoint that is still being written: ask `busy` to avoid that. An
        earlier error is forgotten, for this checkpoint makes up for the one that is missing.
        """
        if self._thread is not None:
            self._thread.join()
        self.error = None
        started = time.perf_counter()
        cloned, event = _clone(state)
        self.stall_seconds = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._work, args=(step, cloned, event), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            SaveError: the last checkpoint was not written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _work(self, step: int, state: dict[str, Any], event: torch.cuda.Event | None) -> None:
        try:
            if event is not None:
                state = self._to_host(state, event)
            checkpoint.save(
                self.folder,
                step,
                state,
                keep=self.keep,
                keep_every=self.keep_every,
                before=self._before,
            )
            if self._after is not None:
                self._after(step)
        except Exception as error:  # handed to the training's thread, whatever it is
            log.error("%s", error)
            self.error = error

    def _to_host(self, state: dict[str, Any], event: torch.cuda.Event) -> dict[str, Any]:
        """Device tensors in pinned memory, which is kept for the next time."""
        found = [t for t in _tensors(state) if t.is_cuda]
        device = found[0].device
        torch.cuda.set_device(device)
        shapes = [(t.shape, t.stride(), t.dtype) for t in found]
        if shapes != [(t.shape, t.stride(), t.dtype) for t in self._pinned]:
            self._pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in found]
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            for into, tensor in zip(self._pinned, found, strict=True):
                into.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        host = iter(self._pinned)
        return dict(_map(state, lambda t: next(host) if t.is_cuda else t))


def _clone(state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """`state` with tensors of its own, and the event after which those on a GPU are filled."""
    devices: list[torch.device] = []

    def clone(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            devices.append(tensor.device)
        return tensor.detach().clone()

    try:
        cloned = _map(state, clone)
    except torch.OutOfMemoryError:
        log.warning("too little GPU memory for a copy of the state: the step waits for the host's")
        return _map(state, lambda t: t.detach().to("cpu", copy=True)), None
    if not devices:
        return cloned, None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(devices[0]))
    return cloned, event


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    """All tensors, in the order in which `_map` meets them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(state, note)
    return found


def _map(value: Any, call: Callable[[Tensor], Tensor]) -> Any:
    """Nested containers with `call` applied to every tensor, in a fixed order."""
    if isinstance(value, Tensor):
        return call(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)  # an OrderedDict of a module carries versions along
        for key, inner in value.items():
            mapped[key] = _map(inner, call)
        return mapped
    if isinstance(value, list | tuple):
        return type(value)(_map(inner, call) for inner in value)
    return value
