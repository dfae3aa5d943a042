"""`python -m byol_fast.evaluate`: a table, a result file, exit codes; on folders of images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from byol_fast import checkpoint, export
from byol_fast.errors import Exit
from byol_fast.evaluate.__main__ import main
from byol_fast.evaluate.commands import common
from byol_fast.evaluate.files import expand
from byol_fast.evaluate.published import Published
from byol_fast.evaluate.table import Row, render
from byol_fast.networks.backbone import build_backbone
from pipelines.convert import main as convert
from pipelines.sources import ffcv_available

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
META = {"backbone": "resnet18", "stem": "imagenet", "hidden_layer": -1, "image_size": 32}
META |= {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}


def class_folders(root, per_class: int, seed: int = 0, names=tuple(COLOURS)):
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            image = rng.integers(90, 130, (36, 40, 3), dtype=np.uint8)
            top, left = rng.integers(4, 10, 2)
            image[top : top + 22, left : left + 22] = COLOURS.get(name, (9, 9, 9))
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data") / "train", 20)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):  # numbered differently: "blue" is missing
    root = tmp_path_factory.mktemp("data") / "test"
    return class_folders(root, 6, seed=1, names=("green", "red"))


def random_weights(folder, stem="imagenet"):
    torch.manual_seed(0)
    net = build_backbone("resnet18", stem=stem, image_size=32)
    return export.export_backbone(net, folder / "exports" / "backbone", {**META, "stem": stem})[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture
def weights(original, tmp_path):
    (tmp_path / "exports").mkdir()
    for path in original.parent.iterdir():
        os.link(path, tmp_path / "exports" / path.name)
    return tmp_path / "exports" / original.name


def run(*words) -> int:
    return main([str(word) for word in words] + ["--device", "cpu", "--threads", "2"])


def abouts(weights):
    return weights.parent.glob("feature-cache/*/about.json")


def result_of(weights):
    (path,) = weights.parent.glob("backbone.*.json")
    return json.loads(path.read_text())


def test_knn_prints_a_table_and_writes_the_result(weights, data, capsys):
    words = ("--weights", weights.parent.parent, "--data", data, "--dataset", "imagenet")
    assert run("knn", *words) == Exit.DONE
    out = capsys.readouterr().out
    lines = {line.split("k=")[1].split()[0]: line for line in out.splitlines() if "k=" in line}
    assert list(lines) == ["10", "20", "100", "200"]
    assert "top-1 64.2 (MMSelfSup, 200 epochs)" in lines["20"] and "63.9" in lines["10"]
    assert "all 48 there are" in lines["100"] and "62.9" not in lines["100"]
    assert "ResNet-50 pretrained on ImageNet-1k" in out
    assert "tested on 12 images, a held-out 20% of --data" in out
    result = result_of(weights)
    assert result["weights"]["sha256"] == checkpoint.file_hash(weights)
    assert result["weights"]["backbone"] == "resnet18"
    assert result["mean"] == [0.4, 0.5, 0.6] and result["std"] == [0.3, 0.2, 0.1]
    assert result["protocol"] == {"name": "knn", "k": [10, 20, 100, 200], "temperature": 0.07}
    assert result["reading"]["backend"] == "torch"
    assert result["reading"]["resizing"] == "bicubic, antialiased (torch, uint8)"
    assert result["images"] == {"train": 48, "test": 12} and result["image_size"] == 32
    assert result["data"]["classes"] == 3 and len(result["data"]["train_fingerprint"]) == 64
    assert result["top1"]["10"] > 0.9  # colours survive random weights
    assert f"{100 * result['top1']['20']:.2f}" in lines["20"]


def test_another_temperature_has_no_published_figure(weights, data, capsys):
    words = ("--weights", weights, "--data", data, "--k", 20, "--dataset", "imagenet")
    assert run("knn", *words, "--temperature", 0.5) == Exit.DONE
    assert "published *" in (out := capsys.readouterr().out) and "64.2" not in out
    result = result_of(weights)
    assert result["published_protocol"] is False
    assert "T 0.5 instead of 0.07" in result["differs"]
    assert "images of 32 pixels instead of 224" in result["differs"]


def test_figures_of_imagenet_stand_beside_imagenet_alone(weights, data, capsys):
    words = ("--weights", weights, "--data", data)
    assert run("knn", *words, "--k", 20) == Exit.DONE
    assert run("linear", *words, "--epochs", 1, "--batch-size", 24) == Exit.DONE
    out = capsys.readouterr().out
    assert "64.2" not in out and "74.3" not in out and "yardstick" not in out


def test_cifar10_has_yardsticks_of_its_own(weights, tmp_path, capsys):
    names = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())  # noqa: SIM905
    root = class_folders(tmp_path / "cifar", 25, names=names)
    words = ("--weights", weights, "--data", root, "--image-size", 16)
    assert run("knn", *words, "--k", 20, 200) == Exit.DONE
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "k=200" in line and line.startswith("kNN")]
    assert "top-1 86.9 on CIFAR-10 (lightly, batch 128, ResNet-18, 200 epochs)" in row
    assert "–" in next(line for line in lines if "k=20 " in line)  # lightly has k=200 alone
    assert any("91.0 (lightly, batch 512, 800 epochs)" in line for line in lines)
    assert any("ResNet-18 (3×3 stem, 32 pixels) pretrained on CIFAR-10" in line for line in lines)
    assert not any("ImageNet-1k for" in line for line in lines)
    assert "T 0.07 instead of 0.1" in result_of(weights)["differs"]
    assert run("linear", *words, "--epochs", 1, "--batch-size", 50) == Exit.DONE
    assert "top-1 92.58 on CIFAR-10 (solo-learn, ResNet-18, 1000" in capsys.readouterr().out


def test_linear_with_a_test_folder_of_other_numbering(weights, data, held_out, capsys, tmp_path):
    out = tmp_path / "results" / "linear.json"
    changes = ("--epochs", 6, "--batch-size", 30, "--base-lr", 4)
    words = ("--weights", weights, "--data", data, "--test-data", held_out, "--out", out)
    assert run("linear", *words, *changes, "--dataset", "imagenet") == Exit.DONE
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "linear, paper with epochs 6, batch 30, base lr 4" in text
    assert "top-1 74.3 (BYOL paper, table 1, 1000 epochs)" in text
    assert "best of five rates" in text and "tested on the 12 images of the test set" in text
    assert result["top1"] == 1.0 and result["top5"] == 1.0
    assert result["published_protocol"] is False
    assert result["differs"][:3] == ["epochs 6", "batch size 30", "base lr 4.0"]
    assert result["protocol"]["peak_lr"] == pytest.approx(4 * 30 / 256)
    head = safetensors.torch.load_file(tmp_path / "results" / "linear.head.safetensors")
    assert head["weight"].shape == (3, 512) and head["bias"].shape == (3,)
    with safetensors.safe_open(result["head"], framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["blue", "green", "red"]


def test_quick_says_that_it_is_no_protocol(weights, data, capsys):
    assert run("linear", "--quick", "--weights", weights, "--data", data) == Exit.DONE
    text, result = capsys.readouterr().out, result_of(weights)
    assert "quick (cached centre crops, not a published protocol)" in text
    assert "74.3" not in text and result["published_protocol"] is False
    assert result["protocol"]["cached"] and result["top1"] > 0.9


def test_mmpretrain_shows_its_own_figure(weights, data, capsys):
    changes = ("--protocol", "mmpretrain", "--epochs", 1, "--batch-size", 24)
    words = ("--weights", weights, "--data", data, "--dataset", "imagenet")
    assert run("linear", *words, *changes) == Exit.DONE
    text, result = capsys.readouterr().out, result_of(weights)
    assert "cosine per epoch" in result["arithmetic"] and not result["published_protocol"]
    assert any("there bilinearly" in line for line in result["differs"])
    assert any("resized to 256" in line for line in result["differs"])
    assert "top-1 71.8 (mmpretrain, 200 epochs)" in text and "lars, 1 epochs, lr" in text
    assert "best of five" not in text


def test_a_plain_state_dict_needs_its_name(data, tmp_path, capsys):
    weights = random_weights(tmp_path, stem="cifar")
    pth = weights.with_suffix(".pth")
    assert run("knn", "--weights", pth, "--data", data, "--k", 5) == Exit.USAGE
    assert "--backbone" in capsys.readouterr().err
    named = ("--backbone", "resnet18", "--stem", "cifar", "--image-size", 32)
    assert run("knn", "--weights", pth, "--data", data, "--k", 5, *named) == Exit.DONE
    assert result_of(weights)["weights"]["stem"] == "cifar"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--weights": "nowhere.pth"}, Exit.NO_CHECKPOINT, "nowhere.pth does not exist"),
        ({"--data": "nowhere"}, Exit.DATA, "nowhere does not exist"),
        ({"--test-data": "{data}"}, Exit.DATA, "the same images"),
        ({"--k": "0"}, Exit.USAGE, "--k must be at least 1"),
        ({"--device": "cuda:99"}, Exit.USAGE, "no such GPU"),
        ({"--device": "tpu"}, Exit.USAGE, "--device is auto, cpu"),
        ({"--device": "mps"}, Exit.USAGE, "--device is auto, cpu"),
        ({"--batch-size": "0"}, Exit.USAGE, "the batch size must be at least 1, got 0"),
        ({"--image-size": "4"}, Exit.USAGE, "at least 8 pixels"),
        ({"--out": "{folder}"}, Exit.USAGE, "cannot be written"),
    ],
)
def test_mistakes_end_with_their_exit_code(weights, data, capsys, change, code, message):
    words = {"--weights": weights, "--data": data, "--k": 5, "--device": "cpu"}
    known = {"data": data, "folder": weights.parent}
    changed = {key: value.format(**known) for key, value in change.items()}
    call = [str(x) for pair in {**words, **changed}.items() for x in pair]
    assert main(["knn", *call]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_unlabelled_and_single_class_folders_are_refused(weights, tmp_path, capsys):
    flat = tmp_path / "flat"
    class_folders(tmp_path / "one", 3, names=("red",)).joinpath("red").rename(flat)
    assert run("knn", "--weights", weights, "--data", flat) == Exit.DATA
    assert "no labels" in capsys.readouterr().err
    np.savez(tmp_path / "one.npz", images=np.zeros((4, 16, 16, 3), np.uint8), labels=[0] * 4)
    assert run("knn", "--weights", weights, "--data", tmp_path / "one.npz") == Exit.DATA
    assert "one class only" in capsys.readouterr().err


def test_a_batch_beyond_the_data_is_refused(weights, data, capsys):
    assert run("linear", "--weights", weights, "--data", data) == Exit.DATA
    assert "batch_size 1024 is larger than the data set (48 images)" in capsys.readouterr().err
    assert not list(weights.parent.glob("*.json"))


def test_images_that_vanish_are_counted(weights, tmp_path, capsys):
    root = class_folders(tmp_path / "d", 10)
    assert run("knn", "--weights", weights, "--data", root, "--k", 3) == Exit.DONE  # indexes it
    victim = root / "red" / "3.png"
    stat = victim.stat()
    data = bytearray(victim.read_bytes())
    data[40:-12] = bytes(len(data) - 52)  # same size and time, so the index stays
    victim.write_bytes(data)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = ("--k", 3, "--no-cache")  # which goes by the folder's index, as the index does
    assert run("knn", "--weights", weights, "--data", root, *again) == Exit.DONE
    assert "1 images could not be decoded" in capsys.readouterr().out
    result = result_of(weights)
    assert result["undecodable"] == 1 and sum(map(len, result["undecodable_images"].values())) == 1
    for path in weights.parent.glob("*.json"):
        path.unlink()
    everything = ("--test-data", class_folders(tmp_path / "test", 2, seed=1), "--epochs", 1)
    words = ("--weights", weights, "--data", root, *everything, "--batch-size", 10)
    assert run("linear", *words) == Exit.DONE  # also those that are trained on
    result, out = result_of(weights), capsys.readouterr().out
    assert "red/3.png: " in out and "(train)" in out and result["images"]["train"] == 29
    (named,) = result["undecodable_images"]["train"]
    assert named.endswith("red/3.png") and result["undecodable"] == 1


def test_weights_replaced_meanwhile_are_not_taken_for_those_that_were_loaded(
    weights, data, tmp_path, monkeypatch
):
    """A pretraining goes on beside the evaluation and writes its next export."""
    first, newer = checkpoint.file_hash(weights), tmp_path / "newer"
    tensors = safetensors.torch.load_file(weights)
    tensors["conv1.weight"] += 1
    with safetensors.safe_open(weights, framework="pt") as file:
        safetensors.torch.save_file(tensors, newer, metadata=file.metadata())
    second, open_labelled = checkpoint.file_hash(newer), common.open_labelled

    def replaced(args):
        if newer.exists():
            os.replace(newer, weights)
        return open_labelled(args)

    monkeypatch.setattr(common, "open_labelled", replaced)
    for digest in (first, second):
        words = ("--weights", weights, "--data", data, "--k", 5)
        assert run("knn", *words) == Exit.DONE
        result = result_of(weights)
        assert result["weights"]["sha256"] == digest
        assert result["images_per_second"] is not None  # nothing came out of the other's cache
    kept = {json.loads(path.read_text())["network"]["weights"] for path in abouts(weights)}
    assert kept == {first, second}


def test_weights_rotated_away_do_not_end_an_evaluation(weights, data, tmp_path, monkeypatch):
    run_folder, open_labelled = tmp_path / "run", common.open_labelled
    loaded = export.read_weights(weights)
    model = {f"online.encoder.backbone.{key}": value for key, value in loaded.tensors.items()}
    path = checkpoint.save(
        run_folder / "checkpoints", 3, {"model": model, "hyper": {**loaded.meta}}
    )
    digest = checkpoint.file_hash(path)

    def rotated(args):
        checkpoint.save(run_folder / "checkpoints", 4, {"model": {}}, keep=1)
        return open_labelled(args)

    monkeypatch.setattr(common, "open_labelled", rotated)
    words = ("--weights", run_folder, "--data", data, "--epochs", 1, "--batch-size", 24)
    assert run("linear", *words) == Exit.DONE
    (where,) = run_folder.glob("step-00000003.linear-paper-*.json")  # not beside the checkpoints
    assert json.loads(where.read_text())["weights"]["sha256"] == digest
    assert (run_folder / "feature-cache").is_dir()
    assert not list((run_folder / "checkpoints").glob("*linear*"))


@pytest.mark.parametrize(
    ("task", "words"),
    [("knn", ("--k", 3)), ("linear", ("--quick",)), ("finetune", ("--quick", "--steps", 2))],
)
def test_class_numbers_may_have_gaps(weights, tmp_path, task, words):
    """Taxon or product numbers: a head with a row for each number up to the largest is 2 GB."""
    class_folders(tmp_path / "images", 6, names=("green", "red"))
    numbers = {"green": 3, "red": 900_000}
    lines = [f"{name}/{i}.png {numbers[name]}" for name in numbers for i in range(6)]
    (tmp_path / "images" / "list.txt").write_text("\n".join(lines))
    words = ("--weights", weights, "--data", tmp_path / "images" / "list.txt", *words)
    assert run(task, *words, "--image-size", 16) == Exit.DONE
    result = result_of(weights)
    assert result["data"]["classes"] == 2 and "have gaps" in result["data"]["tested_on"]
    if "head" in result:
        with safetensors.safe_open(result["head"], framework="pt") as file:
            assert json.loads(file.metadata()["classes"]) == ["3", "900000"]
            assert file.get_tensor("bias").shape == (2,)


def test_as_a_module_it_answers_help_without_torch():
    code = "from byol_fast.evaluate.__main__ import main; main(['--help'])"
    code += "; import sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == "False" and "knn" in out.stdout
    asked = [sys.executable, "-m", "byol_fast.evaluate", "linear", "--help"]
    out = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "--quick" in out.stdout and "no protocol" in out.stdout


def test_the_table_lines_up():
    rows = [
        Row(protocol="a", figures={"top-1": 0.5}, images_per_second=1234.5),
        Row(
            protocol="longer",
            figures={"top-1": 1, "top-5": 1},
            images_per_second=9,
            published=Published(7, 1, "x"),
        ),
    ]
    lines = render(rows, weights="/very/long/way/to/w.pth", data="/d").splitlines()
    assert lines[0].index("top-1 %") == lines[2].index("50.00") == lines[3].index("100.00")
    assert "long/way/to/w.pth" not in lines[2] and "way/to/w.pth" in lines[2]
    assert lines[2].split()[-1] == "–" and "top-1 7 (x, 1 epochs)" in lines[3] and len(lines) == 5


def test_results_come_back_as_one_table(weights, data, capsys):
    words = ("--weights", weights, "--data", data)
    assert run("knn", *words, "--k", 5, 20, "--dataset", "imagenet") == Exit.DONE
    assert run("linear", "--quick", *words) == Exit.DONE
    (weights.parent / "other.json").write_text("{}")
    capsys.readouterr()
    assert main(["table", str(weights.parent)]) == Exit.DONE
    out = capsys.readouterr().out
    assert "k=5" in out and "k=20" in out and "quick" in out and "top-5 %" in out
    assert "64.2 (MMSelfSup, 200 epochs)" in out and out.count("/train") == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{}", "no rows"),
        ("[", "no result"),
        ('{"rows": [{}], "weights": {"file": "w"}, "data": {"train": "d"}}', "this version's"),
        ('{"rows": [], "weights": "w", "data": {}}', "this version's"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main(["table", str(path)]) == Exit.USAGE
    assert message in (error := capsys.readouterr().err) and "x.json" in error


def test_an_unknown_task_gets_the_nearest(capsys):
    assert main(["lineal"]) == Exit.USAGE
    assert "linear" in capsys.readouterr().err


def test_control_c_is_told_in_a_line(monkeypatch, capsys):
    from byol_fast.evaluate.commands import knn

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(knn, "run", interrupted)
    assert main(["knn", "--weights", "x", "--data", "y"]) == 130
    assert capsys.readouterr().err == "interrupted: no result was written\n"


def test_classes_that_are_splits_of_a_data_set_are_refused(weights, tmp_path, capsys):
    root = tmp_path / "set"
    for part, each in (("train", 3), ("val", 2)):
        class_folders(root / part, each)
    assert run("knn", "--weights", weights, "--data", root, "--no-cache") == Exit.DATA
    told = capsys.readouterr().err
    assert "the classes of" in told and f"--data {root}/train --test-data {root}/val" in told
    words = ("--data", root / "train", "--test-data", root / "val", "--no-cache")
    assert run("knn", "--weights", weights, *words) == Exit.DONE


def test_what_is_left_out_of_the_data_is_told(weights, data, tmp_path, caplog):
    root = tmp_path / "set"
    root.mkdir()
    for name in COLOURS:
        (root / name).symlink_to(data / name)
    (root / "again").symlink_to(data / "red")
    assert run("knn", "--weights", weights, "--data", root, "--no-cache") == Exit.DONE
    assert "left out: 1 link to folders that are listed already" in caplog.text
    caplog.clear()
    assert run("embed", root, tmp_path / "out", "--weights", weights) == Exit.DONE
    assert "left out: 1 link to folders" in caplog.text


def test_embedding_says_what_becomes_of_a_broken_image(weights, data, tmp_path, caplog, capsys):
    root = tmp_path / "set"
    root.mkdir()
    for i, path in enumerate(sorted((data / "red").iterdir())):
        (root / f"{i}.png").symlink_to(path)
    whole = (root / "0.png").read_bytes()
    (root / "broken.png").write_bytes(whole[: len(whole) // 2])
    assert run("embed", root, tmp_path / "out", "--weights", weights) == Exit.DONE
    assert "broken.png cannot be decoded" in caplog.text and "features are NaN" in caplog.text
    assert "1 images could not be decoded: NaN" in capsys.readouterr().out


def test_images_of_a_folder_to_predict_leave_out_what_others_do(tmp_path, caplog):
    class_folders(tmp_path / "set", 2, names=("red", "@eaDir", ".hidden"))
    (tmp_path / "set" / "gone.jpg").symlink_to("nowhere")
    found = expand([tmp_path / "set", tmp_path / "x.jpg"])
    below = ["gone.jpg", "red/0.png", "red/1.png"]
    assert found == [*(tmp_path / "set" / name for name in below), tmp_path / "x.jpg"]
    assert "left out: 1 folder that a NAS" in caplog.text


@pytest.mark.slow
@pytest.mark.ffcv
@pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed (launch/install_ffcv.sh)")
def test_ffcv_decodes_labelled_data(weights, data, tmp_path, capsys):
    beton = tmp_path / "a.beton"
    assert convert([str(data), str(beton)]) == 0
    words = ("--data", beton, "--no-cache", "--backend", "ffcv")
    assert run("knn", "--weights", weights, *words) == Exit.DONE
    assert run("linear", "--weights", weights, *words, "--quick") == Exit.DONE
