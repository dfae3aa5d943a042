"""Kept features: found again, made again when damaged, and gone on with after an interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from byol_fast.evaluate import cache as cache_module
from byol_fast.evaluate.cache import FeatureCache
from byol_fast.evaluate.features import extract, windows
from byol_fast.evaluate.parts import Parts
from pipelines.errors import BadImage
from pipelines.spec import AugmentSpec
from pipelines.stores import open_store
from tests.byol_fast.networks import CountingMeans


def arrays(n: int = 20, seed: int = 0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 12, 16, 3), dtype=np.uint8)
    return open_store((images, np.arange(n) % 2))


READING = {"image_size": 8, "batch_size": 4, "threads": 1}


@pytest.fixture
def kept(tmp_path):
    return FeatureCache(root=tmp_path / "cache", network={"weights": "abc"})


def files(kept):
    return sorted(kept.root.rglob("*.safetensors"))


def test_what_was_computed_is_read(kept):
    store, net = arrays(), CountingMeans()
    first = kept.extract(net, store, **READING)
    again = kept.extract(net, store, **READING)
    expected = extract(CountingMeans(), store, **READING)
    assert net.seen == 20 and first.stored == 0 and again.stored == 20
    assert first.computed == 20 and again.computed == 0 and again.images_per_second == 0
    for out in (first, again):
        assert torch.equal(out.features, expected.features)
        assert torch.equal(out.labels, expected.labels) and torch.equal(out.ids, expected.ids)
    about = json.loads((files(kept)[0].parent / "about.json").read_text())
    assert about["network"] == {"weights": "abc"} and about["data"] == store.fingerprint


def test_whatever_decides_the_features_makes_another_key(kept):
    store = arrays()
    variants = [
        {},
        {"image_size": 9},
        {"spec": AugmentSpec(mean=(0.1, 0.2, 0.3))},
        {"spec": AugmentSpec(std=(0.1, 0.2, 0.3))},
        {"crop": "whole"},
        {"crop": "square"},
        {"pooling": "2x2"},
    ]
    for change in variants:
        kept.extract(CountingMeans(), store, **{**READING, **change})
    kept.extract(CountingMeans(), arrays(seed=1), **READING)
    replace(kept, network={"weights": "other"}).extract(CountingMeans(), store, **READING)
    given = {"image_size": 8, "spec": AugmentSpec(), "backend": "auto"}
    keys = [kept.key(store, device=torch.device(d), **given) for d in ("cpu", "cuda")]
    assert keys[0]["precision"] == "fp32" and keys[1]["precision"] == "bf16"
    assert len(list(kept.root.iterdir())) == len(variants) + 2


@pytest.mark.parametrize("interrupted_after", [4, 12])
def test_an_interrupted_extraction_goes_on(kept, monkeypatch, interrupted_after):
    monkeypatch.setattr(cache_module, "CHUNK_SECONDS", 0.0)  # a chunk for each batch
    store = arrays()
    with pytest.raises(KeyboardInterrupt):
        kept.extract(CountingMeans(interrupted_after), store, **READING)
    assert len(files(kept)) == interrupted_after // 4
    net = CountingMeans()
    out = kept.extract(net, store, **READING)
    assert net.seen == 20 - interrupted_after and out.stored == interrupted_after
    assert torch.equal(out.features, extract(CountingMeans(), store, **READING).features)


def test_chunks_are_bounded_by_rows(kept, monkeypatch):
    monkeypatch.setattr(cache_module, "CHUNK_ROWS", 8)
    kept.extract(CountingMeans(), arrays(), **READING)
    assert [path.name[:9] for path in files(kept)] == ["000000000", "000000008", "000000016"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_chunk_is_made_again(kept, monkeypatch, caplog, damage):
    monkeypatch.setattr(cache_module, "CHUNK_SECONDS", 0.0)
    store = arrays()
    whole = kept.extract(CountingMeans(), store, **READING).features
    victim = files(kept)[2]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    cut = {"flip": content, "truncate": content[: len(content) // 2], "empty": b""}[damage]
    victim.write_bytes(cut)
    net = CountingMeans()
    out = kept.extract(net, store, **READING)
    assert "damaged and is made again" in caplog.text and net.seen == 12
    assert torch.equal(out.features, whole)
    assert kept.extract(CountingMeans(0), store, **READING).stored == 20  # it is whole again


def test_undecodable_images_stay_known(kept, caplog):
    class Broken:
        def __init__(self, store):
            self.store = store
            self.encoded, self.sizes = store.encoded, store.sizes
            self.labels, self.classes = store.labels, store.classes
            self.fingerprint, self.quarantined, self.name = "b", (), store.name

        def __len__(self):
            return len(self.store)

        def read(self, row):
            if row in (1, 9):
                raise BadImage("cannot be read: gone")
            return self.store.read(row)

    store = Broken(arrays())
    first = kept.extract(CountingMeans(), store, **READING)
    again = kept.extract(CountingMeans(0), store, **READING)
    assert sorted(again.bad) == [1, 9] and again.bad == first.bad
    assert again.ids.tolist() == first.ids.tolist() and len(again.ids) == 18
    assert torch.equal(again.features, first.features) and again.computed == 0


def test_without_a_folder_or_room_everything_still_works(tmp_path, caplog):
    store = arrays()
    nothing = FeatureCache(root=None, network={})
    assert nothing.extract(CountingMeans(), store, **READING).stored == 0
    assert nothing.extract(CountingMeans(), store, **READING).stored == 0
    (tmp_path / "file").write_text("")
    blocked = FeatureCache(root=tmp_path / "file", network={})
    assert len(blocked.extract(CountingMeans(), store, **READING).features) == 20
    assert "nothing is kept" in caplog.text and "--cache" in caplog.text


def test_a_part_that_cannot_be_written_is_said_once(tmp_path, caplog):
    parts = Parts(tmp_path, {"a": 1})
    parts.folder.joinpath("about.json").unlink()
    parts.folder.rmdir()  # as a full disk would, it fails
    parts.write("x", {"t": torch.zeros(2)}, {})
    parts.write("y", {"t": torch.zeros(2)}, {})
    assert caplog.text.count("nothing is kept") == 1 and parts.read("x") is None


def test_temporary_files_of_killed_runs_are_removed(tmp_path):
    import os

    folder = Parts(tmp_path, {}).folder
    old, new = folder / "a.safetensors.tmp1", folder / "b.safetensors.tmp2"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    Parts(tmp_path, {})
    assert not old.exists() and new.exists()


def test_windows():
    sizes = np.array([[375, 500], [500, 375]])
    assert windows(sizes, "centre")[0, 0].tolist() == [24, 86, 328, 328]
    assert windows(sizes, "square")[:, 0].tolist() == [[0, 63, 375, 375], [63, 0, 375, 375]]
    assert windows(sizes, "whole")[:, 0].tolist() == [[0, 0, 375, 500], [0, 0, 500, 375]]
