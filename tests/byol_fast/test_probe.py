"""The online probe learns from labels without touching what it is given."""

from __future__ import annotations

import copy

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


def test_no_gradient_reaches_the_representation() -> None:
    features, labels = batch(0)
    features.requires_grad_()
    OnlineProbe(8, 3, CPU).update(features, labels)
    assert features.grad is None


def test_a_batch_without_labels_changes_nothing() -> None:
    probe = OnlineProbe(8, 3, CPU)
    probe.update(*batch(0))
    probe._optimizer.state.clear()  # momentum would move the weights by itself
    before = probe.linear.weight.clone()
    loss = probe.update(batch(1)[0], torch.full((32,), -1))
    assert float(loss) == 0.0
    assert torch.equal(probe.linear.weight, before)


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
