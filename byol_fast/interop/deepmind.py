"""The authors' checkpoints (google-deepmind/deepmind-research, byol/): haiku trees in a pickle.

`experiment_state` is a named tuple of parameters and state of both networks; a tree maps a module's
path, such as `res_net50/~/block_group_0/~/block_1/~/conv_0`, to its arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from byol_fast.errors import CheckpointError
from byol_fast.interop import arrays, records
from byol_fast.interop.layouts import (
    BACKBONE,
    PREDICTOR,
    PROJECTOR,
    TARGET_BACKBONE,
    TARGET_PROJECTOR,
)

# byol_experiment._ByolExperimentState, in the order of its fields
_FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")
_BLOCK = re.compile(r"block_group_(\d)/block_(\d+)/(.+)")
_AVERAGES = {"mean_ema": "running_mean", "var_ema": "running_var"}
_NORM = {"scale": "weight", "offset": "bias"}
_HEAD = {"linear": "0", "batch_norm": "1", "linear_1": "3"}

Trees = dict[str, dict[str, Any]]


def trees(tree: Any) -> Trees | None:
    """The four trees of a checkpoint by field name; None where this is no such checkpoint."""
    outer = records.mapping(tree)
    if outer is None:
        return None
    state = outer.get("experiment_state", tree)
    if isinstance(state, records.Opaque):
        values = state.args
        if len(values) == 1 and isinstance(values[0], list | tuple):
            values = tuple(values[0])
        named = dict(zip(_FIELDS, values, strict=False))
    else:
        named = records.mapping(state) or {}
    found = {name: records.mapping(named.get(name)) for name in _FIELDS[:4]}
    params = found["online_params"]
    if params is None or not any("initial_conv" in str(module) for module in params):
        return None
    return {name: value for name, value in found.items() if value is not None}


def networks(found: Trees, tensor: Callable[[Any], Tensor]) -> dict[str, dict[str, Tensor]]:
    """Part -> tensors under torchvision's and `model.MLP`'s keys; unknown modules under "unknown".

    Convolutions turn from [H, W, in, out] to [out, in, H, W], linear layers from [in, out].
    """
    parts: dict[str, dict[str, Tensor]] = {"unknown": {}}
    for network in ("online", "target"):
        both = [found.get(f"{network}_params", {}), found.get(f"{network}_state", {})]
        for module, name, leaf in _leaves(both):
            path = module.replace("/~", "")
            part, key = _place(path, name, network)
            if key is not None:
                parts.setdefault(part, {})[key] = _turned(tensor(leaf), key)
    _refuse_foreign_shapes(parts.get(BACKBONE, {}))
    return parts


def _leaves(both: list[dict[Any, Any]]) -> Iterator[tuple[str, str, Any]]:
    for tree in both:
        for module, values in tree.items():
            for name, leaf in (records.mapping(values) or {}).items():
                if arrays.is_leaf(leaf):
                    yield str(module), str(name), leaf


def _place(path: str, name: str, network: str) -> tuple[str, str | None]:
    """The part a leaf belongs to, and its key there; None for what is not needed."""
    online = network == "online"
    average = path.rpartition("/")[2]
    if average in _AVERAGES:
        if name != "average":
            return "", None  # counter and hidden: the moving average before its correction
        path, name = path.rpartition("/")[0], _AVERAGES[average]
    top, _, inner = path.partition("/")
    if top in ("projector", "predictor") and inner in _HEAD:
        names = {"w": "weight", "b": "bias", **_NORM}
        part = PREDICTOR if top == "predictor" else PROJECTOR if online else TARGET_PROJECTOR
        if top == "predictor" and not online:
            return "", None  # the target has no use for one
        return part, f"{_HEAD[inner]}.{names.get(name, name)}"
    if top == "classifier":
        return "", None
    key = _resnet_key(inner)
    if key is None:
        return "unknown", f"{path}/{name}"
    names = {"w": "weight", **_NORM}
    return (BACKBONE if online else TARGET_BACKBONE), f"{key}.{names.get(name, name)}"


def _resnet_key(inner: str) -> str | None:
    if inner in ("initial_conv", "initial_batchnorm"):
        return {"initial_conv": "conv1", "initial_batchnorm": "bn1"}[inner]
    if not (m := _BLOCK.fullmatch(inner)):
        return None
    layer = re.sub(r"conv_(\d)", lambda n: f"conv{int(n[1]) + 1}", m[3])
    layer = re.sub(r"batchnorm_(\d)", lambda n: f"bn{int(n[1]) + 1}", layer)
    layer = {"shortcut_conv": "downsample.0", "shortcut_batchnorm": "downsample.1"}.get(
        layer, layer
    )
    return f"layer{int(m[1]) + 1}.{m[2]}.{layer}"


def _turned(value: Tensor, key: str) -> Tensor:
    if key.endswith(".weight") and value.dim() == 4 and max(value.shape[:3]) > 1:
        return value.permute(3, 2, 0, 1).contiguous()
    if key.endswith(".weight") and value.dim() == 2 and min(value.shape) > 1:
        return value.t().contiguous()
    return value.reshape(-1)  # BatchNorm's are [1, 1, 1, C]


def _refuse_foreign_shapes(backbone: dict[str, Tensor]) -> None:
    first = backbone.get("conv1.weight")
    if first is not None and first.shape[0] != 64:
        raise CheckpointError(
            f"this ResNet is {first.shape[0] // 64} times as wide as torchvision's, in every "
            "layer: no network here can hold it. The authors' ResNet-50 (1×) can be imported"
        )
    if "layer1.0.downsample.0.weight" in backbone and "layer1.0.conv3.weight" not in backbone:
        raise CheckpointError(
            "the authors' ResNet-18 and 34 have a projection in their first block, torchvision's "
            "have none: no network here can hold it. Their ResNet-50, 101 and 152 can be imported"
        )
