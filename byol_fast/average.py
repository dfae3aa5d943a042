"""A moving average of weights that may be bf16 or fp16: there its steps would be rounded away.

At decay .996 and above a step is smaller than bf16's spacing, so what rounding takes is kept aside
in fp32 and counted in at the next step: the average is fp32's, and the target shows it rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from byol_fast.optim import ema_

HALF = (torch.bfloat16, torch.float16)
_NAME = "average"


class Remainders(nn.Module):
    """What rounding took from each of the tensors, as fp32 buffers named by their numbers."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            zeros = torch.zeros_like(tensor, dtype=torch.float32)
            self.register_buffer(str(number), zeros)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Remainders:
        """As nn.Module's, but `.to(bfloat16)` moves them without rounding."""
        before = list(self._buffers.values())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (name, moved), buffer in zip(self._buffers.items(), before, strict=True):
            if moved is not None and buffer is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @torch.no_grad()
    def follow(self, target: list[Tensor], online: list[Tensor], decay: float) -> None:
        """target = decay·target + (1 − decay)·online, in fp32."""
        for rest, follower, leader in zip(self.buffers(), target, online, strict=True):
            exact = (follower.float() + rest).lerp_(leader.float(), 1 - decay)
            follower.copy_(exact)
            rest.copy_(exact - follower.float())


class Averaging(nn.Module):
    """A module one of whose networks follows another; its remainders are in its state dict."""

    def average_(self, target: list[Tensor], online: list[Tensor], decay: float) -> None:
        """`ema_`, exact for half-precision tensors too."""
        half = {id(t) for t in target if t.dtype in HALF}
        pairs = list(zip(target, online, strict=True))
        full = [(t, o) for t, o in pairs if id(t) not in half]
        ema_([t for t, _ in full], [o for _, o in full], decay)
        if not half:
            self._modules.pop(_NAME, None)  # they have been, before a `.float()`
            return
        rounded = [t for t in target if id(t) in half]
        rest = self._modules.get(_NAME)
        if not isinstance(rest, Remainders) or len(rest._buffers) != len(rounded):
            rest = Remainders(rounded)
            self.add_module(_NAME, rest)
        rest.follow(rounded, [o for t, o in pairs if id(t) in half], decay)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes remainders where the state has them, and drops one's own where it has none."""
        start = f"{prefix}{_NAME}."
        found = [value for key, value in state_dict.items() if key.startswith(start)]
        self._modules.pop(_NAME, None)
        if found:
            device = next(self.parameters()).device
            self.add_module(_NAME, Remainders([value.to(device) for value in found]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
