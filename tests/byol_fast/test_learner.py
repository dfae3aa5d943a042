"""BYOL around any network, used as byol-pytorch is; and the views it makes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import byol_fast
from byol_fast import model as method
from byol_fast.learner import BYOL
from byol_fast.views import CentreView, RandomView, as_bytes
from pipelines.spec import AugmentSpec

SIZES = {"projection_size": 8, "projection_hidden_size": 16}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 20, 24, generator=torch.Generator().manual_seed(1))


def test_the_loop_of_the_readme() -> None:
    net = network()
    learner = byol_fast.BYOL(net, image_size=16, hidden_layer=-2, **SIZES)
    assert learner.feature_dim == 8 and isinstance(learner, method.BYOL)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    before, target = copy.deepcopy(net[0].weight), learner.target_ema_params()[0].clone()
    losses = []
    for _ in range(40):
        loss = learner(images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert not torch.equal(net[0].weight, before)  # the user's network was trained
    assert not torch.equal(learner.target_ema_params()[0], target)


def test_the_moving_average_takes_one_step() -> None:
    learner = BYOL(network(), -2, 16, moving_average_decay=0.9, **SIZES)
    with torch.no_grad():
        for p in learner.online.parameters():
            p.add_(1)
    pairs = list(zip(learner.target_ema_params(), learner.online_ema_params(), strict=True))
    wanted = [0.9 * follower + 0.1 * leader for follower, leader in pairs]
    learner.update_moving_average()
    for (follower, _), value in zip(pairs, wanted, strict=True):
        torch.testing.assert_close(follower, value)


def test_embeddings_of_images_as_they_are() -> None:
    learner = BYOL(network(), -2, 16, **SIZES)
    x = images(5)  # an odd number: they are not two views
    projection, embedding = learner(x, return_embedding=True)
    assert projection.shape == (5, 8) and embedding.shape == (5, 8)
    assert embedding.requires_grad
    norms = [m for m in learner.modules() if hasattr(m, "views")]
    assert {m.views for m in norms} == {2}  # as before
    learner.eval()
    alone = learner(x, return_embedding=True, return_projection=False)
    backbone = learner.online.encoder.backbone
    torch.testing.assert_close(alone, backbone(x).flatten(1))


def test_simsiam_has_no_average() -> None:
    learner = BYOL(network(), -2, 16, use_momentum=False, predictor="directpred", **SIZES)
    assert not [name for name in learner.state_dict() if name.startswith("target")]
    learner(images()).backward()
    with pytest.raises(ValueError, match=r"leave update_moving_average\(\) out"):
        learner.update_moving_average()
    assert not torch.equal(learner.online.predictor.weight, torch.eye(8))  # that one was set


def test_augmentations_of_your_own() -> None:
    calls: list[str] = []

    def first(x: torch.Tensor) -> torch.Tensor:
        calls.append("first")
        return x[..., :16, :16]

    def second(x: torch.Tensor) -> torch.Tensor:
        calls.append("second")
        return x[..., -16:, -16:]

    both = BYOL(network(), -2, 16, augment_fn=first, augment_fn2=second, **SIZES)
    loss = both(images())
    pair = torch.stack([images()[..., :16, :16], images()[..., -16:, -16:]])
    torch.testing.assert_close(both(pair), loss)  # views made elsewhere: the same
    assert calls == ["first", "second"]
    BYOL(network(), -2, 16, augment_fn=first, **SIZES)(images())
    assert calls[2:] == ["first", "first"]


def test_hyper_rebuilds_it_and_the_trainers_model() -> None:
    learner = BYOL("resnet18", -1, 32, stem="cifar", norm="group-ws", **SIZES)
    for kind in (BYOL, method.BYOL):
        kind(**learner.hyper).load_state_dict(learner.state_dict())
    with pytest.raises(ValueError, match="moving_average_decay"):
        BYOL(network(), -2, 16, moving_average_decay=1.5)


# --- views ---------------------------------------------------------------------------------------

SPEC = AugmentSpec(image_size=16)


def test_views_are_drawn_anew_and_repeat_with_torchs_seed() -> None:
    view = RandomView(SPEC, 0)
    torch.manual_seed(3)
    first, again = view(images()), view(images())
    torch.manual_seed(3)
    assert torch.equal(view(images()), first) and not torch.equal(again, first)
    assert first.shape == (6, 3, 16, 16) and first.dtype == torch.float32
    assert not torch.equal(first[0], first[1])
    assert view(images()[0]).shape == (3, 16, 16)
    as_uint8 = (images() * 255).round().to(torch.uint8)
    torch.manual_seed(3)
    assert torch.equal(view(as_uint8), first)


def test_the_second_view_is_the_papers_second() -> None:
    grey = torch.full((400, 3, 16, 16), 0.9)
    solarized = [(RandomView(SPEC, v)(grey).mean((1, 2, 3)) < -0.5).float().mean() for v in (0, 1)]
    assert solarized[0] < 0.02 < 0.1 < solarized[1] < 0.3  # p = 0 and .2; brightness moves some


def test_without_chance_a_view_is_the_resized_image() -> None:
    from dataclasses import replace

    still = replace(
        SPEC.views[0], crop_area=(1, 1), crop_aspect=(1, 1), flip=0, jitter=0, grey=0, blur=0
    )
    spec = replace(SPEC, views=(still, still), mean=(0, 0, 0), std=(1, 1, 1))
    square = torch.rand(2, 3, 32, 32)
    wanted = nn.functional.interpolate(as_bytes(square).float(), 16, mode="bicubic", antialias=True)
    got = RandomView(spec, 0)(square)
    torch.testing.assert_close(got, wanted.round().clamp(0, 255) / 255)
    torch.testing.assert_close(CentreView(spec)(square), got)
    same = CentreView(spec)(square[..., :16, :16])
    torch.testing.assert_close(same, as_bytes(square[..., :16, :16]) / 255)


def test_what_is_no_image() -> None:
    view = RandomView(SPEC, 0)
    for wrong in (torch.rand(4, 1, 16, 16), torch.rand(16, 16)):
        with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
            view(wrong)
    with pytest.raises(ValueError, match="uint8 or floats"):
        view(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    with pytest.warns(UserWarning, match="outside"):
        assert view(torch.randn(2, 3, 16, 16)).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view(images())


def test_the_package_lists_what_it_exports():
    """Completion in a shell and in editors asks `dir`; a star import asks `__all__`."""
    import byol_fast

    assert set(byol_fast.__all__) <= set(dir(byol_fast))
    assert all(hasattr(byol_fast, name) for name in dir(byol_fast))
