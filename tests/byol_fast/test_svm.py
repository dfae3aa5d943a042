"""SVMs against scikit-learn's own, low-shot draws, and what C is chosen by."""

import builtins

import numpy as np
import pytest

from byol_fast.evaluate import lowshot, svm, svmfit
from byol_fast.evaluate.parts import Parts
from pipelines.errors import MissingBackend

pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")

COSTS = (0.01, 1.0, 100.0)


def blobs(n: int = 60, classes: int = 3, noise: float = 0.3, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = np.eye(classes, 6)[labels] + noise * rng.standard_normal((n, 6))
    return x.astype(np.float32), (labels[:, None] == np.arange(classes)).astype(np.int8)


def test_equals_scikit_learn_s_grid_search():
    from sklearn.model_selection import GridSearchCV
    from sklearn.preprocessing import normalize
    from sklearn.svm import LinearSVC

    (x, targets), (unseen, truth) = blobs(noise=0.6), blobs(45, noise=0.6, seed=1)
    ours = svm.fit(x, targets, unseen, truth, costs=COSTS)
    for c in range(3):
        y = np.where(targets[:, c] == 1, 1, -1)
        estimator = LinearSVC(class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)
        grid = GridSearchCV(estimator, {"C": COSTS}, cv=3, scoring="average_precision")
        grid.fit(normalize(x.astype(np.float64)), y)
        assert ours.costs[c] == grid.best_params_["C"]
        assert ours.crossval_aps[c] == pytest.approx(grid.best_score_, abs=1e-4)
        theirs = grid.decision_function(normalize(unseen.astype(np.float64)))
        np.testing.assert_allclose(ours.scores[:, c], theirs, atol=1e-3)
    assert 0.6 < ours.mean_ap < 1 and ours.top1 == (ours.scores.argmax(1) == truth.argmax(1)).mean()


def test_separable_classes_are_separated_and_noise_is_not():
    (x, targets), (unseen, truth) = blobs(noise=0.05), blobs(45, noise=0.05, seed=1)
    result = svm.fit(x, targets, unseen, truth, costs=COSTS)
    assert result.mean_ap == 1.0 and result.top1 == 1.0 and result.aps == [1.0] * 3
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 6))
    shuffled = svm.fit(x, targets, noise, blobs(300)[1], costs=(1.0,))
    assert shuffled.mean_ap == pytest.approx(1 / 3, abs=0.1)


def test_the_recipe_is_the_published_one():
    assert len(svm.COSTS) == 19 and svm.COSTS[:3] == (1, 10, 100)
    assert svm.COSTS[3] == 0.5**4 and svm.COSTS[-1] == 0.5**19
    values = svm.classifier(0.25).get_params()
    assert values["C"] == 0.25 and values["class_weight"] == {1: 2, -1: 1}
    assert values["loss"] == "squared_hinge" and values["penalty"] == "l2" and values["dual"]
    assert values["max_iter"] == 2000 and svm.FOLDS == 3
    lengths = np.linalg.norm(svm.normalised(blobs()[0]), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-4)
    assert lowshot.SHOTS == (1, 2, 4, 8, 16, 32, 64, 96) and lowshot.SAMPLES == 5


def test_difficult_is_a_negative_in_training_and_left_out_of_the_test(monkeypatch):
    (x, targets), (unseen, truth) = blobs(noise=0.05), blobs(12, noise=0.05, seed=1)
    learned = []
    original = svmfit.fit_class
    monkeypatch.setattr(svmfit, "fit_class", lambda *a: learned.append(a[1]) or original(*a))
    targets[:6, 0] = -1
    truth[[3, 4]] = [[-1, 1, 0], [0, 0, 0]]  # they look like classes 0 and 1
    result = svm.fit(x, targets, unseen, truth, costs=(1.0,))
    assert (learned[0][:6] == -1).all() and (learned[0] == 1).sum() == 18
    assert result.top1 is None  # an image shows none
    assert result.aps[0] == 1.0
    truth[3, 0] = 0  # now it counts, and it ranks among the best
    assert svm.fit(x, targets, unseen, truth, costs=(1.0,)).aps[0] < 0.9


def test_classes_too_small_to_choose_by_and_classes_nobody_shows():
    x, targets = blobs(30)
    targets[:, 2] = 0
    targets[2, 2] = 1  # one image: no folds
    unseen, truth = blobs(15, seed=1)
    truth[:, 1] = 0
    result = svm.fit(x, targets, unseen, truth, costs=(100.0, 0.01))
    assert result.costs[2] == svm.USUAL_COST and np.isnan(result.crossval_aps[2])
    assert np.isnan(result.aps[1]) and result.mean_ap == pytest.approx(
        (result.aps[0] + result.aps[2]) / 2
    )
    targets[:, 1] = 0  # nothing to learn: no error, and equal scores
    assert len(np.unique(svm.fit(x, targets, unseen, truth, costs=(1.0,)).scores[:, 1])) == 1


def test_a_class_without_images_is_nobody_s_best_guess():
    """Labels may leave numbers out; SVMs may reject an image of noise in every class there is."""
    (x, targets), (unseen, truth) = blobs(noise=0.6), blobs(300, noise=2.0, seed=1)
    gap = [np.insert(part, 1, 0, axis=1) for part in (targets, truth)]
    found = svm.fit(x, gap[0], unseen, gap[1], costs=(1.0,))
    assert (np.delete(found.scores, 1, axis=1).max(axis=1) < 0).any()
    assert found.top1 == svm.fit(x, targets, unseen, truth, costs=(1.0,)).top1


def test_finished_classes_are_not_fitted_again(tmp_path, monkeypatch):
    (x, targets), (unseen, truth) = blobs(), blobs(15, seed=1)
    whole = svm.fit(x, targets, unseen, truth, costs=(1.0,))
    calls = []
    original = svmfit.fit_class

    def counting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(svmfit, "fit_class", counting)
    parts = Parts(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        svm.fit(x, targets, unseen, truth, costs=(1.0,), parts=parts)
    again = svm.fit(x, targets, unseen, truth, costs=(1.0,), parts=parts)
    assert len(calls) == 4  # two before, one that failed, and that one again
    assert np.array_equal(again.scores, whole.scores) and again.aps == whole.aps


@pytest.mark.slow
def test_more_processes_change_nothing():
    (x, targets), (unseen, truth) = blobs(noise=0.6), blobs(15, seed=1)
    one, two = (svm.fit(x, targets, unseen, truth, costs=COSTS, jobs=j) for j in (1, 2))
    assert np.array_equal(one.scores, two.scores) and one.costs == two.costs


def test_scikit_learn_missing_is_said(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingBackend, match=r"pip install '\.\[evaluate\]'"):
        svm.classifier(1.0)


def test_draws_hold_k_of_each_class_and_are_repeatable():
    _, targets = blobs(60)
    targets[0, 0] = targets[1, 0] = -1
    drawn = lowshot.draw(targets, 4, seed=0, sample=0)
    for c, (shown, others) in enumerate(drawn):
        assert len(set(shown)) == 4 and (targets[shown, c] == 1).all()
        assert len(set(others)) == 8 and (targets[others, c] == 0).all()

    def flat(**given):
        return [a.tolist() for pair in lowshot.draw(targets, 4, **given) for a in pair]

    assert flat(seed=0, sample=0) == flat(seed=0, sample=0)
    others = [flat(seed=1, sample=0), flat(seed=0, sample=1)]
    assert flat(seed=0, sample=0) not in others and others[0] != others[1]
    common = (np.arange(60) < 40).astype(np.int8)
    ((_, rest), _) = lowshot.draw(np.stack([common, 1 - common], 1), 20, seed=0, sample=0)
    assert len(rest) == 20
    ((_, rest), _) = lowshot.draw(np.stack([common, common], 1), 30, seed=0, sample=0)
    assert len(rest) == 20  # all there are


def test_low_shot_improves_with_images_and_gives_mean_and_spread(tmp_path):
    (x, targets), (unseen, truth) = blobs(90, noise=0.5), blobs(60, noise=0.5, seed=1)
    parts = Parts(tmp_path, {})
    given = dict(shots=(1, 16), samples=3, costs=COSTS, parts=parts)
    one, many = lowshot.fit(x, targets, unseen, truth, **given)
    assert (one.k, many.k) == (1, 16) and len(one.mean_aps) == len(one.top1s) == 3
    assert many.mean > one.mean + 0.05 and one.std > 0
    assert one.mean == pytest.approx(np.mean(one.mean_aps)) and one.negatives == 2
    assert one.cost in COSTS and one.cost_chosen
    assert lowshot.fit(x, targets, unseen, truth, **given)[1].mean_aps == many.mean_aps
    with pytest.raises(ValueError, match=r"k=31, but a class has 30"):
        lowshot.fit(x, targets, unseen, truth, shots=(31,))
    with pytest.raises(ValueError, match="at least 2"):
        lowshot.fit(x, targets, unseen, truth, shots=(1,), samples=1)


def test_low_shot_c_does_not_see_the_test_images():
    """Whatever the test labels are, C is the same; and it is the one best on other samples."""
    (x, targets), (unseen, truth) = blobs(90, noise=0.5), blobs(60, noise=0.5, seed=1)
    given = dict(shots=(4,), samples=2, costs=COSTS)
    straight = lowshot.fit(x, targets, unseen, truth, **given)[0]
    turned = lowshot.fit(x, targets, unseen, np.roll(truth, 1, axis=1), **given)[0]
    assert straight.cost == turned.cost and straight.mean > turned.mean
    known = np.array([[0.5, 0.9, 0.9], [0.6, 0.7, 0.7]])
    assert lowshot._choose(known, (1.0, 10.0, 0.1)) == 2  # of equals the smaller C
    assert lowshot._choose(np.empty((0, 3)), (10.0, 1.0, 0.1)) == 1


def test_low_shot_without_images_to_choose_by():
    x, targets = blobs(6, noise=0.1)  # two of each: k=2 draws all of them, always
    unseen, truth = blobs(15, noise=0.1, seed=1)
    result = lowshot.fit(x, targets, unseen, truth, shots=(2,), samples=2, costs=(0.01, 1.0))[0]
    assert not result.cost_chosen and result.cost == 1.0 and result.std == 0
