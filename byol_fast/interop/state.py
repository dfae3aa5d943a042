"""The whole of a BYOL model in one file: `NAME.byol.safetensors`.

Both networks and both heads under the keys of `BYOL.state_dict()`, and as JSON under the metadata
key `byol_fast` all that is needed to build the model again: `hyper` (the arguments of `BYOL`),
`padding` and where the weights came from. Numbers only, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from byol_fast._version import __version__
from byol_fast.export import taken_off, write_atomically
from byol_fast.interop import layouts, networks, resnet
from byol_fast.interop.layouts import (
    BACKBONE,
    PARTS,
    PREDICTOR,
    PROJECTOR,
    TARGET_BACKBONE,
    TARGET_PROJECTOR,
)
from byol_fast.interop.networks import Networks
from byol_fast.model import BYOL, Encoder
from byol_fast.networks.padding import Padding, set_padding
from byol_fast.networks.stem import change_stem

SUFFIX = ".byol.safetensors"
_PREFIXES = {part: layouts.LAYOUTS[0].parts[part][0] for part in PARTS}


def load_byol(path: Path | str) -> BYOL:
    """The BYOL model in a full state or a training checkpoint, in train mode on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
        ValueError: it is not byol_fast's, or holds a part only (a backbone export).
    """
    found = networks.read(path)
    if found.layout != "byol_fast":
        raise ValueError(f"{path} is {found.about}: import it first, with --full")
    return build(found, found.meta)


def build(found: Networks, hyper: Mapping[str, Any]) -> BYOL:
    """A BYOL model that holds all networks of a file.

    Args:
        hyper: `backbone`, `stem`, `image_size`; the heads' sizes are read off the tensors.

    Raises:
        ValueError: a part is missing or does not fit; keys and shapes are named.
    """
    parts = dict(found.parts)
    lacking = [part for part in (BACKBONE, PROJECTOR, PREDICTOR) if part not in parts]
    if lacking:
        why = [f"{part}: {found.problems.get(part, 'not in the file')}" for part in lacking]
        raise ValueError(f"{found.file} does not hold a whole BYOL model ({'; '.join(why)})")
    for follower, online in ((TARGET_BACKBONE, BACKBONE), (TARGET_PROJECTOR, PROJECTOR)):
        parts.setdefault(follower, parts[online])
    with torch.random.fork_rng(devices=[]):  # its first weights are about to be replaced
        model = BYOL(
            hyper["backbone"],
            hyper.get("hidden_layer", -1),
            int(hyper.get("image_size", 224)),
            projector=_sizes(parts[PROJECTOR]),
            predictor=_sizes(parts[PREDICTOR]),
            stem=hyper.get("stem", "imagenet"),
        )
    target = cast(Encoder, model.target)
    for encoder in (model.online.encoder, target):
        set_padding(encoder.backbone, found.padding)
        change_stem(encoder.backbone, hyper.get("stem_changes") or {})
    heads = {
        PROJECTOR: model.online.encoder.projector,
        PREDICTOR: model.online.predictor,
        TARGET_PROJECTOR: target.projector,
    }
    for part, head in heads.items():
        if "3.bias" in parts[part]:
            cast(nn.Sequential, head)[3] = _with_bias(cast(nn.Sequential, head)[3])
    target.requires_grad_(False)
    modules = {BACKBONE: model.online.encoder.backbone, TARGET_BACKBONE: target.backbone, **heads}
    for part, module in modules.items():
        fill(module, parts[part], f"{found.file}, {part.replace('_', ' ')}")
    return model


def fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load tensors strictly; only BatchNorm's counters may be missing.

    Raises:
        ValueError: keys or shapes differ; all are named.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    extra = [k for k in tensors if k not in own and not taken_off(module, k)]
    shapes = [
        f"{k} {[*tensors[k].shape]} instead of {[*own[k].shape]}"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    listed = {"missing": missing, "unexpected": extra, "of another shape": shapes}
    if any(listed.values()):
        text = "; ".join(f"{how}: {', '.join(keys)}" for how, keys in listed.items() if keys)
        raise ValueError(f"{what} does not fit {type(module).__name__}. {text}")
    module.load_state_dict(dict(tensors), strict=False)


def save(model: BYOL, path: Path, meta: Mapping[str, Any]) -> Path:
    """Write a full state; the file appears whole or not at all.

    Args:
        path: with or without the suffix `.byol.safetensors`.
        meta: what else should travel along (padding, mean, std, source); JSON values.
    """
    path = path.with_name(path.name.removesuffix(SUFFIX) + SUFFIX)
    about = {**model.hyper, **meta, "layout": "byol", "version": __version__}
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in model.state_dict().items()
    }
    described = {"format": "pt", "byol_fast": json.dumps(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: safetensors.torch.save_file(tensors, p, metadata=described))
    return path


def guess(found: Networks, network: str = "online") -> dict[str, Any]:
    """`backbone` (None where unknown) and `stem`, as the shapes of a network's tensors show."""
    tensors = found.parts.get(BACKBONE if network == "online" else TARGET_BACKBONE, {})
    return {"backbone": resnet.torchvision_name(tensors), "stem": resnet.stem_of(tensors)}


def padding_of(meta: Mapping[str, Any]) -> Padding:
    """What a file's description says about padding; symmetric where it says nothing."""
    return cast(Padding, meta.get("padding", "symmetric"))


def _sizes(head: Mapping[str, Tensor]) -> tuple[int, int]:
    return head["0.weight"].shape[0], head["3.weight"].shape[0]


def _with_bias(linear: nn.Module) -> nn.Linear:
    old = cast(nn.Linear, linear)
    return nn.Linear(old.in_features, old.out_features, bias=True)
