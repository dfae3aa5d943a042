"""Convolutions on a CPU over maps smaller than the kernel, without the taps that see only padding.

A ResNet at 32 pixels ends in maps of 1×1, where eight of the nine taps of a 3×3 kernel meet nothing
but padding. They add zeros to the output and their gradient is zero, so cutting them off changes
rounding alone. It matters because oneDNN's weight gradient is slow there: 134 ms for a
512-channel layer and 128 images on a core with AVX2, whose forward takes 7.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn


class Taps(NamedTuple):
    """Of one dimension: the taps `[first, last)` that see the map, and the padding they need."""

    first: int
    last: int
    padding: int | None  # on both sides alike; None where that cannot be


def taps(size: int, kernel: int, stride: int, padding: int) -> Taps:
    """The taps of a kernel that meet at least one of the `size` positions of a map."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    seen = [
        tap
        for tap in range(kernel)
        if any(0 <= out * stride - padding + tap < size for out in range(outputs))
    ]
    if not seen:
        return Taps(0, kernel, padding)
    first, last = seen[0], seen[-1] + 1
    left = padding - first
    same = left >= 0 and (size + 2 * left - (last - first)) // stride + 1 == outputs
    return Taps(first, last, left if same else None)


class TrimmedConv2d(nn.Conv2d):
    """nn.Conv2d with the same parameters and keys; without the useless taps on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dim() != 4:
            return super().forward(input)
        size, stride = input.shape[-2:], cast(tuple[int, int], self.stride)
        padding = cast(tuple[int, int], self.padding)
        rows, columns = map(taps, size, self.kernel_size, stride, padding)
        pads = (rows.padding, columns.padding)
        cut = (rows.last - rows.first, columns.last - columns.first)
        if cut == self.kernel_size or None in pads:
            return super().forward(input)
        weight = self.weight[:, :, rows.first : rows.last, columns.first : columns.last]
        if pads == (0, 0) and cut == size:  # one output: a matrix product
            x, w = (t.permute(0, 2, 3, 1).flatten(1) for t in (input, weight))
            return F.linear(x, w, self.bias)[:, :, None, None]
        return F.conv2d(input, weight, self.bias, stride, cast(tuple[int, int], pads))


def trim(module: nn.Module) -> None:
    """Make every plain convolution of `module` a TrimmedConv2d; the layers stay the same objects.

    So weights, hooks, buffers and whatever else a layer carries are kept.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _plain(layer):
            layer.__class__ = TrimmedConv2d


def _plain(layer: nn.Conv2d) -> bool:
    return (
        max(layer.kernel_size) > 1
        and not isinstance(layer.padding, str)
        and max(layer.padding) > 0
        and layer.padding_mode == "zeros"
        and max(layer.dilation) == layer.groups == 1
    )
