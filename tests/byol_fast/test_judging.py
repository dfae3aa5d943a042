"""What a run is judged by while it trains, where class numbers have gaps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from byol_fast.distributed import World
from byol_fast.session.judging import judges
from pipelines.spec import AugmentSpec
from pipelines.stores import open_store
from tests.byol_fast.networks import CountingMeans


class OnePart:
    one_label_space = True

    def __len__(self):
        return 1


def judged(numbers):
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
    store = open_store((images, np.array(numbers)[np.arange(20) % len(numbers)]))
    store.classes = tuple(map(str, range(max(numbers) + 1)))  # as a list of images has them
    return judges(
        SimpleNamespace(store=store, parts=OnePart(), evaluated=None),
        World(0, 1, torch.device("cpu")),
        spec=AugmentSpec(image_size=8),
        feature_dim=3,
        threads=1,
    )


def test_the_probe_keeps_the_numbers_of_the_data():
    """It learns from the labels as they are, so it has to be judged by them."""
    evaluation, probe = judged([0, 4])
    assert evaluation.classes == ("0", "4") and probe.linear.out_features == 5
    with torch.no_grad():
        probe.linear.bias[4] = 1e3
    right = float((evaluation.queries.labels == 1).mean())
    assert evaluation.measure(CountingMeans(), probe)["probe_accuracy"] == pytest.approx(right)


def test_numbers_of_something_else_leave_knn_alone(caplog):
    evaluation, probe = judged([3, 900_000])
    assert probe is None and "2 classes are numbered up to 900000" in caplog.text
    assert 0 <= evaluation.measure(CountingMeans())["knn_accuracy"] <= 1
