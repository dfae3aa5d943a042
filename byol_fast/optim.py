"""LARS as BYOL's authors define it, and the target's moving average, both without host syncs.

Source: `byol/utils/optimizers.py` of the authors (LARS there is two small transforms: decay and
adaptation, both skipping biases and norms, then momentum and the learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from byol_fast.updates import lars_updates
from byol_fast.updates.lars_updates import Norm

if TYPE_CHECKING:
    from byol_fast.updates.fused_update import FusedGroup

Impl = Literal["auto", "reference", "foreach", "fused", "apex"]
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
        dict moves between them.
    norm: "update" divides by ‖u‖ (the authors'); "sum" divides by ‖g‖ + wd·‖p‖ + 1e-8
        (mmpretrain, lightly).
    lr_in_momentum: m = momentum·m + lr·u; p = p − m (mmpretrain).

    Raises ValueError for hyper-parameters out of range and for parameters that `impl` cannot take,
    ImportError where its package is missing. Tensors without a gradient are skipped.
    """

    impl: str = ""  # until the first groups are there

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
        everything = [p for group in self.param_groups for p in group["params"]]
        self.impl = _choose(everything) if impl == "auto" else impl
        self._prepare(everything)

    def _prepare(self, everything: list[Tensor]) -> None:
        self._fused: list[FusedGroup] = []
        match self.impl:
            case "fused":
                self._fused = _fused_groups(everything, len(self.param_groups))
            case "apex":
                from byol_fast.updates.apex_update import update

                self._update = update
            case "foreach":
                self._update = lars_updates.foreach
            case _:
                self._update = lars_updates.reference

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle; not what `state_dict` gives."""
        made = {"impl": self.impl, "norm": self.norm, "lr_in_momentum": self.lr_in_momentum}
        return {**super().__getstate__(), **made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "impl" in state:  # a copy; `load_state_dict` comes here without
            self._prepare([p for group in self.param_groups for p in group["params"]])

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
        if not self._fused:
            if finite is None or bool(finite):
                self.step()
                ema_(target, online, decay)
            return
        follower = dict(zip(online, target, strict=True))
        self._run(follower, decay, finite)
        late = [(t, o) for o, t in follower.items()]  # those that no group stepped
        ema_([t for t, _ in late], [o for _, o in late], decay, finite=finite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for parameters that a fused update cannot take."""
        super().add_param_group(param_group)
        if self.impl != "fused":
            return
        try:
            self._fused += _fused_groups([p for g in self.param_groups for p in g["params"]], 1)
        except ValueError:
            self.param_groups.pop()
            raise

    def settle(self) -> None:
        """After a CUDA graph was captured with a step in it: sends what could not be sent then."""
        for group in self._fused:
            group.settle()

    def _run(
        self,
        follower: dict[Tensor, Tensor],
        decay: float | Tensor,
        finite: Tensor | None = None,
    ) -> None:
        """Updates every group; a fused one takes its parameters' followers out of the dict."""
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, buffers = [p.grad for p in params], [self._buffer(p) for p in params]
            if not self._fused:
                self._update(params, grads, buffers, group, self.norm, self.lr_in_momentum)
                continue
            self._fused[number].update(
                params,
                grads,
                buffers,
                [follower.pop(p, None) for p in params],
                lr=group["lr"],
                decay=decay,
                finite=finite,
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                eta=group["eta"] if group["adapt"] else None,
                sum_of_norms=self.norm == "sum",
                lr_in_momentum=self.lr_in_momentum,
            )

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a tensor lr stays the same tensor (a graph may hold its address)."""
        own = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, lr in zip(self.param_groups, own, strict=True):
            loaded = float(group["lr"])
            group["lr"] = lr.fill_(loaded) if isinstance(lr, Tensor) else loaded


def _choose(params: list[Tensor]) -> str:
    """What "auto" means for these parameters."""
    if params and params[0].is_cuda:
        try:
            from byol_fast.updates.fused_update import misfit
        except ImportError:  # no Triton
            return "foreach"
        return "foreach" if misfit(params) else "fused"
    return "foreach"


def _fused_groups(params: list[Tensor], groups: int) -> list[FusedGroup]:
    from byol_fast.updates.fused_update import FusedGroup, misfit

    if reason := misfit(params):
        raise ValueError(f"impl='fused' cannot take these parameters: {reason}; use 'foreach'")
    return [FusedGroup() for _ in range(groups)]


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


@torch.no_grad()
def ema_(
    target: list[Tensor],
    online: list[Tensor],
    decay: float | Tensor,
    *,
    finite: Tensor | None = None,
) -> None:
    """target = decay·target + (1 − decay)·online, in place, as multi-tensor calls.

    Give parameters, not buffers, and keep them fp32: at decay .996 and above a bf16 average stands
    still. `decay` may be a 0-d tensor on the parameters' device; nothing is read back from it.
    Where `finite`, a 0-d bool tensor, is False the target stays (`online` must be finite all the
    same). Empty lists are fine: SimSiam has no target.
    """
    if not target or (finite is not None and not finite.is_cuda and not bool(finite)):
        return
    share = 1.0 - decay
    if finite is not None and finite.is_cuda:
        share = torch.where(finite, share, 0.0)
    if not isinstance(share, Tensor):
        torch._foreach_lerp_(target, online, share)
        return
    # _foreach_lerp_ takes host scalars only, so the same lerp in three calls.
    weight = share.to(target[0].dtype)
    step = torch._foreach_sub(online, target)
    torch._foreach_mul_(step, weight)
    torch._foreach_add_(target, step)
