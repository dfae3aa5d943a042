"""`mhead`, `semi` and `finetune` to the end, on data in its native format."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from byol_fast import checkpoint, export
from byol_fast.errors import Exit
from byol_fast.evaluate import finetune
from byol_fast.evaluate import head as heads
from byol_fast.evaluate.__main__ import main
from byol_fast.networks.backbone import build_backbone

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
META = {"stem": "imagenet", "hidden_layer": -1, "image_size": 32}


def images(root, n, seed=0):
    """Squares whose colour is their class: `(names, labels)`."""
    rng, names = np.random.default_rng(seed), []
    for i in range(n):
        image = rng.integers(90, 130, (36, 40, 3), dtype=np.uint8)
        image[4:32, 6:36] = COLOURS[i % 3]
        names.append(f"part{i % 2}/{seed}_{i}.png")
        (root / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / names[-1])
    return names, [i % 3 for i in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same images as Places205 has them, and as iNaturalist does."""
    root = tmp_path_factory.mktemp("data")
    for part, n, seed in (("train", 48, 0), ("val", 15, 1)):
        names, labels = images(root / "images", n, seed)
        lines = [f"{name} {label}" for name, label in zip(names, labels, strict=True)]
        (root / f"{part}_places205.csv").write_text("\n".join(lines))
        content = {
            "images": [{"id": i, "file_name": f"images/{name}"} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 5 * c} for i, c in enumerate(labels)
            ],
            "categories": [{"id": 5 * c, "name": f"species {c}"} for c in range(3)],
        }
        (root / f"{part}2018.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of untrained networks: a ResNet, which has stages, and a very small one."""
    made = {}
    for name in ("resnet18", "squeezenet1_1"):
        torch.manual_seed(0)
        net = build_backbone(name, image_size=32)
        where = tmp_path_factory.mktemp("run") / name
        made[name] = export.export_backbone(net, where, {**META, "backbone": name})[0]
    return made


@pytest.fixture
def run(weights, tmp_path):
    """Runs a task; returns its exit code and its result file's content."""
    (tmp_path / "w").mkdir()
    out = tmp_path / "w" / "result.json"

    def task(name, *words):
        net = weights["resnet18" if name == "mhead" else "squeezenet1_1"]
        usual = ("--weights", net, "--device", "cpu", "--threads", 1, "--out", out)
        code = main([name, *map(str, (*words, *usual))])
        return code, json.loads(out.read_text()) if out.exists() else None

    return task


def places(data):
    lists = ("--data", data / "train_places205.csv", "--test-data", data / "val_places205.csv")
    return *lists, "--root", data / "images"


def inaturalist(data):
    return "--data", data / "train2018.json", "--test-data", data / "val2018.json"


def test_mhead_on_inaturalist_s_json(run, data, capsys):
    words = ("--recipe", "inaturalist18", "--epochs", 4, "--batch-size", 12, "--lr", 0.2)
    code, result = run("mhead", *inaturalist(data), *words)
    text = capsys.readouterr().out
    assert code == Exit.DONE
    assert [f["feature"] for f in result["features"]] == [f"Feature{i}" for i in range(1, 6)]
    assert result["features"][0]["top1"] == 1.0  # colours are separable in the stem
    assert result["features"][0]["pooling"] == "adaptive to 12×12"
    assert not result["published_protocol"] and not result["features"][0]["published_pooling"]
    assert result["data"]["classes"] == 3 and result["images"] == {"train": 48, "test": 15}
    assert text.count("mhead Feature") == 5 and "Feature4 adaptive to 2×2" in text
    assert "inaturalist18 with epochs 4, batch 12, lr 0.2" in text
    assert not list(data.glob("*.unfinished")) and "published *" in text


def test_mhead_on_places_lists_is_shown_beside_its_figures(run, data, capsys):
    words = ("--recipe", "places205", "--epochs", 1, "--batch-size", 24)
    code, result = run("mhead", *places(data), *words)
    text = capsys.readouterr().out
    assert code == Exit.DONE and result["protocol"]["from_square"]
    lines = [line for line in text.splitlines() if line.startswith("mhead Feature")]
    for line, figure in zip(lines, ("21.25", "36.55", "43.66", "50.74", "53.82"), strict=True):
        assert f"top-1 {figure} on Places205 (MMSelfSup, 200 epochs)" in line


def test_semi_with_a_list_of_names(run, data, tmp_path, capsys):
    names = [line.split()[0] for line in (data / "train_places205.csv").read_text().splitlines()]
    (tmp_path / "names.txt").write_text("\n".join(os.path.basename(n) for n in names[:24]))
    words = ("--labels", tmp_path / "names.txt", "--epochs", 12, "--batch-size", 12)
    code, result = run("semi", *places(data), *words, "--lr", 0.2, "--head-factor", 1)
    text = capsys.readouterr().out
    assert code == Exit.DONE and result["images"] == {"train": 24, "test": 15}
    assert result["share"] == 0.5 and result["top1"] == 1.0
    assert result["data"]["train"].endswith("train_places205.csv")
    assert "semi, 50% of the labels, 12 epochs with batch 12, lr 0.2" in text
    assert "53.2" not in text and "24 images that" in text
    tuned = export.load_backbone(result["backbone"])
    _, _, about = heads.load(result["head"])  # so that `predict` can tell it from the pretrained
    assert about["weights_sha256"] == checkpoint.file_hash(Path(result["backbone"]))
    assert about["weights_sha256"] != result["weights"]["sha256"] and about["crop"] == "centre"
    head = safetensors.torch.load_file(result["head"])
    image = np.zeros((1, 32, 32, 3), np.float32)
    image[:] = (np.array(COLOURS[1]) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        features = tuned(torch.from_numpy(image).permute(0, 3, 1, 2))
    assert (features @ head["weight"].T + head["bias"]).argmax() == 1


def test_semi_quick_takes_a_stratified_share(run, data, capsys):
    code, result = run("semi", *inaturalist(data), "--share", 0.1, "--quick")
    text = capsys.readouterr().out
    assert code == Exit.DONE and result["images"]["train"] == 6  # two of every class
    assert not result["published_protocol"] and "68.8" not in text
    assert "semi, 10% of the labels, quick (no published protocol)" in text
    assert "0.1 of every class, drawn with seed 0" in text


def test_finetune_chooses_on_held_out_images(run, data, capsys):
    words = ("--steps", 24, "--batch-size", 12, "--lr", 1e-6, 0.2, "--dataset", "pets")
    code, result = run("finetune", *places(data), *words)
    text = capsys.readouterr().out
    assert code == Exit.DONE and result["metric"] == "mean per class"
    tried = result["chosen_from"]
    assert [t["base_lr"] for t in tried] == [1e-6, 0.2]
    assert tried[0]["accuracy"] < tried[1]["accuracy"] and result["protocol"]["base_lr"] == 0.2
    assert result["mean_per_class"] == 1.0 and result["top1"] == 1.0
    assert result["images"]["train"] == 48  # in the end all of them
    assert "mean per class 91.7 on Oxford-IIIT Pets (BYOL paper, table 3, 1000 epochs)" in text
    assert "the best of 2 recipes" in text and not result["published_protocol"]


def test_an_interrupted_command_goes_on_when_repeated(run, data, tmp_path, monkeypatch):
    words = (*places(data), "--steps", 6, "--batch-size", 12, "--lr", 0.01)
    assert run("finetune", *words)[0] == Exit.DONE
    whole = safetensors.torch.load_file(tmp_path / "w" / "result.safetensors")
    first = json.loads((tmp_path / "w" / "result.json").read_text())
    (tmp_path / "w" / "result.json").unlink()
    original = finetune._Run.train_step

    def interrupted(self, x, y):
        original(self, x, y)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetune._Run, "train_step", interrupted)
    assert run("finetune", *words) == (Exit.PREEMPTED, None)
    assert (tmp_path / "w" / "result.unfinished").is_dir()
    seen = []
    monkeypatch.setattr(
        finetune._Run, "train_step", lambda self, x, y: (seen.append(1), original(self, x, y))
    )
    other = run("finetune", *words[:-1], 0.02)
    assert other == (Exit.USAGE, None)  # an unfinished run with another setting
    code, result = run("finetune", *words)
    assert code == Exit.DONE and len(seen) == 3 and result["top1"] == first["top1"]
    again = safetensors.torch.load_file(tmp_path / "w" / "result.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert not (tmp_path / "w" / "result.unfinished").exists()


def test_mistakes_have_their_exit_codes(run, data, tmp_path, capsys):
    assert run("semi", *inaturalist(data)[:2], "--labels", "x.txt")[0] == Exit.USAGE
    assert "--test-data" in capsys.readouterr().err
    assert run("semi", *inaturalist(data), "--share", 0)[0] == Exit.USAGE
    assert run("mhead", *inaturalist(data), "--epochs", -1)[0] == Exit.USAGE
    assert run("finetune", "--data", tmp_path / "none.txt")[0] == Exit.DATA
    assert "does not exist" in capsys.readouterr().err
    lost = ("--data", data / "train_places205.csv", "--root", tmp_path)
    assert run("finetune", *lost)[0] == Exit.DATA
    assert "48 of 48 listed images" in capsys.readouterr().err
    words = ("--steps", 2, "--batch-size", 12, "--lr", 1e30)
    assert run("finetune", *places(data), *words)[0] == Exit.DIVERGED
    assert "lower rate" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_chooses_in_a_set_smaller_than_a_batch(run, data):
    """Its batch may be the whole training set, of which a fifth is held out to choose by."""
    words = ("--quick", "--share", 0.5, "--lr", 1e-6, 0.05)
    code, result = run("semi", *places(data), *words)
    assert code == Exit.DONE and len(result["chosen_from"]) == 2
    assert result["images"]["train"] == result["protocol"]["batch_size"] == 24
