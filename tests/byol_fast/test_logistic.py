"""Logistic regression against scikit-learn's, its penalty's choice, and its metrics."""

import numpy as np
import pytest
import torch
from torch import nn

from byol_fast.evaluate import logistic
from byol_fast.evaluate.parts import Parts


def blobs(n: int, noise: float, seed: int = 0):
    torch.manual_seed(seed)
    labels = torch.arange(n) % 3
    return nn.functional.one_hot(labels, 5).double() + noise * torch.randn(n, 5).double(), labels


def linear(classes: int = 3) -> nn.Linear:
    head = nn.Linear(5, classes, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_equals_scikit_learn(penalty):
    models = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, labels = blobs(90, 0.5)
    head = linear()
    logistic.fit(head, x, labels, penalty=penalty)
    # scikit-learn minimises C * sum of losses + ‖W‖²/2.
    theirs = models.LogisticRegression(C=1 / (2 * penalty), tol=1e-9, max_iter=5000)
    theirs.fit(x.numpy(), labels.numpy())
    with torch.no_grad():
        ours = head(x).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x.numpy()), atol=5e-5)
    np.testing.assert_allclose(head.weight.detach().numpy(), theirs.coef_, atol=1e-3)


def test_several_classes_are_one_regression_each_without_the_difficult():
    models = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, labels = blobs(90, 0.5)
    targets = nn.functional.one_hot(labels, 3)
    targets[:20, 0] = -1
    head = linear()
    logistic.fit(head, x, targets, penalty=0.5)
    counted = targets[:, 0] >= 0
    theirs = models.LogisticRegression(C=1.0, tol=1e-9, max_iter=5000)
    theirs.fit(x[counted].numpy(), targets[counted, 0].numpy())
    np.testing.assert_allclose(head.weight[0].detach().numpy(), theirs.coef_[0], atol=1e-3)


def likelihood(logits, targets):
    return -nn.functional.cross_entropy(logits, targets).item()


def test_the_penalty_is_the_validation_s_best_and_both_parts_are_fitted():
    (x, y), (unseen, truth) = blobs(30, 0.7), blobs(60, 0.7, seed=1)
    penalties = (1e-6, 1.0, 1e5)
    found = logistic.search(x, y, unseen, truth, classes=3, metric=likelihood, penalties=penalties)
    assert set(found.validation) == set(penalties)
    assert found.penalty == 1.0  # the small one overfits 30 images, the large one sees nothing
    assert found.validation[1.0] == max(found.validation.values())
    both = linear()
    logistic.fit(both, torch.cat([x, unseen]), torch.cat([y, truth]), penalty=1.0)
    torch.testing.assert_close(found.head.weight, both.weight, atol=1e-4, rtol=0)
    first = linear()
    logistic.fit(first, x, y, penalty=1.0)
    assert not torch.allclose(first.weight, both.weight, atol=1e-2)


def test_among_equals_the_largest_penalty_wins():
    x, y = blobs(30, 0.01)
    given = dict(classes=3, metric=logistic.top1, penalties=(1e-3, 1e-2, 1e-1))
    assert logistic.search(x, y, x, y, **given).penalty == 1e-1


def test_the_penalties_are_the_paper_s():
    assert len(logistic.PENALTIES) == 45
    assert logistic.PENALTIES[0] == pytest.approx(1e-6)
    assert logistic.PENALTIES[-1] == pytest.approx(1e5)
    ratios = np.diff(np.log(logistic.PENALTIES))
    np.testing.assert_allclose(ratios, ratios[0])


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    (x, y), (unseen, truth) = blobs(60, 0.5), blobs(30, 0.5, seed=1)
    given = dict(classes=3, metric=logistic.top1, penalties=(0.1, 1.0, 10.0))
    whole = logistic.search(x, y, unseen, truth, **given)
    fits, fit = [], logistic.fit

    def counting(*arguments, penalty):
        fits.append(penalty)
        if len(fits) == 3:
            raise KeyboardInterrupt
        fit(*arguments, penalty=penalty)

    monkeypatch.setattr(logistic, "fit", counting)
    parts = Parts(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        logistic.search(x, y, unseen, truth, **given, parts=parts)
    again = logistic.search(x, y, unseen, truth, **given, parts=parts)
    assert fits == [10.0, 1.0, 0.1, 0.1, whole.penalty]
    assert torch.equal(again.head.weight, whole.head.weight)
    assert again.validation == whole.validation


def test_metrics_by_hand():
    logits = torch.eye(3)[[0, 0, 0, 1, 2, 2]]
    targets = torch.tensor([0, 0, 0, 1, 1, 2])  # class 1: one of two is right
    assert logistic.top1(logits, targets) == pytest.approx(5 / 6)
    assert logistic.per_class(logits, targets) == pytest.approx((1 + 0.5 + 1) / 3)
    several = torch.tensor([[1, 0], [0, 1], [1, -1]])
    assert logistic.eleven_point_map(several.float(), several) == 1.0


def test_features_that_blow_up_are_named():
    head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="diverged at penalty 1"):
        logistic.fit(head, torch.full((4, 2), float("inf")), torch.tensor([0, 1, 0, 1]), penalty=1)
