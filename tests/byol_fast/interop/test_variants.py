"""ResNets that other projects have changed or spelled otherwise: the same features, or named."""

import argparse
import re

import pytest
import torch
import torchvision
from interop_support import HEADS, SIZE, features_of, shake
from torch import nn

from byol_fast import load_backbone
from byol_fast.errors import CheckpointError
from byol_fast.interop import load_byol, networks, resnet
from byol_fast.interop.exporting import export_file
from byol_fast.interop.importing import import_file


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return shake(torchvision.models.resnet18()).eval()


def children(net: nn.Module, *left_out: int) -> nn.Sequential:
    return nn.Sequential(*(m for i, m in enumerate([*net.children()][:-1]) if i not in left_out))


def small(net: nn.Module) -> nn.Module:
    """With the CIFAR stem, of the same weights elsewhere."""
    own = torchvision.models.resnet18()
    own.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    weights = net.state_dict() | {"conv1.weight": own.conv1.weight.detach()}
    own.load_state_dict(weights)
    own.maxpool = nn.Identity()
    return own.eval()


def transformers_s(tensors: dict) -> dict:
    """The spelling of Hugging Face transformers, as its modeling_resnet.py names the modules."""
    renamed = {}
    for key, value in tensors.items():
        *path, name = key.split(".")
        if path[0] == "fc":
            renamed[f"classifier.1.{name}"] = value
            continue
        kind = "convolution" if value.dim() == 4 else "normalization"
        if path[0] in ("conv1", "bn1"):
            renamed[f"resnet.embedder.embedder.{kind}.{name}"] = value
            continue
        at = "shortcut" if path[2] == "downsample" else f"layer.{int(path[2][-1]) - 1}"
        stage = int(path[0][5:]) - 1
        renamed[f"resnet.encoder.stages.{stage}.layers.{path[1]}.{at}.{kind}.{name}"] = value
    return renamed


# what an nn.Sequential runs between its first BatchNorm and its first stage, and what is said
@pytest.mark.slow
@pytest.mark.parametrize(
    ("left_out", "stem", "changes", "words"),
    [
        ((), "imagenet", None, []),
        ((3,), "imagenet", {"max_pool": False}, ["one module without weights", "--max-pool"]),
        ((2, 3), "imagenet", {"relu": False, "max_pool": False}, ["no ReLU", "--stem-relu"]),
        ((), "cifar", None, ["stride 1 without max-pool", "--max-pool"]),
        ((3,), "cifar", None, ["one module without weights", "--max-pool"]),
        ((2, 3), "cifar", {"relu": False}, ["no ReLU", "--stem-relu"]),
    ],
)
def test_the_stem_of_a_sequential(tmp_path, net, left_out, stem, changes, words):
    whole = small(net) if stem == "cifar" else net
    theirs = children(whole, *left_out)
    torch.save({"resnet18_parameters": theirs.state_dict()}, tmp_path / "x.pth")
    done = import_file(tmp_path / "x.pth", tmp_path / "out", image_size=SIZE)
    assert done.meta.get("stem_changes") == changes and done.meta["stem"] == stem
    assert all(word in " ".join(done.notes) for word in words)
    assert bool(done.notes) == bool(words)
    torch.testing.assert_close(features_of(load_backbone(done.files[0])), features_of(theirs))
    if changes and stem == "imagenet":
        with pytest.raises(ValueError, match=r"imagenet stem with.*which timm does not know"):
            export_file(done.files[0], tmp_path / "there", "timm")


def test_what_the_keys_do_not_show_can_be_said(tmp_path, net):
    """torchvision variants for small images: the same keys, another stride, pooling or padding."""
    theirs = small(net)
    theirs.conv1.stride, theirs.conv1.padding = (2, 2), (2, 2)
    theirs.maxpool = nn.MaxPool2d(3, 2, 1)
    theirs.relu = nn.Identity()
    theirs.fc = nn.Identity()
    for block in theirs.modules():  # ReLUs of their own: only the stem's is missing
        if isinstance(block, torchvision.models.resnet.BasicBlock):
            assert isinstance(block.relu, nn.ReLU)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    usual = import_file(tmp_path / "x.pth", tmp_path / "usual", image_size=SIZE)
    assert "--stem-stride 2, --max-pool" in " ".join(usual.notes)
    options = {"stem_stride": 2, "max_pool": True, "stem_relu": False, "padding": "wide-stem"}
    done = import_file(tmp_path / "x.pth", tmp_path / "out", image_size=SIZE, **options)
    torch.testing.assert_close(features_of(load_backbone(done.files[0])), features_of(theirs))
    assert not torch.allclose(features_of(load_backbone(usual.files[0])), features_of(theirs))
    with pytest.raises(ValueError, match="a stem has relu, max_pool and stride"):
        import_file(tmp_path / "x.pth", tmp_path / "bad", stem_stride=0)
    with pytest.raises(ValueError, match="padding is one of"):
        import_file(tmp_path / "x.pth", tmp_path / "bad", padding="valid")
    assert not list(tmp_path.glob("bad*"))


def test_a_changed_stem_travels_with_the_full_state(tmp_path, net):
    theirs = children(small(net), 2, 3)
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    sizes = {"projection_head": (512, *HEADS["projector"]), "prediction_head": (12, 20, 12)}
    for head, (first, hidden, last) in sizes.items():
        mlp = nn.Sequential(nn.Linear(first, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        mlp.append(nn.Linear(hidden, last, bias=False))
        state |= {f"{head}.layers.{key}": value for key, value in mlp.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 77}, tmp_path / "x.ckpt")
    done = import_file(tmp_path / "x.ckpt", tmp_path / "out", full=True, image_size=SIZE)
    model = load_byol(done.files[2]).eval()
    expected = features_of(theirs)
    torch.testing.assert_close(features_of(model.online.encoder.backbone), expected)
    torch.testing.assert_close(features_of(model.target.backbone), expected)
    (again,) = export_file(done.files[2], tmp_path / "again", "byol")
    torch.testing.assert_close(features_of(load_backbone(again)), expected)
    with pytest.raises(ValueError, match="cifar stem without ReLU, which lightly does not know"):
        export_file(again, tmp_path / "there", "lightly")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_resnet_of_transformers(tmp_path, name):
    theirs = shake(getattr(torchvision.models, name)(num_classes=3)).eval()
    renamed = transformers_s(theirs.state_dict())
    theirs.fc = nn.Identity()
    bare = {
        key.removeprefix("resnet."): value for key, value in renamed.items() if "fier" not in key
    }
    for keys, left_out in ((renamed, 2), (bare, 0)):
        torch.save(keys, tmp_path / "pytorch_model.bin")
        found = networks.read(tmp_path / "pytorch_model.bin")
        assert "transformers" in found.about and not found.unknown
        assert len(found.left_out) == left_out
        own = theirs.state_dict()
        assert found.parts["backbone"].keys() == own.keys()
        assert all(value.equal(own[key]) for key, value in found.parts["backbone"].items())
    done = import_file(tmp_path / "pytorch_model.bin", tmp_path / "out", image_size=SIZE)
    torch.testing.assert_close(features_of(load_backbone(done.files[0])), features_of(theirs))


def test_sthalles_checkpoint(tmp_path, net):
    """Online and target network, each a Sequential of children with a projection head."""
    online = {f"encoder.{key}": value for key, value in children(net).state_dict().items()}
    head = nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    online |= {f"projetion.net.{key}": value for key, value in head.state_dict().items()}
    target = {k: v + 1 if v.is_floating_point() else v for k, v in online.items()}
    tree = {
        "online_network_state_dict": online,
        "encoder_state_dict": {k[8:]: v for k, v in online.items() if k.startswith("encoder.")},
        "target_network_state_dict": target,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(tree, tmp_path / "model.pth")
    found = networks.read(tmp_path / "model.pth")
    assert found.layout == "pytorch-byol" and not found.unknown and not found.problems
    assert list(found.parts) == ["backbone", "projector", "target_backbone", "target_projector"]
    assert len(found.aliases) == len(children(net).state_dict())
    done = import_file(tmp_path / "model.pth", tmp_path / "out", network="target")
    state = load_backbone(done.files[0]).state_dict()
    assert state["conv1.weight"].equal(net.conv1.weight + 1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_split_batch_norm(tmp_path, mode):
    """Statistics of each split in one vector: lightly averages them when it evaluates."""
    lightly = pytest.importorskip("lightly.models", reason="lightly is not installed")
    torch.manual_seed(0)
    theirs = shake(lightly.ResNetGenerator("resnet-18", num_splits=4))
    with torch.no_grad():
        theirs.train()(torch.randn(16, 3, SIZE, SIZE))  # each split sees other images
    getattr(theirs, mode)()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "x.ckpt")
    done = import_file(tmp_path / "x.ckpt", tmp_path / "out", image_size=SIZE)
    assert "statistics of 4 splits" in " ".join(done.notes)
    theirs.linear = nn.Identity()
    torch.testing.assert_close(
        features_of(load_backbone(done.files[0])), features_of(theirs.eval()), rtol=1e-4, atol=1e-4
    )


def test_networks_that_blur_are_refused(tmp_path, net):
    state = dict(net.state_dict())
    state["layer2.0.conv1.conv.weight"] = state.pop("layer2.0.conv1.weight")
    state["layer2.0.conv1.blur_filter"] = torch.ones(64, 1, 3, 3) / 9  # as FFCV-SSL's
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ffcv.pth")
    with pytest.raises(CheckpointError, match=r"BlurPool: layer2.0.conv1.blur_filter.*no network"):
        networks.read(tmp_path / "ffcv.pth")
    for arch in ("resnetblur18", "resnetaa50.a1h_in1k"):  # timm's: the keys are those of a ResNet
        torch.save({"state_dict": net.state_dict(), "arch": arch}, tmp_path / "timm.pth")
        with pytest.raises(ValueError, match=rf"says that its network is {re.escape(arch)}.*blurs"):
            import_file(tmp_path / "timm.pth", tmp_path / "bad")
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize("source", ["mmpretrain", "lightning", "byol"])
def test_steps_are_carried_into_mmpretrain(tmp_path, model, parts, source, caplog):
    """Its momentum goes by target_net.steps, and at 0 the target is overwritten."""
    state = {"model": model.state_dict(), "hyper": model.hyper}
    torch.save(state | ({"step": 31} if source == "byol" else {}), tmp_path / "own.pt")
    own = tmp_path / "own.pt"
    if source == "byol":
        (own,) = export_file(own, tmp_path / "full", "byol")
    else:
        (there,) = export_file(own, tmp_path / "there", "mmpretrain")
        assert "target_net.steps is 0" in caplog.text
        tree = torch.load(there, weights_only=True)
        tree["meta"] = {}
        if source == "lightning":
            tree["global_step"] = 31
            del tree["state_dict"]["target_net.steps"]
        else:
            tree["state_dict"]["target_net.steps"] = torch.tensor(31)
        torch.save(tree | {"args": argparse.Namespace()}, there)
        done = import_file(there, tmp_path / "in", full=True, image_size=SIZE)
        assert done.meta["steps"] == 31 and "target_net.steps" not in done.networks.left_out
        own = done.files[2]
    caplog.clear()
    (back,) = export_file(own, tmp_path / "back", "mmpretrain")
    tree = torch.load(back, weights_only=True)
    assert tree["state_dict"]["target_net.steps"].item() == 31 == tree["meta"]["iter"]
    assert not caplog.text
    (ckpt,) = export_file(own, tmp_path / "back", "lightly")
    assert networks.read(ckpt).steps == 31


def test_the_prefixes_of_every_spelling(net):
    state = net.state_dict()
    spellings = {
        "torchvision": state,
        "sequential": children(net).state_dict(),
        "detectron2": resnet.to_detectron2(state),
        "transformers": {k[7:]: v for k, v in transformers_s(state).items() if "resnet" in k},
    }
    for name, tensors in spellings.items():
        for prefix in ("", "a.", "a.b.0."):
            assert resnet.prefixes(prefix + key for key in tensors) == {prefix: name}
        own = resnet.to_torchvision(tensors)
        counters = {key for key in state if key.endswith("num_batches_tracked")}
        assert own.keys() | counters | {"fc.weight", "fc.bias"} == state.keys(), name
