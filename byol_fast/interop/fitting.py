"""Whether another project's network can hold byol_fast's weights and compute the same with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision

from byol_fast.networks.stem import described

_RESNETS = ("timm", "mmpretrain", "mmdet", "mmseg", "detectron2", "lightly", "solo-learn", "byol")


def check(file: Path, meta: Mapping[str, Any], layout: str, ignore_padding: bool) -> None:
    """Refuse to write a quiet mistake.

    Args:
        meta: what the file says about its network.
        layout: a key of `exporting.SUFFIXES`.
        ignore_padding: pass weights that were trained with another padding.

    Raises:
        ValueError: the layout's network computes something else; what, and what to use instead.
    """
    if layout in ("onnx", "byol_fast"):  # they carry all of it
        return
    _check_norm(file, meta, layout)
    _check_stem(file, meta, layout)
    if layout in _RESNETS:
        _check_resnet(file, meta, layout)
    _check_padding(file, meta, layout, ignore_padding)


def _check_resnet(file: Path, meta: Mapping[str, Any], layout: str) -> None:
    name = meta.get("backbone")
    model = getattr(torchvision.models, str(name), None)
    is_resnet = callable(model) and str(name).removeprefix("wide_").startswith("resne")
    if not is_resnet or meta.get("hidden_layer", -1) != -1:
        raise ValueError(
            f"{file} is {name} at hidden layer {meta.get('hidden_layer', -1)}: "
            f"--to {layout} is for whole torchvision ResNets (use torchvision, safetensors, onnx)"
        )
    stem = meta.get("stem", "imagenet")
    if stem == "cifar" and layout in ("detectron2", "timm"):
        raise ValueError(f"{layout}'s ResNets have no 3×3 stem: {file} has the cifar stem")


def _check_norm(file: Path, meta: Mapping[str, Any], layout: str) -> None:
    """Other programs have BatchNorm under these keys: refuse to write a quiet mistake."""
    norm = meta.get("norm", "batch")
    if norm != "batch":
        raise ValueError(
            f"{file} has GroupNorm and standardised weights ({norm}), and {layout} computes "
            "with BatchNorm: use --to onnx or byol_fast"
        )


def _check_stem(file: Path, meta: Mapping[str, Any], layout: str) -> None:
    """Other programs have the usual stem under these keys: refuse to write a quiet mistake."""
    changes = meta.get("stem_changes")
    if changes and layout != "byol":
        stem = described(meta.get("stem", "imagenet"), changes)
        raise ValueError(
            f"{file} has a {stem}, which {layout} does not know from the keys: "
            "use --to onnx or byol_fast"
        )


def _check_padding(file: Path, meta: Mapping[str, Any], layout: str, ignore: bool) -> None:
    """Other programs compute with the padding they know: refuse to write a quiet mistake."""
    theirs = "symmetric"
    if layout == "byol":
        return
    if layout == "solo-learn" and meta.get("stem") == "cifar":
        theirs = "wide-stem"
    own = meta.get("padding", "symmetric")
    if own != theirs and not ignore:
        raise ValueError(
            f"{file} was trained with {own} padding, and {layout} computes with {theirs}: "
            "its features would be others, and worse. Use --to onnx or byol_fast, or say "
            "--ignore-padding"
        )
