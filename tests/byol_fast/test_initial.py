"""How weights are drawn at the start; and that a run that goes on keeps what it began with."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, make_folder
from torch import nn

from byol_fast import checkpoint, pretrain
from byol_fast import config as configuration
from byol_fast.assemble import assemble
from byol_fast.distributed import World
from byol_fast.model import BYOL
from byol_fast.session.opening import open_data
from byol_fast.session.signals import StopSignal

LEFT = 0.8796  # of a standard normal's deviation, cut off at two of them: √(1 − 4φ(2)/(2Φ(2)−1))


def build(backbone: Any = "resnet50", init: str = "authors", **options: Any) -> BYOL:
    torch.manual_seed(0)
    sizes = {"projector": (512, 64), "predictor": (512, 64), **options}
    return BYOL(backbone, image_size=32, init=init, **sizes)


@pytest.fixture(scope="module")
def resnet50() -> BYOL:
    return build()


def test_weights_are_the_authors(resnet50: BYOL) -> None:
    """haiku's TruncatedNormal(1/√fan-in) at ±2 deviations, biases 0, scales 1 or 0."""
    for network in (resnet50.online, resnet50.target):
        large = 0
        for layer in network.modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            drawn = 1 / math.sqrt(layer.weight[0].numel())
            assert layer.weight.abs().max() <= 2 * drawn
            assert layer.bias is None or not layer.bias.any()
            if layer.weight.numel() > 30_000:
                large += 1
                assert layer.weight.std().item() == pytest.approx(LEFT * drawn, rel=0.02)
                assert abs(layer.weight.mean().item()) < 0.02 * drawn
        assert large > 40
    conv, linear = resnet50.online.encoder.backbone.conv1, resnet50.online.encoder.projector[0]
    assert conv.weight.std().item() == pytest.approx(LEFT * 0.0825, rel=0.03)  # 1/√(3·7·7)
    assert linear.weight.std().item() == pytest.approx(LEFT * 0.0221, rel=0.02)  # 1/√2048


def test_the_last_scale_of_a_bottleneck_is_0_and_every_other_1(resnet50: BYOL) -> None:
    scales = {
        name: p for name, p in resnet50.named_parameters() if p.dim() == 1 and "weight" in name
    }
    zero = {name for name, p in scales.items() if not p.any()}
    assert zero == {name for name in scales if name.endswith("bn3.weight")} and len(zero) == 32
    assert all((scales[name] == 1).all() for name in scales.keys() - zero)


def test_the_target_is_drawn_by_itself(resnet50: BYOL) -> None:
    pairs = list(zip(resnet50.online_ema_params(), resnet50.target_ema_params(), strict=True))
    equal = [torch.equal(a, b) for a, b in pairs if a.dim() > 1]
    assert not any(equal) and all(torch.equal(a, b) for a, b in pairs if a.dim() == 1)
    assert not any(p.requires_grad for p in resnet50.target.parameters())


def test_basic_blocks_have_scales_of_1_and_it_is_repeatable_and_trains() -> None:
    first, second = build("resnet18"), build("resnet18")
    assert all(p.all() for n, p in first.named_parameters() if "bn2.weight" in n)  # as in haiku
    states = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    first(torch.randn(2, 4, 3, 32, 32)).backward()
    assert all(p.grad.isfinite().all() for p in first.online.parameters())


def test_torchs_start_is_a_copy_and_every_scale_1() -> None:
    model = build(init="torch")
    online, target = model.online.encoder.state_dict(), model.target.state_dict()
    assert all(torch.equal(online[name], target[name]) for name in online)
    assert all((online[name] == 1).all() for name in online if name.endswith("bn3.weight"))
    assert model.hyper["init"] == "torch" and BYOL(**model.hyper).hyper == model.hyper


@pytest.mark.parametrize("init", ["authors", "torch"])
def test_a_network_that_is_given_keeps_its_weights(init: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(7200, 16))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = build(net, init)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    head, target = model.online.encoder.projector[0], model.target.projector[0]
    assert torch.equal(head.weight, target.weight) is (init == "torch")
    assert head.bias.any() is not (init == "authors")


def test_other_architectures_keep_their_own_way_and_methods_work() -> None:
    torch.manual_seed(0)
    net = build("mobilenet_v3_small").online.encoder.backbone
    torch.manual_seed(0)
    alone = BYOL("mobilenet_v3_small", image_size=32, projector=(8, 8), predictor=(8, 8))
    mine = alone.online.encoder.backbone.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in net.state_dict().items())
    simsiam = build("resnet18", momentum=False, predictor="directpred", norm="group-ws")
    assert torch.equal(simsiam.online.predictor.weight, torch.eye(64))
    with pytest.raises(ValueError, match="authors, torch"):
        build("resnet18", "he")


# --- a run ----------------------------------------------------------------------------------------

WORLD = World(0, 1, torch.device("cpu"))


def begin(*arguments: str) -> dict[str, Any]:
    """What a run's trainer would save now."""
    with contextlib.ExitStack() as stack:
        config = configuration.parse([*TINY, *arguments])
        data = open_data(config, WORLD, StopSignal())
        trainer, _ = assemble(pretrain._resolve(config, data, WORLD), data, WORLD, stack)
        return trainer.state()


def test_resuming_keeps_the_start_and_takes_older_checkpoints(tmp_path: Path) -> None:
    """An initialisation is of a fresh start: it is no reason to refuse, and is recorded rightly."""
    train = make_folder(tmp_path / "train", images=16)
    arguments = ["--data", str(train), "--out", str(tmp_path / "run")]
    state = begin(*arguments)
    assert state["config"]["model"]["init"] == "torch"
    del state["config"]["model"]["init"], state["hyper"]["init"]  # as a version before wrote it
    checkpoint.save(tmp_path / "run" / "checkpoints", 0, state)
    resumed = begin(*arguments, "--model.init", "authors")
    assert resumed["config"]["model"]["init"] == resumed["hyper"]["init"] == "torch"
    for name, value in state["model"].items():
        assert torch.equal(resumed["model"][name], value)
    fresh = begin("--data", str(train), "--out", str(tmp_path / "other"), "--model.init", "authors")
    assert fresh["hyper"]["init"] == "authors"
