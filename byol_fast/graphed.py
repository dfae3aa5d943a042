"""A whole update as one CUDA graph: forward, backward, reduction over ranks, LARS and EMA.

A small batch leaves the GPU waiting for launches; a replayed graph launches everything at once.
What changes from step to step lives in device memory: the views, the learning rate and τ.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

from byol_fast.compiled import Networks
from byol_fast.device_errors import first_line, root_cause
from byol_fast.errors import CaptureError
from byol_fast.guard import Guard
from byol_fast.model import BYOL
from byol_fast.optim import LARS, set_lr
from byol_fast.step import StepOutput, train_step

log = logging.getLogger(__name__)

# Ordinary steps before the capture: DistributedDataParallel settles its buckets in eleven.
WARM_UP = 11


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Where DistributedDataParallel has to be made for its reductions to be captured.

    It is the stream of the capture itself: DistributedDataParallel keeps the graph's ends
    (AccumulateGrad), and those work on the stream they were made on.
    """
    return torch.cuda.stream(_stream(device.index or 0))


@cache
def _stream(index: int) -> torch.cuda.Stream:
    """The one of a device on which steps are warmed up and captured."""
    return torch.cuda.Stream(index)


def refusal(device: torch.device, *, accumulate: int, precision: str) -> str:
    """Why such a step cannot be one graph; "" if it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if accumulate != 1:
        return "a step has several micro-batches (--input.accumulate)"
    if precision == "fp16":
        return "fp16's loss scale is decided on the host (--run.precision bf16)"
    return ""


class GraphedStep:
    """Takes training steps; the first `WARM_UP` as usual, all others by replaying one graph.

    The views must keep their shape, dtype and strides. What a step returns is overwritten by the
    next.

    Raises:
        CaptureError: the step after the warm-up could not be captured.
    """

    def __init__(
        self,
        model: BYOL,
        networks: Networks,
        optimizer: LARS,
        *,
        autocast_dtype: torch.dtype | None,
        guard: Guard | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._model, self._networks, self._optimizer = model, networks, optimizer
        self._autocast, self._guard = autocast_dtype, guard
        self._decay = torch.zeros((), dtype=torch.float64, device=device)
        lr = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._side = _stream(device.index or 0)
        self._calls = 0
        self._views: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: StepOutput | None = None

    def __call__(self, x: Tensor, *, lr: float, decay: float) -> StepOutput:
        """One update on views x `[2, B, 3, S, S]`."""
        set_lr(self._optimizer, lr)
        self._decay.fill_(decay)
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._capture(x)
        if self._graph is None or self._output is None or self._views is None:
            return self._as_usual(x)
        self._views.copy_(x)
        self._graph.replay()
        return self._output

    def _step(self, x: Tensor) -> StepOutput:
        return train_step(
            self._model,
            self._networks,
            self._optimizer,
            [x],
            accumulate=1,
            decay=self._decay,
            autocast_dtype=self._autocast,
            guard=self._guard,
        )

    def _as_usual(self, x: Tensor) -> StepOutput:
        current = torch.cuda.current_stream(x.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            output = self._step(x)
        current.wait_stream(self._side)
        x.record_stream(self._side)
        for tensor in output:
            if tensor is not None:
                tensor.record_stream(current)
        return output

    @property
    def captured(self) -> bool:
        """Whether steps are replays of one graph by now."""
        return self._graph is not None

    def _capture(self, x: Tensor) -> None:
        """Records a step without taking it."""
        torch.cuda.synchronize(x.device)
        current = torch.cuda.current_stream(x.device)
        views, graph = x.clone(), torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads decode and pin memory meanwhile
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                output = self._step(views)
        except Exception as error:
            # Ending a failed capture raises in torch 2.11, which hides the first error and leaves
            # the side stream current, random numbers in capture mode and the allocator without a
            # way to free memory: no state to train on.
            torch.cuda.set_stream(current)
            raise CaptureError(
                f"the step cannot be captured as a CUDA graph ({first_line(root_cause(error))}). "
                "Start the same command with --run.engine compile: it goes on from the last "
                "checkpoint"
            ) from error
        self._optimizer.settle()
        self._views, self._graph, self._output = views, graph, output
        log.info("the step is a CUDA graph from here on")
