"""Another project's file to a byol_fast export, and to a full state with `full`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from byol_fast import checkpoint, export
from byol_fast.interop import files as weight_files
from byol_fast.interop import networks, state
from byol_fast.interop.layouts import BACKBONE, TARGET_BACKBONE, TARGET_PROJECTOR, Network
from byol_fast.interop.networks import Networks
from byol_fast.networks.backbone import build_backbone

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
) -> Imported:
    """Write `<out>.safetensors` and `<out>.pth`, which `load_backbone` and evaluation take.

    Args:
        layout: as `networks.read`.
        network: whose backbone.
        backbone, stem: torchvision's name and stem, where the shapes do not tell.
        image_size: pixels it is used at; 224, or 32 with the CIFAR stem.
        mean, std: the normalisation it was trained with; ImageNet's where none is said.
        full: write `<out>.byol.safetensors` as well: both networks and the heads.

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
    asked = {"backbone": backbone, "stem": stem, "image_size": image_size}
    normalisation = {"mean": list(mean) if mean else None, "std": list(std) if std else None}
    meta = _meta(found, network, {**asked, **normalisation})
    net = _filled(found, network, meta)
    model = state.build(found, meta) if full else None  # before anything is written
    target = _without_suffix(Path(out))
    written = (".safetensors", ".pth", *([state.SUFFIX] if full else []))
    weight_files.spare(found.file, [target.with_name(target.name + each) for each in written])
    files: tuple[Path, ...] = export.export_backbone(net, target, meta)
    if model is not None:
        extra: dict[str, Any] = {
            key: meta[key] for key in ("mean", "std", "padding", "source") if key in meta
        }
        files = (*files, state.save(model, target, extra))
    return Imported(found, files, meta, tuple(_notes(found, meta, full)))


def _meta(found: Networks, network: Network, asked: dict[str, Any]) -> dict[str, Any]:
    """What the export says of its network: what was asked for, else the file, else its shapes."""
    if _part(network) not in found.parts:
        held = ", ".join(name.replace("_", " ") for name in found.parts)
        raise ValueError(f"{found.file} holds no {network} backbone, only: {held}")
    own, seen = found.meta, state.guess(found, network)
    name = asked["backbone"] or own.get("backbone") or seen["backbone"]
    if name is None:
        raise ValueError(
            f"{found.file}: its shapes are of no torchvision ResNet; give the network's "
            "torchvision name with --backbone, if it has one"
        )
    stem = asked["stem"] or own.get("stem") or seen["stem"]
    usual_size = 32 if stem == "cifar" else 224
    return {
        **{key: own[key] for key in ("mean", "std") if key in own},
        **{key: asked[key] for key in ("mean", "std") if asked[key]},
        "backbone": name,
        "stem": stem,
        "hidden_layer": own.get("hidden_layer", -1),
        "image_size": asked["image_size"] or own.get("image_size") or usual_size,
        "padding": found.padding,
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
        notes.append("the 3×3 stem pads 2 pixels, as solo-learn's; it is loaded that way")
    elif meta["stem"] == "cifar" and "stem" not in found.meta:
        notes.append("a 3×3 first convolution: taken as stride 1 without max-pool (--stem cifar)")
    if full and TARGET_BACKBONE not in found.parts:
        notes.append("the file has no target backbone: the full state holds a copy of the online")
    if full and TARGET_PROJECTOR not in found.parts:
        notes.append("the file has no target projector: the full state holds a copy of the online")
    if found.unknown:
        notes.append(f"unexpected, not imported: {', '.join(found.unknown)}")
    return notes


def _without_suffix(path: Path) -> Path:
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix))
    return path
