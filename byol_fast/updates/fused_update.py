"""LARS and the target's moving average in one pass over memory, for any number of tensors.

A parameter group takes three kernels: partial norms of pieces of its tensors, the trust ratios, and
the update, which reads parameter, gradient, momentum and target once and writes three of them. A
group that is not adapted takes the last one alone. Tensors are reached through a table of their
addresses, so nothing is copied together and nothing is read back. Every sum has a fixed order:
the result is the same to the last bit each time.

Needs Triton, and a GPU unless Triton interprets (TRITON_INTERPRET=1).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from byol_fast.updates.layouts import dense, laid_out_as

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Elements of a piece, and of the part of it that is in registers at a time.
_PIECE, _BLOCK = 8192, 1024
_WARPS = 4


def unsupported(tensor: Tensor) -> str:
    """Why a parameter cannot be updated here; "" if it can."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        return "it is not on a GPU"
    if tensor.dtype != torch.float32:
        return f"it is {str(tensor.dtype).removeprefix('torch.')}, not float32"
    return "" if dense(tensor) else "its elements have gaps or overlap in memory"


class FusedGroup:
    """One parameter group's update; keeps the tables of addresses between steps."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._sent: list[int] = []
        self._sizes: list[int] = []
        self._table = self._pieces = self._first = self._counts = torch.empty(0)
        self._partial = self._ratios = self._always = torch.empty(0)

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        buffers: Sequence[Tensor],
        targets: Sequence[Tensor | None],  # each parameter's average, None where there is none
        *,
        lr: float | Tensor,
        decay: float | Tensor,  # τ
        finite: Tensor | None = None,  # 0-d bool on the device: where False nothing changes
        momentum: float,
        weight_decay: float,
        eta: float | None,  # None: no trust ratio
        sum_of_norms: bool,
        lr_in_momentum: bool,
    ) -> None:
        """One step, in place. Parameters are ones that `unsupported` names no reason for, on one
        device; momentum and targets have their dtype, device, shape and memory order.

        `lr` and `decay` are numbers, or 0-d tensors on the device, read when the kernel runs; a
        float64 decay keeps 1 − τ exact near τ = 1.
        """
        grads = [laid_out_as(p, g) for p, g in zip(params, grads, strict=True)]
        self._prepare(params, grads, buffers, targets)
        device = params[0].device
        if isinstance(lr, Tensor) and lr.device != device:
            lr = float(lr)
        if isinstance(decay, Tensor) and decay.device != device:
            decay = float(decay)
        pieces, tensors = (len(self._pieces),), (len(params),)
        aligned = all(address % 16 == 0 for address in self._addresses)
        sizes: dict[str, Any] = {"PIECE": _PIECE, "BLOCK": _BLOCK, "num_warps": _WARPS}
        sizes["ALIGNED"] = aligned
        if eta is not None:
            _norms[pieces](
                self._table, self._pieces, self._counts, self._partial, weight_decay,
                SUM=sum_of_norms, **sizes,
            )  # fmt: skip
            _trust[tensors](
                self._partial, self._first, self._ratios, weight_decay, eta,
                SUM=sum_of_norms, BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        _apply[pieces](
            self._table, self._pieces, self._counts, self._ratios,
            lr,
            decay if isinstance(decay, Tensor) else 1.0 - decay,
            self._always if finite is None else finite.to(device, torch.int32),
            weight_decay, momentum,
            ADAPT=eta is not None,
            LR_INSIDE=lr_in_momentum,
            LR_IS_TENSOR=isinstance(lr, Tensor),
            DECAY_IS_TENSOR=isinstance(decay, Tensor),
            **sizes,
        )  # fmt: skip

    def _prepare(self, *columns: Sequence[Tensor | None]) -> None:
        """Brings the tables up to date; in a steady state nothing has moved and nothing is sent."""
        self._addresses = [
            0 if t is None else t.data_ptr() for row in zip(*columns, strict=True) for t in row
        ]
        params = [p for p in columns[0] if p is not None]
        device = params[0].device
        counts = [p.numel() for p in params]
        if counts != self._sizes:
            self._sizes = counts
            pieces = [-(-count // _PIECE) for count in counts]
            tensor = np.repeat(np.arange(len(counts)), pieces)
            first = np.concatenate([[0], np.cumsum(pieces)])
            number = np.arange(len(tensor)) - first[tensor]
            self._pieces = _send(np.stack([tensor, number], axis=1).astype(np.int32), device)
            self._first = _send(first.astype(np.int32), device)
            self._counts = _send(np.array(counts, dtype=np.int64), device)
            self._partial = torch.empty(len(tensor), 2, device=device)
            self._always = torch.ones((), dtype=torch.int32, device=device)
            self._ratios = torch.empty(len(counts), device=device)
            self._table = torch.empty(len(self._addresses), dtype=torch.int64, device=device)
            self._sent = []
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self.settle()

    def settle(self) -> None:
        """Sends the newest addresses, if they were not; a graph being captured cannot do that."""
        if self._addresses != self._sent:
            self._table.copy_(_send(np.array(self._addresses, dtype=np.int64), self._table.device))
            self._sent = self._addresses


def _send(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@triton.jit
def _floats(table, tensor, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """The memory a column of the table names: 0 parameter, 1 gradient, 2 momentum, 3 target."""
    address = tl.load(table + tensor * 4 + COLUMN).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _norms(
    table,  # int64 [T, 4] addresses
    pieces,  # int32 [P, 2] tensor, number of the piece in it
    counts,  # int64 [T] elements
    partial,  # float32 [P, 2] out: sums of squares of parameter and update (or gradient)
    weight_decay,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    tensor = tl.load(pieces + piece * 2)
    start = tl.load(pieces + piece * 2 + 1).to(tl.int64) * PIECE
    left = tl.minimum(tl.load(counts + tensor) - start, PIECE)
    p = _floats(table, tensor, 0, ALIGNED) + start
    g = _floats(table, tensor, 1, ALIGNED) + start
    lanes = tl.arange(0, BLOCK)
    of_p = tl.zeros([BLOCK], tl.float32)
    of_u = tl.zeros([BLOCK], tl.float32)
    whole = left // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):  # unmasked, so that memory is read in wide words
        weight = tl.load(p + at + lanes)
        update = tl.load(g + at + lanes)
        if not SUM:
            update += weight_decay * weight
        of_p += weight * weight
        of_u += update * update
    inside = whole + lanes < left
    weight = tl.load(p + whole + lanes, mask=inside, other=0.0)
    update = tl.load(g + whole + lanes, mask=inside, other=0.0)
    if not SUM:
        update += weight_decay * weight
    of_p += weight * weight
    of_u += update * update
    tl.store(partial + piece * 2, tl.sum(of_p, axis=0))
    tl.store(partial + piece * 2 + 1, tl.sum(of_u, axis=0))


@triton.jit
def _trust(
    partial,  # float32 [P, 2]
    first,  # int32 [T + 1] pieces of tensor i are [first[i], first[i + 1])
    ratios,  # float32 [T] out
    weight_decay,
    eta,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    start, stop = tl.load(first + tensor), tl.load(first + tensor + 1)
    lanes = tl.arange(0, BLOCK)
    of_p = tl.zeros([BLOCK], tl.float32)
    of_u = tl.zeros([BLOCK], tl.float32)
    for part in range(start, stop, BLOCK):
        at = part + lanes
        of_p += tl.load(partial + at * 2, mask=at < stop, other=0.0)
        of_u += tl.load(partial + at * 2 + 1, mask=at < stop, other=0.0)
    size = tl.sqrt(tl.sum(of_p, axis=0))
    over = tl.sqrt(tl.sum(of_u, axis=0))
    live = (size > 0.0) & (over > 0.0)
    if SUM:
        over += weight_decay * size + 1e-8
    ratio = tl.where(live, eta * size / tl.where(live, over, 1.0), 1.0)
    tl.store(ratios + tensor, ratio)


@triton.jit
def _apply(
    table,
    pieces,
    counts,
    ratios,
    lr,  # number, or pointer to one
    decay,  # pointer to τ, or the number 1 − τ
    finite,  # int32 []: 0 leaves everything as it is
    weight_decay,
    momentum,
    ADAPT: tl.constexpr,
    LR_INSIDE: tl.constexpr,
    LR_IS_TENSOR: tl.constexpr,
    DECAY_IS_TENSOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    tensor = tl.load(pieces + piece * 2)
    start = tl.load(pieces + piece * 2 + 1).to(tl.int64) * PIECE
    left = tl.minimum(tl.load(counts + tensor) - start, PIECE)
    left = tl.where(tl.load(finite) != 0, left, 0)  # no element is read or written
    p = _floats(table, tensor, 0, ALIGNED) + start
    g = _floats(table, tensor, 1, ALIGNED) + start
    m = _floats(table, tensor, 2, ALIGNED) + start
    t = _floats(table, tensor, 3, ALIGNED) + start
    averaged = tl.load(table + tensor * 4 + 3) != 0
    rate = tl.load(lr).to(tl.float32) if LR_IS_TENSOR else lr
    share = (1.0 - tl.load(decay)).to(tl.float32) if DECAY_IS_TENSOR else decay
    ratio = tl.load(ratios + tensor) if ADAPT else 1.0
    lanes = tl.arange(0, BLOCK)
    whole = left // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):  # unmasked, so that memory is moved in wide words
        _step(p, g, m, t, at + lanes, None, None, averaged,
              rate, share, ratio, weight_decay, momentum, LR_INSIDE)  # fmt: skip
    at = whole + lanes
    _step(p, g, m, t, at, at < left, 0.0, averaged,
          rate, share, ratio, weight_decay, momentum, LR_INSIDE)  # fmt: skip


@triton.jit
def _step(
    p, g, m, t, at, inside, other, averaged,
    rate, share, ratio, weight_decay, momentum, LR_INSIDE: tl.constexpr,
):  # fmt: skip
    """LARS, and the moving average where there is a target, on one block of a tensor."""
    weight = tl.load(p + at, mask=inside, other=other)
    update = (tl.load(g + at, mask=inside, other=other) + weight_decay * weight) * ratio
    speed = tl.load(m + at, mask=inside, other=other) * momentum
    if LR_INSIDE:
        speed += rate * update
        weight -= speed
    else:
        speed += update
        weight -= rate * speed
    tl.store(m + at, speed, mask=inside)
    tl.store(p + at, weight, mask=inside)
    if averaged:
        mean = tl.load(t + at, mask=inside, other=other)
        tl.store(t + at, mean + share * (weight - mean), mask=inside)
