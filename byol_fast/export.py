"""Backbones out of a run and back into a program: torchvision-keyed, self-describing, no pickle.

`backbone.safetensors` holds the weights and, as JSON under the metadata key `byol_fast`, all that
is needed to build the network again. `backbone.pth` holds the same tensors as a plain state dict,
for programs that expect torchvision's file format.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from byol_fast._version import __version__
from byol_fast.errors import CheckpointError
from byol_fast.networks.backbone import HiddenOutput, build_backbone, feature_dim
from byol_fast.weights import METADATA_KEY, Weights, foreign, read_weights, some

__all__ = [
    "Weights",
    "build",
    "export_backbone",
    "load_backbone",
    "plain_tensors",
    "read_weights",
    "write_atomically",
    "write_bytes",
]

_NEEDED = ("backbone", "stem", "hidden_layer", "image_size")


def export_backbone(
    backbone: nn.Module, path_without_suffix: Path | str, meta: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write `<path>.safetensors` and `<path>.pth`; each appears whole or not at all.

    Args:
        backbone: as `build_backbone` made it, in any mode and on any device.
        meta: `BYOL.hyper`, and whatever else should travel along (mean, std, steps); JSON values.

    Returns:
        The two paths.

    Raises:
        ValueError: `meta` lacks a key that loading needs, or holds something JSON cannot.
        OSError: the disk is full or read-only; earlier files are untouched.
    """
    if missing := [key for key in _NEEDED if key not in meta]:
        raise ValueError(f"meta lacks {', '.join(missing)}: pass BYOL.hyper")
    stem = Path(path_without_suffix)
    about = {
        **meta,
        "feature_dim": feature_dim(backbone, int(meta["image_size"])),
        "layout": "torchvision" if _is_torchvision(meta["backbone"]) else "module",
        "version": __version__,
    }
    try:
        described = {"format": "pt", METADATA_KEY: json.dumps(about)}
    except TypeError as error:
        raise ValueError(f"meta must hold plain JSON values: {error}") from error
    tensors = plain_tensors(backbone)
    stem.parent.mkdir(parents=True, exist_ok=True)
    # with_name, not with_suffix: a name such as "resnet18.v2" keeps its dot.
    paths = stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".pth")
    write_atomically(
        paths[0], lambda p: safetensors.torch.save_file(tensors, p, metadata=described)
    )
    write_atomically(paths[1], lambda p: torch.save(tensors, p))
    return paths


def load_backbone(
    path: Path | str,
    *,
    backbone: str | nn.Module | None = None,
    stem: str | None = None,
    hidden_layer: int | str | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A ready network in eval mode: images `[N, 3, S, S]` to features `[N, F]`.

    Args:
        path: an exported `.safetensors` or `.pth`, a run folder (its export, else its newest
            checkpoint), or a training checkpoint (`step-*.pt`).
        backbone: a torchvision name, needed for a plain `.pth`; or, for a network of your own, a
            module of the same layers, which is filled with the weights.
        stem, hidden_layer, image_size: as in `build_backbone`; by default what the file says.

    Raises:
        CheckpointError: nothing is there, or it is damaged, or no weights, or a pickle (of which
            nothing is executed).
        ValueError: the weights are of another network, or the file does not say of which.
    """
    given = {"backbone": backbone, "stem": stem, "hidden_layer": hidden_layer}
    return build(read_weights(path), **given, image_size=image_size, device=device)  # type: ignore[arg-type]


def build(
    weights: Weights,
    *,
    backbone: str | nn.Module | None = None,
    stem: str | None = None,
    hidden_layer: int | str | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The network of `weights`; see `load_backbone`."""
    meta = weights.meta
    backbone = meta.get("backbone") if backbone is None else backbone
    own_module = isinstance(backbone, nn.Module)  # whose keys are its own affair
    if not meta and not own_module and (hint := foreign(weights.file, weights.tensors)):
        raise CheckpointError(f"{weights.file} holds the weights of another project. {hint}")
    if backbone is None:
        raise ValueError(
            f"{weights.file} does not say which network it belongs to: give its torchvision name "
            "as backbone= (--backbone), and stem= if that is not imagenet"
        )
    if isinstance(backbone, str):
        if backbone == meta.get("backbone") and not _is_torchvision(backbone):
            raise ValueError(
                f"{weights.file} belongs to {backbone}, a network of your own: build one and pass "
                "it as load_backbone(path, backbone=module)"
            )
        stem = meta.get("stem", "imagenet") if stem is None else stem
    layer = meta.get("hidden_layer", -1) if hidden_layer is None else hidden_layer
    size = meta.get("image_size", 224) if image_size is None else image_size
    with torch.random.fork_rng(devices=[]):  # its first weights are about to be replaced
        net = build_backbone(
            backbone,
            stem=stem or "imagenet",  # type: ignore[arg-type]
            hidden_layer=layer,
            image_size=size,
            norm=meta.get("norm", "batch"),
            padding=meta.get("padding", "symmetric") if isinstance(backbone, str) else "symmetric",
        )
    _fill(net, weights, type(backbone).__name__ if isinstance(backbone, nn.Module) else backbone)
    return net.to(device).eval()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` to a temporary file beside `path`, make it durable, then rename.

    The file has the permissions of any new file there, whatever `write` gives it: safetensors
    makes its files 0600.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # by umask, or by the folder's default ACL
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} was NOT written: {error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """`write_atomically` of bytes."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def _fill(net: nn.Module, weights: Weights, name: str) -> None:
    tensors, inner = weights.tensors, net
    if isinstance(net, HiddenOutput) and not tensors.keys() & net.state_dict().keys():
        inner = net.net  # an export is without the wrapper's prefix, a checkpoint is with it
    own = inner.state_dict()
    counters = {key for key in own if key.endswith(".num_batches_tracked")}
    missing = sorted(own.keys() - tensors.keys() - counters)
    extra = sorted(k for k in tensors.keys() - own.keys() if not taken_off(inner, k))
    differ = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or extra or differ:
        shapes = [f"{k} {[*tensors[k].shape]} instead of {[*own[k].shape]}" for k in differ]
        listed = {"missing": missing, "unknown": extra, "other shape": shapes}
        what = "; ".join(
            f"{len(keys)} {how} ({some(keys)})" for how, keys in listed.items() if keys
        )
        raise ValueError(
            f"the weights in {weights.file} do not fit {name}: {what}. "
            "Check the backbone and the stem (imagenet or cifar)"
        )
    inner.load_state_dict(tensors, strict=False)


def taken_off(net: nn.Module, key: str) -> bool:
    """Whether `key` is of a classifier that the network has no longer: an Identity stands there."""
    try:
        return isinstance(net.get_submodule(key.rpartition(".")[0]), nn.Identity)
    except AttributeError:
        return False


def plain_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's state dict on the CPU, contiguous, unshared, with every BatchNorm's counter."""
    inner = backbone.net if isinstance(backbone, HiddenOutput) else backbone
    assert isinstance(inner, nn.Module)
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)
        for key, value in inner.state_dict().items()
    }
    for key in [key for key in tensors if key.endswith("running_var")]:
        counter = key.removesuffix("running_var") + "num_batches_tracked"
        tensors.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return tensors


def _is_torchvision(name: object) -> bool:
    return name in torchvision.models.list_models(module=torchvision.models)
