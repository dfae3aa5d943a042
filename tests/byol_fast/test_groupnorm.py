"""GroupNorm and weight standardisation in BatchNorm's place."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from byol_fast import load_backbone
from byol_fast.export import export_backbone
from byol_fast.model import BYOL, MLP, build_backbone
from byol_fast.networks.groupnorm import (
    StandardisedConv2d,
    StandardisedLinear,
    standardise,
    to_group_norm,
)
from byol_fast.optim import param_groups


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.double().flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
    return rows.view_as(weight).float()


def test_standardised_weights_have_mean_0_and_variance_1() -> None:
    weight = torch.randn(6, 4, 3, 3) * 0.02 + 0.5
    torch.testing.assert_close(standardise(weight), by_hand(weight), rtol=1e-4, atol=1e-4)
    assert standardise(torch.ones(2, 5)).eq(0).all()


def test_a_network_equals_one_written_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32, eps=1e-3),
        nn.ReLU(),
        nn.Conv2d(32, 24, 1),
        nn.BatchNorm2d(24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    before = net.state_dict()
    weights = {name: value.clone() for name, value in before.items()}
    made = to_group_norm(net)
    assert made is net
    assert [n for n in made.state_dict()] == [
        n for n in weights if "running" not in n and "tracked" not in n
    ]
    x = torch.randn(4, 3, 9, 9)
    y = F.conv2d(x, by_hand(weights["0.weight"]), stride=2)
    y = F.group_norm(y, 16, weights["1.weight"], weights["1.bias"], 1e-3).relu()
    y = F.conv2d(y, by_hand(weights["3.weight"]), weights["3.bias"])
    y = F.group_norm(y, 8, weights["4.weight"], weights["4.bias"])  # 16 does not divide 24
    y = F.linear(y.mean((2, 3)), weights["7.weight"], weights["7.bias"])  # no norm after it
    torch.testing.assert_close(made(x), y, rtol=1e-4, atol=1e-4)


def test_heads_and_shared_layers() -> None:
    head = to_group_norm(MLP(8, 32, 4))
    assert [type(layer) for layer in head] == [
        *(StandardisedLinear, nn.GroupNorm, nn.ReLU, nn.Linear)
    ]
    norm = nn.BatchNorm2d(16)
    twice = to_group_norm(nn.Sequential(norm, nn.ReLU(), norm))
    assert twice[0] is twice[2] and twice[0].num_groups == 16
    assert isinstance(to_group_norm(nn.BatchNorm2d(16)), nn.GroupNorm)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert type(to_group_norm(plain)[0]) is nn.Conv2d  # no BatchNorm: nothing is changed


def test_layers_keep_their_hooks() -> None:
    net, calls = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), []
    for layer in net:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    to_group_norm(net)(torch.randn(1, 3, 4, 4))
    assert calls == list(net) and isinstance(net[1], nn.GroupNorm)


@pytest.fixture(scope="module")
def model() -> BYOL:
    torch.manual_seed(0)
    sizes = (32, 8)
    return BYOL("resnet18", -1, 32, stem="cifar", projector=sizes, predictor=sizes, norm="group-ws")


def test_nothing_depends_on_the_other_images(model: BYOL) -> None:
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, StandardisedConv2d) for m in convs)
    x = torch.randn(4, 3, 32, 32)
    alone = torch.cat([model.online(image[None])[0] for image in x])
    torch.testing.assert_close(model.online(x)[0], alone, rtol=1e-3, atol=1e-4)
    adapted, _ = param_groups(model.online, 1e-6)
    assert not [p for p in adapted["params"] if p.dim() == 1]


def test_the_exported_backbone_is_the_same_network(model: BYOL, tmp_path) -> None:
    backbone = model.online.encoder.backbone
    path, _ = export_backbone(backbone, tmp_path / "backbone", model.hyper)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_backbone(path)(x), backbone(x), rtol=1e-5, atol=1e-5)
    names = torchvision.models.resnet18().state_dict().keys()
    assert load_backbone(path).state_dict().keys() <= names


def test_a_deep_copy_and_channels_last_give_the_same(model: BYOL) -> None:
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 2, 3, 32, 32)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="batch or group-ws"):
        build_backbone("resnet18", image_size=32, norm="group")  # type: ignore[arg-type]
