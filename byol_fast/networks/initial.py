"""Weights at the start as the authors draw them: `byol/utils/networks.py` and haiku's defaults."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn
from torchvision.models.resnet import Bottleneck

# "torch": as torchvision and torch have drawn them. He normal by fan-out in a ResNet, every norm's
# scale 1; in heads uniform within 1/√fan-in, biases too.
Init = Literal["authors", "torch"]


def as_authors_(network: nn.Module) -> None:
    """Draw the weights of heads or of a torchvision ResNet anew, in place, from torch's generator.

    Weights of convolutions and linear layers come from a normal distribution of standard deviation
    1/√fan-in, cut off at two of them (so .88 of it is left); biases are 0, and so is the last
    norm's scale of each bottleneck. (Of a basic block it stays 1, in haiku too.)
    """
    for layer in network.modules():
        if isinstance(layer, Bottleneck):
            nn.init.zeros_(layer.bn3.weight)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            std = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
