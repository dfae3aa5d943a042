"""Weights at the start as the authors draw them, and as mmpretrain does.

Sources: `byol/utils/networks.py` with haiku's defaults; `zero_init_residual` of mmpretrain.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Init = Literal["authors", "mmpretrain", "torchvision"]


def draw_(network: nn.Module, init: Init) -> None:
    """Draw the weights of heads or of a torchvision ResNet anew, in place, from torch's generator.

    authors: every weight of a convolution or linear layer from a normal distribution of standard
        deviation 1/√fan-in, cut off at two of them (.88 of the deviation is left); biases 0; the
        last norm's scale of each bottleneck 0.
    mmpretrain: the last norm's scale of each block 0, of basic blocks too; the rest stays.
    torchvision: all stays: He normal by fan-out in a ResNet, torch's default in heads.
    """
    for layer in network.modules():
        if isinstance(layer, Bottleneck) and init != "torchvision":
            nn.init.zeros_(layer.bn3.weight)
        elif isinstance(layer, BasicBlock) and init == "mmpretrain":
            nn.init.zeros_(layer.bn2.weight)
        elif isinstance(layer, nn.Conv2d | nn.Linear) and init == "authors":
            std = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
