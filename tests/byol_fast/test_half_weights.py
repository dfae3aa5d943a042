"""Weights in bf16 or fp16: views follow them, and the moving average does not stand still."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from byol_fast import pair
from byol_fast.average import Remainders
from byol_fast.learner import BYOL
from byol_fast.networks.predictors import DirectPred

SIZES = {"image_size": 16, "projection_size": 8, "projection_hidden_size": 16}
HALF = [torch.bfloat16, torch.float16]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def moved(learner: BYOL) -> BYOL:
    """With an online network that has gone somewhere else by 5 %."""
    with torch.no_grad():
        for p in learner.online_ema_params():
            p.mul_(1.05).add_(0.01)
    return learner


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("when", ["before", "after"])
def test_images_and_views_take_the_type_of_the_weights(dtype: torch.dtype, when: str) -> None:
    learner = BYOL(network().to(dtype) if when == "before" else network(), **SIZES).to(dtype)
    images = torch.rand(4, 3, 24, 24)
    for given in (images, images.to(dtype), (images * 255).byte()):
        loss = learner(given)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
    learner(torch.randn(2, 4, 3, 16, 16)).backward()
    projection, representation = learner(torch.randn(2, 3, 16, 16), return_embedding=True)
    assert projection.dtype == representation.dtype == dtype
    assert all(p.grad.isfinite().all() for p in learner.online.parameters())


def test_views_that_are_not_normalised_are_refused() -> None:
    learner = BYOL(network(), **SIZES)
    with pytest.raises(ValueError, match=r"normalised floats, got torch\.uint8"):
        learner(torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8))
    learner(torch.rand(2, 4, 3, 16, 16, dtype=torch.float64)).backward()


def test_autocast_leaves_the_choice_of_types_to_autocast() -> None:
    learner, seen = BYOL(network(), **SIZES), []
    learner.online.encoder.backbone[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.autocast("cpu", torch.bfloat16):
        learner(torch.rand(4, 3, 16, 16)).backward()
    assert seen[0].dtype == torch.float32
    assert next(learner.parameters()).grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_the_average_is_that_of_fp32(dtype: torch.dtype, decay: float) -> None:
    half = moved(BYOL(network(), moving_average_decay=decay, **SIZES).to(dtype))
    full = copy.deepcopy(half).float()
    for _ in range(200):
        half.update_moving_average()
        full.update_moving_average()
    eps = torch.finfo(dtype).eps
    for got, wanted in zip(half.target_ema_params(), full.target_ema_params(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), wanted, rtol=eps, atol=1e-6)  # one rounding
    assert not [name for name in full.state_dict() if name.startswith("average")]


def test_half_of_the_parameters_in_half() -> None:
    net = network()
    net[0].to(torch.bfloat16)
    net.insert(1, Float())
    learner = moved(BYOL(net, moving_average_decay=0.999, **SIZES))
    before = [p.clone() for p in learner.target_ema_params()]
    for _ in range(200):
        learner.update_moving_average()
    pairs = zip(learner.target_ema_params(), before, strict=True)
    assert all(not torch.equal(now, then) for now, then in pairs)


class Float(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_a_resumed_average_goes_on_exactly() -> None:
    def fresh() -> BYOL:
        return BYOL(network(), moving_average_decay=0.999, **SIZES).bfloat16()

    whole = moved(fresh())
    for _ in range(30):
        whole.update_moving_average()
    state = copy.deepcopy(whole.state_dict())
    resumed, blank = fresh(), fresh()
    resumed.load_state_dict(state)
    blank.update_moving_average()
    blank.load_state_dict({k: v for k, v in state.items() if not k.startswith("average")})
    moves = [whole, resumed.bfloat16()]  # moving it rounds nothing
    for learner in moves:
        for _ in range(30):
            learner.update_moving_average()
    for a, b in zip(*[m.state_dict().values() for m in moves], strict=True):
        assert torch.equal(a, b)
    assert "average" not in blank._modules  # none were loaded: those of before are gone
    whole.float().update_moving_average()
    assert "average" not in whole._modules


def test_the_pair_of_views_too() -> None:
    options = {"hidden_size": 16, "output_size": 8, "backend": "resnet18", "input_size": 512}
    paired = pair.BYOL(**options, t=0.98).bfloat16()  # steps of .1 %: bf16 has one value in .4 %
    before = paired.target.projector[0].weight.clone()
    with torch.no_grad():
        paired.online.projector[0].weight.mul_(1.05)
    for _ in range(4):
        paired.updateTargetNetwork()
    assert not torch.equal(paired.target.projector[0].weight, before)
    assert isinstance(paired.average, Remainders)


@pytest.mark.parametrize("dtype", HALF)
def test_directpred_keeps_its_moments_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    half, full = DirectPred(8).to(dtype), DirectPred(8)
    for _ in range(3):
        z = torch.randn(1000, 8).to(dtype)
        assert half(z).dtype == dtype
        full(z.float())
        half.update()
        full.update()
    torch.testing.assert_close(half.correlation, full.correlation)
    torch.testing.assert_close(half.weight.float(), full.weight, rtol=0.01, atol=0.01)
