"""LARS as BYOL's authors define it, and the target's moving average, both without host syncs.

Source: `byol/utils/optimizers.py` of the authors (LARS there is two small transforms: decay and
adaptation, both skipping biases and norms, then momentum and the learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from byol_fast.updates.average import ema_ as ema_
from byol_fast.updates.dispatch import Dispatch, Impl
from byol_fast.updates.lars_updates import Norm
from byol_fast.updates.layouts import laid_out_as, overlapping

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive SGD with momentum.

    For a tensor p with gradient g, weight decay wd and momentum buffer m (0 at first):

        u = g + wd·p
        u = u · eta·‖p‖/‖u‖        adapted groups only; factor 1 if either norm is 0, no epsilon
        m = momentum·m + u
        p = p − lr·m

    Groups carry `adapt: bool` (default True); `param_groups` makes the usual two. With
    `eta=1, adapt=False` groups this is SGD with momentum. `lr` is a float or a 0-d tensor, which
    every group then shares and `set_lr` fills in place (a CUDA graph can hold the step).

    impl: "foreach" runs the step as a fixed number of multi-tensor calls and never reads a value
        back from the device; "fused" is one pass over memory by Triton kernels, with the target's
        moving average in it (`step_and_average`); "apex" uses NVIDIA apex's multi-tensor kernels;
        "reference" is the plain loop they are tested against. "auto" is fused for fp32 parameters
        on a GPU where Triton is installed, else foreach. All share one state layout, so a state
        dict moves between them. Memory order does not matter: momentum is kept in the parameter's,
        a gradient is brought into it, and a tensor that the kernels cannot take (other dtypes, gaps
        in memory) is updated by foreach, which is logged once.
    norm: "update" divides by ‖u‖ (the authors'); "sum" divides by ‖g‖ + wd·‖p‖ + 1e-8
        (mmpretrain, lightly).
    lr_in_momentum: m = momentum·m + lr·u; p = p − m (mmpretrain).

    Raises ValueError for hyper-parameters out of range and for parameters that `impl` cannot take,
    ImportError where its package is missing. Tensors without a gradient are skipped.
    """

    impl: Impl | None = None  # until the first groups are there

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        impl: Impl = "auto",
        norm: Norm = "update",
        lr_in_momentum: bool = False,
    ) -> None:
        if isinstance(lr, Tensor):
            if lr.dim() != 0:
                raise ValueError(f"a tensor lr must be 0-d, got shape {list(lr.shape)}")
        elif not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be finite and >= 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if not (0 <= weight_decay < math.inf and 0 < eta < math.inf):
            raise ValueError(f"need weight_decay >= 0 and eta > 0, got {weight_decay} and {eta}")
        if impl not in get_args(Impl):
            raise ValueError(f"impl is one of {', '.join(get_args(Impl))}, got {impl!r}")
        if norm not in get_args(Norm):
            raise ValueError(f"norm is update or sum, got {norm!r}")
        # Not in the groups: a state dict must not carry the implementation along.
        self.norm, self.lr_in_momentum = norm, lr_in_momentum
        groups = {"momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        super().__init__(params, {"lr": lr, **groups})
        self._dispatch = Dispatch(impl, self._parameters())
        self.impl = self._dispatch.impl

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle; not what `state_dict` gives."""
        made = {"impl": self.impl, "norm": self.norm, "lr_in_momentum": self.lr_in_momentum}
        return {**super().__getstate__(), **made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "impl" in state:  # a copy; `load_state_dict` comes here without
            self._dispatch = Dispatch(state["impl"], self._parameters())

    def _parameters(self) -> list[list[Tensor]]:
        return [group["params"] for group in self.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; a closure is run first, with gradients on, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run({}, 0.0)
        return loss

    @torch.no_grad()
    def step_and_average(
        self,
        target: list[Tensor],
        online: list[Tensor],
        decay: float | Tensor,
        *,
        finite: Tensor | None = None,
    ) -> None:
        """`step()`, then `ema_(target, online, decay)`: in one pass over memory if fused.

        finite: a 0-d bool tensor; where it is False nothing changes. Only a fused update reads it
            without waiting for the device.
        """
        if not self._dispatch.fused:
            if finite is None or bool(finite):
                self.step()
                ema_(target, online, decay)
            return
        shared = overlapping(target)
        averages: dict[Tensor, Tensor] = {}
        late: list[tuple[Tensor, Tensor]] = []
        for index, (t, o) in enumerate(zip(target, online, strict=True)):
            if index in shared or o in averages:
                late.append((t, o))
            else:
                averages[o] = t
        self._run(averages, decay, finite)
        late += [(t, o) for o, t in averages.items()]  # those that no kernel took
        ema_([t for t, _ in late], [o for _, o in late], decay, finite=finite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for parameters that a fused update cannot take."""
        super().add_param_group(param_group)
        if self.impl is None:  # the first groups
            return
        before = self._dispatch.fused  # a graph may hold the addresses of their tables
        try:
            self._dispatch = Dispatch(self.impl, self._parameters())
        except ValueError:
            self.param_groups.pop()
            raise
        self._dispatch.fused[: len(before)] = before

    def settle(self) -> None:
        """After a CUDA graph was captured with a step in it: sends what could not be sent then."""
        for group in self._dispatch.fused:
            group.settle()

    def _run(
        self,
        averages: dict[Tensor, Tensor],
        decay: float | Tensor,
        finite: Tensor | None = None,
    ) -> None:
        """Updates every group; a fused one takes the targets that it updates out of the dict."""
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            own, others = self._dispatch.split(params)
            if own:
                self._dispatch.fused[number].update(
                    own,
                    _gradients(own),
                    [self._buffer(p) for p in own],
                    [self._dispatch.take(averages, p) for p in own],
                    lr=group["lr"],
                    decay=decay,
                    finite=finite,
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    eta=group["eta"] if group["adapt"] else None,
                    sum_of_norms=self.norm == "sum",
                    lr_in_momentum=self.lr_in_momentum,
                )
            if others and (finite is None or bool(finite)):
                for update, some in others:
                    buffers = [self._buffer(p) for p in some]
                    grads = _gradients(some)
                    update(some, grads, buffers, group, self.norm, self.lr_in_momentum)

    def _buffer(self, p: Tensor) -> Tensor:
        """The momentum of a parameter, in its memory order."""
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = laid_out_as(p, state["momentum_buffer"])
        state["momentum_buffer"] = buffer
        return buffer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but tensors stay the ones they are (a graph may hold their addresses): lr,
        and momentum, which is copied into the parameter's memory order.

        Raises ValueError for momentum of another shape than its parameter's; nothing is loaded.
        """
        given = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(given, params, strict=False):
            buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
            if buffer is not None and buffer.shape != p.shape:
                raise ValueError(
                    f"momentum of parameter {index} has shape {list(buffer.shape)}, the parameter "
                    f"{list(p.shape)}: the state is of another network"
                )
        rates = [group["lr"] for group in self.param_groups]
        kept = {p: self._buffer(p) for p in params if p in self.state}
        super().load_state_dict(state_dict)
        for group, lr in zip(self.param_groups, rates, strict=True):
            loaded = float(group["lr"])
            group["lr"] = lr.fill_(loaded) if isinstance(lr, Tensor) else loaded
        for p in params:
            loaded = self.state.get(p, {}).get("momentum_buffer")
            if loaded is not None:
                own = kept[p] if p in kept else torch.empty_like(p)
                self.state[p]["momentum_buffer"] = own.copy_(loaded)


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set every group's learning rate; a tensor lr is filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def param_groups(
    module: nn.Module, weight_decay: float, *, adapt: bool = True
) -> list[dict[str, Any]]:
    """The trainable parameters as two groups for `LARS`; an empty group is left out.

    adapt: False takes the trust ratio from weights too; with it LARS is SGD with momentum.

    Weights with more than one dimension are adapted and decayed; biases and all parameters of norm
    layers (those of `downsample` too) are neither. ResNet-50 with heads: 57 and 112 tensors.
    """
    of_norms = {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters()}
    adapted: list[Tensor] = []
    excluded: list[Tensor] = []
    for p in module.parameters():
        if p.requires_grad:
            (adapted if p.dim() > 1 and id(p) not in of_norms else excluded).append(p)
    groups = [
        {"params": adapted, "weight_decay": weight_decay, "adapt": adapt},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]
