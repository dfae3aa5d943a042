"""A network that was handed in: what can be trained, and copies of its layers.

`copy.deepcopy` alone fails on a module that keeps an activation or cannot be pickled in part, and a
network that is trained in place would come back with other norms, hooks and frozen layers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = {
    *("DataParallel", "DistributedDataParallel"),
    *("FullyShardedDataParallel", "FSDPModule"),  # by name: importing them takes seconds
}
_ATOMS = (int, float, complex, str, bytes, bool, type(None), type)


def usable(net: nn.Module) -> nn.Module:
    """The network itself, out of torch.compile's wrapper.

    Raises ValueError for what cannot be trained here, with what to give instead.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(
            f"backbone is an nn.Module or a name of torchvision.models, got {type(net).__name__}"
        )
    if isinstance(inside := getattr(net, "_orig_mod", None), nn.Module):
        warnings.warn(
            "the backbone comes from torch.compile: the network inside is trained, not compiled; "
            "compile learner.online instead",
            stacklevel=4,
        )
        net = inside
    name = type(net).__name__
    for module in net.modules():
        if wrapper := _WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            raise ValueError(
                f"the backbone is wrapped in {min(wrapper)}: give the network itself and wrap the "
                "learner"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name} holds TorchScript, whose layers cannot be replaced: give the module that "
                "it was made from"
            )
    tensors = [*net.parameters(), *net.buffers()]
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise ValueError(
            "the backbone has lazy layers without weights: run one batch through it first, so "
            "that optimizer and target see every parameter"
        )
    return net


def sharing(net: nn.Module) -> nn.Module:
    """The layers of `net` again, over the very same parameters, buffers and kept tensors.

    What is done to the copy's layers (hooks, modes, another class) does not reach `net`. Where a
    parameter or buffer is replaced, as `.to(device)` does with buffers, both see the new one.
    Hooks are called from the copy too.

    Raises ValueError where the network cannot be copied.
    """
    twin = _copy(net, {id(value): value for value in _values(net) if isinstance(value, Tensor)})
    for layer, original in zip(twin.modules(), net.modules(), strict=True):
        layer._parameters, layer._buffers = original._parameters, original._buffers
    return twin


def detached_copy(net: nn.Module) -> nn.Module:
    """As copy.deepcopy; activations that a layer keeps lose their graph instead of failing.

    Raises ValueError where the network cannot be copied.
    """
    kept = [value for value in _values(net) if isinstance(value, Tensor) and not value.is_leaf]
    return _copy(net, {id(value): value.detach() for value in kept})


def _copy(net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    layers = set(net.modules())
    for layer in layers:
        dicts = [value for name, value in vars(layer).items() if name.endswith("_hooks")]
        for hook in (hook for hooks in dicts if isinstance(hooks, dict) for hook in hooks.values()):
            # Somebody's collector stays theirs; a method of a layer has to go with the layer.
            if getattr(hook, "__self__", None) not in layers:
                memo[id(hook)] = hook
    try:
        return copy.deepcopy(net, dict(memo))
    except Exception:  # whatever an attribute's own way of copying raises
        # Locks, process groups, loggers with files: one for both.
        kept = {**memo, **{id(layer): layer for layer in layers}}
        memo |= {id(value): value for value in _values(net) if not _can_be_copied(value, kept)}
    try:
        return copy.deepcopy(net, memo)
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be copied, and the target network is a copy of it: "
            f"{type(error).__name__}: {error}. Take off what it keeps besides layers and tensors"
        ) from error


def _can_be_copied(value: object, kept: dict[int, Any]) -> bool:
    if isinstance(value, Tensor):
        return True
    try:
        copy.deepcopy(value, dict(kept))
    except Exception:
        return False
    return True


def _values(net: nn.Module) -> Iterator[Any]:
    """What the modules hold, through lists, tuples, sets and dicts, each object once."""
    stack: list[Any] = [net]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            stack.extend(vars(value).values())
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            stack.extend(value)
        else:
            yield value
