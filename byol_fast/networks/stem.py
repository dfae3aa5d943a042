"""What other projects change in a ResNet's stem, which no shape of a tensor shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

CHANGES = ("relu", "max_pool", "stride")


def change_stem(resnet: nn.Module, changes: Mapping[str, Any]) -> None:
    """Change a torchvision ResNet's stem in place; its keys stay.

    changes: `relu` False: none after the first BatchNorm (lightly's ResNet for small images, cut
        into an nn.Sequential). `max_pool` True or False: with or without it. `stride`: of the first
        convolution.

    Raises:
        ValueError: an unknown change, or a value that it cannot take.
    """
    check_changes(changes)
    if "relu" in changes:
        resnet.relu = nn.ReLU(inplace=True) if changes["relu"] else nn.Identity()
    if "max_pool" in changes:
        pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        resnet.maxpool = pool if changes["max_pool"] else nn.Identity()
    if "stride" in changes:
        cast(nn.Conv2d, resnet.conv1).stride = (changes["stride"], changes["stride"])


def check_changes(changes: Any) -> None:
    """Raises ValueError for what `change_stem` cannot take."""
    for name, value in dict(changes if isinstance(changes, Mapping) else {"": None}).items():
        fits = type(value) is bool if name != "stride" else type(value) is int and 1 <= value <= 4
        if name not in CHANGES or not fits:
            raise ValueError(f"a stem has relu, max_pool and stride, got {changes!r:.80}")


def described(stem: str, changes: Mapping[str, Any]) -> str:
    """`cifar stem`, or `cifar stem without ReLU`, for messages."""
    more = []
    if "stride" in changes:
        more.append(f"of stride {changes['stride']}")
    for name, word in (("relu", "ReLU"), ("max_pool", "max-pool")):
        if name in changes:
            more.append(f"{'with' if changes[name] else 'without'} {word}")
    return " ".join([f"{stem} stem", ", ".join(more)]).strip()
