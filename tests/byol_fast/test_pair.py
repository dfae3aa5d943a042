"""BYOL on a pair of views, by the names of its published interface."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from byol_fast import pair
from byol_fast.norm import ViewBatchNorm
from byol_fast.pair import BYOL, criterion, get_byol_transforms

SMALL = {"input_size": 512, "hidden_size": 16, "output_size": 8, "backend": "resnet18"}


def make(**options) -> BYOL:
    torch.manual_seed(0)
    return BYOL(**{**SMALL, **options})


def views(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, 0.8 * x + 0.2


@pytest.fixture(scope="module")
def model() -> BYOL:
    return make(depth_proj=3, depth_pred=1)


def test_four_tensors_of_predictions_and_projections(model: BYOL) -> None:
    x, x1 = views()
    onlinex, onlinex1, targetx, targetx1 = model(x, x1)
    assert {t.shape for t in (onlinex, onlinex1, targetx, targetx1)} == {(4, 8)}
    assert onlinex.requires_grad and not targetx.requires_grad
    swapped = model(x1, x)
    torch.testing.assert_close(swapped[0], onlinex1)  # each view has its own statistics
    torch.testing.assert_close(swapped[2], targetx1)
    projections = model.online(torch.cat([x, x1]))  # the target starts as a copy
    torch.testing.assert_close(torch.cat([targetx, targetx1]), projections)
    torch.testing.assert_close(torch.cat([onlinex, onlinex1]), model.predictor(projections))
    with pytest.raises(ValueError, match="two views"):
        model(x, x1[:2])


def test_depths_are_numbers_of_linear_layers(model: BYOL) -> None:
    kinds = [type(layer) for layer in model.online.projector]
    block = [nn.Linear, ViewBatchNorm, nn.ReLU]
    assert kinds == [*block, *block, nn.Linear]
    assert [type(layer) for layer in model.predictor] == [nn.Linear]
    assert model.online.projector[-1].bias is not None
    with pytest.raises(ValueError, match="depth"):
        make(depth_pred=0)


def test_the_target_network_is_updated(model: BYOL) -> None:
    with torch.no_grad():
        for p in model.online.parameters():
            p.add_(0.1)
    before = [p.clone() for p in model.target.parameters()]
    leaders = list(model.online.parameters())
    model.updateTargetNetwork()
    for follower, old, leader in zip(model.target.parameters(), before, leaders, strict=True):
        torch.testing.assert_close(follower, 0.996 * old + 0.004 * leader)
        assert not torch.equal(follower, old)


def test_criterion_is_both_directions_summed() -> None:
    onlinex, targetx1, onlinex1, targetx = torch.randn(4, 6, 8)
    wanted = (2 - 2 * F.cosine_similarity(onlinex, targetx1)).mean()
    wanted += (2 - 2 * F.cosine_similarity(onlinex1, targetx)).mean()
    torch.testing.assert_close(criterion(onlinex, targetx1, onlinex1, targetx), wanted)


def test_the_closed_form_predicts_the_other_view() -> None:
    model = make(closedFormPredicator=True, EAvg=False)
    assert model.predictor is None and not list(model.target.parameters())
    x, x1 = views(16)
    onlinex, onlinex1, targetx, targetx1 = model(x, x1)
    z = model.online(torch.cat([x, x1]))
    t = torch.cat([targetx1, targetx]).double().numpy()  # each online view's own goal
    a = z.detach().double().numpy()
    gram = a.T @ a
    weight = np.linalg.solve(gram + 1e-3 * np.trace(gram) / 8 * np.eye(8), a.T @ t)
    got = torch.cat([onlinex, onlinex1])
    np.testing.assert_allclose(got.detach().numpy(), a @ weight, rtol=1e-3, atol=1e-4)
    loss = criterion(onlinex, targetx1, onlinex1, targetx)
    (mine,) = torch.autograd.grad(loss, model.online.projector[-1].weight, retain_graph=True)
    constant = z @ torch.tensor(weight, dtype=torch.float32)  # W is a constant to the gradient
    same = criterion(constant[:16], targetx1, constant[16:], targetx)
    (theirs,) = torch.autograd.grad(same, model.online.projector[-1].weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)
    model.updateTargetNetwork()  # nothing to do, and no error: the loop is the same
    with pytest.warns(UserWarning, match="8 views in 8 dimensions"):
        model(*views(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 2048}, "use input_size=512"),
        ({"backend": "resnet19"}, "did you mean 'resnet18'"),
        ({"t": 1.5}, "moving average"),
    ],
)
def test_mistakes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_pretrained_weights_from_the_cache_and_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(ValueError, match=r"could not be fetched .*no network.*checkpoints"):
        make(pretrained=True)
    weights = torchvision.models.resnet18().state_dict()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(weights, cache / Path(url).name)
    model = make(pretrained=True)
    for network in (model.online, model.target):
        for name, value in network.backbone.state_dict().items():
            assert torch.equal(value, weights[name])


def test_transforms() -> None:
    t, t1, evaluation = get_byol_transforms(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = torch.rand(5, 3, 24, 20)
    assert t(images).shape == t1(images).shape == evaluation(images).shape == (5, 3, 16, 16)
    assert t.spec.semantics == "torchvision" and (t.spec.views[0].blur, t1.spec.views[0].blur) == (
        *(1.0, 0.1),
    )
    exact = torch.rand(2, 3, 16, 16)
    wanted = ((exact * 255).round() / 255 - 0.5) / 0.25
    torch.testing.assert_close(evaluation(exact), wanted)
    with pytest.raises(ValueError, match="three channels"):
        pair.get_byol_transforms(16, (0.5,), (0.25,))
