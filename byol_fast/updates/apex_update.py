"""LARS by NVIDIA apex's multi-tensor kernels (its compiled module `amp_C`), where they are there.

apex has no LARS. It has what one is made of: per-tensor norms, sums of scaled tensors, and the last
stage of LAMB, `p -= rate · (norm a / norm b) · update`, which here adds the adapted update to the
momentum. apex is built from source (github.com/NVIDIA/apex with `APEX_CPP_EXT=1 APEX_CUDA_EXT=1`);
the package of that name on PyPI is an unrelated project.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byol_fast.updates.lars_updates import Norm
from byol_fast.updates.layouts import laid_out_as

try:
    import amp_C
except Exception as error:  # a build for another PyTorch raises whatever it likes
    raise ImportError(
        "impl='apex' needs NVIDIA apex built from source with its CUDA extensions "
        f"({type(error).__name__}: {error}); impl='auto' needs nothing more"
    ) from error

_CHUNK = 2048 * 32  # elements of a block, as apex's own optimizers use


def unsupported(tensor: Tensor) -> str:
    """Why a parameter cannot be updated here; "" if it can."""
    if tensor.dtype != torch.float32:
        return f"it is {str(tensor.dtype).removeprefix('torch.')}, not float32"
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if last or tensor.is_contiguous():
        return ""
    return "apex takes contiguous and channels_last tensors alone"


def update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    group: dict[str, Any],
    norm: Norm,
    lr_in_momentum: bool,
) -> None:
    """One LARS step of a parameter group, in place; see `optim.LARS`.

    Parameters are ones that `unsupported` names no reason for, on one device; momentum has their
    memory order. apex's kernels take numbers, so a tensor lr is read back from the device.
    """
    grads = [laid_out_as(p, g) for p, g in zip(params, grads, strict=True)]
    wd, momentum, lr = group["weight_decay"], group["momentum"], float(group["lr"])
    noop = torch.zeros(1, dtype=torch.int32, device=params[0].device)
    inside, outside = (lr, 1.0) if lr_in_momentum else (1.0, lr)
    u = grads
    if wd:
        u = [torch.empty_like(p) for p in params]
        amp_C.multi_tensor_axpby(_CHUNK, noop, [grads, params, u], 1.0, wd, 0)
    if group["adapt"]:
        size = amp_C.multi_tensor_l2norm(_CHUNK, noop, [params], True)[1]
        over = amp_C.multi_tensor_l2norm(_CHUNK, noop, [u if norm == "update" else grads], True)[1]
        live = (size > 0) & (over > 0)
        if norm == "sum":
            over = over + wd * size + 1e-8
        size = torch.where(live, group["eta"] * size, 1.0)
        over = torch.where(live, over, 1.0)
        amp_C.multi_tensor_scale(_CHUNK, noop, [buffers, buffers], momentum)
        amp_C.multi_tensor_lamb_stage2_cuda(
            _CHUNK, noop, [buffers, u], size, over, -inside, 0.0, True
        )
    else:
        amp_C.multi_tensor_axpby(_CHUNK, noop, [buffers, u, buffers], momentum, inside, 0)
    amp_C.multi_tensor_axpby(_CHUNK, noop, [params, buffers, params], 1.0, -outside, 0)
