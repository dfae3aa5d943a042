"""byol_fast's weights in the files of other projects."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from byol_fast import checkpoint, export
from byol_fast._version import __version__
from byol_fast.export import Weights, write_atomically, write_bytes
from byol_fast.interop import (
    describe,
    files,
    fitting,
    heads,
    layouts,
    networks,
    onnx,
    resnet,
    state,
)
from byol_fast.interop.layouts import (
    BACKBONE,
    PARTS,
    TARGET_BACKBONE,
    Network,
)

log = logging.getLogger(__name__)

# What can be written, and the suffix of its file.
SUFFIXES = {
    "torchvision": ".pth",
    "timm": ".pth",
    "safetensors": ".safetensors",
    "mmpretrain": ".pth",
    "mmdet": ".pth",
    "mmseg": ".pth",
    "detectron2": ".pkl",
    "lightly": ".ckpt",
    "solo-learn": ".ckpt",
    "onnx": ".onnx",
    "byol_fast": "",
    "byol": state.SUFFIX,
}
_BOTH = ("mmpretrain", "lightly", "solo-learn", "byol")  # hold both networks and the heads
_PREFIXES = {part: layouts.LAYOUTS[0].parts[part][0] for part in PARTS}


@dataclass(frozen=True)
class Source:
    """byol_fast's own weights: one backbone, or both networks and the heads."""

    file: Path
    parts: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]

    def backbone(self, network: Network) -> nn.Module:
        """The network in eval mode."""
        part = BACKBONE if network == "online" else TARGET_BACKBONE
        exported = self.meta.get("network", "online") if len(self.parts) == 1 else None
        if exported == network:
            part = BACKBONE  # an export holds one backbone, and says whose
        elif part not in self.parts or exported:
            raise ValueError(
                f"{self.file} holds no {network} network: name the training checkpoint, the run "
                "folder with its checkpoints, or a full state (import --full)"
            )
        return export.build(Weights(self.file, self.parts[part], self.meta))


def read_source(path: Path | str) -> Source:
    """A run folder, training checkpoint, exported backbone or full state.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
        ValueError: another project's file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        for folder in (path / "checkpoints", path):
            if (found := checkpoint.latest(folder)) is not None:
                return _split(folder / f"step-{found['step']:08d}.pt", found["model"], found)
        weights = export.read_weights(path)
        return Source(weights.file, {BACKBONE: weights.tensors}, weights.meta)
    if checkpoint.has_hash(path):
        found = checkpoint.load(path)
        return _split(path, found["model"], found)
    content = files.read(path)
    tree = content.tree if isinstance(content.tree, dict) else {}
    if "hyper" in tree and "model" in tree:
        return _split(path, tree["model"], tree)
    if "byol_fast" not in tree:
        raise ValueError(
            f"{path} is not byol_fast's own and does not say what it is. Import it first: "
            f"{describe.command(path)}"
        )
    return _split(path, tree["state_dict"], {"hyper": tree["byol_fast"]})


def _split(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Source:
    meta = dict(about["hyper"])
    if "step" in about:
        meta["steps"] = about["step"]
    parts = {
        part: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for part, prefix in _PREFIXES.items()
    }
    parts = {part: found for part, found in parts.items() if found}
    return Source(path, parts or {BACKBONE: dict(tensors)}, meta)


def export_file(
    source: Path | str,
    out: Path | str,
    layout: str,
    *,
    network: Network = "online",
    ignore_padding: bool = False,
) -> list[Path]:
    """Write byol_fast's weights in another project's layout.

    Args:
        layout: a key of `SUFFIXES`; its suffix is added to `out` where that has none.
        network: whose backbone; layouts of whole models hold both.
        ignore_padding: write weights trained with another padding than that project computes with.

    Returns:
        The files written; each appears whole or not at all.

    Raises:
        CheckpointError: the source cannot be read.
        ValueError: the layout cannot hold it, and why; or `out` would be written over the source.
        OSError: disk full or read-only.
        ImportError: ONNX was asked for and a package for it is missing.
    """
    if layout not in SUFFIXES:
        raise ValueError(f"unknown layout {layout!r}: one of {', '.join(SUFFIXES)}")
    found = read_source(source)
    fitting.check(found.file, found.meta, layout, ignore_padding)
    path = _with_suffix(Path(out), layout)
    both = [path.with_name(path.name + each) for each in (".safetensors", ".pth")]
    files.spare(found.file, both if layout == "byol_fast" else [path])
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout in _BOTH:
        if network != "online":
            raise ValueError(f"--to {layout} holds both networks: --network has no meaning there")
        return [_write_model(found, path, layout)]
    net = found.backbone(network)
    if layout == "onnx":
        return [onnx.write(net, path, found.meta)]
    if layout == "byol_fast":
        return list(export.export_backbone(net, path, {**found.meta, "network": network}))
    return [_write_backbone(export.plain_tensors(net), path, layout, found.meta)]


def _write_backbone(
    tensors: dict[str, Tensor], path: Path, layout: str, meta: Mapping[str, Any]
) -> Path:
    if layout == "detectron2":
        content = {
            "model": {k: v.numpy() for k, v in resnet.to_detectron2(tensors).items()},
            "__author__": f"byol_fast {__version__}; input RGB, scaled to mean 0 and std 1",
            "matching_heuristics": True,
        }
        write_bytes(path, pickle.dumps(content, protocol=2))
    elif path.suffix == ".safetensors":
        described = {"format": "pt"}  # timm and transformers look for it
        write_atomically(
            path, lambda p: safetensors.torch.save_file(tensors, p, metadata=described)
        )
    else:
        inner = {"meta": _mm_meta(meta), "state_dict": tensors}
        tree = inner if layout in ("mmdet", "mmseg") else tensors
        write_atomically(path, lambda p: torch.save(tree, p))
    return path


def _write_model(found: Source, path: Path, layout: str) -> Path:
    """Both networks and the heads."""
    lacking = [part for part in PARTS if part not in found.parts]
    if lacking:
        raise ValueError(
            f"{found.file} holds no {lacking[0].replace('_', ' ')}, which --to {layout} needs: "
            "name a training checkpoint or a full state; or write the backbone alone "
            "(--to torchvision, --to mmdet)"
        )
    for part in PARTS:
        if not part.endswith(BACKBONE) and "3.weight" not in found.parts[part]:
            raise ValueError(
                f"{found.file}: its {part.replace('_', ' ')} ({found.meta.get(part)}) is not "
                f"Linear, BatchNorm, ReLU, Linear, which --to {layout} needs: write the backbone "
                "alone (--to torchvision, --to mmdet)"
            )
    if layout == "byol":
        whole = networks.Networks(
            found.file, "", "byol_fast", "", found.parts, padding=state.padding_of(found.meta)
        )
        about = {key: found.meta[key] for key in _TRAVELS if key in found.meta}
        return state.save(state.build(whole, found.meta), path, about)
    names = next(each for each in layouts.LAYOUTS if each.name == layout)
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        if part.endswith(BACKBONE):
            own = {k: v.contiguous() for k, v in found.parts[part].items()}
        else:
            own = _head(found.parts[part], layout, f"the {part.replace('_', ' ')}")
        tensors |= {names.parts[part][0] + key: value for key, value in own.items()}
    tree: dict[str, Any] = {"state_dict": tensors}
    steps = int(found.meta.get("steps") or 0)
    if layout == "mmpretrain":
        if not steps:
            log.warning(
                "note: %s does not say how many steps it was trained for, so target_net.steps is "
                "0: training on there starts the momentum's schedule again, and its first step "
                "copies the online network over the target",
                found.file,
            )
        tensors["target_net.steps"] = torch.tensor(steps)
        tree["meta"] = _mm_meta(found.meta)
    elif steps:
        tree["global_step"] = steps
    write_atomically(path, lambda p: torch.save(tree, p))
    return path


_TRAVELS = ("mean", "std", "padding", "stem_changes", "source", "steps")


def _head(tensors: Mapping[str, Tensor], layout: str, what: str) -> dict[str, Tensor]:
    options: dict[str, dict[str, Any]] = {
        "mmpretrain": {"spelling": "mm"},
        "lightly": {"first_bias": False, "last_bias": True},
        "solo-learn": {"last_bias": True},
    }
    try:
        return heads.from_mlp(tensors, **options[layout])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _mm_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {"writer": f"byol_fast {__version__}", "iter": int(meta.get("steps") or 0)}


def _with_suffix(path: Path, layout: str) -> Path:
    suffix = SUFFIXES[layout]
    if layout == "byol_fast":
        for known in (".safetensors", ".pth"):
            path = path.with_name(path.name.removesuffix(known))
        return path
    if layout == "byol":
        return path.with_name(path.name.removesuffix(suffix) + suffix)
    free = layout in ("torchvision", "timm")
    allowed = {suffix, ".pth", ".pt", ".ckpt"} if suffix in (".pth", ".ckpt") else {suffix}
    if free:
        allowed |= {".safetensors"}
    if path.suffix in allowed:
        return path
    if path.suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".pkl", ".onnx"):
        raise ValueError(f"--to {layout} writes {suffix}, not {path.suffix}: rename OUT")
    return path.with_name(path.name + suffix)
