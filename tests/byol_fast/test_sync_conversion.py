"""torch's conversion to SyncBatchNorm, as Lightning calls it, keeps statistics per view."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from byol_fast import model, pair
from byol_fast.learner import BYOL
from byol_fast.norm import ViewBatchNorm, ViewBatchNormAct

to_sync: Callable[..., nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm


class NormAct(nn.BatchNorm2d):
    """As timm has it: the activation is part of the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
    )


def learner(net: nn.Module | None = None, **options: object) -> BYOL:
    sizes = {"projection_size": 8, "projection_hidden_size": 16}
    return BYOL(net or network(), image_size=8, **{**sizes, **options})


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


VIEWS = torch.stack([torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8) * 0.3 + 0.5])


class Lightning(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.learner, self.probe = inner, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_a_whole_learner(momentum: bool, times: int) -> None:
    plain = learner(use_momentum=momentum)
    converted = copy.deepcopy(plain)
    for _ in range(times):
        assert to_sync(converted) is converted
    torch.testing.assert_close(converted(VIEWS), plain(VIEWS), rtol=0, atol=0)
    found = norms(converted)
    assert len(found) == len(norms(plain))
    assert all(isinstance(norm, ViewBatchNorm) and norm.sync is True for norm in found)
    assert sum(isinstance(norm, ViewBatchNormAct) for norm in found) == 1 + momentum
    assert converted.state_dict().keys() == plain.state_dict().keys()


def test_a_learner_inside_another_module_and_parts_of_one() -> None:
    outer = to_sync(Lightning(learner()))
    assert isinstance(outer.probe[1], nn.SyncBatchNorm)  # not BYOL's
    assert all(isinstance(norm, ViewBatchNorm) for norm in norms(outer.learner))
    plain, parts = learner(), learner()
    to_sync(parts.online.encoder.backbone)  # found at the next forward
    to_sync(parts.target.projector)
    torch.testing.assert_close(parts(VIEWS), plain(VIEWS), rtol=0, atol=0)
    inner = learner()
    assert to_sync(inner.online) is inner.online
    assert [type(n) for n in norms(inner.online)] == [type(n) for n in norms(outer.learner.online)]


def test_the_pair_of_views() -> None:
    options = {"hidden_size": 16, "output_size": 8, "backend": "resnet18", "input_size": 512}
    paired = to_sync(pair.BYOL(**options))
    assert all(isinstance(norm, ViewBatchNorm) and norm.sync for norm in norms(paired))


def test_a_network_that_was_converted_before_it_is_handed_in() -> None:
    paired = learner(to_sync(network()))
    found = norms(paired)
    assert all(isinstance(norm, ViewBatchNorm) and norm.sync is True for norm in found)
    plain = learner()
    torch.testing.assert_close(paired(VIEWS), plain(VIEWS), rtol=0, atol=0)
    assert not any(norm.sync for norm in norms(plain))
    assert model.BYOL(network(), image_size=8, projector=(16, 8), predictor=(16, 8), bn_sync=True)
