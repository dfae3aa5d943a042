"""Another project's file to a byol_fast export, and to a full state with `full`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from byol_fast import checkpoint, export
from byol_fast.interop import files as weight_files
from byol_fast.interop import networks, state, statedicts, stems
from byol_fast.interop.layouts import BACKBONE, TARGET_BACKBONE, TARGET_PROJECTOR, Network
from byol_fast.interop.networks import Networks
from byol_fast.networks.backbone import build_backbone
from byol_fast.networks.padding import Padding
from byol_fast.networks.stem import check_changes

_TRAVELS = ("mean", "std", "padding", "stem_changes", "steps", "source")
_SUFFIXES = (state.SUFFIX, ".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Imported:
    """What an import wrote, and what it found."""

    networks: Networks
    files: tuple[Path, ...]
    meta: dict[str, Any]
    notes: tuple[str, ...]


def import_file(
    file: Path | str,
    out: Path | str,
    *,
    layout: str | None = None,
    network: Network = "online",
    backbone: str | None = None,
    stem: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    full: bool = False,
    padding: str | None = None,
    stem_relu: bool | None = None,
    max_pool: bool | None = None,
    stem_stride: int | None = None,
) -> Imported:
    """Write `<out>.safetensors` and `<out>.pth`, which `load_backbone` and evaluation take.

    Args:
        layout: as `networks.read`.
        network: whose backbone.
        backbone, stem: torchvision's name and stem, where the shapes do not tell.
        image_size: pixels it is used at; 224, or 32 with the CIFAR stem.
        mean, std: the normalisation it was trained with; ImageNet's where none is said.
        full: write `<out>.byol.safetensors` as well: both networks and the heads.
        padding: as `build_backbone`; solo-learn's 3×3 stem is taken as "wide-stem".
        stem_relu, max_pool, stem_stride: of the stem, where its keys do not show them, or show
            what its forward does not do; see `networks.stem`.

    Raises:
        CheckpointError: the file cannot be read, or nothing here can hold its network.
        ValueError: the network asked for is not in it, or does not fit; keys are named. Or `out`
            would be written over `file`.
        OSError: disk full or read-only.
    """
    for name, values, least in (("mean", mean, 0.0), ("std", std, 1e-6)):
        if values is not None and not all(least <= value <= 1 for value in values):
            raise ValueError(f"{name} is of pixels in 0–1: divide by 255 what is of 0–255")
    if image_size is not None and image_size < 8:
        raise ValueError(f"the image size must be at least 8 pixels, got {image_size}")
    found = networks.read(file, layout)
    if padding is not None:
        found.padding = cast(Padding, padding)
    changes = {"relu": stem_relu, "max_pool": max_pool, "stride": stem_stride}
    stem_asked = {name: value for name, value in changes.items() if value is not None}
    check_changes(stem_asked)
    asked = {"backbone": backbone, "stem": stem, "image_size": image_size, "changes": stem_asked}
    normalisation = {"mean": list(mean) if mean else None, "std": list(std) if std else None}
    meta = _meta(found, network, {**asked, **normalisation})
    net = _filled(found, network, meta)
    model = state.build(found, meta) if full else None  # before anything is written
    target = _without_suffix(Path(out))
    written = (".safetensors", ".pth", *([state.SUFFIX] if full else []))
    weight_files.spare(found.file, [target.with_name(target.name + each) for each in written])
    files: tuple[Path, ...] = export.export_backbone(net, target, meta)
    if model is not None:
        extra: dict[str, Any] = {key: meta[key] for key in _TRAVELS if meta.get(key) is not None}
        files = (*files, state.save(model, target, extra))
    return Imported(found, files, meta, tuple(_notes(found, meta, full)))


def _meta(found: Networks, network: Network, asked: dict[str, Any]) -> dict[str, Any]:
    """What the export says of its network: what was asked for, else the file, else its shapes."""
    if _part(network) not in found.parts:
        held = ", ".join(name.replace("_", " ") for name in found.parts)
        raise ValueError(f"{found.file} holds no {network} backbone, only: {held}")
    own, seen = found.meta, state.guess(found, network)
    if found.blurred and asked["backbone"] is None:
        raise ValueError(
            f"{found.file} says that its network is {found.arch}, which blurs where it strides, "
            f"under the keys of {seen['backbone']}: no network here computes that. --backbone "
            f"{seen['backbone']} imports it without the blur, and its features would be others"
        )
    name = asked["backbone"] or own.get("backbone") or seen["backbone"]
    if name is None:
        raise ValueError(
            f"{found.file}: its shapes are of no torchvision ResNet; give the network's "
            "torchvision name with --backbone, if it has one"
        )
    stem = asked["stem"] or own.get("stem") or seen["stem"]
    first = found.parts[_part(network)].keys()
    if "norm" not in own and "bn1.weight" in first and "bn1.running_mean" not in first:
        raise ValueError(
            f"{found.file}: its norms keep no running statistics (GroupNorm, or BatchNorm without "
            "them), and no network here computes with such weights"
        )
    changes = stems.changes(found, stem, asked["changes"])
    usual_size = 32 if stem == "cifar" else 224
    return {
        **{key: own[key] for key in ("mean", "std") if key in own},
        **{key: asked[key] for key in ("mean", "std") if asked[key]},
        "backbone": name,
        "stem": stem,
        "hidden_layer": own.get("hidden_layer", -1),
        "image_size": asked["image_size"] or own.get("image_size") or usual_size,
        "padding": found.padding,
        **({"norm": own["norm"]} if "norm" in own else {}),
        **({"stem_changes": changes} if changes else {}),
        **({"steps": found.steps} if found.steps is not None else {}),
        "network": network,
        "source": {
            "file": found.file.name,
            "layout": found.layout,
            "sha256": checkpoint.file_hash(found.file),
            **found.progress,
        },
    }


def _filled(found: Networks, network: Network, meta: dict[str, Any]) -> nn.Module:
    """The backbone that `meta` describes, with the file's weights."""
    with torch.random.fork_rng(devices=[]):
        net = build_backbone(
            meta["backbone"],
            stem=meta["stem"],
            hidden_layer=meta["hidden_layer"],
            image_size=meta["image_size"],
            padding=found.padding,
            norm=meta.get("norm", "batch"),
            stem_changes=meta.get("stem_changes"),
        )
    state.fill(net, found.parts[_part(network)], f"the {network} backbone of {found.file}")
    return net


def _part(network: Network) -> str:
    return BACKBONE if network == "online" else TARGET_BACKBONE


def _notes(found: Networks, meta: dict[str, Any], full: bool) -> list[str]:
    """What a user should know of this import."""
    notes = []
    if found.padding == "same":
        notes.append("convolutions pad SAME, as in JAX; the export says so and is loaded that way")
    if found.padding == "wide-stem":
        notes.append(
            "the 3×3 stem pads 2 pixels, as solo-learn's, and is loaded that way "
            "(--padding symmetric if its code pads 1)"
        )
    notes += stems.notes(found, meta)
    if found.also:
        notes.append(
            f"taken from {found.path or 'the top of the file'}; another network lies in "
            f"{', '.join(found.also)} and was not imported (--from {found.also[0]} takes it)"
        )
    if found.splits > 1:
        notes.append(
            f"statistics of {found.splits} splits (lightly's SplitBatchNorm) were averaged, as "
            "lightly does for evaluation"
        )
    if found.layout == "byol_fast" and not found.meta:
        notes.append(
            "a learner's state dict does not name its hidden layer: the whole backbone is imported"
        )
    if full and TARGET_BACKBONE not in found.parts:
        notes.append("the file has no target backbone: the full state holds a copy of the online")
    if full and TARGET_PROJECTOR not in found.parts:
        notes.append("the file has no target projector: the full state holds a copy of the online")
    if found.unknown:
        notes.append(f"unexpected, not imported: {statedicts.some(found.unknown, most=20)}")
    return notes


def _without_suffix(path: Path) -> Path:
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix))
    return path
