"""Any project's file to the networks in it: what `inspect` prints and `import` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from byol_fast.errors import CheckpointError
from byol_fast.interop import arrays, deepmind, files, heads, layouts, records, resnet
from byol_fast.interop.layouts import BACKBONE, PARTS, TARGET_BACKBONE, Layout
from byol_fast.networks.padding import Padding

# Where checkpoints keep their weights, in the order they are looked for at each level.
_INNER = (
    *("classy_state_dict", "base_model", "state_dict", "model_state_dict", "model", "trunk"),
    *("network", "net"),
)
_PROGRESS = ("epoch", "epochs", "step", "steps", "global_step", "iter", "iteration")
_CLASSIFIER = ("fc.", "linear.", "projection_head.", "prototypes.")  # the last two are SwAV's


@dataclass
class Networks:
    """The networks of a file, each under byol_fast's keys."""

    file: Path
    container: str
    layout: str
    about: str
    parts: dict[str, dict[str, Tensor]]  # of `layouts.PARTS`; torchvision's and MLP's keys
    padding: Padding = "symmetric"
    path: str = ""  # where in the file they were: "state_dict"
    progress: dict[str, int] = field(default_factory=dict)  # epochs, steps as the file says
    aliases: list[str] = field(default_factory=list)  # keys that repeat other keys' tensors
    left_out: list[str] = field(default_factory=list)  # known, and no part of BYOL
    unknown: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # part -> why it cannot be used
    opaque: list[str] = field(default_factory=list)  # program objects, read as data
    meta: dict[str, Any] = field(default_factory=dict)  # of byol_fast's own files

    @property
    def stem(self) -> str:
        return resnet.stem_of(self.parts.get(BACKBONE, {}))


def read(path: Path | str, layout: str | None = None) -> Networks:
    """Read a file of any known layout; nothing in it is executed.

    Args:
        layout: one of `layouts.CHOICES`, where it should not be guessed; or the prefix of a ResNet,
            with its dot.

    Raises:
        CheckpointError: unreadable, of no known layout, or networks that nothing here can hold.
        ValueError: it is not of the layout named.
    """
    content = files.read(path)
    if layout in (None, layouts.DEEPMIND):
        trees = deepmind.trees(content.tree)
        if trees is not None:
            return _deepmind(content, trees)
        if layout is not None:
            raise ValueError(f"{content.file} holds no haiku trees, so it is not DeepMind's")
    flat, where = _state_dict(content)
    keys = layouts.clean(flat)
    found = layouts.find(keys.values(), layout)
    if found is None:
        if several := layouts.resnets(keys.values()):
            raise CheckpointError(
                f"{content.file} holds ResNets below {', '.join(several)}: name one with --from"
            )
        raise CheckpointError(
            f"{content.file}: its keys are of no layout known here ({_first(flat)}). "
            "docs/interop.md lists the layouts; name one with --from if it is a variant of it, or "
            "--from torchvision with --backbone NAME for another network of torchvision"
        )
    networks = Networks(
        file=content.file,
        container=content.container,
        layout=found.name,
        about=found.about,
        parts={},
        path=where,
        progress=_progress(content.tree),
        opaque=content.opaque,
        meta=_own_meta(content.tree),
    )
    _sort(networks, found, {keys[key]: leaf for key, leaf in flat.items()}, content)
    if found.name.startswith("solo-learn") and networks.stem == "cifar":
        networks.padding = "wide-stem"
    networks.padding = networks.meta.get("padding", networks.padding)
    return networks


def _deepmind(content: files.Content, trees: deepmind.Trees) -> Networks:
    parts = deepmind.networks(trees, content.tensor)
    networks = Networks(
        file=content.file,
        container=content.container,
        layout=layouts.DEEPMIND,
        about="DeepMind's BYOL (haiku trees)",
        parts={},
        padding="same",
        path="experiment_state",
        progress=_progress(content.tree),
        opaque=content.opaque,
        unknown=sorted(parts.pop("unknown")),
    )
    for part in PARTS:
        if part in parts:
            networks.parts[part] = parts[part]
    return networks


def _state_dict(content: files.Content) -> tuple[dict[str, Any], str]:
    """The innermost dict of tensors, and the keys that lead to it."""
    node, path = records.mapping(content.tree) or {}, []
    while True:
        flat = {str(key): leaf for key, leaf in node.items() if arrays.is_leaf(leaf)}
        inner = next((key for key in _INNER if records.mapping(node.get(key))), None)
        if inner is None:
            break
        node = records.mapping(node[inner]) or {}
        path.append(inner)
    if not flat:  # below names of its own: {"encoder": {…}}, {"student": {…}, "teacher": {…}}
        inside = {str(name): records.mapping(below) or {} for name, below in node.items()}
        flat = {
            f"{name}.{key}": leaf
            for name, below in inside.items()
            for key, leaf in below.items()
            if arrays.is_leaf(leaf)
        }
    if not flat:
        held = _first(node) if node else type(content.tree).__name__
        raise CheckpointError(
            f"{content.file} holds no state dict that can be found ({held}): save the model's "
            "state_dict()"
        )
    return flat, ".".join(path)


def _sort(
    networks: Networks, layout: Layout, flat: Mapping[str, Any], content: files.Content
) -> None:
    """Put every key into a part, the aliases, the left out or the unknown."""
    raw: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    rest: dict[str, Any] = {}
    for key, leaf in flat.items():
        part, inner = _part_of(key, layout)
        if part is None:
            rest[key] = leaf
        elif part.endswith(BACKBONE) and inner.startswith(_CLASSIFIER):
            networks.left_out.append(key)
        else:
            raw[part][inner] = content.tensor(leaf)
    for key, leaf in rest.items():
        alias = next((prefix for prefix in layout.aliases if key.startswith(prefix)), None)
        original = alias and layout.aliases[alias] + key.removeprefix(alias)
        if original in flat:
            same = content.tensor(leaf).equal(content.tensor(flat[str(original)]))
            (networks.aliases if same else networks.unknown).append(key)
        elif key.startswith(layout.other) and layout.other:
            networks.left_out.append(key)
        else:
            networks.unknown.append(key)
    for part in PARTS:
        if not raw[part]:
            continue
        if part.endswith(BACKBONE):
            networks.parts[part] = resnet.to_torchvision(raw[part])
            continue
        try:
            networks.parts[part] = heads.to_mlp(raw[part])
        except ValueError as error:
            networks.problems[part] = str(error)
    if not networks.parts.get(BACKBONE) and not networks.parts.get(TARGET_BACKBONE):
        raise CheckpointError(f"{content.file} holds no backbone, as {layout.about} names it")


def _part_of(key: str, layout: Layout) -> tuple[str | None, str]:
    """The part with the longest prefix of `key`, and the key below it."""
    if not layout.parts:  # a bare backbone
        return BACKBONE, key
    matches = [
        (prefix, part)
        for part, prefixes in layout.parts.items()
        for prefix in prefixes
        if key.startswith(prefix)
    ]
    if not matches:
        return None, key
    prefix, part = max(matches)
    return part, key.removeprefix(prefix)


def _progress(tree: Any) -> dict[str, int]:
    outer = records.mapping(tree) or {}
    found: dict[str, int] = {}
    for source in (outer, records.mapping(outer.get("meta")) or {}):
        for key in _PROGRESS:
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                found.setdefault(key, value)
    return found


def _own_meta(tree: Any) -> dict[str, Any]:
    """What byol_fast's own files say about themselves."""
    outer = records.mapping(tree) or {}
    if isinstance(outer.get("byol_fast"), dict):
        return dict(outer["byol_fast"])
    return dict(outer["hyper"]) if isinstance(outer.get("hyper"), dict) else {}


def _first(keys: Any, most: int = 4) -> str:
    listed = [str(key) for key in keys]
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")
