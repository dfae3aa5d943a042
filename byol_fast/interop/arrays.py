"""NumPy arrays and torch tensors out of a pickle's records; see `inert.py`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byol_fast.interop.records import Name, Opaque, Refused

_NUMERIC = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c(8|16))")
_NUMPY = re.compile(r"numpy\.(core|_core)\.(multiarray|numeric)")
# What torch calls a storage of each type.
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DIMENSIONS = 64  # torch's own limit
_LARGEST = 1 << 48  # of a size, stride or offset
_EXPANDED = 1 << 16  # numbers that a tensor may repeat beyond those stored: buffers made by expand
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}


class DType:
    """A numeric NumPy dtype in the making: its byte order comes with a later opcode."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

    def fill_from_pickle(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array in the making; `value` once its content has been read."""

    def __init__(self) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.value is None else self.value.nbytes

    def fill_from_pickle(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, DType):
            return  # an array of objects: no weights
        self.value = _shaped(data, dtype, shape, "F" if fortran else "C")


@dataclass(frozen=True)
class Storage:
    """Bytes that lie elsewhere in a torch file; `elements` of `dtype`."""

    key: str
    dtype: torch.dtype
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor as a torch file describes it: a window onto a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, data: Tensor) -> Tensor:  # data: [bytes] uint8
        """The tensor itself, a view; ValueError where it reaches beyond the storage."""
        try:
            return data.view(self.dtype).as_strided(self.size, self.stride, self.offset)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"a tensor does not fit its storage: {error}") from error


def reduce(name: Name, args: tuple[Any, ...]) -> Any:
    """Arrays, dtypes, scalars and tensors; NotImplemented for anything else."""
    if _NUMPY.fullmatch(name.module):
        return _numpy(name.name, args)
    match str(name), args:
        case "numpy.dtype", (str(code), *_) if _NUMERIC.fullmatch(code):
            return DType(code)
        case "jax._src.array._reconstruct_array", (_, _, tuple(state), *_):
            array = Array()
            array.fill_from_pickle(state)
            return array
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            Storage() as storage,
            offset,
            size,
            stride,
            *_,
        ):
            return _view(storage, storage.dtype, offset, size, stride)
        case "torch._utils._rebuild_tensor_v3", (
            Storage() as storage,
            offset,
            size,
            stride,
            _,
            _,
            Name("torch", str(dtype)),
            *_,
        ) if dtype in _DTYPES:
            return _view(storage, _DTYPES[dtype], offset, size, stride)
        case (
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            (View() as view, *_),
        ):
            return view
        case "torch._utils._rebuild_meta_tensor_no_storage", _:
            raise Refused("it holds a tensor without numbers (device meta): save it from the CPU")
        case "torch._tensor._rebuild_from_type_v2", (Name() as inner, _, tuple(inner_args), *_):
            return reduce(inner, inner_args)
    return NotImplemented


def storage(identity: Any) -> Any:
    """What a torch file's persistent id stands for."""
    match identity:
        case ("storage", Name(_, str(kind)), str() | int() as key, _, int(elements), *_) if (
            kind in _STORAGES and 0 <= elements < _LARGEST
        ):
            return Storage(str(key), _STORAGES[kind], elements)
    return Opaque(Name("torch", "storage"), (identity,))


def is_leaf(value: Any) -> bool:
    """Whether a value of a tree is a tensor, or can become one."""
    if isinstance(value, Array):
        return value.value is not None
    return isinstance(value, Tensor | np.ndarray | View)


def _numpy(name: str, args: tuple[Any, ...]) -> Any:
    match name, args:
        case "_reconstruct", _:
            return Array()
        case "scalar", (DType() as dtype, bytes(data)):
            return _shaped(data, dtype, (), "C").item()
        case "_frombuffer", (data, DType() as dtype, tuple(shape), str(order)):
            array = Array()
            array.value = _shaped(data, dtype, shape, order)
            return array
    return NotImplemented


def _shaped(data: Any, dtype: DType, shape: Any, order: str) -> np.ndarray[Any, Any]:
    if isinstance(data, str):  # protocols 0 to 2 of Python 2
        data = data.encode("latin-1")
    if not isinstance(data, bytes | bytearray):
        raise Refused("its pickle is damaged (an array without bytes)")
    flat = np.frombuffer(data, dtype=dtype.dtype)
    whole = flat.reshape([int(n) for n in shape], order="F" if order == "F" else "C")
    native = whole.astype(dtype.dtype.newbyteorder("="), copy=False)
    return np.array(native, order="C")  # a copy of its own, writable


def _view(storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> View:
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise Refused("its pickle is damaged (a tensor with impossible sizes)")
    if len(size) > _DIMENSIONS or max(numbers) > _LARGEST:
        raise Refused("its pickle is damaged (a tensor with impossible sizes)")
    claimed, stored = math.prod(size), storage.nbytes // dtype.itemsize
    if claimed > max(stored, _EXPANDED):
        raise Refused(
            f"a tensor claims {claimed:,} numbers where {stored:,} are stored (a stride of 0 "
            "repeats them): it is damaged or was made to exhaust this machine"
        )
    return View(storage, dtype, offset, tuple(size), tuple(stride))
