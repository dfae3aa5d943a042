"""One image of zeros through a network, to see what it takes and gives; nothing of it remains."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)


def side(image_size: object) -> int:
    """`image_size` as a number of pixels. Raises ValueError for anything but a positive integer."""
    try:
        size = operator.index(image_size)  # type: ignore[arg-type]
    except TypeError:
        size = 0
    if size < 1 or isinstance(image_size, bool):
        raise ValueError(
            "image_size is one whole number, the side of the square views in pixels, such as 224; "
            f"got {image_size!r}"
        )
    return size


def input_like(net: nn.Module) -> Tensor:
    """An empty tensor of the device and floating-point type that `net` takes images in.

    That is the type of its weights: of the first parameter with two axes or more, as a scale or a
    norm may be kept in another precision.
    """
    floats = [p for p in net.parameters() if p.is_floating_point()]
    weights = [p for p in floats if p.dim() > 1] or floats
    first = next(net.parameters(), None)
    if weights:
        return weights[0].new_empty(0)
    return torch.empty(0, device=None if first is None else first.device)


def mock(
    net: nn.Module, image_size: int, name: str, use: Callable[[Any], Any] = lambda output: output
) -> Any:
    """What `net` gives for one image [1, C, S, S] of zeros in evaluation mode; or what `use` makes
    of that while the mode lasts. Without gradient unless it is enabled by the caller.

    C is 3, or what the convolutions take where three channels fail. Modes, statistics and whatever
    a layer keeps from its forward are as before.

    Raises ValueError, with `name` in it, where the network cannot take the image.
    """
    size, like = side(image_size), input_like(net)
    convs = [m.in_channels for m in net.modules() if isinstance(m, _ConvNd)]
    failed: dict[int, Exception] = {}
    for channels in dict.fromkeys([3, *convs]):
        image = like.new_zeros(1, channels, size, size)
        try:
            with _untouched(net, training=False):
                return use(net(image))
        except _REFUSALS as error:
            failed[channels] = error
    reason = failed[convs[0] if convs else 3]
    raise ValueError(f"backbone {name!r} cannot take {size}×{size} images: {reason}") from reason


@torch.no_grad()
def mixes_views(net: nn.Module, image_size: int) -> bool:
    """Whether in training the features of a batch's first half depend on its second half's images.

    A layer that takes statistics over the batch without being nn.BatchNorm does that. False where
    the network takes no such batch. Nothing remains of the trial, as of `mock`.
    """
    like, rows = input_like(net), 2
    convs = [m.in_channels for m in net.modules() if isinstance(m, _ConvNd)]
    for channels in [] if like.is_meta else dict.fromkeys([3, *convs]):
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(2 * rows, channels, image_size, image_size, generator=noise).to(like)
        others = torch.cat([images[:rows], 3 * images[rows:] + 2])
        gpus = [like.device.index] if like.is_cuda else []
        seen: list[Tensor] = []
        with contextlib.suppress(*_REFUSALS):
            for batch in (images, others):
                with _untouched(net, training=True), torch.random.fork_rng(devices=gpus):
                    torch.manual_seed(0)  # the same dropout
                    seen.append(net(batch)[:rows])
            first, second = seen
            return bool((first - second).norm() > 0.01 * first.norm())
    return False


@contextlib.contextmanager
def _untouched(net: nn.Module, *, training: bool) -> Iterator[None]:
    """In one mode and without autocast; afterwards attributes and buffers are what they were."""
    modules = list(net.modules())
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    values = [(b, b._version, b.clone()) for b in net.buffers() if not b.is_inference()]
    kind = input_like(net).device.type
    full: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch.amp.is_autocast_available(kind):  # it is not for the meta device
        full = torch.autocast(kind, enabled=False)
    for module in modules:  # not net.train(): what overrides it may change weights, as LoRA's does
        module.training = training
    try:
        with full:
            yield
        if list(net.modules()) != modules:
            raise ValueError(
                "it makes layers in its first forward: run one batch through it first, so that "
                "optimizer and target see every parameter"
            )
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, value in values:
                # A backward pass of the caller's may still need those that did not change. In
                # training the kernel of BatchNorm changes them without a new version.
                if training or buffer._version != version:
                    buffer.copy_(value)
