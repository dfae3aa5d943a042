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
from torch.nn.utils.parametrize import is_parametrized

from byol_fast.networks.norm_ops import normalise

Sync = bool | dist.ProcessGroup

_NO_MOMENTUM = (
    "ViewBatchNorm does not count batches, so momentum=None (a cumulative average) "
    "has no meaning: give a number such as 0.1"
)


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
            raise ValueError(_NO_MOMENTUM)
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


class ViewBatchNorm1d(ViewBatchNorm, nn.BatchNorm1d):
    """What `convert` makes of nn.BatchNorm1d; still one for code that asks with isinstance."""


class ViewBatchNorm2d(ViewBatchNorm, nn.BatchNorm2d):
    """What `convert` makes of nn.BatchNorm2d."""


class ViewBatchNorm3d(ViewBatchNorm, nn.BatchNorm3d):
    """What `convert` makes of nn.BatchNorm3d."""


class ViewBatchNormAct(ViewBatchNorm2d):
    """With what timm's BatchNormAct2d does to its output: `drop`, then `act`, of the same names."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(super().forward(input))))


_PLAIN = (ViewBatchNorm1d, ViewBatchNorm2d, ViewBatchNorm3d)


def convert(module: nn.Module, *, views: int = 2, sync: Sync | None = None) -> nn.Module:
    """Turn every BatchNorm (SyncBatchNorm too) of `module` into a ViewBatchNorm, in place.

    Layers stay the same objects, so parameters, buffers, hooks and sharing are kept. What timm's
    BatchNormAct2d does besides is kept too. Returns the module.

    sync: as in ViewBatchNorm; None keeps what each layer has: its group for a SyncBatchNorm.

    Raises ValueError for another subclass with a forward of its own, for `momentum=None` and for
    parametrized weights. Nothing has been changed then.
    """
    found = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kinds = [_kind(layer) for layer in found]  # all are asked before the first is changed
    for layer, kind in zip(found, kinds, strict=True):
        if not isinstance(layer, ViewBatchNorm):
            own = isinstance(layer, nn.SyncBatchNorm) and (layer.process_group or True)
            layer.__class__ = kind
            cast(ViewBatchNorm, layer).sync = own
    set_views(module, views)
    if sync is not None:
        set_sync(module, sync)
    return module


def does_more(norm: _BatchNorm) -> bool:
    """Whether a layer of this class does something of its own besides BatchNorm."""
    ours_and_torchs = (_BatchNorm, nn.SyncBatchNorm, ViewBatchNorm)
    return type(norm).forward not in [kind.forward for kind in ours_and_torchs]


def _kind(norm: _BatchNorm) -> type[ViewBatchNorm]:
    """The class that does the same per view."""
    if isinstance(norm, ViewBatchNorm):
        return type(norm)
    name = type(norm).__name__
    if is_parametrized(norm):
        raise ValueError(
            f"the backbone's {name} has a parametrization, which cannot be kept per view: remove "
            "it with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if norm.momentum is None:
        raise ValueError(_NO_MOMENTUM)
    # Also of a SyncBatchNorm that torch has made of one: it keeps these two, and does not run them.
    if norm._modules.keys() == {"drop", "act"}:
        return ViewBatchNormAct
    if does_more(norm):
        raise ValueError(
            f"the backbone's {name} is a BatchNorm with a forward of its own, "
            "and it is not known what that does: use nn.BatchNorm2d and a layer of its own"
        )
    return next((kind for kind in _PLAIN if isinstance(norm, kind.__mro__[2])), ViewBatchNorm)


def synchronised(module: nn.Module) -> Sync:
    """Whom the first ViewBatchNorm below `module` that shares its statistics shares them with."""
    norms = (layer for layer in module.modules() if isinstance(layer, ViewBatchNorm))
    return next((norm.sync for norm in norms if norm.sync), False)


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
