"""`detect` and `segment` from the command line: each protocol to its end, and stopped halfway."""

import json
import os
import signal
from argparse import Namespace

import pytest
import torch

from byol_fast import checkpoint, export
from byol_fast.errors import Exit
from byol_fast.evaluate.__main__ import main
from byol_fast.evaluate.commands import dense
from byol_fast.evaluate.commands import detect as detect_command
from byol_fast.evaluate.commands import segment as segment_command
from byol_fast.evaluate.dense import detect, recipes, segment
from byol_fast.evaluate.table import render
from byol_fast.networks.backbone import build_backbone
from tests.byol_fast.dense_data import make_cityscapes, make_coco, make_voc, make_voc_masks

META = {"backbone": "resnet18", "stem": "imagenet", "hidden_layer": -1, "image_size": 32}
META |= {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}
MAKERS = {
    ("detect", "voc"): make_voc,
    ("detect", "coco"): make_coco,
    ("segment", "voc12aug"): make_voc_masks,
    ("segment", "cityscapes"): make_cityscapes,
}
ITERATIONS = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    net = build_backbone("resnet18", image_size=32)
    return export.export_backbone(net, tmp_path_factory.mktemp("run") / "backbone", META)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each protocol's data, made when it is asked for."""
    made = {}

    def of(task, protocol):
        if protocol == "coco":
            pytest.importorskip("pycocotools")
        if protocol not in made:
            made[protocol] = MAKERS[task, protocol](tmp_path_factory.mktemp(protocol))
        return made[protocol]

    return of


def run(task, protocol, weights, data, out, *more) -> int:
    words = ["--weights", weights, "--data", data, "--protocol", protocol, "--out", out]
    words += ["--device", "cpu", "--threads", 2, "--quick", "--iterations", ITERATIONS]
    return main([task, *map(str, words), "--batch-size", "2", *map(str, more)])


@pytest.mark.parametrize(
    ("task", "protocol"),
    [
        ("detect", "voc"),
        pytest.param("detect", "coco", marks=pytest.mark.slow),
        pytest.param("segment", "voc12aug", marks=pytest.mark.slow),
        ("segment", "cityscapes"),
    ],
)
def test_a_protocol_stops_when_asked_and_the_same_command_ends_it(
    task, protocol, weights, data, tmp_path, monkeypatch, capsys
):
    out, here, seen = tmp_path / "r.json", data(task, protocol), []
    module = {"detect": detect, "segment": segment}[task]
    original = module.loss_of

    def stop_in_the_first(model, device, samples):
        seen.append(len(samples))
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, device, samples)

    monkeypatch.setattr(module, "loss_of", stop_in_the_first)
    assert run(task, protocol, weights, here, out) == Exit.PREEMPTED
    assert "goes on from there" in capsys.readouterr().err
    assert seen == [2] and not out.exists()

    assert run(task, protocol, weights, here, out) == Exit.DONE
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "not a published protocol" in text and result["published_protocol"] is False
    assert result["weights"]["sha256"] == checkpoint.file_hash(weights)
    assert result["protocol"]["name"] == protocol
    assert result["protocol"]["iterations"] == ITERATIONS and result["protocol"]["batch_size"] == 2
    assert result["mean"] == [0.4, 0.5, 0.6] and "image_size" not in result
    assert result["data"]["train"] == str(here) and len(result["data"]["train_fingerprint"]) == 64
    assert result["images"] == {"train": 4, "test": 2} and result["resumed_at"] == 1
    assert torch.isfinite(torch.tensor(result["final_loss"]))
    for row in result["rows"]:
        assert all(0 <= value <= 1 for value in row["figures"].values())


@pytest.mark.parametrize(
    ("task", "protocol", "published"),
    [
        ("detect", "voc", ["AP50 80.35 on VOC07 test (MMSelfSup, 200 epochs)"]),
        ("detect", "coco", ["box AP 40.9 on COCO val2017", "mask AP 36.8 on COCO val2017"]),
        ("segment", "voc12aug", ["mIoU 67.16 on VOC12 val"]),
        ("segment", "cityscapes", []),
    ],
)
def test_published_figures_stand_beside_the_whole_protocol(task, protocol, published):
    asked = dict.fromkeys(("iterations", "batch_size", "lr", "train_sets", "test_set"))
    args = Namespace(quick=False, protocol=protocol, **asked)
    figures = dict.fromkeys(("AP50", "AP", "AP75"), 0.5)
    outcome = Namespace(
        figures={"box": figures} if protocol == "voc" else {"box": figures, "mask": figures},
        miou=0.5,
        pixel_accuracy=0.5,
        trained=Namespace(images_per_second=12.0),
    )
    if task == "detect":
        rows = detect_command._rows(args, recipes.DETECTION[protocol], outcome)
    else:
        rows = [segment_command._row(args, recipes.SEGMENTATION[protocol], outcome)]
    table = render(rows, weights="w", data="d")
    assert all(words in table for words in published) and "quick" not in table
    assert ("yardstick" in table) == bool(published)
    assert len([line for line in table.splitlines() if "50.00" in line]) == max(1, len(published))
    network = Namespace(device=torch.device("cpu"))
    exact = task == "segment"  # of these nothing is known to differ
    assert (dense.differences(args, network) == []) is exact
    args.iterations = 7
    assert "with iterations 7" in dense.title(args, recipes.VOC)
    assert dense.differences(args, network)[0] == "iterations 7"
    args.test_set = "val"  # figures of another test are no yardstick
    assert dense.published(args, "voc") is None


def test_an_iteration_beyond_reason_ends_as_diverged(weights, data, tmp_path, capsys):
    out = tmp_path / "r.json"
    code = run("segment", "voc12aug", weights, data("segment", "voc12aug"), out, "--lr", 1e30)
    assert code == Exit.DIVERGED
    assert "use a lower --lr" in capsys.readouterr().err and not out.exists()


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(weights, data, tmp_path, capsys):
    out, here = tmp_path / "r.json", data("segment", "voc12aug")
    assert run("segment", "voc12aug", weights, here, out) == Exit.DONE
    before = json.loads(out.read_text())
    assert run("segment", "voc12aug", weights, here, out) == Exit.DONE  # nothing left to train
    again = json.loads(out.read_text())
    assert again["resumed_at"] == ITERATIONS and again["miou"] == before["miou"]
    capsys.readouterr()
    assert run("segment", "voc12aug", weights, here, out, "--seed", 1) == Exit.NO_CHECKPOINT
    error = capsys.readouterr().err
    assert "seed is 0, now 1" in error and "--out" in error
    assert main(["table", str(tmp_path)]) == Exit.DONE
    assert "mIoU %" in (text := capsys.readouterr().out) and "67.16" not in text  # quick


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--data", "nowhere"], Exit.DATA, "no VOC20xx/JPEGImages"),
        (["--train-sets", "VOC2007/nothing"], Exit.DATA, "nothing.txt cannot be read"),
        (["--batch-size", "64"], Exit.DATA, "larger than the training set (4 images)"),
        (["--batch-size", "0"], Exit.USAGE, "at least 1"),
        (["--lr", "-1"], Exit.USAGE, "above 0"),
        (["--save-every", "0"], Exit.USAGE, "--save-every"),
        (["--weights", "nowhere.pth"], Exit.NO_CHECKPOINT, "does not exist"),
    ],
)
def test_mistakes_end_with_their_exit_code(weights, data, tmp_path, capsys, change, code, message):
    given = (weights, data("detect", "voc"), tmp_path / "r.json")
    assert run("detect", "voc", *given, *change) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_empty_test_set_is_refused_before_training(weights, data, tmp_path, capsys):
    for task, protocol, lists, name in (
        ("detect", "voc", "VOC2007/ImageSets/Main", "VOC2007/none"),
        ("segment", "voc12aug", "VOC2012/ImageSets/Segmentation", "none"),
    ):
        here = data(task, protocol)
        (here / lists / "none.txt").write_text("\n")
        code = run(task, protocol, weights, here, tmp_path / "r.json", "--test-set", name)
        error = capsys.readouterr().err
        assert code == Exit.DATA and ("nothing to measure" in error or "no images" in error)
        assert not list(tmp_path.glob("*.checkpoints"))


def test_coco_without_pycocotools_names_the_command(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    code = run("detect", "coco", weights, tmp_path, tmp_path / "r.json")
    assert code == Exit.USAGE
    assert "pip install '.[evaluate]' in the checkout" in capsys.readouterr().err


def test_torchrun_is_refused(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("detect", "voc", weights, tmp_path, tmp_path / "r.json") == Exit.USAGE
    assert "not torchrun" in capsys.readouterr().err


def test_another_kind_of_network_is_refused(data, tmp_path, capsys):
    torch.manual_seed(0)
    net = build_backbone("squeezenet1_1", image_size=32)
    other = export.export_backbone(net, tmp_path / "b", {**META, "backbone": "squeezenet1_1"})[0]
    for task, protocol in (("detect", "voc"), ("segment", "voc12aug")):
        code = run(task, protocol, other, data(task, protocol), tmp_path / "r.json")
        assert code == Exit.USAGE and "use a ResNet" in capsys.readouterr().err
