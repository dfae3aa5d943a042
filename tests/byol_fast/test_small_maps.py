"""Convolutions over small maps equal torch's own, gradients too."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torchvision
from torch import nn

from byol_fast.networks.backbone import build_backbone
from byol_fast.networks.small_maps import TrimmedConv2d, taps, trim


def test_taps_by_hand():
    assert taps(1, 3, 1, 1) == (1, 2, 0)  # the middle one
    assert taps(2, 3, 2, 1) == (1, 3, 0)
    assert taps(2, 3, 1, 1) == (0, 3, 1)  # all
    assert taps(56, 3, 1, 1) == (0, 3, 1)
    assert taps(2, 7, 2, 3) == (3, 5, 0)
    assert taps(4, 5, 2, 2) == (0, 5, 2)
    assert taps(1, 2, 2, 2) == (0, 1, None)  # two to the left, one to the right


@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
def test_equals_torch(kernel: int):
    """Every small map, stride and padding, in fp64: outputs and all gradients."""
    torch.manual_seed(0)
    cut = 0
    for height, width, stride, padding in itertools.product(*[range(1, 5)] * 2, *[range(1, 4)] * 2):
        if min(height, width) + 2 * padding < kernel:
            continue
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        layer = nn.Conv2d(3, 4, kernel, stride, padding, dtype=torch.float64)
        wanted = layer(x)
        net = nn.Sequential(layer)
        trim(net)
        found = net(x)
        torch.testing.assert_close(found, wanted)
        gradient, inputs = torch.randn_like(wanted), (x, layer.weight, layer.bias)
        for mine, theirs in zip(
            torch.autograd.grad(found, inputs, gradient),
            torch.autograd.grad(wanted, inputs, gradient),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
        seen = [taps(size, kernel, stride, padding) for size in (height, width)]
        cut += any(each.last - each.first < kernel for each in seen)
    assert cut


def test_a_resnet_keeps_its_parameters_and_does_less():
    """At 32 pixels the last stage's maps are 1×1: its 3×3 convolutions become matrix products."""
    resnet = torchvision.models.resnet18().eval()
    before, x = dict(resnet.named_parameters()), torch.randn(2, 3, 32, 32)
    wanted = resnet(x)
    trim(resnet)
    assert {name: id(p) for name, p in resnet.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert isinstance(resnet.layer4[1].conv1, TrimmedConv2d)
    assert type(resnet.layer4[0].downsample[0]) is nn.Conv2d  # 1×1
    torch.testing.assert_close(resnet(x), wanted, atol=1e-4, rtol=1e-4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        resnet(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::conv2d"] == 16 and calls["aten::linear"] == 5  # 20 and 1 before


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 1),
    ],
)
def test_other_convolutions_are_left_alone(layer: nn.Conv2d):
    net = nn.Sequential(layer)
    trim(net)
    assert net[0] is layer


def test_a_layer_keeps_what_it_carries():
    """Hooks, buffers, attributes: the hidden layer's hook and spectral norm's among them."""
    layer, calls = nn.Conv2d(4, 4, 3, padding=1), []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_buffer("mask", torch.ones(2))
    layer.note = "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch call it old
        nn.utils.spectral_norm(layer)
    net, keys = nn.Sequential(layer), list(layer.state_dict())
    wanted = net.eval()(x := torch.randn(2, 4, 1, 1))
    trim(net)
    assert net[0] is layer and isinstance(layer, TrimmedConv2d)
    torch.testing.assert_close(net(x), wanted)
    assert calls == ["before", "after"] * 2 and layer.note == "mine"
    assert list(layer.state_dict()) == keys


def test_a_convolution_that_is_the_hidden_layer_is_still_seen():
    backbone = build_backbone("resnet18", hidden_layer="layer1.0.conv2", image_size=32)
    x = torch.randn(2, 3, 32, 32)
    wanted = backbone(x)
    trim(backbone)
    torch.testing.assert_close(backbone(x), wanted, atol=1e-4, rtol=1e-4)


def test_a_layer_used_twice_stays_one():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(layer, layer)
    trim(net)
    assert net[0] is net[1] and isinstance(net[0], TrimmedConv2d)


def test_it_is_traced_in_one_piece():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))
    x = torch.randn(2, 3, 2, 2)
    wanted = net(x)
    trim(net)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), wanted)
