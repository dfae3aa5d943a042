"""svm, lowshot, transfer, predict and embed to the end: VOC in its own format, class folders."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

from byol_fast import export
from byol_fast.classifier import Classifier
from byol_fast.errors import Exit
from byol_fast.evaluate import embedding, logistic, svm
from byol_fast.evaluate import features as features_module
from byol_fast.evaluate import head as heads
from byol_fast.evaluate.__main__ import main
from byol_fast.evaluate.pooling import Corners, with_corners
from byol_fast.networks.backbone import build_backbone
from tests.byol_fast.networks import CountingMeans
from tests.byol_fast.voc_folder import voc_folder

META = {"backbone": "resnet18", "stem": "imagenet", "hidden_layer": -1, "image_size": 64}
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    net = build_backbone("resnet18", image_size=64)
    path = tmp_path_factory.mktemp("run") / "backbone"
    return export.export_backbone(net, path, META)[0]


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return voc_folder(tmp_path_factory.mktemp("data") / "VOCdevkit").parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data") / "shapes", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(20):
            image = rng.integers(90, 130, (36, 40, 3), dtype=np.uint8)
            image[6:30, 6:30] = colour
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # shared: each protocol's features once


def run(task, *words, out=None):
    where = ["--out", str(out)] if out else []
    code = main([task, *map(str, words), "--device", "cpu", "--threads", "1", *where])
    return code, json.loads(out.read_text()) if out and out.is_file() else None


def test_svm_on_voc(weights, voc, cache, tmp_path, capsys):
    words = ("--weights", weights, "--data", voc, "--cache", cache, "--jobs", 1)
    code, result = run("svm", *words, out=tmp_path / "svm.json")
    text = capsys.readouterr().out
    assert code == Exit.DONE and "SVM, 19 C in 3 folds" in text and "mAP %" in text
    assert "mAP 86.31 on VOC07 (OpenMixup, 200 epochs)" in text
    assert result["published_protocol"] and result["top1"] is None and result["map"] > 0.8
    assert result["map"] == pytest.approx(np.mean([c["ap"] for c in result["classes"].values()]))
    assert list(result["classes"]) == ["bird", "boat", "cat"]
    protocol = result["protocol"]
    assert protocol["crop"] == "whole" and protocol["pooling"] == "2x2"
    assert protocol["features"] == 4 * 512 and len(protocol["costs"]) == 19
    assert result["images"] == {"train": 36, "test": 24} and result["data"]["classes"] == 3
    code, again = run("svm", *words, out=tmp_path / "again.json")
    assert again["map"] == result["map"]
    assert "features of 60 images came from the cache" in capsys.readouterr().out


def test_low_shot_on_voc(weights, voc, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(svm, "COSTS", (0.1, 1.0))  # the 19 have been through above
    words = ("--weights", weights, "--data", voc, "--cache", cache, "--jobs", 1)
    code, result = run("lowshot", *words, "--k", 1, 8, out=tmp_path / "low.json")
    text = capsys.readouterr().out
    assert code == Exit.DONE and "k=1, 5 samples, mAP ±" in text
    assert "mAP 45.37 on VOC07" in text and "mAP 74.12 on VOC07" in text
    assert "other samples' training images" in text
    assert set(result["k"]) == {"1", "8"} and len(result["k"]["8"]["map_of_samples"]) == 5
    assert result["k"]["8"]["map"] > result["k"]["1"]["map"] and result["k"]["1"]["map_std"] > 0
    assert "other samples" in result["cost_chosen_by"] and result["published_protocol"]


def test_transfer_on_voc(weights, voc, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logistic, "MOST_STEPS", 30)
    words = ("--weights", weights, "--data", voc, "--cache", cache)
    code, result = run("transfer", *words, out=tmp_path / "t.json")
    text = capsys.readouterr().out
    assert code == Exit.DONE and "mAP11 82.5 on VOC2007 (BYOL paper, table 3" in text
    assert result["images"] == {"train": 27, "validation": 9, "test": 24}
    assert result["figures"]["mAP11"] > 0.7 and len(result["validation"]) == 45
    assert "VOC's val list" in result["chosen_on"]
    assert result["protocol"]["crop"] == "square" and result["protocol"]["pooling"] == "global"
    assert Classifier.load(weights, result["head"]).multi_label
    code, _ = run("transfer", *words, "--test-data", tmp_path)
    assert code == Exit.DATA and "is no VOC folder" in capsys.readouterr().err
    code, _ = run("transfer", *words, "--dataset", "pets", out=tmp_path / "no.json")
    assert code == Exit.USAGE and "images of several classes" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["svm", "lowshot", "transfer", "knn"])
def test_quick_on_class_folders(weights, folders, cache, tmp_path, capsys, task):
    words = ("--weights", weights, "--data", folders, "--cache", cache, "--quick")
    words += ("--jobs", 1) if task in ("svm", "lowshot") else ()
    code, result = run(task, *words, out=tmp_path / "q.json")
    text = capsys.readouterr().out
    assert code == Exit.DONE and "quick" in text and "published *" in text
    assert result["published_protocol"] is False and "yardstick" not in text
    found = {
        "svm": lambda: (result["map"], result["top1"]),
        "lowshot": lambda: (result["k"]["4"]["map"], result["k"]["4"]["top1_of_samples"][0]),
        "transfer": lambda: result["figures"].values(),
        "knn": lambda: (result["top1"]["10"],),
    }[task]()
    assert all(share > 0.9 for share in found)  # colours survive random weights
    if task == "lowshot":
        assert set(result["k"]) == {"1", "4", "16"} and result["k"]["4"]["negatives"] == 8


def test_transfer_picks_the_data_set_s_metric(weights, folders, cache, tmp_path, capsys):
    words = ("--weights", weights, "--data", folders, "--cache", cache, "--quick")
    given = ("--val-data", folders, "--test-data", folders)
    _, result = run("transfer", *words, "--dataset", "pets", out=tmp_path / "p.json")
    assert list(result["figures"]) == ["per class", "top-1"]
    assert "held-out fifth" in result["chosen_on"]
    code, _ = run("transfer", *words, *given)
    assert code == Exit.DATA and "the same images" in capsys.readouterr().err
    code, _ = run("transfer", *words, "--dataset", "voc2007")
    assert code == Exit.USAGE and "one class each" in capsys.readouterr().err


def test_two_windows_a_side_are_the_benchmark_s():
    x = torch.arange(49.0).reshape(1, 1, 7, 7)
    expected = [x[0, 0, i : i + 6, j : j + 6].mean().item() for i in (0, 1) for j in (0, 1)]
    assert Corners()(x)[0].tolist() == pytest.approx(expected)
    assert Corners()(torch.ones(2, 3, 1, 1)).shape == (2, 3)
    assert Corners()(torch.ones(1, 2048, 7, 7)).shape == (1, 8192)
    net = build_backbone("resnet18", image_size=64).eval()
    with torch.no_grad():
        maps = with_corners(net)(torch.randn(2, 3, 32, 32))  # a map of one pixel: as it was
        assert maps.shape == (2, 512)
    assert with_corners(torch.nn.Flatten()) is None


@pytest.fixture(scope="module")
def head(weights, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("head") / "linear.json"
    words = ("linear", "--quick", "--weights", weights, "--data", folders, "--out", out)
    assert main([*map(str, words), "--device", "cpu", "--threads", "1", "--no-cache"]) == Exit.DONE
    return out.with_name("linear.head.safetensors")


def test_predict_names_classes_and_scores(weights, folders, head, capsys):
    images = [folders / "red" / "3.png", folders / "blue" / "0.png"]
    code, _ = run("predict", *images, "--weights", weights, "--head", head)
    out = capsys.readouterr().out
    assert code == Exit.DONE and f"{images[0]}: red" in out and f"{images[1]}: blue" in out
    assert out.count("green") == 2  # top 5 of three classes
    code, _ = run("predict", *images, "--weights", weights, "--head", head, "--json", "--top", 2)
    first, second = json.loads(capsys.readouterr().out)
    assert first["pred_class"] == "red" and second["pred_class"] == "blue"
    assert first["top"][0] == ["red", first["pred_score"]] and len(first["top"]) == 2
    assert 1 / 3 < first["pred_score"] <= 1 and first["pred_label"] == 2


def test_predict_does_the_rest_when_an_image_is_broken(weights, folders, head, tmp_path, capsys):
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_bytes(b"no image")
    cut.write_bytes((folders / "red" / "1.png").read_bytes()[:600])  # a header, and no more
    images = [broken, folders / "red" / "0.png", cut, tmp_path / "gone.png"]
    code, _ = run("predict", *images, "--weights", weights, "--head", head, "--json")
    said = capsys.readouterr()
    assert code == Exit.DATA and "3 of 4 images could not be read" in said.err
    assert all(str(path) in said.err for path in (broken, cut, images[3]))
    entries = json.loads(said.out)
    assert entries[1]["pred_class"] == "red" and all("error" in entries[i] for i in (0, 2, 3))
    code, _ = run("predict", broken, "--weights", weights, "--head", head)
    assert code == Exit.DATA and "1 of 1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    code, _ = run("predict", tmp_path / "empty", "--weights", weights, "--head", head)
    assert code == Exit.DATA and "holds no images" in capsys.readouterr().err
    code, _ = run("predict", folders / "red", "--weights", weights, "--head", broken)
    assert (
        code == Exit.NO_CHECKPOINT and "no classifier that can be read" in capsys.readouterr().err
    )


def test_the_classifier_in_python(weights, folders, head, tmp_path):
    import byol_fast

    assert byol_fast.Classifier is Classifier
    classifier = byol_fast.Classifier.load(weights, head)
    assert classifier.classes == ("blue", "green", "red") and not classifier.training
    path = folders / "green" / "2.png"
    (one,) = classifier.predict(path)
    assert one["pred_class"] == "green" and one == classifier.predict([str(path)])[0]
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    (said,) = classifier.explain(logits)
    assert said["pred_label"] == 1 and said["pred_score"] == pytest.approx(0.6652, abs=1e-4)
    assert [name for name, _ in said["top"]] == ["green", "red", "blue"]
    x = torch.randn(3, 3, 64, 64)
    expected = classifier(x).softmax(1).max(1).values.tolist()
    found = [each["pred_score"] for each in classifier.predict(x, batch_size=2)]
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(byol_fast.classifier.DataError, match="gone"):
        classifier.predict(tmp_path / "gone.png")


def test_a_head_of_other_weights_is_refused(weights, folders, head, tmp_path, capsys):
    """Its rows mean other features: the classes it names would be chance."""
    tensors = safetensors.torch.load_file(weights)
    with safetensors.safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    safetensors.torch.save_file(tensors, again, metadata={**metadata, "copied": "yes"})
    safetensors.torch.save_file(
        {**tensors, "conv1.weight": tensors["conv1.weight"] + 1}, other, metadata=metadata
    )
    assert Classifier.load(again, head).classes  # the same tensors in another file
    words = ("predict", folders / "green" / "2.png", "--head", head, "--device", "cpu")
    assert main([str(word) for word in (*words, "--weights", other)]) == Exit.USAGE
    said = capsys.readouterr()
    assert "was trained on the features of other weights" in said.err and not said.out
    layer, classes, about = heads.load(head)
    del about["weights_tensors_sha256"]  # as earlier versions wrote it
    heads.save(layer, tmp_path / "h", classes=classes, about=about)
    assert Classifier.load(weights, tmp_path / "h").classes
    with pytest.raises(ValueError, match="other weights"):
        Classifier.load(again, tmp_path / "h")
    heads.save(layer, tmp_path / "h", classes=classes)  # it does not say
    assert Classifier.load(other, tmp_path / "h").classes
    narrow = torch.nn.Linear(5, 3)
    heads.save(narrow, tmp_path / "h", classes=classes)
    with pytest.raises(ValueError, match=r"takes 5 features and .* gives 512"):
        Classifier.load(weights, tmp_path / "h")
    with pytest.raises(ValueError, match="2 class names for 3 outputs"):
        Classifier(torch.nn.Flatten(), narrow, ("a", "b"))


def test_embed_writes_features_and_names(weights, folders, tmp_path, capsys):
    out = tmp_path / "e"
    words = ("embed", folders, out, "--weights", weights)
    assert run(*words)[0] == Exit.DONE
    assert "60 × 512 float32" in capsys.readouterr().out
    features = np.load(out / "features.npy", allow_pickle=False)
    names = (out / "names.txt").read_text().splitlines()
    assert features.shape == (60, 512) and features.dtype == np.float32
    assert len(names) == 60 and names[0].endswith("blue/0.png")
    assert np.load(out / "labels.npy").tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert (out / "classes.txt").read_text().split() == list(COLOURS)
    about = json.loads((out / "about.json").read_text())
    assert about["done"] == 60 and about["of"]["network"]["backbone"] == "resnet18"
    net = export.load_backbone(weights)
    expected = features_module.extract(
        net, open_images(folders), image_size=64, threads=1
    ).features.numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert run(*words)[0] == Exit.DONE
    assert "all there already" in capsys.readouterr().out
    assert run(*words, "--dtype", "float16")[0] == Exit.USAGE
    assert "name another folder" in capsys.readouterr().err


def open_images(folders):
    from pipelines.stores import open_store

    return open_store(folders)


def test_embed_goes_on_and_marks_what_cannot_be_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "EVERY_SECONDS", 0.0)
    rng = np.random.default_rng(0)
    for i in range(10):  # no classes
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    store = open_images(tmp_path)
    cut = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(cut[:200])
    given = {"key": {"a": 1}, "image_size": 8, "batch_size": 3, "threads": 1}
    whole = embedding.embed(CountingMeans(), store, tmp_path / "whole", **given)
    assert whole.bad.keys() == {2} and whole.computed == 10 and whole.width == 3
    with pytest.raises(KeyboardInterrupt):
        embedding.embed(CountingMeans(6), store, tmp_path / "out", **given)
    assert not (tmp_path / "out" / "features.npy").exists()
    net = CountingMeans()
    rest = embedding.embed(net, store, tmp_path / "out", **given)
    assert net.seen == rest.computed == 4 and rest.bad == whole.bad
    a, b = np.load(whole.file), np.load(rest.file)
    np.testing.assert_array_equal(a, b)
    assert math.isnan(a[2, 0]) and np.isfinite(np.delete(a, 2, axis=0)).all()
    half = embedding.embed(CountingMeans(), store, tmp_path / "half", **given, dtype="float16")
    assert np.load(half.file).dtype == np.float16
    np.testing.assert_allclose(np.load(half.file), a, atol=1e-2)
    assert not (tmp_path / "out" / "labels.npy").exists()
    assert not list((tmp_path / "out").glob("*.part"))
    with pytest.raises(KeyboardInterrupt):
        embedding.embed(CountingMeans(6), store, tmp_path / "cut", **given)
    (tmp_path / "cut" / "features.npy.part").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be gone on with"):
        embedding.embed(CountingMeans(), store, tmp_path / "cut", **given)


def test_embed_on_a_full_disk_is_an_error_not_a_crash(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for 4 × 3 features"):
        embedding._make(tmp_path / "f.npy", (4, 3), "float32")
    assert not list(tmp_path.iterdir())


def test_validation_images_of_a_list_lie_below_root_too(weights, folders, cache, tmp_path):
    for part, rows in (("train", range(12)), ("val", range(12, 16)), ("test", range(16, 20))):
        lines = [f"{name}/{i}.png {c}" for c, name in enumerate(COLOURS) for i in rows]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
    given = (("--data", "train"), ("--val-data", "val"), ("--test-data", "test"))
    words = [word for flag, part in given for word in (flag, tmp_path / f"{part}.txt")]
    words += ["--root", folders, "--weights", weights, "--cache", cache, "--quick"]
    code, result = run("transfer", *words, out=tmp_path / "t.json")
    assert code == Exit.DONE and result["images"] == {"train": 36, "validation": 12, "test": 12}
    assert result["chosen_on"] == "the 12 images of --val-data"


def test_predict_shows_a_name_that_utf8_cannot_write(weights, folders, head, tmp_path, capfd):
    """Latin-1 out of an old archive: one such file must not cost the others their answer."""
    (tmp_path / "x").mkdir()
    name = os.fsencode(tmp_path) + b"/x/caf\xe9.png"
    shutil.copy(folders / "red" / "1.png", name)
    broken = os.fsencode(tmp_path) + b"/x/na\xefve.png"
    with open(broken, "wb") as file:
        file.write(b"no image")
    for words in ((), ("--json",)):
        code, _ = run("predict", tmp_path / "x", "--weights", weights, "--head", head, *words)
        said = capfd.readouterr()
        assert code == Exit.DATA and "1 of 2 images" in said.err and "udcef" in said.err
        assert "udce9" in said.out and "red" in said.out
