"""Every layout out, in again bitwise, and into the real modules with strict=True."""

import copy
import json
import pickle

import numpy as np
import pytest
import safetensors
import torch
import torchvision
from interop_support import HEADS, SIZE, features_of, keys, shake
from torch import nn

from byol_fast import export, load_backbone
from byol_fast.interop import load_byol, networks
from byol_fast.interop.exporting import SUFFIXES, export_file
from byol_fast.interop.importing import import_file
from byol_fast.model import BYOL

BACKBONES = ("torchvision", "timm", "safetensors", "mmdet", "mmseg", "detectron2", "byol_fast")
MODELS = ("mmpretrain", "lightly", "solo-learn", "byol")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A model with the ImageNet stem, as a full state."""
    torch.manual_seed(0)
    model = BYOL("resnet18", image_size=SIZE, **HEADS)
    shake(model.online)
    shake(model.target, seed=3)
    path = tmp_path_factory.mktemp("whole") / "x.pt"
    torch.save({"model": model.state_dict(), "hyper": model.hyper, "step": 5}, path)
    return model.eval(), path


@pytest.mark.parametrize(
    ("layout", "network"), [*((layout, "online") for layout in BACKBONES), ("timm", "target")]
)
def test_backbones_come_back_bitwise(tmp_path, whole, layout, network):
    model, source = whole
    own = (model.online.encoder if network == "online" else model.target).backbone.state_dict()
    (path, *_) = export_file(source, tmp_path / "out", layout, network=network)
    assert path.suffix == (SUFFIXES[layout] or ".safetensors")
    found = networks.read(path)
    assert not found.unknown and not found.opaque
    again = found.parts["backbone"]
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    assert again.keys() | counters == own.keys()
    assert (again.keys() >= counters) == (layout != "detectron2")
    assert all(again[key].equal(own[key]) for key in again)
    if layout == "detectron2":
        done = import_file(path, tmp_path / "again", image_size=SIZE)
        expected = features_of(model.online.encoder.backbone)
        assert torch.equal(features_of(load_backbone(done.files[0])), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MODELS)
def test_whole_models_come_back(tmp_path, model, run, layout):
    options = {"ignore_padding": True} if layout == "solo-learn" else {}
    (path,) = export_file(run, tmp_path / "out", layout, **options)
    found = networks.read(path)
    assert not found.unknown and not found.problems
    if layout != "byol":
        assert found.layout == layout
    done = import_file(path, tmp_path / "again", full=True, image_size=SIZE)
    state, own = load_byol(done.files[2]).state_dict(), model.state_dict()
    assert state.keys() == own.keys()
    changed = {key for key in own if not state[key].equal(own[key])}
    if layout == "lightly":  # its first layer has no bias: that went into the running mean
        heads = ("online.encoder.projector.", "online.predictor.", "target.projector.")
        assert changed <= {f"{p}{key}" for p in heads for key in ("0.bias", "1.running_mean")}
        features = torch.randn(4, 512)
        again = load_byol(done.files[2]).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                again.online.predictor(again.online.encoder.projector(features)),
                model.online.predictor(model.online.encoder.projector(features)),
            )
    else:
        assert not changed


def test_mmpretrain_s_keys_are_all_there(tmp_path, whole):
    """Against the keys and shapes of the real module, which loads them with strict=True."""
    (path,) = export_file(whole[1], tmp_path / "out", "mmpretrain")
    content = torch.load(path, weights_only=True)
    expected = keys("mmpretrain")
    assert content["state_dict"].keys() == expected.keys()
    for key, value in content["state_dict"].items():
        if ".layer" in key or "conv1" in key:
            assert [*value.shape] == expected[key], key
    assert content["state_dict"]["target_net.steps"].item() == 5 == content["meta"]["iter"]


def test_solo_learn_s_keys_are_there_but_its_classifier(tmp_path, model, run):
    (path,) = export_file(run, tmp_path / "out", "solo-learn", ignore_padding=True)
    expected = {key.replace("encoder.", "backbone.", 1) for key in keys("solo-learn")}
    found = torch.load(path, weights_only=True)["state_dict"].keys()
    assert {key for key in expected ^ found if not key.startswith("classifier.")} == set()


def test_lightly_s_module_loads_it_strictly(tmp_path, model, run):
    lightly = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
    (path,) = export_file(run, tmp_path / "out", "lightly")
    net = nn.Module()
    net.backbone = torchvision.models.resnet18()
    net.backbone.fc = nn.Identity()
    net.backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.backbone.maxpool = nn.Identity()
    net.projection_head = lightly.BYOLProjectionHead(512, *HEADS["projector"])
    net.prediction_head = lightly.BYOLPredictionHead(12, *HEADS["predictor"])
    net.teacher_backbone = copy.deepcopy(net.backbone)
    net.teacher_projection_head = copy.deepcopy(net.projection_head)
    net.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    net.eval()
    features = features_of(net.backbone)
    assert torch.equal(features, features_of(model.online.encoder.backbone))
    assert torch.equal(features_of(net.teacher_backbone), features_of(model.target.backbone))
    with torch.no_grad():
        torch.testing.assert_close(
            net.prediction_head(net.projection_head(features)),
            model.online.predictor(model.online.encoder.projector(features)),
        )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_and_torchvision_load_it_strictly(tmp_path, whole, suffix):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model, source = whole
    (path,) = export_file(source, tmp_path / f"out{suffix}", "timm")
    net = timm.create_model("resnet18", num_classes=0)
    timm.models.load_checkpoint(net, str(path), strict=True)
    expected = features_of(model.online.encoder.backbone)
    torch.testing.assert_close(features_of(net), expected)
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    plain.load_state_dict(networks.read(path).parts["backbone"], strict=True)
    assert torch.equal(features_of(plain), expected)


def test_detectron2_s_file(tmp_path, whole):
    (path,) = export_file(whole[1], tmp_path / "out", "detectron2")
    content = pickle.loads(path.read_bytes())  # arrays only: see the names below
    assert content["matching_heuristics"] is True and "RGB" in content["__author__"]
    arrays = content["model"]
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    own = whole[0].online.encoder.backbone.state_dict()
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res5.1.conv2.norm.weight": "layer4.1.bn2.weight",
    }.items():
        assert np.array_equal(arrays[theirs], own[ours].numpy())
    assert len(arrays) == sum(not key.endswith("num_batches_tracked") for key in own)
    assert not any(key.startswith("fc") for key in arrays)


@pytest.mark.slow
def test_onnx_gives_the_same_features_for_any_batch(tmp_path, whole):
    padding = "same"  # the harder one: it depends on the image's size
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnx
    import onnxruntime

    (source, _) = export_file(whole[1], tmp_path / "source", "byol_fast")
    with safetensors.safe_open(source, framework="pt") as file:
        meta = json.loads(file.metadata()["byol_fast"])
    net = export.build(
        export.Weights(source, export.read_weights(source).tensors, {**meta, "padding": padding})
    )
    export.export_backbone(net, tmp_path / padding, {**meta, "padding": padding})
    (path,) = export_file(tmp_path / f"{padding}.safetensors", tmp_path / "net", "onnx")
    onnx.checker.check_model(str(path))
    props = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert props["padding"] == padding and props["backbone"] == "resnet18"
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 5):
        images = torch.randn(batch, 3, SIZE, SIZE)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), net(images), rtol=1e-4, atol=1e-4)
    assert [p.name for p in tmp_path.glob("net*")] == ["net.onnx"]  # no data file beside it


def test_another_padding_is_not_written_silently(tmp_path, whole, run):
    model, _ = whole
    net = model.online.encoder.backbone
    export.export_backbone(net, tmp_path / "same", {**model.hyper, "padding": "same"})
    for layout in ("torchvision", "timm", "mmdet", "detectron2", "safetensors"):
        with pytest.raises(ValueError, match=r"same padding, and .* computes with symmetric"):
            export_file(tmp_path / "same.safetensors", tmp_path / "out", layout)
    export_file(tmp_path / "same.safetensors", tmp_path / "out", "mmdet", ignore_padding=True)
    with pytest.raises(ValueError, match="symmetric padding, and solo-learn computes with wide"):
        export_file(run, tmp_path / "bad", "solo-learn")
    assert sorted(p.name for p in tmp_path.glob("[ob]*")) == ["out.pth"]


def test_what_a_layout_cannot_hold_is_said(tmp_path, whole, run):
    model, source = whole
    (alone, _) = export_file(source, tmp_path / "alone", "byol_fast", network="target")
    for layout in MODELS:
        with pytest.raises(ValueError, match="holds no projector"):
            export_file(alone, tmp_path / "out", layout)
    with pytest.raises(ValueError, match="holds no online network"):
        export_file(alone, tmp_path / "out", "torchvision")
    assert export_file(alone, tmp_path / "ok", "torchvision", network="target")[0].is_file()
    with pytest.raises(ValueError, match="holds both networks"):
        export_file(run, tmp_path / "out", "mmpretrain", network="target")
    with pytest.raises(ValueError, match="no 3×3 stem"):
        export_file(run, tmp_path / "out", "detectron2")
    with pytest.raises(ValueError, match="unknown layout 'caffe'"):
        export_file(run, tmp_path / "out", "caffe")
    with pytest.raises(ValueError, match=r"writes \.pkl, not \.pth"):
        export_file(source, tmp_path / "out.pth", "detectron2")
    torch.save(model.online.encoder.backbone.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"not byol_fast's own.*interop import"):
        export_file(tmp_path / "plain.pth", tmp_path / "out", "torchvision")
    assert not list(tmp_path.glob("out*"))


def test_group_norm_is_not_written_as_batch_norm(tmp_path):
    """Under torchvision's keys it would load with strict=False, and compute something else."""
    model = BYOL("resnet18", image_size=SIZE, norm="group-ws", **HEADS)
    state = {"model": model.state_dict(), "hyper": model.hyper, "step": 5}
    torch.save(state, tmp_path / "x.pt")
    for layout in set(SUFFIXES) - {"onnx", "byol_fast"}:
        with pytest.raises(ValueError, match=rf"standardised weights .group-ws., and {layout}"):
            export_file(tmp_path / "x.pt", tmp_path / "out", layout)
    path, _ = export_file(tmp_path / "x.pt", tmp_path / "out", "byol_fast")
    expected = features_of(model.online.encoder.backbone)
    assert torch.equal(features_of(load_backbone(path)), expected)


def test_a_predictor_that_is_no_mlp_is_said(tmp_path):
    model = BYOL("resnet18", image_size=SIZE, projector=HEADS["projector"], predictor="directpred")
    state = {"model": model.state_dict(), "hyper": model.hyper, "step": 5}
    torch.save(state, tmp_path / "x.pt")
    for layout in MODELS:
        with pytest.raises(ValueError, match=rf"its predictor .directpred. .* which --to {layout}"):
            export_file(tmp_path / "x.pt", tmp_path / "out", layout)
