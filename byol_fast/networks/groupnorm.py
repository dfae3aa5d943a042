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
    """Replace every BatchNorm below `module` by GroupNorm, and standardise the weights before it.

    That is every convolution, and a linear layer that stands right before a BatchNorm in a
    Sequential. Parameters are taken over, not copied, and keep their names; running statistics go.
    A number of channels that `groups` does not divide gets their greatest common divisor of groups.
    A module without BatchNorm is left as it is. In place; returns the module.
    """
    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return module
    made: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one layer
    for parent in list(module.modules()):
        before = set(_before_a_norm(parent))
        for name, child in parent._modules.items():  # named_children() names a shared layer once
            if child is None:
                continue
            if child not in made and (new := _replacement(child, child in before, groups)):
                made[child] = new
            if child in made:
                parent._modules[name] = made[child]
    return made.get(module) or _replacement(module, False, groups) or module


def _before_a_norm(parent: nn.Module) -> Iterator[nn.Module]:
    layers = list(parent.children()) if isinstance(parent, nn.Sequential) else []
    for layer, following in itertools.pairwise(layers):
        if isinstance(following, _BatchNorm):
            yield layer


def _replacement(old: nn.Module, before_a_norm: bool, groups: int) -> nn.Module | None:
    new: nn.Module
    if isinstance(old, _BatchNorm):
        if does_more(old):
            raise ValueError(
                f"group-ws cannot take the place of the backbone's {type(old).__name__}, which "
                "does more than BatchNorm: use nn.BatchNorm2d and a layer of its own for the rest"
            )
        new = nn.GroupNorm(
            math.gcd(groups, old.num_features), old.num_features, old.eps, old.affine, device="meta"
        )
    elif type(old) is nn.Conv2d and old.weight[0].numel() > 1:  # of one weight nothing is left
        new = StandardisedConv2d(
            old.in_channels,
            old.out_channels,
            cast("tuple[int, int]", old.kernel_size),
            cast("tuple[int, int]", old.stride),
            cast("tuple[int, int]", old.padding),
            cast("tuple[int, int]", old.dilation),
            old.groups,
            old.bias is not None,
            cast("str", old.padding_mode),  # type: ignore[arg-type]
            device="meta",
        )
    elif type(old) is nn.Linear and before_a_norm:
        new = StandardisedLinear(
            old.in_features, old.out_features, old.bias is not None, device="meta"
        )
    else:
        return None
    new._parameters.update(old._parameters)
    return new.train(old.training)
