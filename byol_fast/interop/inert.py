"""A pickle read as data: its opcodes are interpreted here, nothing is looked up and nothing called.

Published checkpoints hold more than tensors: an `argparse.Namespace`, a configuration, a haiku
mapping. Python's unpickler would import and call whatever the file names. This one knows a short
list of names that stand for data (tensors, arrays, plain containers) and builds those itself; every
other name becomes an `Opaque` record of what the file said. No name in a file is ever imported, no
attribute is set, so there is nothing a file could make this program do but use memory and time,
and `limits.py` bounds both.
"""

from __future__ import annotations

import pickletools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

from byol_fast.errors import CheckpointError
from byol_fast.interop import limits
from byol_fast.interop.records import Name, Opaque, Refused, named

_MARK = object()
_RECORD = 512  # bytes of an `Opaque` with its dict

Reduce = Callable[[Name, tuple[Any, ...]], Any]


def nothing(name: Name, args: tuple[Any, ...]) -> Any:
    """The `reduce` of a pickle in which no name stands for data."""
    return NotImplemented


def load(
    file: IO[bytes],
    *,
    reduce: Reduce = nothing,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The next pickle of `file`.

    Args:
        reduce: what `name(*args)` stands for, or NotImplemented where it is to stay opaque.
        persistent: what a persistent id stands for (torch's storages).

    Raises:
        Refused: damaged, it names what would run programs or open files, or it asks for more
            memory than its size explains.
    """
    window = limits.Window(file)
    machine = _Machine(reduce, persistent, limits.Budget(window.size))
    try:
        for opcode, arg, _ in pickletools.genops(window):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, arg)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise Refused(f"its pickle is damaged ({type(error).__name__}: {error})") from error
    except RecursionError as error:
        raise Refused("its pickle is nested deeper than any weights file") from error
    except MemoryError as error:
        raise Refused("its pickle asks for more memory than there is") from error
    finally:  # a traceback may keep the frame, and with it all that was built
        machine.stack, machine.memo = [], {}
    raise Refused("its pickle ends early")


class _Machine:
    def __init__(
        self, reduce: Reduce, persistent: Callable[[Any], Any] | None, budget: limits.Budget
    ) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.reduce = reduce
        self.persistent = persistent
        self.budget = budget

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        self.budget.spend()
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                kinds: dict[str, Callable[[], Any]] = {
                    "EMPTY_LIST": list,
                    "EMPTY_DICT": dict,
                    "EMPTY_SET": set,
                    "EMPTY_TUPLE": tuple,
                }
                stack.append(kinds[name]())
                self.budget.spend(sys.getsizeof(stack[-1]))
            case "LIST" | "TUPLE" | "FROZENSET":
                of = {"LIST": list, "TUPLE": tuple, "FROZENSET": frozenset}[name]
                values = self.marked()
                stack.append(of(map(limits.key, values) if name == "FROZENSET" else values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                stack.append({})
                stack[-1].update(_pairs(self.marked(below=1)))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self.extend([stack.pop()] if name == "APPEND" else self.marked())
            case "SETITEM" | "SETITEMS":
                values = self.marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                target = stack[-1]
                into = target.items if isinstance(target, Opaque) else target
                if not isinstance(into, dict):
                    raise Refused(f"its pickle is damaged (items set on {type(target).__name__})")
                into.update(_pairs(values))
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(arg)])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(arg)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINSTRING" | "SHORT_BINSTRING" | "STRING":
                stack.append(arg)
            case "PERSID" | "BINPERSID":
                if self.persistent is None:
                    raise Refused("its pickle refers to things outside it")
                stack.append(self.persistent(arg if name == "PERSID" else stack.pop()))
            case _ if name in _VALUES:
                stack.append(limits.number(arg))
            case _:
                self.build(name, arg)

    def build(self, name: str, arg: Any) -> None:
        """The opcodes that name, call or fill something."""
        stack = self.stack
        match name:
            case "GLOBAL":
                module, _, attribute = arg.partition(" ")
                stack.append(named(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not (isinstance(module, str) and isinstance(attribute, str)):
                    raise Refused("its pickle is damaged (a name that is no text)")
                stack.append(named(module, attribute))
            case "INST":
                module, _, attribute = arg.partition(" ")
                stack.append(self.call(named(module, attribute), tuple(self.marked())))
            case "OBJ":
                of, *args = self.marked()
                stack.append(self.call(of, tuple(args)))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(self.call(stack.pop(), args))
            case "NEWOBJ_EX":
                kwargs, args = stack.pop(), stack.pop()
                stack.append(self.call(stack.pop(), args))
                if isinstance(stack[-1], Opaque) and kwargs:
                    stack[-1].items.update(kwargs)
            case "BUILD":
                state = stack.pop()
                target = stack[-1]
                if isinstance(target, Opaque):
                    target.state = state
                elif hasattr(type(target), "fill_from_pickle"):  # ours: arrays and their types
                    target.fill_from_pickle(state)
                    self.budget.spend(_nbytes(target))
                # else: attributes on a plain container (a state dict's _metadata): not needed
            case _:
                raise Refused(f"its pickle uses {name}, which no weights file needs")

    def call(self, of: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise Refused("its pickle is damaged (arguments that are no tuple)")
        self.budget.spend(_RECORD)
        if isinstance(of, Name):
            known = _containers(of, args)
            if known is NotImplemented:
                known = self.reduce(of, args)
            if known is not NotImplemented:
                self.budget.spend(_nbytes(known))
                return known
        return Opaque(of, args)

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(limits.key, values))
        elif isinstance(target, Opaque):
            target.items.update(enumerate(values, start=len(target.items)))
        else:
            raise Refused(f"its pickle is damaged (values added to {type(target).__name__})")

    def marked(self, below: int = 0) -> list[Any]:
        """Take what lies above the last mark off the stack, and the mark."""
        end = len(self.stack) - below
        at = end - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Refused("its pickle is damaged (no mark)")
        values = self.stack[at + 1 : end]
        del self.stack[at:end]
        return values


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(map(limits.key, values[::2]), values[1::2], strict=True)


def _nbytes(made: Any) -> int:
    """What a call or a state has added: four bytes of a file can copy all that it holds."""
    return int(getattr(made, "nbytes", 0)) or sys.getsizeof(made)


def _containers(of: Name, args: tuple[Any, ...]) -> Any:
    """Python's own containers; NotImplemented for anything else."""
    match str(of):
        case "collections.OrderedDict" | "builtins.dict" | "__builtin__.dict":
            return _dict(*args)
        case "collections.defaultdict":
            return _dict(*args[1:])
        case "collections.Counter":
            return _dict(*args) if args and isinstance(args[0], dict) else _counted(*args)
        case "builtins.bytearray" if args and isinstance(args[0], int):
            raise Refused("its pickle asks for empty bytes, which no weights file needs")
        case "builtins.set" | "__builtin__.set":
            return set(map(limits.key, *args)) if args else set()
        case "builtins.frozenset" | "__builtin__.frozenset":
            return frozenset(map(limits.key, *args)) if args else frozenset()
        case "builtins.list" | "__builtin__.list":
            return list(*args)
        case "builtins.bytes" | "__builtin__.bytes" if not args:
            return b""  # how protocols below 3 write empty bytes
        case "builtins.tuple" | "torch.Size":
            return tuple(*args)
        case "_codecs.encode" if len(args) == 2 and args[1] in ("latin1", "latin-1"):
            return str.encode(args[0], "latin-1")
        case "copyreg._reconstructor" | "copy_reg._reconstructor" if args:
            return Opaque(args[0], args[2:])
    return NotImplemented


def _dict(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    return {limits.key(key): value for key, value in items}


def _counted(items: Any = ()) -> dict[Any, int]:
    return dict(Counter(map(limits.key, items)))
