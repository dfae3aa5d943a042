"""Projectors and predictors: Linear – BatchNorm – ReLU – Linear, in anyone's spelling.

The names of the layers differ between projects, their number and shapes do not, so the layers are
recognised by what they hold. The result has the keys of `model.MLP`: 0 (Linear), 1 (BatchNorm) and
3 (Linear).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_SPELLINGS = {  # how each project calls layers 0, 1 and 3
    "mm": ("fc0", "bn0", "fc1"),
    "plain": ("0", "1", "3"),
}


def to_mlp(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors under the keys of `model.MLP`.

    A first Linear without bias gets zeros (BatchNorm follows, so nothing changes); a last bias of
    zeros is left out, since `model.MLP` has none; another one stays, as `3.bias`.

    Raises:
        ValueError: these are not two linear layers with a BatchNorm between them.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, name = key.rpartition(".")
        layers.setdefault(layer, {})[name] = value
    order = sorted(layers, key=_natural)
    norms = [layers[name] for name in order if "running_mean" in layers[name]]
    linears = [n for n in order if "weight" in layers[n] and layers[n]["weight"].dim() == 2]
    if len(linears) != 2 or len(norms) != 1 or len(order) != 3:
        raise ValueError(
            f"a head of {len(linears)} linear layers and {len(norms)} BatchNorm, where BYOL has "
            "Linear, BatchNorm, ReLU, Linear"
        )
    first, last = (dict(layers[name]) for name in linears)
    hidden = first["weight"].shape[0]
    if not first["weight"].numel() or not last["weight"].numel():
        raise ValueError("a head whose layers hold no numbers")
    if last["weight"].shape[1] != hidden or norms[0]["running_mean"].shape != (hidden,):
        raise ValueError("a head whose layers do not fit one another")
    first.setdefault("bias", torch.zeros(hidden, dtype=first["weight"].dtype))
    if "bias" in last and not last["bias"].any():
        del last["bias"]
    parts = {"0": first, "1": norms[0], "3": last}
    return {f"{at}.{name}": value for at, part in parts.items() for name, value in part.items()}


def from_mlp(
    tensors: Mapping[str, Tensor],
    spelling: str = "plain",
    *,
    last_bias: bool = False,
    first_bias: bool = True,
) -> dict[str, Tensor]:
    """The keys of `model.MLP` in another project's spelling.

    last_bias: that project's last Linear has a bias; zeros where there is none.
    first_bias: False if its first Linear has none: the bias goes into BatchNorm's running mean,
        which gives the same outputs in evaluation, and in training it never mattered.

    Raises:
        ValueError: there is a last bias, and that project has no place for it.
    """
    names = dict(zip(("0", "1", "3"), _SPELLINGS[spelling], strict=True))
    found = dict(tensors)
    if last_bias:
        found.setdefault("3.bias", torch.zeros(found["3.weight"].shape[0]))
    elif "3.bias" in found:
        raise ValueError("its last layer has a bias, and this layout has no place for one")
    if not first_bias:
        found["1.running_mean"] = found["1.running_mean"] - found.pop("0.bias")
    return {names[key[0]] + key[1:]: value for key, value in found.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """fc2 before fc10, 0.1 before 1."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
