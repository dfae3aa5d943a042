"""Weights out and in again: bitwise, torchvision-keyed, whole or absent, and never executed."""

import json
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from byol_fast import checkpoint, export, load_backbone
from byol_fast.errors import CheckpointError
from byol_fast.model import BYOL

SIZE = 32


def trained_like(model: BYOL) -> BYOL:
    """Weights and running statistics that are not the initial ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.online.encoder.backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    return model


def small_byol(**options) -> BYOL:
    torch.manual_seed(0)
    options = {"projector": (16, 8), "predictor": (16, 8), **options}
    return trained_like(BYOL(options.pop("backbone", "resnet18"), image_size=SIZE, **options))


def features_of(net: nn.Module) -> torch.Tensor:
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return net.eval()(images)


def exported(model: BYOL, folder, **more):
    meta = {**model.hyper, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), **more}
    return export.export_backbone(model.online.encoder.backbone, folder / "backbone", meta)


@pytest.fixture(scope="module")
def model() -> BYOL:
    return small_byol(stem="cifar")


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("run") / "exports", steps=7)


def test_the_file_describes_itself(files):
    with safetensors.safe_open(files[0], framework="pt") as file:
        about = json.loads(file.metadata()["byol_fast"])
        keys = set(file.keys())
    assert about["backbone"] == "resnet18" and about["stem"] == "cifar"
    assert about["image_size"] == SIZE and about["feature_dim"] == 512
    assert about["mean"] == [0.5, 0.5, 0.5] and about["steps"] == 7
    assert about["layout"] == "torchvision"
    plain = torch.load(files[1], weights_only=True)
    assert set(plain) == keys
    assert [path.name for path in files] == ["backbone.safetensors", "backbone.pth"]


def test_features_are_bitwise_those_of_the_trained_network(model, files):
    expected = features_of(model.online.encoder.backbone)
    for loaded in (
        load_backbone(files[0]),
        load_backbone(files[0].parent.parent),  # the run folder
        load_backbone(files[1], backbone="resnet18", stem="cifar"),
    ):
        assert not loaded.training
        assert torch.equal(features_of(loaded), expected)


def test_loading_leaves_the_random_generator_alone(files):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    load_backbone(files[0])
    assert torch.equal(torch.rand(4), expected)


def test_torchvision_reports_only_the_classifier_missing(tmp_path):
    model = small_byol()
    _, path = exported(model, tmp_path)
    net = torchvision.models.resnet18()
    result = net.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert sorted(result.missing_keys) == ["fc.bias", "fc.weight"]
    assert result.unexpected_keys == []
    net.fc = nn.Identity()
    assert torch.equal(features_of(net), features_of(model.online.encoder.backbone))


def test_counters_that_a_norm_left_out_are_added(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    del net[1]._buffers["num_batches_tracked"]
    meta = {"backbone": "Sequential", "stem": "imagenet", "hidden_layer": -1, "image_size": 8}
    path, _ = export.export_backbone(net, tmp_path / "net", meta)
    tensors = safetensors.torch.load_file(path)
    assert tensors["1.num_batches_tracked"].item() == 0
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    assert fresh.load_state_dict(tensors).missing_keys == []


def test_torchvision_s_own_weights_with_classifier_load(tmp_path):
    torch.manual_seed(3)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    loaded = load_backbone(tmp_path / "resnet18.pth", backbone="resnet18", image_size=SIZE)
    net.fc = nn.Identity()
    assert torch.equal(features_of(loaded), features_of(net))


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(1))


@pytest.mark.parametrize("hidden_layer", [-1, "pool"])
def test_a_network_of_one_s_own_needs_its_module(tmp_path, hidden_layer):
    model = small_byol(backbone=TinyNet(), hidden_layer=hidden_layer)
    path, _ = exported(model, tmp_path)
    assert "body.0.weight" in safetensors.torch.load_file(path)  # no prefix of ours
    with pytest.raises(ValueError, match=r"belongs to TinyNet.*backbone=module"):
        load_backbone(path)
    loaded = load_backbone(path, backbone=TinyNet())
    assert torch.equal(features_of(loaded), features_of(model.online.encoder.backbone))


@pytest.mark.parametrize(
    "options",
    [
        {"stem": "cifar"},
        pytest.param({"hidden_layer": "layer2"}, marks=pytest.mark.slow),
        {"backbone": TinyNet(), "hidden_layer": "pool"},
    ],
)
def test_training_checkpoints_load_directly(tmp_path, options):
    model = small_byol(**options)
    own = {"backbone": TinyNet()} if "backbone" in options else {}
    state = {"model": model.state_dict(), "hyper": model.hyper}
    path = checkpoint.save(tmp_path / "checkpoints", 12, state)
    alone = tmp_path / "step-00000012.pt"  # sent to a friend, without its hash
    alone.write_bytes(path.read_bytes())
    expected = features_of(model.online.encoder.backbone)
    for place in (path, tmp_path, tmp_path / "checkpoints", alone):
        assert torch.equal(features_of(load_backbone(place, **own)), expected)
    weights = export.read_weights(tmp_path)
    assert weights.file == path and weights.meta["steps"] == 12


def test_a_hash_that_somebody_else_put_beside_the_weights_is_not_ours(tmp_path, model):
    path = tmp_path / "weights.pth"
    torch.save(model.online.encoder.backbone.state_dict(), path)
    path.with_name("weights.pth.sha256").write_text(f"{checkpoint.file_hash(path)}  weights.pth\n")
    net = load_backbone(path, backbone="resnet18", stem="cifar", image_size=SIZE)
    assert torch.equal(features_of(net), features_of(model.online.encoder.backbone))


def test_the_export_is_preferred_to_a_checkpoint(tmp_path, model):
    checkpoint.save(tmp_path / "checkpoints", 1, {"model": model.state_dict(), "hyper": {}})
    paths = exported(model, tmp_path / "exports")
    assert export.read_weights(tmp_path).file == paths[0]


class Payload:
    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["evil.pth", "step-00000001.pt", "evil.safetensors", "evil.pkl"])
@pytest.mark.parametrize("container", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, name, container):
    target, path = tmp_path / "executed", tmp_path / name
    payload = {"model": Payload(target), "hyper": {}}
    with open(path, "wb") as file:
        torch.save(payload, file) if container == "torch" else pickle.dump(payload, file)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_backbone(path, backbone="resnet18")
    assert not target.exists()
    with open(path, "rb") as file:  # the payload works: it is refused for being one
        torch.load(file, weights_only=False) if container == "torch" else pickle.load(file)
    assert target.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_named(tmp_path, files, suffix, damage):
    good = files[0] if suffix == "safetensors" else files[1]
    data = {"truncated": good.read_bytes()[:5000], "empty": b"", "text": b"<html>not found"}
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(data[damage])
    with pytest.raises(CheckpointError, match=r"damaged\.") as error:
        load_backbone(path, backbone="resnet18")
    assert "weights_only" not in str(error.value)  # torch advises to turn it off


def test_missing_things_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.pth does not exist"):
        load_backbone(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_backbone(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_backbone(tmp_path / "list.pth")
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="epoch, optimizer"):
        load_backbone(tmp_path / "other.pth")
    path = checkpoint.save(tmp_path / "of-an-evaluation", 3, {"module": {}, "optimizer": {}})
    for place in (path, path.parent):
        with pytest.raises(CheckpointError, match="no checkpoint of pretraining"):
            load_backbone(place)


def test_weights_of_another_network_are_refused(files):
    with pytest.raises(ValueError, match="does not say which network"):
        load_backbone(files[1])
    with pytest.raises(ValueError, match=r"do not fit resnet34: .* missing"):
        load_backbone(files[1], backbone="resnet34", stem="cifar")
    with pytest.raises(ValueError, match=r"conv1.weight \[64, 3, 3, 3\] instead of"):
        load_backbone(files[1], backbone="resnet18", stem="imagenet")
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        load_backbone(files[1], backbone="resnet81")


def test_a_failed_write_leaves_the_old_files(tmp_path, model, monkeypatch):
    paths = exported(model, tmp_path)
    before = [path.read_bytes() for path in paths]

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"was NOT written: .*No space left"):
        exported(model, tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)


def test_meta_must_be_enough_and_plain(tmp_path, model):
    backbone = model.online.encoder.backbone
    with pytest.raises(ValueError, match="lacks stem, hidden_layer"):
        export.export_backbone(backbone, tmp_path / "b", {"backbone": "resnet18", "image_size": 32})
    with pytest.raises(ValueError, match="plain JSON"):
        export.export_backbone(backbone, tmp_path / "b", {**model.hyper, "mean": torch.ones(3)})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny() -> BYOL:
    return small_byol(backbone=TinyNet(), hidden_layer="pool")


def test_the_hash_is_of_the_bytes_that_were_loaded(tmp_path, tiny):
    files = exported(tiny, tmp_path)
    path = checkpoint.save(
        tmp_path / "checkpoints", 1, {"model": tiny.state_dict(), "hyper": tiny.hyper}
    )
    for file in (*files, path):
        digest, weights = checkpoint.file_hash(file), export.read_weights(file)
        file.write_bytes(b"something else")
        assert weights.sha256 == digest
        file.unlink()
        assert weights.sha256 == digest


def test_a_file_is_read_once(tmp_path, tiny, monkeypatch):
    """Replaced between two readings, the tensors of one network get the other one's hash."""
    files = exported(tiny, tmp_path)
    path = checkpoint.save(
        tmp_path / "checkpoints", 1, {"model": tiny.state_dict(), "hyper": tiny.hyper}
    )
    read, opened = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or read(self))
    for name in ("torch.load", "safetensors.safe_open"):
        module, _, function = name.rpartition(".")
        original = getattr(sys.modules[module], function)

        def from_memory(source, *args, original=original, **options):
            assert not isinstance(source, str | Path), "a second reading"
            return original(source, *args, **options)

        monkeypatch.setattr(name, from_memory)
    for file in (*files, path):
        opened.clear()
        export.read_weights(file)
        assert opened.count(file.name) == 1


def test_a_checkpoint_rotated_away_while_it_is_opened_gives_way_to_the_next(
    tmp_path, tiny, monkeypatch
):
    state = {"model": tiny.state_dict(), "hyper": tiny.hyper}
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, state, keep=1)
    read, raced = Path.read_bytes, []

    def rotated(self):
        if self.suffix == ".pt" and not raced:
            raced.append(self)
            checkpoint.save(folder, 2, state, keep=1)  # removes the first
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", rotated)
    weights = export.read_weights(tmp_path)
    assert raced and weights.meta["steps"] == 2
    assert weights.sha256 == checkpoint.file_hash(checkpoint.path_of(folder, 2))


def test_checkpoint_and_exports_hold_the_same_tensors(tmp_path, tiny):
    state = {"model": tiny.state_dict(), "hyper": tiny.hyper}
    checkpoint.save(tmp_path / "checkpoints", 1, state)
    places = (*exported(tiny, tmp_path / "exports"), tmp_path / "checkpoints")
    found = [export.read_weights(place) for place in places]
    assert len({weights.tensors_sha256 for weights in found}) == 1
    assert len({weights.sha256 for weights in found}) == 3
    with torch.no_grad():
        next(tiny.online.encoder.backbone.parameters()).add_(1)
    other, _ = exported(tiny, tmp_path / "other")
    assert export.read_weights(other).tensors_sha256 != found[0].tensors_sha256


def test_results_of_a_checkpoint_go_to_the_run_folder(tmp_path, tiny):
    state = {"model": tiny.state_dict(), "hyper": tiny.hyper}
    path = checkpoint.save(tmp_path / "checkpoints", 1, state)
    assert export.read_weights(tmp_path).folder == tmp_path
    assert export.read_weights(path).folder == tmp_path
    alone = tmp_path / "elsewhere" / path.name
    alone.parent.mkdir()
    alone.write_bytes(path.read_bytes())
    assert export.read_weights(alone).folder == alone.parent
    assert export.read_weights(exported(tiny, tmp_path / "exports")[0]).folder.name == "exports"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_written_files_have_the_rights_of_any_new_file(tmp_path, tiny, umask):
    before = os.umask(umask)
    try:
        files = exported(tiny, tmp_path)
        (tmp_path / "usual").touch()
    finally:
        os.umask(before)
    usual = (tmp_path / "usual").stat().st_mode
    assert usual & 0o777 == 0o666 & ~umask
    assert [file.stat().st_mode for file in files] == [usual, usual]
