"""Features of evaluation crops, and the split and class matching they are judged by."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from byol_fast.evaluate import knn
from byol_fast.evaluate.data import Subset, prepare, stratified_split
from byol_fast.evaluate.features import extract
from pipelines.augment import reference
from pipelines.crops import centre_windows
from pipelines.errors import BadImage, DataError
from pipelines.sources.torch_source import resize_crop
from pipelines.spec import AugmentSpec
from pipelines.stores import open_store


def arrays(n: int = 20, classes: int = 2, size: tuple[int, int] = (20, 28), seed: int = 0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)
    return open_store((images, np.arange(n) % classes))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Named:
    """A store of encoded images with names of the test's choice."""

    encoded, quarantined, fingerprint = True, (), "named"

    def __init__(self, names, labels, classes, broken=()):
        self._names, self.classes, self._broken = names, classes, broken
        self.labels = np.asarray(labels, dtype=np.int32)
        self.sizes = np.full((len(names), 2), 16, dtype=np.int32)
        self.fingerprint = "".join(names)

    def __len__(self):
        return len(self._names)

    def name(self, row):
        return self._names[row]

    def read(self, row):
        if row in self._broken:
            raise BadImage("cannot be read: gone")
        data = io.BytesIO()
        Image.new("RGB", (16, 16), (row * 7 % 256, 99, 10)).save(data, "PNG")
        return data.getvalue()


def test_features_are_those_of_the_normalised_centre_crop():
    store, net = arrays(), small_net()
    spec = AugmentSpec(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    out = extract(net, store, image_size=16, spec=spec, batch_size=6, threads=2)
    window = centre_windows(store.sizes[:1])[0, 0].tolist()
    assert window == [2, 6, 17, 17]
    crops = torch.stack([resize_crop(store.read(row), window, 16) for row in range(len(store))])
    x = reference.normalise(crops[None], AugmentSpec(image_size=16, mean=spec.mean, std=spec.std))
    with torch.no_grad():
        expected = net.eval()(x[0])
    torch.testing.assert_close(out.features, expected)
    assert out.labels.tolist() == store.labels.tolist()
    assert out.ids.tolist() == list(range(20)) and out.bad == {}
    assert out.features.dtype == torch.float32 and out.images_per_second > 0


def test_modes_come_back_and_statistics_stay():
    net = small_net().train()
    net[1].eval()
    mean = net[1].running_mean.clone()
    extract(net, arrays(), image_size=16, threads=1)
    assert net.training and not net[1].training and net[2].training
    assert torch.equal(net[1].running_mean, mean)
    assert all(p.grad is None for p in net.parameters())


def test_undecodable_images_are_left_out_and_named(caplog):
    store = Named([f"d/a/{i}.png" for i in range(6)], [0, 1, 0, 1, 0, 1], ("a", "b"), broken={1, 4})
    out = extract(small_net(), store, image_size=8, batch_size=4, threads=1)
    whole = Named([f"d/a/{i}.png" for i in range(6)], [0, 1, 0, 1, 0, 1], ("a", "b"))
    all_six = extract(small_net(), whole, image_size=8, batch_size=4, threads=1).features
    assert torch.equal(out.features, all_six[[0, 2, 3, 5]])
    assert out.ids.tolist() == [0, 2, 3, 5]
    assert out.labels.tolist() == [0, 0, 1, 1]
    assert len(out.features) == 4 and sorted(out.bad) == [1, 4]
    assert "2 images could not be decoded" in caplog.text
    nothing = Named(["d/a/0.png"], [0], ("a",), broken={0})
    with pytest.raises(DataError, match="none of the 1 images"):
        extract(small_net(), nothing, image_size=8, threads=1)


def test_backbones_without_usable_features_are_named():
    with pytest.raises(ValueError, match=r"must be \[B, F\]"):
        extract(nn.Conv2d(3, 4, 3), arrays(), image_size=16, threads=1)
    broken = small_net()
    with torch.no_grad():
        broken[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        extract(broken, arrays(), image_size=16, threads=1)


def test_raw_pixels_are_the_normalised_crop():
    store = arrays()
    raw = knn.raw_pixel_features(store, 16, threads=1)
    assert raw.features.shape == (20, 3 * 16 * 16)
    same = extract(nn.Flatten(), store, image_size=16, threads=2, batch_size=7)
    assert torch.equal(raw.features, same.features)


def test_progress_shows_on_stderr_only_when_asked(capsys, monkeypatch):
    monkeypatch.setattr("pipelines.progress._LINE_EVERY", 0.0)
    extract(small_net(), arrays(), image_size=16, batch_size=8, threads=1)
    assert capsys.readouterr().err == ""
    extract(small_net(), arrays(), image_size=16, batch_size=8, threads=1, progress=True)
    assert "8 of 20 images" in capsys.readouterr().err


def test_a_subset_is_a_store_of_its_rows():
    store = arrays(10, classes=5)
    part = Subset(store, np.array([7, 2]), labels=np.array([1, 0]), classes=("x", "y"))
    assert len(part) == 2 and part.labels.tolist() == [1, 0] and part.classes == ("x", "y")
    assert np.array_equal(part.read(0), store.read(7)) and part.name(1) == store.name(2)
    assert part.fingerprint != store.fingerprint
    assert part.fingerprint != Subset(store, np.array([2, 7])).fingerprint


def folder_like(root: str, order=None) -> Named:
    names = [(f"c{c}", f"{i}.png") for c in range(3) for i in range(10 * (c + 1))]
    names = [names[i] for i in order] if order is not None else names
    paths = [f"{root}/{c}/{file}" for c, file in names]
    return Named(paths, [int(c[1]) for c, _ in names], ("c0", "c1", "c2"))


def test_the_split_is_stratified_complete_and_a_function_of_names_alone():
    store = folder_like("/data/one")
    train, test = stratified_split(store)
    assert sorted([*train, *test]) == list(range(60))
    assert np.bincount(store.labels[test]).tolist() == [2, 4, 6]
    order = np.random.default_rng(0).permutation(60)
    moved = folder_like("/elsewhere/c1/two", order)
    _, test_again = stratified_split(moved)
    short = {store.name(i).removeprefix("/data/one") for i in test}
    assert {moved.name(i).removeprefix("/elsewhere/c1/two") for i in test_again} == short


def test_small_classes_stay_on_both_sides():
    store = Named([f"d/{c}/{i}" for c, i in ["a0", "b0", "b1"]], [0, 1, 1], ("a", "b"))
    train, test = stratified_split(store)
    assert sorted(store.labels[train]) == [0, 1] and store.labels[test].tolist() == [1]


def test_without_a_test_set_a_fifth_is_held_out_and_said():
    data = prepare(folder_like("d"))
    assert (len(data.train), len(data.test)) == (48, 12)
    assert "held-out 20% of --data" in data.source and data.classes == ("c0", "c1", "c2")


def test_test_classes_are_matched_by_name():
    train = Named(["d/a/0", "d/b/1", "d/c/2"], [0, 1, 2], ("a", "b", "c"))
    test = Named(["t/c/0", "t/a/1"], [1, 0], ("a", "c"))
    data = prepare(train, test)
    assert data.test.labels.tolist() == [2, 0] and data.test.classes == ("a", "b", "c")
    stranger = Named(["t/c/0", "t/x/1"], [0, 1], ("c", "x"))
    with pytest.raises(DataError, match=r"1 classes that --data lacks \(x\)"):
        prepare(train, stranger)
    unused = Named(["t/c/0"], [0], ("c", "x"))  # an empty class folder is no disagreement
    assert prepare(train, unused).test.labels.tolist() == [2]


@pytest.mark.parametrize("names", [(), tuple(map(str, range(900_001)))], ids=["arrays", "list"])
def test_class_numbers_with_gaps_make_no_classes(names):
    """An array has no names; a list's are all numbers up to the largest."""
    paths = [f"d/{i}.png" for i in range(10)]
    data = prepare(Named(paths, [3, 900_000] * 5, names))
    assert data.classes == ("3", "900000") and data.numbers.tolist() == [3, 900_000]
    assert sorted(np.unique(data.train.labels)) == sorted(np.unique(data.test.labels)) == [0, 1]
    assert "class numbers from 3 to 900000 have gaps" in data.source
    test = Named(["t/0.png", "t/1.png"], [900_000, 3], names)
    assert prepare(Named(paths, [3, 900_000] * 5, names), test).test.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"1 classes that --data lacks \(7\)"):
        prepare(Named(paths, [3, 900_000] * 5, names), Named(["t/0.png"], [7], names))


def test_class_numbers_without_gaps_stay_as_they_are():
    paths = [f"d/{i}.png" for i in range(10)]
    unnamed, listed = Named(paths, [0, 1] * 5, ()), Named(paths, [0, 1] * 5, ("0", "1"))
    folders = Named(paths, [0, 2] * 5, ("a", "b", "c"))  # b is a class, though empty
    for store, classes in ((unnamed, ("0", "1")), (listed, ("0", "1")), (folders, tuple("abc"))):
        data = prepare(store)
        assert data.classes == classes and data.numbers is None and "gaps" not in data.source


def test_unusable_data_is_refused():
    with pytest.raises(DataError, match="--data has no labels"):
        prepare(Named(["a", "b"], [-1, -1], ()))
    with pytest.raises(DataError, match="one class only \\('a'\\)"):
        prepare(Named(["d/a/0", "d/a/1"], [0, 0], ("a", "b")))
    store = folder_like("d")
    with pytest.raises(DataError, match="the same images"):
        prepare(store, store)
    partly = Named(["d/a/0", "d/b/1", "d/b/2"], [0, 1, -1], ("a", "b"))
    with pytest.raises(DataError, match="the same images"):
        prepare(partly, partly)
    with pytest.raises(DataError, match="the test set has no labels"):
        prepare(store, Named(["a"], [-1], ()))
    with pytest.raises(DataError, match="one image per class"):
        prepare(Named(["d/a/0", "d/b/1"], [0, 1], ("a", "b")))


def test_unlabelled_images_among_labelled_ones_are_left_out():
    labels = np.array([0, 1] * 10 + [-1] * 5)
    store = open_store((np.zeros((25, 8, 8, 3), np.uint8), labels))
    data = prepare(store)
    assert len(data.train) + len(data.test) == 20
    assert "5 images of --data without a label" in data.source
