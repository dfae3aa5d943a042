"""Evaluations read images by one decoder, whatever is installed and whatever is fastest."""

import json

import numpy as np
import pytest
import torch
from support import OPTIONAL_BACKENDS

from byol_fast.evaluate import decoding
from byol_fast.evaluate.batches import TrainingBatches
from byol_fast.evaluate.cache import FeatureCache
from byol_fast.evaluate.features import extract
from byol_fast.evaluate.recipes import FINETUNE
from pipelines.spec import AugmentSpec
from pipelines.stores import open_store
from tests.byol_fast.networks import CountingMeans

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def arrays(n: int = 8):
    images = np.random.default_rng(0).integers(0, 256, (n, 12, 16, 3), dtype=np.uint8)
    return open_store((images, np.arange(n) % 2))


def sources_of(monkeypatch):
    """Backend and decoder of every source that is opened."""
    opened, original = [], decoding.open_source

    def noted(*args, backend, decode, **options):
        opened.append((backend, decode))
        return original(*args, backend=backend, decode=decode, **options)

    monkeypatch.setattr(decoding, "open_source", noted)
    return opened


def test_auto_is_the_same_on_every_machine(monkeypatch):
    """Also where there is a GPU and DALI, which pretraining takes there."""
    monkeypatch.setattr("pipelines.sources.dali_available", lambda: True)
    assert decoding.pinned("auto", arrays()) == "torch"
    on_cpu, on_gpu = (decoding.described("auto", arrays(), device) for device in (CPU, GPU))
    assert on_cpu == on_gpu and on_cpu["backend"] == "torch"
    assert decoding.pinned("auto", open_store("synthetic:4")) == "synthetic"
    assert decoding.pinned("dali", arrays()) == "dali"


def test_features_and_training_batches_are_read_by_it(monkeypatch):
    opened = sources_of(monkeypatch)
    extract(CountingMeans(), arrays(), image_size=8, threads=1)
    recipe = FINETUNE.changed({"batch_size": 4, "steps": 1})
    spec = AugmentSpec(image_size=8)
    TrainingBatches(arrays(), recipe, spec, device=CPU, seed=0, threads=1).close()
    assert opened == [("torch", "cpu")] * 2  # "cpu": no trial, whatever the backend


def test_the_cache_knows_decoder_and_resizing(tmp_path):
    cache = FeatureCache(root=tmp_path, network={})
    given = {"image_size": 8, "spec": AugmentSpec()}
    keys = [
        cache.key(arrays(), device=device, backend=backend, **given)["reading"]
        for backend, device in (("auto", CPU), ("ffcv", CPU), ("dali", CPU), ("dali", GPU))
    ]
    assert all({"backend", "decoder", "resizing"} == key.keys() for key in keys)
    assert len({json.dumps(key) for key in keys}) == 4  # DALI resizes where the crops go


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="got 'pillow'"):
        decoding.described("pillow", arrays(), CPU)


@pytest.mark.parametrize("backend", OPTIONAL_BACKENDS[:1])  # FFCV reads .beton files alone
def test_a_backend_that_is_named_is_used(monkeypatch, backend):
    opened = sources_of(monkeypatch)
    first, again = (
        extract(CountingMeans(), arrays(), image_size=8, threads=1, backend=backend).features
        for _ in range(2)
    )
    assert opened == [(backend, "cpu")] * 2 and torch.equal(first, again)
