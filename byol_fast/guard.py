"""A step that is not finite changes nothing: weights, momentum, target and BatchNorm statistics.

Everything is decided on the device by one flag, so the host waits for nothing. The flag is the same
on every rank without a message of its own: a loss that is not finite makes the gradient of its rank
NaN (`seed`), and the sum over the ranks carries that to all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byol_fast.model import BYOL


class Guard:
    """Watches the steps of one model.

    Args:
        model: its contiguous floating-point buffers, which those of BatchNorm are, are put back
            after a step that was not finite.
        window: steps between two calls of `read`, at most.
    """

    def __init__(self, model: BYOL, *, window: int) -> None:
        self._parameters = list(model.online.parameters())
        device = self._parameters[0].device
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.is_contiguous():
                kinds.setdefault(buffer.dtype, []).append(buffer)
        self._groups = [_Group(buffers) for buffers in kinds.values()]
        self._skipped = torch.zeros(window, dtype=torch.bool, device=device)
        self._own = torch.zeros(window, dtype=torch.bool, device=device)
        self._steps: list[int] = []

    def begin(self) -> None:
        """Before a step: remembers the statistics."""
        for group in self._groups:
            group.remember()

    def seed(self, loss: Tensor) -> Tensor:
        """What `loss.backward` starts from: 1, or NaN where the loss is not finite."""
        return loss.detach() * 0.0 + 1.0

    def gradient_norm(self) -> Tensor:
        """Length of the whole gradient, a 0-d tensor; infinite where it overflows fp32."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def end(self, finite: Tensor) -> None:
        """After a step: puts the statistics back unless it was `finite` (a 0-d bool tensor)."""
        for group in self._groups:
            group.restore_unless(finite)

    def note(self, step: int, finite: Tensor, loss: Tensor) -> None:
        """Remember the outcome of `step` until `read`, on the device."""
        place = len(self._steps)
        self._steps.append(step)
        self._skipped[place] = finite.logical_not()
        self._own[place] = loss.isfinite().logical_not()

    def read(self) -> tuple[list[int], list[int], int]:
        """Since the last call: steps that were skipped, those whose loss was not finite on this
        rank, and how many steps there were. Waits for the device.
        """
        steps, self._steps = self._steps, []
        skipped, own = torch.stack([self._skipped, self._own]).tolist()
        return (
            [step for step, bad in zip(steps, skipped, strict=False) if bad],
            [step for step, bad in zip(steps, own, strict=False) if bad],
            len(steps),
        )


class _Group:
    """Buffers of one type and their last good values, in one piece of memory."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._flat = [b.view(-1) for b in buffers]
        size = sum(b.numel() for b in buffers)
        self._good = buffers[0].new_empty(size)
        self._now = self._good.new_empty(size) if self._good.is_cuda else self._good
        self._pieces = self._good.split([b.numel() for b in buffers])

    def remember(self) -> None:
        torch.cat(self._flat, out=self._good)

    def restore_unless(self, finite: Tensor) -> None:
        if not finite.is_cuda:
            if not bool(finite):
                torch._foreach_copy_(self._flat, self._pieces)
            return
        torch.cat(self._flat, out=self._now)
        torch.where(finite, self._now, self._good, out=self._good)
        torch._foreach_copy_(self._flat, self._pieces)
