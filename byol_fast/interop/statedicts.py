"""Which of the dicts in a file holds the weights, and which others could have been meant."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from byol_fast.errors import CheckpointError
from byol_fast.interop import arrays, files, layouts, records, resnet

# Where checkpoints keep their weights, in the order they are looked for at each level.
_INNER = (
    *("classy_state_dict", "base_model", "state_dict", "model_state_dict", "model", "trunk"),
    *("network", "net", "module"),
)
_MODULE = ("_modules", "_parameters", "_buffers")  # of a module that was pickled as a whole
_DEEPEST, _MOST_DICTS, _MOST_KEYS = 24, 20_000, 2_000_000  # in each other; in all

Dicts = dict[str, dict[str, Any]]  # path, joined by dots -> the tensors that lie directly there


@dataclass(frozen=True)
class Chosen:
    """The tensors to read."""

    tensors: dict[str, Any]  # key -> leaf
    path: str  # where in the file they are: "state_dict"
    layout: str | None  # what is left of the layout that was asked for
    also: list[str]  # paths, with a dot, of state dicts with a ResNet that were not chosen


def choose(content: files.Content, layout: str | None = None) -> Chosen:
    """The innermost dict of tensors that checkpoints keep their weights in, or the one asked for.

    Args:
        layout: as `networks.read`.

    Raises:
        CheckpointError: there are no tensors.
    """
    found = _dicts(content.tree)
    named = [path for path in found if path and layout and layout.startswith(f"{path}.")]
    if named and layout is not None:
        path = max(named, key=len)
        rest = layout[len(path) + 1 :] or None
        tensors = _below(found, path)
    else:
        path, rest = _usual(content.tree), layout
        tensors = found.get(path) or {}
        known = layouts.clean(tensors).values()
        if not tensors or (layouts.find(known) is None and not resnet.prefixes(known)):
            deeper = _below(found, path)
            tensors = deeper if resnet.prefixes(deeper) or not tensors else tensors
    if not tensors:
        raise CheckpointError(_nothing(content))
    inside = [each for each in found if each == path or each.startswith(f"{path}." if path else "")]
    used = inside if tensors.keys() - found.get(path, {}).keys() else [path]
    also = [
        f"{each}." for each in found if each not in used and resnet.prefixes(map(str, found[each]))
    ]
    return Chosen(tensors, path, rest, also)


def some(keys: Iterable[Any], most: int = 4) -> str:
    """The first of some keys, for a message."""
    listed = [str(key) if isinstance(key, str | int) else type(key).__name__ for key in keys]
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


def _dicts(tree: Any) -> Dicts:
    """All dicts of tensors, outer ones first; a file may hold itself, or a dict many times."""
    found: Dicts = {}
    todo: deque[tuple[str, Any, tuple[int, ...]]] = deque([("", tree, (0,))])
    dicts = keys = 0
    while todo and dicts < _MOST_DICTS and keys < _MOST_KEYS:
        path, value, above = todo.popleft()
        node = records.mapping(value)
        if node is None or id(node) in above or len(above) > _DEEPEST:
            continue
        dicts, keys = dicts + 1, keys + len(node)
        named = {str(key): leaf for key, leaf in node.items() if isinstance(key, str | int)}
        leaves = {key: leaf for key, leaf in named.items() if arrays.is_leaf(leaf)}
        if leaves:
            found.setdefault(path, {}).update(leaves)
        inner = [(key, leaf) for key, leaf in named.items() if key not in leaves]
        inside = (*above, id(node))
        for key, leaf in inner:
            name = path if key in _MODULE else f"{path}.{key}" if path else key
            todo.append((name, leaf, inside))
    return dict(sorted(found.items()))


def _usual(tree: Any) -> str:
    """The path that checkpoints keep their weights under."""
    node, path, seen = records.mapping(tree) or {}, [], set()
    while id(node) not in seen:
        seen.add(id(node))
        inner = next((key for key in _INNER if records.mapping(node.get(key))), None)
        if inner is None:
            break
        node = records.mapping(node[inner]) or {}
        path.append(inner)
    return ".".join(path)


def _below(found: Dicts, path: str) -> dict[str, Any]:
    """The tensors at and below a path, each under its path from there."""
    start = f"{path}." if path else ""
    return {
        (f"{name.removeprefix(start)}.{key}" if name != path else key): leaf
        for name, leaves in found.items()
        if name == path or name.startswith(start)
        for key, leaf in leaves.items()
    }


def _nothing(content: files.Content) -> str:
    tree = content.tree
    if isinstance(tree, records.Opaque) or any("DTensor" in name for name in content.opaque):
        what = "shards" if any("DTensor" in name for name in content.opaque) else "a whole object"
        return (
            f"{content.file} holds {what} ({some(content.opaque)}), not a state dict: load it with "
            "the program that wrote it and save the model's full state_dict()"
        )
    node = records.mapping(tree)
    held = some(node) if node else type(tree).__name__
    return (
        f"{content.file} holds no state dict that can be found ({held}): save the model's "
        "state_dict()"
    )
