"""A network that is handed in: it is trained, and stays usable as it was."""

from __future__ import annotations

import copy
import logging
import threading
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from byol_fast.learner import BYOL
from byol_fast.networks.backbone import build_backbone
from byol_fast.norm import ViewBatchNorm

SIZES = {"image_size": 16, "projection_size": 8, "projection_hidden_size": 16}


class Net(nn.Module):
    """Convolution, norm, in-place ReLU, pooling and a head."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.relu(self.norm(self.conv(x)))).flatten(1))


def step(learner: BYOL, *shape: int) -> None:
    torch.manual_seed(1)
    learner(torch.rand(2, *(shape or (4, 3, 16, 16)))).backward()
    with torch.no_grad():
        for p in learner.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    learner.update_moving_average()


# --- what comes back ------------------------------------------------------------------------------


def test_the_network_is_trained_and_its_layers_are_left_alone() -> None:
    net = Net()
    plain = copy.deepcopy(net)
    learner = BYOL(net, "pool", **SIZES)
    step(learner)
    assert type(net.norm) is nn.BatchNorm2d and not net.pool._forward_hooks
    assert net.fc.weight.requires_grad and torch.equal(net.fc.weight, plain.fc.weight)
    assert not torch.equal(net.conv.weight, plain.conv.weight)
    assert net.norm.running_mean.any() and net.norm.num_batches_tracked == 0
    plain.load_state_dict(net.state_dict())
    x = torch.cat([torch.rand(4, 3, 16, 16), torch.rand(3, 3, 16, 16) * 0.2])
    torch.testing.assert_close(net(x), plain(x))  # one batch, of an odd number
    net(x).sum().backward()
    assert net.fc.weight.grad is not None
    copy.deepcopy(net)
    net.fc = nn.Linear(8, 2)  # another head does not reach the learner
    step(learner)


def test_modes_and_hooks_do_not_cross() -> None:
    net, seen = Net(), []
    net.relu.register_forward_hook(lambda *_: seen.append(1))
    net.eval()
    learner = BYOL(net, "pool", **SIZES).train()
    assert not net.training and not net.norm.training
    net.train()
    learner.eval()
    assert net.norm.training
    seen.clear()
    learner(torch.rand(4, 3, 16, 16), return_embedding=True)
    assert seen == [1]  # one's own hooks see the learner's forward too


def test_a_collector_of_hooks_is_not_copied() -> None:
    class Collector:
        def __init__(self) -> None:
            self.lock, self.shapes = threading.Lock(), []

        def hook(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
            self.shapes.append(output.shape)

    net, collector = Net(), Collector()
    net.relu.register_forward_hook(collector.hook)
    learner = BYOL(net, "pool", **SIZES)
    collector.shapes.clear()
    step(learner)
    assert collector.shapes == [(8, 8, 14, 14)] * 2  # online and target


@pytest.mark.parametrize("assign", [False, True])
def test_types_devices_and_loaded_states_reach_both(assign: bool) -> None:
    net = Net()
    learner = BYOL(net, "pool", **SIZES).double()
    assert {t.dtype for t in net.state_dict().values()} == {torch.float64, torch.int64}
    other = BYOL(Net(), "pool", **SIZES).double()
    step(other, 4, 3, 16, 16)
    learner.load_state_dict(other.state_dict(), strict=True, assign=assign)
    wanted = {k: v for k, v in other.online.encoder.backbone.net.state_dict().items()}
    for name, value in net.state_dict().items():
        if not (assign and name.startswith("fc")):
            assert torch.equal(value, wanted[name]), name
    net.float()  # and the other way round
    assert {p.dtype for p in learner.online.encoder.backbone.net.conv.parameters()} == {
        torch.float32
    }
    assert net.fc(torch.rand(1, 8)).dtype == torch.float32
    assert net(torch.rand(2, 3, 16, 16)).dtype == torch.float32


def test_from_the_meta_device() -> None:
    with torch.device("meta"):
        net = Net()
        learner = BYOL(net, "pool", **SIZES)
    learner.to_empty(device="cpu")
    assert {t.device.type for t in net.state_dict().values()} == {"cpu"}
    assert net.fc.weight.requires_grad


def test_group_norm_is_put_into_the_network_itself() -> None:
    net = Net()
    learner = BYOL(net, "pool", norm="group-ws", **SIZES)
    step(learner)
    assert isinstance(net.norm, nn.GroupNorm)
    x = torch.rand(3, 3, 16, 16)
    wanted = net.pool(net.relu(net.norm(net.conv(x)))).flatten(1)
    torch.testing.assert_close(learner(x, return_embedding=True)[1], wanted)


# --- hidden layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("layer", ["conv", "norm", "pool"])
def test_a_layer_that_the_next_one_changes_in_place(layer: str, mode: bool) -> None:
    class Changing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            x += 1
            x = self.pool(self.relu(self.norm(x)))
            return self.fc(x.zero_().flatten(1))

    net, seen = Changing().train(mode), {}
    net.get_submodule(layer).register_forward_hook(lambda m, a, out: seen.update(x=out.clone()))
    backbone = build_backbone(net, hidden_layer=layer, image_size=16).train(mode)
    got = backbone(torch.randn(2, 3, 16, 16))
    assert torch.equal(got, seen["x"].flatten(1)) and got.abs().sum() > 0
    got.sum().backward()


@pytest.mark.parametrize("layer", ["pool", "conv", -1])
@pytest.mark.parametrize("trains", ["nothing", "fc", "norm"])
def test_frozen_layers(layer: str | int, trains: str) -> None:
    net = Net()
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(trains))
    learner = BYOL(net, layer, **SIZES)
    step(learner)
    assert learner.online.predictor[0].weight.grad is not None
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        n for n, _ in net.named_parameters() if n.startswith(trains)
    ]


class Windows(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([x, x]))


class Sum(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum(1)


class Wrong(Net):
    def __init__(self, give: object) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: torch.Tensor) -> object:
        return self.give(super().forward(x))  # type: ignore[operator]


class Builder(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(5, 4)
        return self.late(super().forward(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windows(), r"first dimension is not the batch"),
        (lambda: Sum(), r"shape \[1\]"),
        (lambda: Wrong(lambda x: (x, x)), "gives tuple, not a tensor"),
        (lambda: Wrong(lambda x: {"out": x}), "gives dict, not a tensor"),
        (lambda: Wrong(lambda x: x.argmax(1, keepdim=True)), "int64"),
        (lambda: Wrong(lambda x: x + 1j), "complex64"),
        (lambda: Builder(), "run one batch through it first"),
        (lambda: nn.DataParallel(Net()), "DataParallel: give the network itself"),
        (lambda: torch.jit.script(Net()), "TorchScript"),
        (lambda: nn.Sequential(torch.jit.script(nn.BatchNorm2d(3)), Net()), "TorchScript"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), "lazy"),
        (lambda: [Net()], "got list"),
        (lambda: Net, "got type"),
    ],
)
def test_what_cannot_be_trained_is_named(make, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is on its way out
        net = make()
    with pytest.raises(ValueError, match=message):
        BYOL(net, **SIZES)


@pytest.mark.parametrize("size", [(32, 48), [32, 32], 32.0, True, 0, -1, "32", None])
def test_an_image_size_is_one_whole_number(size: object) -> None:
    with pytest.raises(ValueError, match="one whole number"):
        BYOL(Net(), **{**SIZES, "image_size": size})


# --- what modules may hold ------------------------------------------------------------------------


class Keeping(Net):
    """Keeps an activation of every forward, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.maps = None, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.map = self.conv(x)
        self.maps.append(self.map)
        return super().forward(x)


@pytest.mark.parametrize("layer", ["pool", -1])
def test_kept_activations(layer: str | int) -> None:
    net = Keeping()
    net(torch.rand(2, 3, 16, 16))  # one with a graph is there already
    kept = net.map
    learner = BYOL(net, layer, **SIZES)
    assert net.map is kept and len(net.maps) == 1
    step(learner)


class Held(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.log = threading.Lock(), logging.getLogger("held")
        self.stages = [self.conv, self.norm]  # the layers a second time, not registered
        self.first = self.stages[0].forward
        self.register_buffer("none", None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.steps += 1
            x = self.stages[1](self.first(x))
            return self.fc(self.pool(self.relu(x)).flatten(1))


def test_locks_lists_of_layers_and_bound_methods() -> None:
    net = Held()
    learner = BYOL(net, "pool", **SIZES)
    assert net.steps == 0
    inner = learner.online.encoder.backbone.net
    assert isinstance(inner.stages[1], ViewBatchNorm) and inner.stages[1] is inner.norm
    assert inner.first.__self__ is inner.conv and inner.lock is net.lock
    target = learner.target.backbone.net
    assert target.stages[1] is target.norm and target.first.__self__ is target.conv
    step(learner)
    assert net.steps == target.steps == 1


def test_complex_integer_and_mixed_parameters() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.count = nn.Parameter(torch.zeros((), dtype=torch.long), requires_grad=False)
            self.filter = nn.Parameter(torch.randn(3, 16, 9, dtype=torch.cfloat))
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=x.shape[-2:])
            return super().forward(x * self.scale.float())

    net = Mixed()
    # The order of parameters must not matter: these come first.
    net._parameters = {name: net._parameters[name] for name in ("count", "filter", "scale")}
    learner = BYOL(net, "pool", **SIZES)
    assert learner.online.encoder.projector[0].weight.dtype == torch.float32
    before = [p.clone() for p in learner.target_ema_params()]
    step(learner)
    after = learner.target_ema_params()
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def reparametrized(kind: str) -> nn.Module:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match kind:
            case "weight_norm":
                nn.utils.weight_norm(net.conv)
            case "spectral_norm":
                nn.utils.spectral_norm(net.conv)
            case "new weight_norm":
                parametrizations.weight_norm(net.conv)
            case "new spectral_norm":
                parametrizations.spectral_norm(net.conv)
            case "tied":
                net.fc = nn.Linear(8, 8)
                net.again = nn.Linear(8, 8)
                net.again.weight = net.fc.weight
    return net


@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "new weight_norm", "new spectral_norm", "tied"]
)
def test_computed_and_tied_weights(kind: str) -> None:
    net = reparametrized(kind)
    before = {name: p.clone() for name, p in net.named_parameters()}
    learner = BYOL(net, **SIZES)
    step(learner)
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    assert any(name.startswith("conv") for name in moved)
    net.eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(
        net(x), learner.eval()(x, return_embedding=True, return_projection=False)
    )
    assert len(learner.target_ema_params()) == len(learner.online_ema_params())
    step(copy.deepcopy(BYOL(reparametrized("new weight_norm"), **SIZES)))
    if kind.endswith("_norm"):
        with pytest.raises(ValueError, match="group-ws cannot standardise"):
            BYOL(reparametrized(kind), norm="group-ws", **SIZES)


def test_a_compiled_network_is_unwrapped_with_a_warning() -> None:
    net = Net()
    with pytest.warns(UserWarning, match=r"compile learner\.online"):
        learner = BYOL(torch.compile(net, backend="eager"), "pool", **SIZES)
    before = net.conv.weight.clone()
    step(learner)
    assert not torch.equal(net.conv.weight, before)
    names = [name for name, _ in learner.named_parameters()]
    assert not [name for name in names if "_orig_mod" in name]


def test_torchvisions_vit_and_dropout() -> None:
    vit = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, dropout=0.5
    )
    learner = BYOL(vit, "encoder.ln", **SIZES)
    assert learner.feature_dim == 5 * 8
    step(learner)


class ByHand(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) * 2


@pytest.mark.parametrize("channels", [3, 5])
def test_statistics_that_are_taken_by_hand_are_noticed(channels: int) -> None:
    net = Net(channels)
    net.norm = ByHand()
    with pytest.warns(UserWarning, match="over the whole batch, without nn"):
        BYOL(net, "pool", **SIZES)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.GroupNorm(2, 8),
        nn.LocalResponseNorm(2),
        nn.Dropout2d(0.5),
        nn.RReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    ],
)
def test_other_layers_are_no_reason_for_a_warning_and_keep_their_state(layer: nn.Module) -> None:
    net = Net()
    net.norm = layer
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner = BYOL(net, "pool", **SIZES)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    step(learner)


def test_gradient_checkpointing_leaves_nothing_behind() -> None:
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = checkpoint(lambda x: self.norm(self.conv(x)), x, use_reentrant=False)
            return self.fc(self.pool(self.relu(x)).flatten(1))

    learner = BYOL(Checkpointed(), "conv", **SIZES)
    step(learner)
    assert learner.online.encoder.backbone._seen is None
    step(copy.deepcopy(learner))


def test_the_target_still_follows_what_is_frozen_later() -> None:
    net = Net()
    learner = BYOL(net, "pool", moving_average_decay=0.5, **SIZES)
    step(learner)
    net.requires_grad_(False)
    for _ in range(60):
        learner.update_moving_average()
    torch.testing.assert_close(learner.target.backbone.net.conv.weight, net.conv.weight)


def test_the_trials_do_not_call_an_overridden_train() -> None:
    class Merging(Net):
        """As LoRA's layers: the mode changes the weights, and back."""

        def train(self, mode: bool = True) -> nn.Module:
            if mode != self.training:
                self.conv.weight.data += -1 if mode else 1
            return super().train(mode)

    net = Merging()
    before = net.conv.weight.clone()
    BYOL(net, "pool", **SIZES)
    assert torch.equal(net.conv.weight, before)


def test_inference_mode() -> None:
    with torch.inference_mode():
        made, views = Net(), torch.rand(2, 4, 3, 16, 16)
        with pytest.raises(ValueError, match="inference_mode"):
            BYOL(Net(), **SIZES)
    with pytest.raises(ValueError, match="inference_mode"):
        BYOL(made, **SIZES)
    features = build_backbone(made, hidden_layer="pool", image_size=16)  # but be used, yes
    with torch.inference_mode():
        assert features.eval()(views[0]).shape == (4, 8)
    learner = BYOL(Net(), "pool", **SIZES)
    learner(views).backward()
    learner(views[0]).backward()
    with torch.no_grad():
        BYOL(Net(), "pool", **SIZES)(torch.rand(4, 3, 16, 16))


# --- channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_other_numbers_of_channels(channels: int) -> None:
    learner = BYOL(Net(channels), "pool", augment_fn=lambda x: x, **SIZES)
    learner(torch.rand(4, channels, 16, 16)).backward()
    step(learner, 4, channels, 16, 16)
    with pytest.raises(ValueError, match="3 channels"):
        BYOL(Net(channels), **SIZES)(torch.rand(4, channels, 16, 16))
