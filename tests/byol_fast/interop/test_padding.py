"""SAME padding against a convolution written out by hand, and where it applies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from byol_fast.networks.backbone import build_backbone
from byol_fast.networks.padding import SameConv2d, SameMaxPool2d, same_padding, set_padding


def by_hand(x, weight, stride):
    """TensorFlow's definition, a window at a time: output ⌈n/s⌉, extra padding at the end."""
    n, k = x.shape[-1], weight.shape[-1]
    out = -(-n // stride)
    before = max((out - 1) * stride + k - n, 0) // 2
    result = torch.zeros(x.shape[0], weight.shape[0], out, out)
    for i in range(out):
        for j in range(out):
            for di in range(k):
                for dj in range(k):
                    row, column = i * stride - before + di, j * stride - before + dj
                    if 0 <= row < n and 0 <= column < n:
                        result[:, :, i, j] += x[:, :, row, column] @ weight[:, :, di, dj].t()
    return result


@pytest.mark.parametrize(("size", "kernel", "stride"), [(12, 7, 2), (9, 3, 2), (8, 3, 2)])
def test_convolution_is_tensorflow_s(size, kernel, stride):
    torch.manual_seed(0)
    conv = SameConv2d(3, 4, kernel, stride, bias=False)
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(conv(x), by_hand(x, conv.weight, stride))


def test_max_pool_looks_down_and_right():
    x = -torch.arange(16.0).reshape(1, 1, 4, 4) - 1  # all negative: a border of zeros would win
    found = SameMaxPool2d(3, 2)(x)
    assert found.flatten().tolist() == [-1, -3, -9, -11]
    assert not found.equal(F.max_pool2d(x, 3, 2, 1))


def test_the_published_paddings():
    assert same_padding((224, 224), (7, 7), (2, 2)) == (2, 3, 2, 3)
    assert same_padding((112, 112), (3, 3), (2, 2)) == (0, 1, 0, 1)
    assert same_padding((7, 8), (3, 3), (2, 2)) == (0, 1, 1, 1)  # width 8, height 7


def test_a_resnet_changes_only_where_a_stride_is():
    torch.manual_seed(0)
    net = build_backbone("resnet18", image_size=32, padding="same")
    changed = [name for name, m in net.named_modules() if isinstance(m, SameConv2d)]
    assert changed == ["conv1", *(f"layer{n}.0.conv1" for n in (2, 3, 4))]
    assert isinstance(net.maxpool, SameMaxPool2d)
    torch.manual_seed(0)
    usual = build_backbone("resnet18", image_size=32)
    assert net.state_dict().keys() == usual.state_dict().keys()
    usual.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(net.eval()(images), usual.eval()(images), atol=1e-3)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="is for ResNets"):
        build_backbone("squeezenet1_1", image_size=32, padding="same")
    with pytest.raises(ValueError, match="symmetric, same, wide-stem"):
        build_backbone("resnet18", image_size=32, padding="valid")
    with pytest.raises(ValueError, match="cifar stem"):
        build_backbone("resnet18", image_size=32, padding="wide-stem")
    net = build_backbone("resnet18", image_size=32, stem="cifar", padding="wide-stem")
    assert net.conv1(torch.zeros(1, 3, 32, 32)).shape[-1] == 34
    set_padding(nn.Sequential(), "symmetric")


def test_a_dilated_convolution_keeps_the_size():
    torch.manual_seed(0)
    conv = SameConv2d(3, 4, 3, stride=1, dilation=2, bias=False)
    x = torch.randn(1, 3, 9, 9)
    usual = F.conv2d(x, conv.weight, padding=2, dilation=2)
    torch.testing.assert_close(conv(x), usual)
