"""GroupNorm and weight standardisation in BatchNorm's place: no statistics over the batch.

Source: Richemond et al. 2020, "BYOL works even without batch statistics" (arXiv 2010.10241): 73.9 %
against 74.3 % on ImageNet. Weight standardisation: Qiao et al. 2019.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from byol_fast.norm import does_more

GROUPS = 16
_TINY = 1e-10  # beside a variance of 1e-4 or more; a constant weight becomes 0, not NaN


def standardise(weight: Tensor) -> Tensor:  # [out, in, ...] -> the same
    """Each output's weights with mean 0 and variance 1 over its fan-in."""
    var, mean = torch.var_mean(
        weight, dim=tuple(range(1, weight.dim())), correction=0, keepdim=True
    )
    return (weight - mean) * torch.rsqrt(var + _TINY)


class StandardisedConv2d(nn.Conv2d):
    """A convolution by its standardised weights; the stored weights are the raw ones."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, standardise(self.weight), self.bias)
        return out


class StandardisedLinear(nn.Linear):
    """A linear layer by its standardised weights; the stored weights are the raw ones."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, standardise(self.weight), self.bias)


def to_group_norm(module: nn.Module, groups: int = GROUPS) -> nn.Module:
    """In place: every BatchNorm of `module` a GroupNorm, and the weights before it standardised.

    These are those of every convolution, and of a linear layer right before a BatchNorm in a
    Sequential. Layers stay the same objects, with their parameters and hooks; running statistics
    go. A number of channels that `groups` does not divide gets their greatest common divisor of
    groups. A module without BatchNorm is left as it is. Returns the module.

    Raises ValueError for a BatchNorm that does more, and for weights that are computed (weight or
    spectral norm, parametrizations). Nothing has been changed then.
    """
    layers = list(module.modules())
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    if not norms:
        return module
    before = {layer for parent in layers for layer in _before_a_norm(parent)}
    standardised = [layer for layer in layers if _has_weights_for(layer, layer in before)]
    for layer in [*norms, *standardised]:
        _refuse_what_would_be_lost(layer)
    for norm in norms:
        channels = norm.num_features
        norm._buffers.clear()
        norm.__class__ = nn.GroupNorm  # type: ignore[assignment]
        vars(norm).update(num_groups=math.gcd(groups, channels), num_channels=channels)
    for layer in standardised:
        layer.__class__ = StandardisedConv2d if isinstance(layer, nn.Conv2d) else StandardisedLinear
    return module


def _before_a_norm(parent: nn.Module) -> Iterator[nn.Module]:
    layers = list(parent.children()) if isinstance(parent, nn.Sequential) else []
    for layer, following in itertools.pairwise(layers):
        if isinstance(following, _BatchNorm):
            yield layer


def _has_weights_for(layer: nn.Module, before_a_norm: bool) -> bool:
    kind = type_before_parametrizations(layer)
    if kind is nn.Conv2d:
        return cast(Tensor, layer.weight)[0].numel() > 1  # of one weight nothing is left
    return kind is nn.Linear and before_a_norm


def _refuse_what_would_be_lost(layer: nn.Module) -> None:
    name = type(layer).__name__
    if isinstance(layer, _BatchNorm) and does_more(layer):
        raise ValueError(
            f"group-ws cannot take the place of the backbone's {name}, which does more than "
            "BatchNorm: use nn.BatchNorm2d and a layer of its own for the rest"
        )
    # A BatchNorm without affine has it as None; weight norm and the like keep it under other names.
    if "weight" not in layer._parameters:
        raise ValueError(
            f"group-ws cannot standardise the backbone's {name}, whose weight is computed from "
            "other parameters: remove weight norm, spectral norm or parametrizations first"
        )
