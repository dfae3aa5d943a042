"""Batch normalisation per view, on one rank or over several: two routes, one result.

Eager (`_Kernels`): torch's own BatchNorm kernels on each view's chunk, written into one output
and one input gradient. Two calls and a `cat` would allocate and copy every activation once more
each way, which on a CPU costs more than the normalisation itself.
Traced (`_Formulas`): the same in plain tensor formulas under `torch.compile`, for Inductor to fuse.

Over ranks, both send one message per layer forward and one backward, with all views in it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Running = tuple[Tensor, Tensor] | None


def normalise(
    x: Tensor,  # [V*B, C, ...]
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,  # mean and variance [C], updated view by view
    *,
    momentum: float,
    eps: float,
    views: int,
    group: dist.ProcessGroup | None,  # every rank brings the same shape
) -> Tensor:  # like x
    """Training-mode BatchNorm of each of the V equal chunks of x, differentiable once."""
    if torch.compiler.is_compiling() or not _fits_kernels(x, weight, bias):
        out, mean, var = _Formulas.apply(x, weight, bias, eps, views, group)
        _update(running, mean, var, momentum, _values(x, views, group))
        # Flattened here: a view made inside the Function could not be followed by an in-place ReLU.
        return cast(Tensor, out.flatten(0, 1))
    return cast(Tensor, _Kernels.apply(x, weight, bias, running, momentum, eps, views, group))


def _fits_kernels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernels keep statistics in the weight's full precision for this input."""
    if weight is None or bias is None or weight.dtype not in (torch.float32, torch.float64):
        return False
    return x.dtype in (weight.dtype, torch.bfloat16, torch.float16)


class _Kernels(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: Running,
        momentum: float,
        eps: float,
        views: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        x = _dense(x)
        # Over ranks, this rank's statistics must not reach the running ones.
        local = running if group is None else None
        mean, var = _statistics(x.chunk(views), weight, local, momentum)
        if group is not None:
            mean, var = _combine(mean, var, group)
            _update(running, mean, var, momentum, _values(x, views, group))
        out = torch.empty_like(x)
        for v, (chunk, into) in enumerate(zip(x.chunk(views), out.chunk(views), strict=True)):
            _scale_shift(chunk, weight, bias, mean[v], var[v], eps, into)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group = eps, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        views, chunks, grads = len(mean), x.chunk(len(mean)), grad.chunk(len(mean))
        invstd = torch.rsqrt(var + ctx.eps)
        sums = torch.stack(
            [
                torch.stack(_reduce(g, chunk, weight, mean[v], invstd[v], ctx.eps))
                for v, (g, chunk) in enumerate(zip(grads, chunks, strict=True))
            ],
            dim=1,
        )  # [2, V, C]: sum of grad · normalised x, sum of grad
        dx = None
        if ctx.needs_input_grad[0]:
            slope, shift = _over_ranks(sums, ctx.group) / -_values(x, views, ctx.group)
            scale = invstd * weight
            dx = torch.empty_like(x)
            # dx = scale·grad + (scale·slope)·normalised x + scale·shift: the last two are what
            # the kernel computes. They are small beside the first, so bf16 loses nothing here.
            for v, (chunk, into) in enumerate(zip(chunks, dx.chunk(views), strict=True)):
                a, b = scale[v] * slope[v], scale[v] * shift[v]
                _scale_shift(chunk, a, b, mean[v], var[v], ctx.eps, into)
            _split(dx, views).addcmul_(_split(grad, views), _spread(scale, x))
        # Gradients of weight and bias stay this rank's: DDP averages them like any other.
        return dx, sums[0].sum(0), sums[1].sum(0), *[None] * 5


def _statistics(
    chunks: tuple[Tensor, ...], like: Tensor, running: Running, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each view [V, C]; `running` is updated on the way."""
    if running is None:  # the kernel takes its precision from these, so they cannot be left out
        running = (torch.zeros_like(like), torch.ones_like(like))
    stats = [torch.ops.aten.batch_norm_update_stats(c, *running, momentum) for c in chunks]
    return torch.stack([s[0] for s in stats]), torch.stack([s[1] for s in stats])


def _scale_shift(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor
) -> None:
    """out = (x − mean)·rsqrt(var + eps)·weight + bias, by the kernel of evaluation mode."""
    scratch = torch.empty(2, len(mean), dtype=mean.dtype, device=mean.device)
    torch.ops.aten.native_batch_norm.out(
        *(x, weight, bias, mean, var, False, 0.0, eps),
        out=out,
        save_mean=scratch[0],
        save_invstd=scratch[1],
    )


def _reduce(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums over all but channels: grad · normalised x, and grad; [C] each."""
    _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
        *(grad, x, weight, None, None, mean, invstd, True, eps, [False, True, True])
    )
    return scaled, plain


class _Formulas(Function):
    """Returns (out [V, B, C, ...], mean [V, C], biased variance [V, C]); gradient from `out`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        views: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _split(_wide(x), views)
        var, mean = torch.var_mean(wide, _axes(x), correction=0)
        if group is not None:
            mean, var = _combine(mean, var, group)
        invstd = torch.rsqrt(var + eps)
        out = (wide - _spread(mean, x)) * _spread(invstd, x)
        if weight is not None:
            out = out * _spread(weight[None], x)
        if bias is not None:
            out = out + _spread(bias[None], x)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var)
        return _narrow(out, x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        views = len(mean)
        wide = _wide(grad)  # [V, B, C, ...]
        hat = (_split(_wide(x), views) - _spread(mean, x)) * _spread(invstd, x)
        sums = torch.stack(((wide * hat).sum(_axes(x)), wide.sum(_axes(x))))  # [2, V, C]
        slope, shift = _over_ranks(sums, ctx.group) / -_values(x, views, ctx.group)
        scale = invstd if weight is None else invstd * weight
        dx = (wide + hat * _spread(slope, x) + _spread(shift, x)) * _spread(scale, x)
        dx = _narrow(dx, x.dtype).view(x.shape)
        if weight is None:
            return dx, *[None] * 5
        dweight, dbias = sums.sum(1).to(weight.dtype)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None, None, None


def _update(
    running: Running,
    mean: Tensor,  # [V, C]
    var: Tensor,  # [V, C], biased
    momentum: float,
    values: int,
) -> None:
    if running is None:
        return
    with torch.no_grad():
        for m, v in zip(mean, var, strict=True):  # in view order, as V calls would
            running[0].lerp_(m.to(running[0].dtype), momentum)
            running[1].lerp_((v * (values / (values - 1))).to(running[1].dtype), momentum)


def _combine(mean: Tensor, var: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks from each rank's own, in one message.

    Every rank has the same count, so var = mean of (var_r + mean_r²) − mean². That difference
    cancels badly in fp32 when |mean| >> std; in fp64 it does not, and 2·V·C numbers are nothing.
    """
    mine = mean.double()
    message = torch.stack((mine, var.double() + mine.square()))
    dist.all_reduce(message, group=group)
    message = message / dist.get_world_size(group)
    both = (message[1] - message[0].square()).clamp_min(0)
    return message[0].to(mean.dtype), both.to(var.dtype)


def _over_ranks(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return sums
    total = sums.clone()  # this rank's own are its weight gradients
    dist.all_reduce(total, group=group)
    return total


def _values(x: Tensor, views: int, group: dist.ProcessGroup | None) -> int:
    """Values per channel and view, over all ranks."""
    ranks = 1 if group is None else dist.get_world_size(group)
    return x.numel() // x.shape[1] // views * ranks


def _dense(x: Tensor) -> Tensor:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Not a `to` that changes nothing: after it, as a Function's last operation, torch 2.11 compiles
    # a backward in which every gradient is 0.
    return x if x.dtype == dtype else x.to(dtype)


def _split(x: Tensor, views: int) -> Tensor:
    """[V*B, C, ...] as [V, B, C, ...]: a view in any memory format."""
    return x.unflatten(0, (views, -1))  # type: ignore[no-any-return]


def _axes(x: Tensor) -> list[int]:
    return [1, *range(3, x.dim() + 1)]


def _spread(stats: Tensor, x: Tensor) -> Tensor:
    """[V, C] as [V, 1, C, 1, ...], to broadcast against the split x."""
    return stats.reshape(stats.shape[0], 1, -1, *[1] * (x.dim() - 2))
