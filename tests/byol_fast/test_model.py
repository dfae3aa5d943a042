"""BYOL: networks, plug-in backbones, and the step's arithmetic against a plain second BYOL."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from byol_fast.loss import pair_loss
from byol_fast.model import BYOL, MLP, build_backbone, feature_dim
from byol_fast.norm import ViewBatchNorm
from byol_fast.optim import LARS, ema_, param_groups

SMALL = {"projector": (16, 8), "predictor": (16, 8)}


def small(**options) -> BYOL:
    """A BYOL small enough for two cores, over a plain convolutional net."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 10, 3, stride=2),
        nn.BatchNorm2d(10),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
    )
    return BYOL(net, image_size=16, **{**SMALL, **options})


def views(batch: int = 6, size: int = 16) -> torch.Tensor:
    x = torch.randn(2, batch, 3, size, size)
    x[1] = x[0] * 0.7 + x[1] * 0.5 + 0.3
    return x


def test_resnet50_counts():
    with torch.device("meta"):  # shapes only
        model = BYOL()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 35_066_944
    assert sum(p.numel() for p in model.parameters()) == 68_024_448
    adapted, excluded = param_groups(model.online, 1.5e-6)
    assert (len(adapted["params"]), len(excluded["params"])) == (57, 112)
    assert model.feature_dim == 2048


def test_heads_are_the_authors():
    head = MLP(5, 7, 3)
    assert [type(layer) for layer in head] == [nn.Linear, ViewBatchNorm, nn.ReLU, nn.Linear]
    assert head[0].bias is not None and head[3].bias is None
    assert (head[1].eps, head[1].momentum, head[1].views) == (1e-5, 0.1, 2)
    assert head(torch.randn(4, 5)).shape == (4, 3)


def test_named_children_shapes_and_detached_representation():
    model = small()
    assert [n for n, _ in model.named_children()] == ["online", "target"]
    assert [n for n, _ in model.online.named_children()] == ["encoder", "predictor"]
    assert [n for n, _ in model.online.encoder.named_children()] == ["backbone", "projector"]
    x = views().flatten(0, 1)
    prediction, _, representation = model.online(x)
    assert prediction.shape == (12, 8) and representation.shape == (12, model.feature_dim)
    assert prediction.requires_grad and not representation.requires_grad
    assert model.target(x).shape == (12, 8) and not model.target(x).requires_grad
    with pytest.raises(ValueError, match=r"two views \[2, B, C, S, S\]"):
        model(x)


def test_target_is_a_copy_that_shares_nothing_and_normalises_like_online():
    model = small()
    online, target = model.online.encoder.state_dict(), model.target.state_dict()
    assert list(online) == list(target)
    assert all(torch.equal(online[k], target[k]) for k in online)
    addresses = {t.untyped_storage().data_ptr() for t in online.values()}
    assert not addresses & {t.untyped_storage().data_ptr() for t in target.values()}
    assert not any(p.requires_grad for p in model.target.parameters())
    assert model.target.training
    x = views().flatten(0, 1)
    torch.testing.assert_close(model.target(x), model.online.encoder(x), rtol=0, atol=0)
    assert all(isinstance(m, ViewBatchNorm) for m in model.modules() if "Norm" in type(m).__name__)
    assert model.target.backbone.net[1].running_mean.abs().sum() > 0  # tracked, for export


def test_ema_lists_pair_up_and_follow():
    model = small()
    online, target = model.online_ema_params(), model.target_ema_params()
    assert len(online) == len(target) == len(list(model.target.parameters()))
    assert [o.shape for o in online] == [t.shape for t in target]
    with torch.no_grad():
        for o in online:
            o.add_(1)
    buffers = [b.clone() for b in model.target.buffers()]
    ema_(target, online, 0.0)
    for o, t in zip(model.online.encoder.parameters(), model.target.parameters(), strict=True):
        torch.testing.assert_close(o, t, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.target.buffers(), strict=True))


def test_construction_leaves_statistics_and_modes_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    net[1].eval()
    model = BYOL(net, image_size=8, **SMALL)
    norm = model.online.encoder.backbone[1]
    assert isinstance(norm, ViewBatchNorm) and not norm.training and net[2].training
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
    assert all(p.grad is None for p in model.parameters())
    assert model.feature_dim == 4 * 6 * 6


def test_seeded_construction_is_repeatable():
    def make():
        torch.manual_seed(3)
        return BYOL("resnet18", image_size=32, stem="cifar", **SMALL).state_dict()

    first, second = make(), make()
    assert all(torch.equal(first[k], second[k]) for k in first)


# --- the arithmetic, against a second BYOL written the plain way ------------------------------


class PlainBYOL:
    """Two separate forwards per network with torch's own BatchNorm; nothing of byol_fast."""

    def __init__(self, model: BYOL) -> None:
        def plain(module: nn.Module) -> nn.Module:
            module = copy.deepcopy(module)
            for parent in list(module.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, ViewBatchNorm):
                        kind = nn.BatchNorm1d if isinstance(parent, MLP) else nn.BatchNorm2d
                        norm = kind(child.num_features, dtype=child.weight.dtype)
                        norm.load_state_dict(child.state_dict())
                        setattr(parent, name, norm)
            return module

        self.encoder = plain(model.online.encoder)
        self.predictor = plain(model.online.predictor)
        self.target = plain(model.target)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        cosine = nn.functional.cosine_similarity
        predictions = [self.predictor(self.encoder(view)) for view in x]
        with torch.no_grad():
            targets = [self.target(view) for view in x]
        there = 2 - 2 * cosine(predictions[0], targets[1])
        back = 2 - 2 * cosine(predictions[1], targets[0])
        return (there + back).mean()


def assert_same_as_plain(model: BYOL, x: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():  # online and target must differ for the test to say anything
        for p in model.online.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.abs().mean())
    plain = PlainBYOL(model)
    loss, want = model(x), plain.loss(x)
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)
    loss.backward()
    want.backward()
    mine = [*model.online.encoder.parameters(), *model.online.predictor.parameters()]
    theirs = [*plain.encoder.parameters(), *plain.predictor.parameters()]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        [*model.online.buffers(), *model.target.buffers()],
        [
            *plain.encoder.buffers(),
            *plain.predictor.buffers(),
            *plain.target.buffers(),
        ],
        strict=True,
    ):
        if a.is_floating_point():  # not num_batches_tracked, which is not counted
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [6, 9])
def test_equals_two_plain_forwards(batch):
    model = small()
    assert_same_as_plain(model, views(batch), 1e-5)


@pytest.mark.slow
def test_resnet18_equals_two_plain_forwards_in_channels_last():
    torch.manual_seed(0)
    model = BYOL("resnet18", image_size=32, stem="cifar", **SMALL)
    model = model.to(memory_format=torch.channels_last).double()
    # fp64, so that only a wrong formula can differ after 20 layers
    assert_same_as_plain(model, views(4, 32).double(), 1e-9)


def freeze_batchnorm(model: BYOL) -> None:
    for module in model.modules():
        if isinstance(module, ViewBatchNorm):
            module.eval()


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_step_equals_one_large_step_with_frozen_batchnorm(parts):
    torch.manual_seed(0)
    x = views(6)
    whole, split = small(), small()
    for model, pieces in ((whole, 1), (split, parts)):
        freeze_batchnorm(model)
        with torch.no_grad():
            for p in model.online.parameters():
                p.mul_(1.1)
        optimizer = LARS(param_groups(model.online, 1e-4), lr=3.2)
        for piece in x.chunk(pieces, dim=1):
            (model(piece) / pieces).backward()
        optimizer.step()
        ema_(model.target_ema_params(), model.online_ema_params(), 0.9)  # once
    for (name, a), b in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bf16_autocast_trains_with_fp32_weights():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(views())
    loss.backward()
    assert loss.dtype == torch.float32
    reference = small()(views())
    # Measured: 0.016 of 4.4. In fp32 nothing would differ.
    assert 0 < (loss - reference).abs() < 0.1
    for p in model.online.parameters():
        assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()


def test_simsiam_has_a_stop_gradient_and_no_target_weights():
    model = small(momentum=False)
    assert not [k for k in model.state_dict() if k.startswith("target")]
    assert model.online_ema_params() == [] and model.target_ema_params() == []
    x = views()
    loss = model(x)
    projection = model.online.encoder(x.flatten(0, 1)).detach()
    torch.testing.assert_close(loss, pair_loss(model.online(x.flatten(0, 1))[0], projection))
    loss.backward()
    assert all(p.grad is not None for p in model.online.parameters())
    twin = copy.deepcopy(model)
    assert twin.target._encoder[0] is twin.online.encoder


def test_sync_reaches_every_norm_of_both_networks():
    model = small(bn_sync=True)
    norms = [m for m in model.modules() if isinstance(m, ViewBatchNorm)]
    assert len(norms) == 7 and all(m.sync is True for m in norms)
    assert not any(m.sync for m in small().modules() if isinstance(m, ViewBatchNorm))


def test_heads_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match="end in the same size"):
        small(projector=(16, 8), predictor=(16, 4))


def test_hyper_rebuilds_the_model():
    options = {"image_size": 32, "stem": "cifar", "projector": (16, 8), "predictor": (12, 8)}
    model = BYOL("resnet18", **options)
    again = BYOL(**model.hyper)
    again.load_state_dict(model.state_dict())
    assert again.hyper == model.hyper and again.online.predictor[0].out_features == 12


# --- backbones ------------------------------------------------------------------------------


def test_resnet_keeps_torchvision_keys():
    backbone = build_backbone("resnet18", image_size=64)
    plain = torchvision.models.resnet18()
    wanted = [k for k in plain.state_dict() if not k.startswith("fc.")]
    assert list(backbone.state_dict()) == wanted
    backbone.load_state_dict({k: plain.state_dict()[k] for k in wanted})
    plain.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone(x), plain(x), rtol=0, atol=0)
    assert not any(isinstance(m, ViewBatchNorm) for m in backbone.modules())  # for downstream
    two = build_backbone("resnet18", image_size=64, views=2)
    assert sum(isinstance(m, ViewBatchNorm) for m in two.modules()) == 20
    assert list(two.state_dict()) == wanted


def test_cifar_stem():
    backbone = build_backbone("resnet18", stem="cifar", image_size=32)
    conv = backbone.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == (
        (3, 3),
        (1, 1),
        (1, 1),
        None,
    )
    assert isinstance(backbone.maxpool, nn.Identity)
    seen = []
    backbone.layer4.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    assert backbone(torch.randn(1, 3, 32, 32).repeat(2, 1, 1, 1)).shape == (2, 512)
    assert seen == [(2, 512, 4, 4)]


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("mobilenet_v3_small", 32, 1024),
        ("convnext_tiny", 32, 768),
        ("efficientnet_b0", 32, 1280),
        ("vit_b_16", 32, 768),
        ("densenet121", 32, 1024),
        ("squeezenet1_1", 32, 512),
        ("shufflenet_v2_x0_5", 32, 1024),
        ("vgg11_bn", 32, 4096),
        ("inception_v3", 80, 2048),
    ],
)
def test_other_torchvision_networks(name, size, features):
    with torch.device("meta"):  # 130 M parameters in a moment
        backbone = build_backbone(name, image_size=size, views=2)
        assert feature_dim(backbone, size) == features
    dropouts = [n for n, m in backbone.named_modules() if isinstance(m, nn.Dropout)]
    if name in ("efficientnet_b0", "inception_v3"):
        assert not dropouts  # the classifier's went with it


def test_another_network_trains():
    torch.manual_seed(0)
    model = BYOL("mobilenet_v3_small", image_size=32, **SMALL)
    model(views(4, 32)).backward()
    assert all(p.grad is not None for p in model.online.parameters())


class Net(nn.Module):
    """A user's network with an unused tail, functional pooling and a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.tail = nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.norm(self.stem(x)).relu())
        return {"logits": self.tail(x.flatten(1))}


@pytest.mark.parametrize("layer", ["pool", -2, 2])
def test_hidden_layer_by_name_or_index(layer):
    net = Net()
    model = BYOL(net, layer, 8, **SMALL)
    assert model.feature_dim == 16  # 4 channels × 2 × 2, flattened
    x = views(4, 8).flatten(0, 1)
    wanted = [net.pool(net.norm(net.stem(view)).relu()).flatten(1) for view in x.chunk(2)]
    torch.testing.assert_close(model.online(x)[2], torch.cat(wanted))
    # What the layer does not depend on is frozen: DDP waits for every trainable gradient.
    tail = model.online.encoder.backbone.net.tail
    assert not any(p.requires_grad for p in tail.parameters())
    model(x.unflatten(0, (2, 4))).backward()
    assert all(p.grad is not None for p in model.online.parameters() if p.requires_grad)
    assert net.stem.weight.grad is not None and net.tail.weight.requires_grad
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin.online(x)[0], model.online(x)[0])
    assert len(model.online_ema_params()) == len(model.target_ema_params()) == 4 + 5


def test_nested_hidden_layer_of_a_torchvision_name():
    backbone = build_backbone("resnet18", hidden_layer="layer2.0.bn1", image_size=32)
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 128 * 4 * 4)
    assert not backbone.net.layer3[0].conv1.weight.requires_grad
    pooled = build_backbone("resnet18", hidden_layer="avgpool", image_size=32)
    assert "conv1.weight" in pooled.state_dict()  # the same as -1, with torchvision's keys


def test_sequential_is_cut_without_a_hook():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7))
    cut = build_backbone(net, hidden_layer=-2, image_size=8)
    assert isinstance(cut, nn.Sequential) and list(cut.state_dict()) == ["0.weight", "0.bias"]
    assert cut(torch.randn(2, 3, 8, 8)).shape == (2, 144)


def test_hidden_layer_compiles_in_one_piece():
    backbone = build_backbone(Net(), hidden_layer="pool", image_size=8, views=2)
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), backbone(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_backbone("resnet5O"), "did you mean 'resnet50'"),
        (lambda: build_backbone("qqqq"), "list_models"),
        (lambda: build_backbone("fcn_resnet50"), "unknown backbone"),
        (lambda: build_backbone("vgg11", stem="cifar"), "for ResNets"),
        (lambda: build_backbone("resnet18", stem="cfar"), "imagenet or cifar"),
        (lambda: build_backbone(Net(), stem="cifar"), "a module brings its own"),
        (lambda: build_backbone(Net(), hidden_layer="pol", image_size=8), "did you mean 'pool'"),
        (lambda: build_backbone(Net(), hidden_layer=4, image_size=8), "has 4 children"),
        (lambda: build_backbone(Net(), hidden_layer=None, image_size=8), "name or index, got None"),
        (lambda: build_backbone(Net(), hidden_layer=True, image_size=8), "name or index, got True"),
        (lambda: build_backbone(Net(), image_size=8), "gives dict, not a tensor"),
        (lambda: build_backbone(Net(), hidden_layer="pool", image_size=2), "cannot take 2×2"),
        (lambda: build_backbone("vit_b_16", image_size=100), "cannot take 100×100.*indivisible"),
        (lambda: build_backbone(nn.LazyLinear(3), image_size=8), "lazy layers"),
    ],
)
def test_mistakes_are_named(call, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        call()
