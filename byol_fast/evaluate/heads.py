"""Networks with classifiers on top: one on the features, or one on each stage of a ResNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from byol_fast.networks.backbone import HiddenOutput

# Kernel, stride and padding of the average pooling of Feature1 to Feature5, and the side of what
# it gives: with a ResNet-50 at 224 pixels 9216, 9216, 8192, 9216 and 8192 numbers an image.
# MMSelfSup's `MultiPooling`, after Goyal et al. 2019.
POOLS = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))
SIDES = (12, 6, 4, 3, 2)


class FineTuned(nn.Module):
    """A backbone and a linear classifier, both trained.

    Args:
        backbone: images `[B, 3, S, S]` to features `[B, F]`.
        width: F.
        seed: of the classifier's first weights, normal with a standard deviation of .01.
    """

    def __init__(self, backbone: nn.Module, width: int, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone, self.head = backbone, _linear(width, classes, seed)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits `[B, classes]`, one tensor in the list."""
        return [self.head(self.backbone(x))]

    def heads(self) -> Iterator[nn.Parameter]:
        """Parameters that were not pretrained."""
        return self.head.parameters()


@dataclass(frozen=True)
class Pooling:
    """How one feature map is brought to a vector."""

    feature: str  # "Feature1": the stem before its max-pool; 2 to 5: the stages
    channels: int
    side: int  # of the map, pixels
    kernel: tuple[int, int, int] | None  # kernel, stride, padding; None: adaptive
    out: int  # side of what is left

    @property
    def width(self) -> int:
        return self.channels * self.out**2

    def describe(self) -> str:
        """`pool 16/8/0 to 6×6`, or `adaptive to 6×6`."""
        how = f"pool {'/'.join(map(str, self.kernel))}" if self.kernel else "adaptive"
        return f"{how} to {self.out}×{self.out}"

    def module(self) -> nn.Module:
        if self.kernel is None:
            return nn.AdaptiveAvgPool2d(self.out)
        size, stride, padding = self.kernel
        return nn.AvgPool2d(size, stride, padding)


class StageHeads(nn.Module):
    """Linear classifiers on the stem and the four stages of a frozen ResNet.

    The ResNet stays in eval mode and gets no gradient; one forward pass serves all classifiers.
    Each is average pooling, a BatchNorm without scale and shift, and a linear layer.

    Args:
        backbone: a ResNet of torchvision, as `build_backbone` makes it.
        image_size: S, pixels. Published kernels are used for every map that they bring to the
            published side; other maps are pooled adaptively to that side, or to their own.

    Raises:
        ValueError: the backbone is not a ResNet.
    """

    def __init__(
        self, backbone: nn.Module, classes: int, *, image_size: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.resnet = _resnet(backbone).requires_grad_(False).eval()
        like = next(self.resnet.parameters())
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, image_size, image_size, device=like.device))
        self.poolings = tuple(_pooling(i, m.shape[1], m.shape[2]) for i, m in enumerate(maps))
        self.pools = nn.ModuleList([pooling.module() for pooling in self.poolings])
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(pooling.channels, affine=False) for pooling in self.poolings]
        )
        self.linears = nn.ModuleList(
            [_linear(p.width, classes, seed + i) for i, p in enumerate(self.poolings)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits `[B, classes]` of Feature1 to Feature5."""
        with torch.no_grad():
            pooled = [pool(m).float() for pool, m in zip(self.pools, self._maps(x), strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            return [
                linear(norm(p).flatten(1))
                for p, norm, linear in zip(pooled, self.norms, self.linears, strict=True)
            ]

    def train(self, mode: bool = True) -> StageHeads:
        super().train(mode)
        self.resnet.eval()
        return self

    def heads(self) -> Iterator[nn.Parameter]:
        """Parameters that were not pretrained: all that are trained."""
        return self.linears.parameters()

    def _maps(self, x: Tensor) -> list[Tensor]:
        """`[B, C, H, W]` of the stem and the stages."""
        net = self.resnet
        maps = [net.relu(net.bn1(net.conv1(x)))]
        x = net.maxpool(maps[0])
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            maps.append(x := stage(x))
        return maps


Classifier = FineTuned | StageHeads


def _resnet(backbone: nn.Module) -> torchvision.models.ResNet:
    net = backbone.net if isinstance(backbone, HiddenOutput) else backbone
    if not isinstance(net, torchvision.models.ResNet):
        raise ValueError(
            f"Feature1 to Feature5 are the stem and the four stages of a ResNet, and this is a "
            f"{type(net).__name__}: use the task `linear`, which takes any network"
        )
    return net


def _pooling(number: int, channels: int, side: int) -> Pooling:
    size, stride, padding = POOLS[number]
    fits = (side + 2 * padding - size) // stride + 1 == SIDES[number]
    return Pooling(
        feature=f"Feature{number + 1}",
        channels=channels,
        side=side,
        kernel=POOLS[number] if fits else None,
        out=SIDES[number] if fits else min(SIDES[number], side),
    )


def _linear(width: int, classes: int, seed: int) -> nn.Linear:
    layer = nn.Linear(width, classes)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return layer
