"""Networks that are small enough for a unit test."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """A network of which every part trains, in a thousandth of a ResNet's time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class CountingMeans(nn.Module):
    """Channel means, counting images; after `most` of them it fails as a killed run does."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        self.seen, self.most = 0, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen >= self.most:
            raise KeyboardInterrupt
        self.seen += len(x)
        return x.mean((2, 3))
