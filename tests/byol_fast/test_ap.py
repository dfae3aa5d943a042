"""Average precision by both definitions, on rankings worked out by hand."""

import numpy as np
import pytest

from byol_fast.evaluate.ap import average_precision, eleven_point, mean_precision


def ranked(truth):
    return np.arange(len(truth), 0, -1, dtype=float)


@pytest.mark.parametrize(
    ("truth", "area", "eleven"),
    [
        ([1, 1, 0, 0], 1.0, 1.0),  # perfect
        ([0, 0, 0, 1], 1 / 4, 1 / 4),
        ([1, 0, 1, 0], (1 + 2 / 3) / 2, (6 * 1 + 5 * 2 / 3) / 11),
        ([0, 1, 1], 2 / 3, 2 / 3),  # the envelope lifts 1/2 to 2/3: without it .5833
        ([1, 0, 0, 0, 1, 1], (1 + 1 / 2 + 1 / 2) / 3, (4 * 1 + 7 / 2) / 11),
    ],
)
def test_rankings_by_hand(truth, area, eleven):
    assert average_precision(truth, ranked(truth)) == pytest.approx(area, abs=1e-12)
    assert eleven_point(truth, ranked(truth)) == pytest.approx(eleven, abs=1e-12)


def test_random_scores_give_the_share_of_positives():
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) < 0.1
    assert average_precision(truth, rng.random(20_000)) == pytest.approx(0.1, abs=0.01)
    assert eleven_point(truth, rng.random(20_000)) == pytest.approx(0.1, abs=0.02)
    assert average_precision(truth, np.zeros(20_000)) == pytest.approx(truth.mean())


def test_equal_scores_do_not_depend_on_the_order():
    truth, scores = np.array([1, 0, 0, 1]), np.array([2.0, 2, 1, 1])
    backwards = average_precision(truth[::-1], scores[::-1])
    assert average_precision(truth, scores) == backwards == pytest.approx(0.5)


def test_the_mean_leaves_out_difficult_images_and_classes_nobody_shows():
    targets = np.array([[1, -1, 0], [0, 1, 0], [-1, 0, 0], [0, 0, 0]])
    scores = np.array([[3, 9, 1], [2, 5, 1], [9, 4, 1], [1, 1, 1]], dtype=float)
    mean, each = mean_precision(targets, scores)
    assert each[:2] == [1.0, 1.0] and np.isnan(each[2]) and mean == 1.0
    assert np.isnan(mean_precision(np.zeros((3, 1)), np.zeros((3, 1)))[0])
    with pytest.raises(ValueError, match=r"must be \[n\]"):
        average_precision([1, 0], [0.5])


def test_the_unlifted_area_is_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(1)
    truth, scores = rng.random(200) < 0.3, rng.random(200)
    ours, theirs = average_precision(truth, scores), metrics.average_precision_score(truth, scores)
    assert theirs < ours < theirs + 0.05  # the envelope only adds
    assert average_precision(truth, truth + 0.1 * scores) == 1.0
