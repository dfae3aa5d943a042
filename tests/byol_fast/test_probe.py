"""The online probe learns from labels without touching what it is given."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from byol_fast.watching.probe import OnlineProbe

CPU = torch.device("cpu")


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (32,), generator=generator)
    features = torch.eye(8)[labels] + 0.1 * torch.randn(32, 8, generator=generator)
    return torch.cat([features, features + 0.01]), labels


def test_it_learns_a_separable_set() -> None:
    probe = OnlineProbe(8, 3, CPU)
    first = float(probe.update(*batch(0)))
    for seed in range(1, 60):
        last = float(probe.update(*batch(seed)))
    features, labels = batch(99)
    assert last < first / 2
    assert probe.accuracy(features[:32], labels) == 1.0


def of_a_network(
    seed: int, features: int, directions: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both views' features of 64 images in 10 classes: off centre, correlated, of any scale."""
    fixed = torch.Generator().manual_seed(0)
    basis = torch.randn(directions, features, generator=fixed)
    centres = 2 * torch.randn(10, directions, generator=fixed)
    offset = 3 * torch.rand(features, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (64,), generator=generator)
    views = [
        (centres[labels] + 0.5 * torch.randn(64, directions, generator=generator)) @ basis
        for _ in range(2)
    ]
    return (torch.cat(views) + offset) * scale, labels


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("features", "directions"), [(512, 64), (512, 8), (2048, 8)])
def test_separable_features_of_any_scale_are_learned(
    features: int, directions: int, scale: float
) -> None:
    probe = OnlineProbe(features, 10, CPU)
    losses = [
        float(probe.update(*of_a_network(seed, features, directions, scale))) for seed in range(200)
    ]
    assert max(losses) < math.log(10) + 0.01, "it never does worse than chance"
    assert losses[-1] < 0.2
    unseen, labels = of_a_network(10**6, features, directions, scale)
    assert probe.accuracy(unseen[:64], labels) > 0.95


def test_features_that_are_all_alike_do_not_make_it_diverge() -> None:
    """Of a collapsed network: one direction alone, where the loss is as curved as it can be."""
    probe = OnlineProbe(2048, 10, CPU)
    losses = [float(probe.update(*of_a_network(seed, 2048, 1, 1.0))) for seed in range(100)]
    assert max(losses) < math.log(10) + 0.01


def test_features_that_grow_while_they_are_learned() -> None:
    probe = OnlineProbe(512, 10, CPU)
    for seed in range(300):
        scale = 10 ** (seed / 100 - 1.5)
        last = float(probe.update(*of_a_network(seed, 512, 32, scale)))
    unseen, labels = of_a_network(10**6, 512, 32, scale)
    assert last < 0.2 and probe.accuracy(unseen[:64], labels) > 0.95


def test_a_step_that_is_not_finite_leaves_the_running_means() -> None:
    probe = OnlineProbe(8, 3, CPU)
    probe.update(*batch(0))
    before = copy.deepcopy(probe.state_dict()["running"])
    bad = batch(1)[0]
    bad[3] = torch.nan
    probe.update(bad, batch(1)[1], torch.tensor(False))
    for name, value in probe.state_dict()["running"].items():
        assert torch.equal(value, before[name]), name


def test_a_probe_of_an_earlier_version_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    probe = OnlineProbe(8, 3, CPU)
    old = {"linear": {"weight": torch.ones(3, 8), "bias": torch.ones(3)}, "optimizer": {}}
    probe.load_state_dict(old)
    assert not probe.linear.weight.any() and "begins anew" in caplog.text


def test_no_gradient_reaches_the_representation() -> None:
    features, labels = batch(0)
    features.requires_grad_()
    OnlineProbe(8, 3, CPU).update(features, labels)
    assert features.grad is None


def test_a_batch_without_labels_changes_nothing() -> None:
    probe = OnlineProbe(8, 3, CPU)
    probe.update(*batch(0))
    probe._optimizer.state.clear()  # momentum would move the weights by itself
    before = copy.deepcopy(probe.state_dict())
    loss = probe.update(batch(1)[0], torch.full((32,), -1))
    assert float(loss) == 0.0
    for part in ("linear", "running"):
        for name, value in probe.state_dict()[part].items():
            assert torch.equal(value, before[part][name]), name


def test_unlabelled_images_are_left_out() -> None:
    features, labels = batch(0)
    some = labels.clone()
    some[16:] = -1
    first, second = OnlineProbe(8, 3, CPU), OnlineProbe(8, 3, CPU)
    with_unlabelled = first.update(features, some)
    labelled_only = second.update(torch.cat([features[:16], features[32:48]]), labels[:16])
    assert torch.allclose(with_unlabelled, labelled_only)
    assert torch.allclose(first.linear.weight, second.linear.weight)


def test_state_round_trip_continues_bitwise() -> None:
    one, two = OnlineProbe(8, 3, CPU), OnlineProbe(8, 3, CPU)
    one.update(*batch(0))
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # as through a file
    one.update(*batch(1))
    two.update(*batch(1))
    assert torch.equal(one.linear.weight, two.linear.weight)
    assert torch.equal(one.mean, two.mean) and torch.equal(one.var, two.var)
