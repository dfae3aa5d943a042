"""What apex's compiled module `amp_C` does, in plain torch, as its C++ sources declare it.

Lists of tensors come in `tensor_lists`; numbers are floats, never tensors; every call is refused
that pybind11 would refuse for its types, or the kernel's launcher for its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

CALLS: list[str] = []


def _check(chunk: int, noop: Tensor, lists: list[list[Tensor]], *numbers: float) -> None:
    assert isinstance(chunk, int)
    assert noop.dtype == torch.int32 and noop.numel() == 1
    assert all(type(number) in (float, int) for number in numbers)
    assert len({len(one) for one in lists}) == 1 and lists[0]
    for tensors in zip(*lists, strict=True):
        assert len({t.numel() for t in tensors}) == 1
        # The kernel sees memory, not shapes; a dimension of one element has no step in it.
        assert (
            len(
                {
                    tuple(s * (n > 1) for s, n in zip(t.stride(), t.shape, strict=True))
                    for t in tensors
                }
            )
            == 1
        )
        for t in tensors:
            assert isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float16)
            last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
            assert t.is_contiguous() or last


@torch.no_grad()
def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    CALLS.append("scale")
    _check(chunk, noop, lists, scale)
    for source, out in zip(*lists, strict=True):
        out.copy_(source * scale)


@torch.no_grad()
def multi_tensor_axpby(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], a: float, b: float, arg_to_check: int
) -> None:
    CALLS.append("axpby")
    _check(chunk, noop, lists, a, b)
    assert arg_to_check in (-1, 0, 1)
    for x, y, out in zip(*lists, strict=True):
        out.copy_(a * x + b * y)


@torch.no_grad()
def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    CALLS.append("l2norm")
    _check(chunk, noop, lists)
    each = torch.stack([t.float().norm() for t in lists[0]])
    return each.norm()[None], each if per_tensor else torch.empty(0)


@torch.no_grad()
def multi_tensor_lamb_stage2_cuda(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    param_norms: Tensor,
    update_norms: Tensor,
    lr: float,
    decay: float,
    use_nvlamb: bool | None = None,
) -> None:
    """p -= lr · (param norm / update norm) · update; the quotient is 1 if a norm is 0."""
    CALLS.append("lamb_stage2")
    _check(chunk, noop, lists, lr, decay)
    assert param_norms.dtype == update_norms.dtype == torch.float32
    for p, update, size, over in zip(*lists, param_norms, update_norms, strict=True):
        adapt = (use_nvlamb or decay != 0) and size != 0 and over != 0
        p.sub_(lr * (size / over if adapt else 1.0) * update)
