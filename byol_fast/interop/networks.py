"""Any project's file to the networks in it: what `inspect` prints and `import` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from byol_fast import filemeta
from byol_fast.errors import CheckpointError
from byol_fast.interop import deepmind, files, heads, layouts, records, resnet, statedicts
from byol_fast.interop.layouts import BACKBONE, PARTS, TARGET_BACKBONE, Layout
from byol_fast.networks.padding import Padding

_PROGRESS = ("epoch", "epochs", "step", "steps", "global_step", "iter", "iteration")
_STEPS = "target_net.steps"  # mmpretrain's count of updates, by which its momentum goes
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
    also: list[str] = field(default_factory=list)  # other state dicts with a ResNet
    between: int | None = None  # see `resnet.between_stem_and_stages`
    splits: int = 1  # of lightly's SplitBatchNorm, whose statistics were averaged
    arch: str = ""  # what the file calls its network; timm's trainer writes it
    problems: dict[str, str] = field(default_factory=dict)  # part -> why it cannot be used
    opaque: list[str] = field(default_factory=list)  # program objects, read as data
    meta: dict[str, Any] = field(default_factory=dict)  # of byol_fast's own files

    @property
    def stem(self) -> str:
        return resnet.stem_of(self.parts.get(BACKBONE, {}))

    @property
    def blurred(self) -> bool:
        """Whether it is one of timm's networks that blur, with the keys of those that do not."""
        return self.arch.startswith(("resnetblur", "resnetaa", "wide_resnetblur"))

    @property
    def steps(self) -> int | None:
        """Updates of the target network; None where the file does not say."""
        said = (self.progress.get(key) for key in ("steps", *_PROGRESS[2:]))
        return next((steps for steps in said if steps is not None), None)


def read(path: Path | str, layout: str | None = None) -> Networks:
    """Read a file of any known layout; nothing in it is executed.

    Args:
        layout: one of `layouts.CHOICES`, where it should not be guessed; or the prefix of a ResNet,
            with its dot; or the path of one of several state dicts, with a dot
            (`state_dict_ema.`), and a prefix below that.

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
    chosen = statedicts.choose(content, layout)
    keys = layouts.clean(chosen.tensors)
    if len(set(keys.values())) < len(keys):
        raise CheckpointError(
            f"{content.file} holds a network twice, with and without a wrapper's prefix "
            "(_orig_mod., module.): save the state_dict() of one"
        )
    found = _layout(content, keys, chosen.layout)
    meta = _own_meta(content)
    if found.spelling and "byol_fast" in (records.mapping(content.tree) or {}):
        found = replace(found, name="byol_fast-export", about="byol_fast's own export")
    networks = Networks(
        file=content.file,
        container=content.container,
        layout=found.name,
        about=found.about,
        parts={},
        path=chosen.path,
        also=chosen.also,
        progress=_progress(content.tree),
        opaque=content.opaque,
        meta=meta,
        arch=_arch(content.tree),
    )
    _sort(networks, found, {keys[key]: leaf for key, leaf in chosen.tensors.items()}, content)
    if found.name.startswith("solo-learn") and networks.stem == "cifar":
        networks.padding = "wide-stem"
    networks.padding = networks.meta.get("padding", networks.padding)
    return networks


def _layout(content: files.Content, keys: Mapping[str, str], name: str | None) -> Layout:
    """The layout of a state dict; `name` as in `read`."""
    if name is not None and name.endswith(".") and name not in resnet.prefixes(keys.values()):
        (inner,) = layouts.clean([f"{name}x"]).values()  # a wrapper's prefix is off the keys, too
        name = inner.removesuffix("x") or None
    found = layouts.find(keys.values(), name)
    own = records.mapping(content.tree) or {}
    if found is None and "byol_fast" in own:  # a network that is no ResNet
        found = next(each for each in layouts.LAYOUTS if each.name == "torchvision")
    if found is not None and not (found.spelling and name is not None):
        return found
    several = resnet.prefixes(keys.values())
    if len(several) > 1 and "" not in several:
        raise CheckpointError(
            f"{content.file} holds ResNets below {', '.join(several)}: name one with --from"
        )
    if found is not None:
        return found
    raise CheckpointError(
        f"{content.file}: its keys are of no layout known here ({statedicts.some(keys)}). "
        "docs/interop.md lists the layouts; name one with --from if it is a variant of it, or "
        "--from torchvision with --backbone NAME for another network of torchvision"
    )


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
        elif part.endswith(BACKBONE) and inner.startswith((*_CLASSIFIER, *layouts.COUNTERS)):
            networks.left_out.append(key)
        else:
            raw[part][inner] = content.tensor(leaf)
    for key, leaf in rest.items():
        alias = next((prefix for prefix in layout.aliases if key.startswith(prefix)), None)
        original = alias and layout.aliases[alias] + key.removeprefix(alias)
        if original in flat:
            same = content.tensor(leaf).equal(content.tensor(flat[str(original)]))
            (networks.aliases if same else networks.unknown).append(key)
        elif key.endswith(_STEPS) and (value := content.tensor(leaf)).numel() == 1:
            networks.progress["steps"] = max(int(value), 0)
        elif key.startswith(layout.other) and layout.other:
            networks.left_out.append(key)
        else:
            networks.unknown.append(key)
    for part in PARTS:
        if not raw[part]:
            continue
        if part.endswith(BACKBONE):
            networks.parts[part] = _backbone(networks, raw[part])
            continue
        try:
            networks.parts[part] = heads.to_mlp(raw[part])
        except ValueError as error:
            networks.problems[part] = str(error)
    if not networks.parts.get(BACKBONE) and not networks.parts.get(TARGET_BACKBONE):
        raise CheckpointError(f"{content.file} holds no backbone, as {layout.about} names it")


def _backbone(networks: Networks, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone under torchvision's keys, whatever wrapper it is in; notes what its keys show."""
    at = resnet.prefixes(raw)
    if len(at) == 1 and "" not in at:  # a wrapper's: `net.` of a hidden layer's
        (prefix,) = at
        networks.unknown += [key for key in raw if not key.startswith(prefix)]
        raw = {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}
    if blur := next((key for key in raw if key.endswith((".blur_filter", ".filt"))), None):
        raise CheckpointError(
            f"{networks.file}: its strided convolutions blur first (BlurPool: {blur}), and no "
            "network here computes that. Train or take weights without it (use_blurpool=0)"
        )
    networks.between = resnet.between_stem_and_stages(raw)
    tensors, splits = resnet.split_statistics(resnet.to_torchvision(raw))
    networks.splits = max(networks.splits, splits)
    for key in [key for key in tensors if key.startswith(_CLASSIFIER)]:
        networks.left_out.append(key)
        del tensors[key]
    return tensors


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
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60:
                found.setdefault(key, value)
    return found


def _arch(tree: Any) -> str:
    said = (records.mapping(tree) or {}).get("arch")
    return said if isinstance(said, str) and said.isprintable() else ""


def _own_meta(content: files.Content) -> dict[str, Any]:
    """What byol_fast's own files say about themselves."""
    outer = records.mapping(content.tree) or {}
    own = outer.get("byol_fast", outer.get("hyper"))
    return dict(filemeta.checked(own, content.file)) if isinstance(own, dict) else {}
