"""How tensors lie in memory: what a kernel has to know that walks through memory, not shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory, each once, in whatever order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:  # its stride is never taken
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether the same step through memory leads to the same element of both; they are dense."""
    if a.stride() == b.stride():
        return a.shape == b.shape
    pairs = zip(a.shape, a.stride(), b.stride(), strict=False)
    return a.shape == b.shape and all(size == 1 or s == t for size, s, t in pairs)


def laid_out_as(model: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with dtype, device and, where `model` is dense, memory order of `model`; itself if
    it has them already."""
    fits = tensor.layout == torch.strided and same_order(model, tensor)
    if kind(tensor) == kind(model) and (fits or not dense(model)):
        return tensor
    return torch.empty_like(model).copy_(tensor)


def kind(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    """Tensors of one kind can share a multi-tensor call."""
    return tensor.device, tensor.dtype


def by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors, one list for each kind."""
    lists: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        lists.setdefault(kind(tensor), []).append(index)
    return list(lists.values())


def overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """Indices of tensors whose extent in memory meets that of another one of them.

    Interleaved tensors count, as columns of one matrix: they are rare, and taking them one after
    the other is right.
    """
    some = [(i, t) for i, t in enumerate(tensors) if t.layout == torch.strided and t.numel()]
    # The storage's identity, not its address: a fake tensor has none.
    storages = [t.untyped_storage()._cdata for _, t in some]
    if len(set(storages)) == len(storages):  # as in nearly every network
        return set()
    spans: list[tuple[int, int, int, int]] = []
    for storage, (index, t) in zip(storages, some, strict=True):
        size = t.element_size()
        first = int(t.storage_offset()) * size
        reach = 1 + sum((n - 1) * int(s) for n, s in zip(t.shape, t.stride(), strict=True))
        spans.append((storage, first, first + reach * size, index))
    spans.sort()
    found: set[int] = set()
    last: tuple[int, int, int] | None = None  # storage, the furthest end in it, whose it is
    for storage, first, end, index in spans:
        if last is not None and last[0] == storage and first < last[1]:
            found.update((last[2], index))
        if last is None or last[0] != storage or end > last[1]:
            last = storage, end, index
    return found
