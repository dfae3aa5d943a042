"""What a file's keys show of a ResNet's stem, and what they leave open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from byol_fast.interop.networks import Networks

_USUAL: dict[str, dict[str, Any]] = {
    "imagenet": {"relu": True, "max_pool": True, "stride": 2},
    "cifar": {"relu": True, "max_pool": False, "stride": 1},
}


def changes(found: Networks, stem: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """How a network's stem differs from torchvision's (imagenet) or the usual 3×3 one (cifar).

    An nn.Sequential shows it: its forward runs its modules, and those without tensors leave gaps in
    the numbers of the others. Nothing between the first BatchNorm and the first stage means no ReLU
    and no max-pool; one module is a ReLU. What was asked for comes before that.
    """
    usual = _USUAL[stem]
    seen = dict(found.meta.get("stem_changes") or {})
    if found.between is not None:
        seen["relu"] = found.between > 0
        if found.between < 2:
            seen["max_pool"] = False
    told = {**seen, **asked}
    return {name: value for name, value in told.items() if value != usual[name]}


def notes(found: Networks, meta: Mapping[str, Any]) -> list[str]:
    """What was concluded from the keys, what was assumed, and the options for both."""
    said = []
    made: Mapping[str, Any] = meta.get("stem_changes", {})
    open_stem = meta["stem"] == "cifar" and "stem" not in found.meta
    if found.between == 0 and made.get("relu") is False:
        said.append(
            "no module stands between the first BatchNorm and the first stage, so no ReLU is "
            "computed there, as in lightly's ResNet for small images cut into an nn.Sequential "
            "(--stem-relu if its forward applied one)"
        )
    elif found.between == 1:
        said.append(
            "one module without weights follows the first BatchNorm: taken as a ReLU, without "
            "max-pool (--max-pool, --no-stem-relu otherwise)"
        )
    elif open_stem and found.padding != "wide-stem" and found.between != 0:
        said.append(
            "a 3×3 first convolution: taken as stride 1 without max-pool, which the keys do not "
            "show (--stem-stride 2, --max-pool otherwise)"
        )
    if found.between is not None and found.between > 2:
        said.append(
            f"{found.between} modules without weights follow the first BatchNorm: taken as ReLU "
            "and max-pool"
        )
    if found.layout == "detectron2":
        said.append(
            "taken with RGB input and the stride in the 3×3 convolutions (STRIDE_IN_1X1: False); "
            "detectron2's own default is BGR and the 1×1"
        )
    return said
