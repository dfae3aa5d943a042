"""The last feature map as the SVM protocol takes it: four averages a channel instead of one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

GLOBAL, CORNERS = "global", "2x2"  # names of what a network puts out


class Corners(nn.Module):
    """[N, C, H, W] to [N, 4C]: averages over four windows, each one short of the whole map.

    At 224 pixels a ResNet's map is 7 × 7 and the windows 6 × 6 with stride 1: `res5` of the
    benchmark (Goyal et al. 2019; 8192 features of a ResNet-50), and Feature5 of MMSelfSup. A map of
    one pixel stays one value a channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        side = max(1, min(x.shape[2:]) - 1)
        return F.avg_pool2d(x, side, stride=1).flatten(1)


def with_corners(backbone: nn.Module) -> nn.Module | None:
    """`backbone` with its last map pooled by `Corners`, sharing its weights; None if no ResNet."""
    if not isinstance(backbone, ResNet) or not isinstance(backbone.fc, nn.Identity):
        return None
    stem = (backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
    stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    return nn.Sequential(*stem, *stages, Corners())
