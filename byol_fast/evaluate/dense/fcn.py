"""A fully convolutional segmenter on a dilated ResNet, as MMSegmentation's `fcn_r50-d8`."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from byol_fast.evaluate.dense.detector import out_channels, resnet
from byol_fast.evaluate.dense.masks import IGNORE
from byol_fast.evaluate.dense.recipes import SegmentationRecipe


class Segmenter(nn.Module):
    """`[N, 3, H, W]` to logits at an eighth of the size; in training the auxiliary ones as well.

    network: a torchvision ResNet; its layers are used, not copied, and dilated.

    Raises ValueError for another network.
    """

    def __init__(self, network: nn.Module, classes: int, recipe: SegmentationRecipe) -> None:
        super().__init__()
        net = resnet(network, "segmentation")
        dilate(net.layer3, 2)
        dilate(net.layer4, 4)
        self.body = IntermediateLayerGetter(net, {"layer3": "auxiliary", "layer4": "main"})
        self.recipe = recipe
        width, dropout = recipe.channels, recipe.dropout
        self.head = _Head(out_channels(net.layer4), width, classes, 2, dropout, concatenate=True)
        self.auxiliary = _Head(out_channels(net.layer3), width // 2, classes, 1, dropout)
        self.requires_grad_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.body(x)
        main = self.head(features["main"])
        return (main, self.auxiliary(features["auxiliary"])) if self.training else (main,)

    def loss(self, x: Tensor, classes: Tensor) -> Tensor:  # [N, 3, H, W], int64 [N, H, W] -> []
        """Cross-entropy, the auxiliary one weighted; the mean is over all pixels.

        Pixels without a class add nothing, but count: MMSegmentation's `avg_non_ignore=False`.
        """
        total = x.new_zeros(())
        for weight, logits in zip((1.0, self.recipe.auxiliary_weight), self(x), strict=True):
            full = self.upsample(logits.float(), classes.shape[1], classes.shape[2])
            summed = F.cross_entropy(full, classes, ignore_index=IGNORE, reduction="sum")
            total = total + weight * summed / classes.numel()
        return total

    def predict(self, x: Tensor, height: int, width: int) -> Tensor:
        """Classes `[height, width]` of one image `[1, 3, H, W]`, as the recipe tests."""
        recipe = self.recipe
        scores = self._whole(x) if recipe.slide is None else self._by_windows(x, recipe.slide)
        return self.upsample(scores, height, width)[0].argmax(0)

    def upsample(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Bilinear, with the recipe's convention for corners."""
        corners = self.recipe.align_corners
        return F.interpolate(logits, (height, width), mode="bilinear", align_corners=corners)

    def _whole(self, x: Tensor) -> Tensor:
        return self.upsample(self(x)[0].float(), x.shape[2], x.shape[3])

    def _by_windows(self, x: Tensor, stride: int) -> Tensor:
        """Mean of the logits of windows as large as a crop; the last ones end at the edge."""
        side, (height, width) = self.recipe.crop, x.shape[2:]
        total: Tensor | None = None
        seen = x.new_zeros(1, 1, height, width)
        for top in starts(height, side, stride):
            for left in starts(width, side, stride):
                at = (..., slice(top, top + side), slice(left, left + side))
                part = self._whole(x[at])
                if total is None:
                    total = part.new_zeros(1, part.shape[1], height, width)
                total[at] += part
                seen[at] += 1
        assert total is not None
        return total / seen


def starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin along one axis."""
    last = max(length - side, 0)
    return [min(i * stride, last) for i in range(-(-last // stride) + 1)]


def dilate(stage: nn.Module, dilation: int) -> None:
    """Take a ResNet stage's stride away and dilate its 3×3 convolutions instead, in place.

    The first block, which sees the stage before, has half of the dilation: torchvision's
    `replace_stride_with_dilation`, MMSegmentation's `contract_dilation`. Works for basic blocks,
    which torchvision refuses.
    """
    for number, block in enumerate(stage.children()):
        amount = dilation if number else dilation // 2
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                if layer.kernel_size == (3, 3):
                    layer.dilation = layer.padding = (amount, amount)


class _Head(nn.Module):
    """Convolutions, dropout, and a class for each pixel."""

    def __init__(
        self,
        channels: int,
        width: int,
        classes: int,
        depth: int,
        dropout: float,
        *,
        concatenate: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels] + [width] * depth
        self.convolutions = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)))
        self.joined = _block(channels + width, width) if concatenate else None
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.classify.bias))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, classes, H, W]
        y = self.convolutions(x)
        if self.joined is not None:
            y = self.joined(torch.cat([x, y], 1))
        logits: Tensor = self.classify(self.dropout(y))
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
