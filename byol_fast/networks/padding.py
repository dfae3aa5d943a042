"""Padding of a ResNet that was trained elsewhere: what its convolutions saw at the borders.

torch pads both sides alike. TensorFlow and JAX pad "SAME": output ⌈n/stride⌉, and where the padding
is odd the extra row goes to the bottom and right. For 224 pixels that is (2, 3) in front of the
first convolution and (0, 1) for the max-pool and every 3×3 convolution of stride 2. Run with the
other kind of padding, features are off by half a pixel in every stage.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch.nn.functional as F
from torch import Tensor, nn

# "wide-stem": 2 pixels around the CIFAR stem's 3×3 convolution, as solo-learn has it.
Padding = Literal["symmetric", "same", "wide-stem"]


def same_padding(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of TensorFlow's SAME for an image of `size` (height, width)."""
    totals = [
        max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, stride, strict=True)
    ]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    return left, right, top, bottom


class SameConv2d(nn.Conv2d):
    """A convolution with SAME padding; keys and parameters are nn.Conv2d's."""

    def forward(self, input: Tensor) -> Tensor:
        size = cast(tuple[int, int], tuple(input.shape[-2:]))
        spans = ((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        stride = cast(tuple[int, int], self.stride)
        x = F.pad(input, same_padding(size, cast(tuple[int, int], tuple(spans)), stride))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SameMaxPool2d(nn.Module):
    """Max-pooling with SAME padding (by −∞, so a border never wins)."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, input: Tensor) -> Tensor:
        size = cast(tuple[int, int], tuple(input.shape[-2:]))
        pads = same_padding(size, (self.kernel,) * 2, (self.stride,) * 2)
        return F.max_pool2d(F.pad(input, pads, value=float("-inf")), self.kernel, self.stride)


def set_padding(resnet: nn.Module, padding: Padding) -> None:
    """Give a torchvision ResNet another padding, in place; parameters are kept.

    Raises:
        ValueError: an unknown padding, or "wide-stem" without the CIFAR stem.
    """
    if padding not in get_args(Padding):
        raise ValueError(f"padding is one of {', '.join(get_args(Padding))}, got {padding!r}")
    if padding == "wide-stem":
        first = cast(nn.Conv2d, resnet.conv1)
        if first.kernel_size != (3, 3):
            raise ValueError("padding wide-stem belongs to the cifar stem")
        first.padding = (2, 2)
    elif padding == "same":
        for module in list(resnet.modules()):
            for name, child in list(module.named_children()):
                setattr(module, name, _same(child))


def _same(layer: nn.Module) -> nn.Module:
    # Only where a stride meets a larger kernel do the two paddings differ.
    if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
        layer.__class__ = SameConv2d
    if isinstance(layer, nn.MaxPool2d):
        return SameMaxPool2d(cast(int, layer.kernel_size), cast(int, layer.stride))
    return layer
