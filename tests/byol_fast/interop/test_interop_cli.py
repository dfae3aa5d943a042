"""The commands as a user runs them: what they print, and their exit codes."""

import argparse
import shutil

import pytest
import torch

from byol_fast import load_backbone
from byol_fast.errors import CheckpointError, Exit
from byol_fast.evaluate.__main__ import main as evaluate
from byol_fast.interop.__main__ import main


@pytest.fixture(scope="module")
def foreign(parts, tmp_path_factory):
    """A file as mmpretrain writes it: objects of its own beside the weights."""
    path = tmp_path_factory.mktemp("foreign") / "byol_epoch_200.pth"
    prefixes = {"backbone": "backbone.", "target_backbone": "target_net.module.0."}
    state = {p + key: value for part, p in prefixes.items() for key, value in parts[part].items()}
    config = argparse.Namespace(lr=4.8)
    torch.save({"meta": {"epoch": 200, "cfg": config}, "state_dict": state}, path)
    return path


def test_inspect_says_what_is_there(foreign, capsys):
    assert main(["inspect", str(foreign)]) == Exit.DONE
    said = capsys.readouterr().out
    for text in (
        "mmpretrain: mmpretrain and MMSelfSup 1.x",
        "epoch 200",
        "backbone          resnet18, cifar stem",
        "target backbone   resnet18",
        "argparse.Namespace (read as data",
        f"python -m byol_fast.interop import {foreign} byol_epoch_200",
    ):
        assert text in said
    assert "layer4.1.conv2.weight" not in said
    assert main(["inspect", str(foreign), "--keys"]) == Exit.DONE
    assert "layer4.1.conv2.weight [512, 512, 3, 3]" in capsys.readouterr().out


def test_import_then_export(foreign, tmp_path, capsys):
    out = tmp_path / "net"
    assert main(["import", str(foreign), str(out), "--network", "target"]) == Exit.DONE
    said = capsys.readouterr().out
    assert "the target resnet18, cifar stem" in said and f"written: {out}.safetensors" in said
    words = ["export", f"{out}.safetensors", str(tmp_path / "there"), "--to", "mmdet"]
    assert main([*words, "--network", "target"]) == Exit.DONE
    assert (tmp_path / "there.pth").is_file()
    assert main(words) == Exit.USAGE
    assert "holds no online network" in capsys.readouterr().err


def test_exit_codes(foreign, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere.pth")]) == Exit.NO_CHECKPOINT
    assert main(["export", str(tmp_path), "x", "--to", "timm"]) == Exit.NO_CHECKPOINT
    assert main(["export", str(foreign), "x", "--to", "timm"]) == Exit.USAGE
    assert main(["import", str(foreign), str(tmp_path / "x"), "--full"]) == Exit.USAGE
    assert main(["import", str(foreign), str(tmp_path / "x"), "--from", "vit"]) == Exit.USAGE
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 5 and all(line.startswith("error: ") for line in errors)
    assert not list(tmp_path.iterdir())


def test_loading_a_foreign_file_says_how_to_import_it(foreign, tmp_path, capsys, parts):
    hint = r"looks like mmpretrain.*python -m byol_fast.interop import .*byol_epoch_200"
    with pytest.raises(CheckpointError, match=hint):
        load_backbone(foreign)
    plain = {f"online_encoder.net.{key}": value for key, value in parts["backbone"].items()}
    torch.save(plain, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"another project.*byol-pytorch; import it first"):
        load_backbone(tmp_path / "plain.pth", backbone="resnet18")
    own = torch.nn.Sequential()  # a module of one's own may call its layers as it likes
    own.add_module("backbone", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()))
    own.add_module("classifier", torch.nn.LazyLinear(2))
    expected = own(torch.ones(1, 3, 8, 8))
    torch.save(own.state_dict(), tmp_path / "own.pth")
    loaded = load_backbone(tmp_path / "own.pth", backbone=own, image_size=8)
    assert torch.equal(loaded(torch.ones(1, 3, 8, 8)), expected)
    (tmp_path / "data").mkdir()
    words = ["knn", "--weights", str(foreign), "--data", str(tmp_path / "data")]
    assert evaluate(words) == Exit.NO_CHECKPOINT
    assert "byol_fast.interop import" in capsys.readouterr().err


def test_a_file_is_not_written_over_itself(foreign, tmp_path, capsys, monkeypatch):
    """`import byol.pth byol`, in the folder of byol.pth, would put the backbone in its place."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(foreign, "byol.pth")
    content = (tmp_path / "byol.pth").read_bytes()
    assert main(["import", "byol.pth", "byol"]) == Exit.USAGE
    assert "would be written over: name another OUT" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["byol.pth"]
    assert (tmp_path / "byol.pth").read_bytes() == content
    main(["inspect", "byol.pth"])
    words = capsys.readouterr().out.splitlines()[-1].partition("byol_fast.interop ")[2].split()
    assert main(words) == Exit.DONE  # the command that `inspect` prints
    assert (tmp_path / "byol.pth").read_bytes() == content
    content = (tmp_path / "byol-backbone.safetensors").read_bytes()
    for layout in ("safetensors", "byol_fast"):  # the first would lose what the file says of itself
        words = ["export", "byol-backbone.safetensors", "byol-backbone", "--to", layout]
        assert main(words) == Exit.USAGE
    assert (tmp_path / "byol-backbone.safetensors").read_bytes() == content


@pytest.mark.parametrize("how", ["wrapped", "with objects", "parallel"])
def test_torchvision_s_keys_in_another_s_wrapping_are_recognised(tmp_path, parts, how):
    """As MoCo's, timm's and torchvision's own training scripts save them."""
    state = parts["backbone"]
    tree = {
        "wrapped": {"state_dict": state, "arch": "resnet18"},
        "with objects": {"model": state, "args": argparse.Namespace(lr=0.1)},
        "parallel": {f"module.{key}": value for key, value in state.items()},
    }[how]
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"torchvision's keys.*interop import .*x.pth x-back"):
        load_backbone(tmp_path / "x.pth", backbone="resnet18", stem="cifar")
    torch.save(state, tmp_path / "x.pth")  # nothing to import
    load_backbone(tmp_path / "x.pth", backbone="resnet18", stem="cifar", image_size=32)
