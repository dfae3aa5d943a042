"""BatchNorm whose statistics are taken per view, with both views in one forward.

In BYOL each view is a batch of its own (authors' `byol/byol_experiment.py`). Running both views as
one 2N batch saves launches, but a plain BatchNorm would then mix the views. `ViewBatchNorm` gives
what V consecutive calls of `nn.BatchNorm` on the V chunks would give: outputs, gradients and
running statistics. The arithmetic is in `norm_ops.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_fast.networks.norm_ops import normalise

Sync = bool | dist.ProcessGroup


class ViewBatchNorm(_BatchNorm):
    """BatchNorm for `[V*B, C]` or `[V*B, C, ...]` (view 0 first), statistics per view in training.

    Evaluation is plain BatchNorm on any batch. State-dict keys are those of `nn.BatchNorm2d`;
    `num_batches_tracked` is kept for the keys' sake only: it is not counted, and may be missing on
    load. Running statistics are updated view by view; torch's kernels do that on the way, so the
    target network tracks them as well and can be exported. Statistics are fp32 for bf16/fp16 input.

    views: V, the number of equal chunks of the batch; 1 is plain BatchNorm.
    sync: share statistics over the default process group (True) or the given one. Every rank must
        bring a batch of the same size: the count is not sent. Without a group of more than one
        rank it changes nothing.

    Raises ValueError for a batch that V does not divide and for one value per channel and view.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        views: int = 2,
        sync: Sync = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if momentum is None:
            raise ValueError(
                "ViewBatchNorm does not count batches, so momentum=None (a cumulative average) "
                "has no meaning: give a number such as 0.1"
            )
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.views = views
        self.sync = sync

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2:
            raise ValueError(f"expected [N, C] or [N, C, ...], got a {input.dim()}-d tensor")
        momentum = cast(float, self.momentum)
        mean, var = self.running_mean, self.running_var
        if not self.training:
            own = mean is None  # nn.BatchNorm without running statistics uses the batch's
            return F.batch_norm(input, mean, var, self.weight, self.bias, own, momentum, self.eps)
        self._check(input)
        group = self._group()
        if group is None and self.views == 1:
            return F.batch_norm(input, mean, var, self.weight, self.bias, True, momentum, self.eps)
        running = None if mean is None or var is None else (mean, var)
        return normalise(
            input,
            self.weight,
            self.bias,
            running,
            momentum=momentum,
            eps=self.eps,
            views=self.views,
            group=group,
        )

    def _check(self, input: Tensor) -> None:
        if input.shape[0] % self.views:
            raise ValueError(
                f"a batch of {input.shape[0]} rows cannot be split into {self.views} views: "
                "give V*B rows, or norm.set_views(module, 1) outside BYOL"
            )
        if input.numel() // input.shape[1] <= self.views and self._group() is None:
            raise ValueError(
                "BatchNorm in training needs more than one value per channel and view, got input "
                f"of shape {list(input.shape)} with {self.views} views: use a larger batch"
            )

    def _group(self) -> dist.ProcessGroup | None:
        if self.sync is False or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.sync is True else self.sync
        return group if dist.get_world_size(group) > 1 else None

    def extra_repr(self) -> str:
        base: str = super().extra_repr()  # type: ignore[no-untyped-call]
        shared = ", sync=True" if self.sync is True else ", sync=group" if self.sync else ""
        return f"{base}, views={self.views}{shared}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.num_batches_tracked is not None:
            state_dict.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def convert(module: nn.Module, *, views: int = 2, sync: Sync = False) -> nn.Module:
    """Replace every BatchNorm (SyncBatchNorm too) below `module` by ViewBatchNorm, in place.

    Parameters and buffers are taken over, not copied. Returns the module; a new one only if it is
    itself a BatchNorm. A layer used in two places stays one layer. What timm's BatchNormAct2d does
    besides is kept; another subclass with a forward of its own raises ValueError.
    """
    made: dict[nn.Module, ViewBatchNorm] = {}

    def replacement(old: nn.Module) -> nn.Module:
        if not isinstance(old, _BatchNorm) or isinstance(old, ViewBatchNorm):
            return old
        if old not in made:
            made[old] = _as_view_norm(old, views, sync)
        return made[old]

    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = replacement(child)
    set_views(module, views)
    set_sync(module, sync)
    return replacement(module)


class ViewBatchNormAct(ViewBatchNorm):
    """With what timm's BatchNormAct2d does to its output: `drop`, then `act`, of the same names."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(super().forward(input))))


def does_more(norm: _BatchNorm) -> bool:
    """Whether a layer of this class does something of its own besides BatchNorm."""
    ours_and_torchs = (_BatchNorm, nn.SyncBatchNorm, ViewBatchNorm)
    return type(norm).forward not in [kind.forward for kind in ours_and_torchs]


def _as_view_norm(old: _BatchNorm, views: int, sync: Sync) -> ViewBatchNorm:
    kind = ViewBatchNorm
    if does_more(old):
        if old._modules.keys() != {"drop", "act"}:
            raise ValueError(
                f"the backbone's {type(old).__name__} is a BatchNorm with a forward of its own, "
                "and it is not known what that does: use nn.BatchNorm2d and a layer of its own"
            )
        kind = ViewBatchNormAct
    new = kind(
        old.num_features,
        old.eps,
        cast(float, old.momentum),
        affine=False,
        track_running_stats=False,
        views=views,
        sync=sync,
    )
    new.affine, new.track_running_stats = old.affine, old.track_running_stats
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    new._modules.update(old._modules)
    new.training = old.training
    return new


def set_views(module: nn.Module, views: int) -> None:
    """Give every ViewBatchNorm below `module` this number of views (1: plain BatchNorm)."""
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    for layer in module.modules():
        if isinstance(layer, ViewBatchNorm):
            layer.views = views


def set_sync(module: nn.Module, sync: Sync) -> None:
    """Share statistics over ranks (True: the default group), or not, below `module`."""
    for layer in module.modules():
        if isinstance(layer, ViewBatchNorm):
            layer.sync = sync
