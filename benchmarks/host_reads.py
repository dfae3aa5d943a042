"""Counts where the host would wait for a GPU, without one: reads of values that a device computes.

On a GPU `torch.cuda.set_sync_debug_mode` finds the same. Here every operation of a block is watched
(those of backward too), and every tensor method that hands values to Python.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# item(), bool(), float() and int() end in the first; the others have to know values or counts.
READING_OPERATORS = {
    *(_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero, _aten.nonzero),
    *(_aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive),
}
# These count the true entries of a mask.
INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# On a CPU these read memory without an operation.
READING_METHODS = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.cpu,
}


class HostReads:
    """`with HostReads() as seen: …` leaves `seen.reads` (names) and `seen.operators` (a count)."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.operators = 0
        self._modes = (_Operators(self), _Methods(self))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: HostReads) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._seen.operators += 1
        packet = func.overloadpacket
        if packet in READING_OPERATORS or (packet in INDEXING and _has_mask(args[1])):
            self._seen.reads.append(str(func))
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


class _Methods(TorchFunctionMode):
    def __init__(self, seen: HostReads) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*args[1:], *(kwargs or {}).values()]
        if func in READING_METHODS or (func is torch.Tensor.to and "cpu" in map(str, given)):
            self._seen.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))
