"""A ResNet's keys in the spelling of each project, to and from torchvision's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

_T = TypeVar("_T")

# (blocks of the four stages, width and group width of the first 3×3 convolution) -> torchvision's
# name; a group width of None stands for blocks without a bottleneck.
_NAMES: dict[tuple[tuple[int, ...], int, int | None], str] = {
    ((2, 2, 2, 2), 64, None): "resnet18",
    ((3, 4, 6, 3), 64, None): "resnet34",
    ((3, 4, 6, 3), 64, 64): "resnet50",
    ((3, 4, 23, 3), 64, 64): "resnet101",
    ((3, 8, 36, 3), 64, 64): "resnet152",
    ((3, 4, 6, 3), 128, 128): "wide_resnet50_2",
    ((3, 4, 23, 3), 128, 128): "wide_resnet101_2",
    ((3, 4, 6, 3), 128, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), 256, 8): "resnext101_32x8d",
    ((3, 4, 23, 3), 256, 4): "resnext101_64x4d",
}
_FIRST_CHILDREN = re.compile(r"(\d+)\.(.+)")  # of nn.Sequential(*resnet.children())
_IN_STAGE = re.compile(r"layer(\d)\.(\d+)\.")
# spelling -> its first convolution, and one of its first stage, each below the network's prefix
_SPELLINGS = {
    "torchvision": ("conv1.weight", r"layer1\.0\.conv1\.weight"),
    "sequential": ("0.weight", r"[2-9]\.0\.conv1\.weight"),
    "detectron2": ("stem.conv1.weight", r"res2\.0\.conv1\.weight"),
    "transformers": (
        "embedder.embedder.convolution.weight",
        r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight",
    ),
}


def prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Each prefix below which a ResNet lies, "" among them, and its spelling."""
    keys = set(keys)
    found: dict[str, str] = {}
    for spelling, (first, stage) in _SPELLINGS.items():
        pattern = re.compile(rf"(|.*\.){stage}")
        at = {m[1] for key in keys if (m := pattern.fullmatch(key))}
        found |= {prefix: spelling for prefix in at if prefix + first in keys}
    return dict(sorted(found.items()))


def spelling(keys: Iterable[str]) -> str:
    """The spelling of the ResNet that has these keys; torchvision's where there is none."""
    return prefixes(keys).get("", "torchvision")


def to_torchvision(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """The same tensors under torchvision's keys; unknown keys stay as they are."""
    how = spelling(tensors)
    if how == "detectron2":
        return {_from_detectron2(key): value for key, value in tensors.items()}
    if how == "transformers":
        return {_from_transformers(key): value for key, value in tensors.items()}
    if how == "sequential":
        renamed = _children_names(tensors)
        found = {key: _FIRST_CHILDREN.fullmatch(key) for key in tensors}
        tensors = {
            f"{renamed.get(m[1], m[1])}.{m[2]}" if (m := found[key]) else key: value
            for key, value in tensors.items()
        }
    # lightly's ResNet for small images calls a projection "shortcut"
    return {
        re.sub(r"^(layer\d\.\d+\.)shortcut\.", r"\1downsample.", key): value
        for key, value in tensors.items()
    }


def between_stem_and_stages(keys: Iterable[str]) -> int | None:
    """How many modules without tensors an nn.Sequential runs between the first BatchNorm and the
    first stage; None where the ResNet's children have names, and its forward is not known."""
    keys = list(keys)
    return _stages(keys)[0] - 2 if spelling(keys) == "sequential" else None


def _stages(keys: Iterable[str]) -> list[int]:
    found = (re.fullmatch(r"(\d+)\.0\.conv1\.weight", key) for key in keys)
    return sorted({int(m[1]) for m in found if m})


def _children_names(tensors: Mapping[str, Any]) -> dict[str, str]:
    stages = _stages(tensors)
    names = {str(number): f"layer{at}" for at, number in enumerate(stages, start=1)}
    for after in (stages[-1] + 1, stages[-1] + 2):  # the classifier, mostly after the pooling
        weight = tensors.get(f"{after}.weight")
        if weight is not None and len(weight.shape) == 2:
            names[str(after)] = "fc"
    return {"0": "conv1", "1": "bn1", **names}


def split_statistics(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Statistics of lightly's SplitBatchNorm as it averages them for evaluation; how many splits.

    It keeps one mean and variance for each split of a batch, one after the other.
    """
    joined, splits = dict(tensors), 1
    for key, value in tensors.items():
        scale = tensors.get(re.sub(r"running_(mean|var)$", "weight", key))
        if not key.endswith(("running_mean", "running_var")) or scale is None:
            continue
        if value.dim() == scale.dim() == 1 and len(value) > len(scale) > 0:
            number, odd = divmod(len(value), len(scale))
            if not odd:
                joined[key], splits = value.view(number, len(scale)).mean(0), number
    return joined, splits


def to_detectron2(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """torchvision's keys to detectron2's; counters, which it does not keep, are left out."""
    renamed = {}
    for key, value in tensors.items():
        if key.endswith("num_batches_tracked"):
            continue
        key = re.sub(r"downsample\.0\.", "shortcut.", key)
        key = re.sub(r"downsample\.1\.", "shortcut.norm.", key)
        key = re.sub(r"bn(\d)\.", r"conv\1.norm.", key)
        key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
        renamed[key if key.startswith("res") else f"stem.{key}"] = value
    return renamed


def _from_detectron2(key: str) -> str:
    key = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", key).removeprefix("stem.")
    key = re.sub(r"shortcut\.norm\.", "downsample.1.", key)
    key = re.sub(r"shortcut\.", "downsample.0.", key)
    return re.sub(r"conv(\d)\.norm\.", r"bn\1.", key)


def _from_transformers(key: str) -> str:
    key = re.sub(r"^embedder\.embedder\.convolution\.", "conv1.", key)
    key = re.sub(r"^embedder\.embedder\.normalization\.", "bn1.", key)
    key = re.sub(
        r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", key
    )
    key = key.replace("shortcut.convolution.", "downsample.0.")
    key = key.replace("shortcut.normalization.", "downsample.1.")
    key = re.sub(r"layer\.(\d)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}.", key)
    return re.sub(r"layer\.(\d)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}.", key)


def torchvision_name(tensors: Mapping[str, Any]) -> str | None:
    """The torchvision network that has these tensors, as their shapes show; None if none does."""
    blocks: dict[int, set[int]] = {}
    for key in tensors:
        if m := _IN_STAGE.match(key):
            blocks.setdefault(int(m[1]), set()).add(int(m[2]))
    counts = tuple(len(blocks.get(stage, ())) for stage in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in tensors
    middle = tensors.get("layer1.0.conv2.weight" if bottleneck else "layer1.0.conv1.weight")
    if middle is None or len(middle.shape) != 4:
        return None
    return _NAMES.get((counts, middle.shape[0], middle.shape[1] if bottleneck else None))


def stem_of(tensors: Mapping[str, Tensor]) -> str:
    """`cifar` where the first convolution is 3×3, else `imagenet`."""
    first = tensors.get("conv1.weight")
    return "cifar" if first is not None and first.shape[-1:] == (3,) else "imagenet"
