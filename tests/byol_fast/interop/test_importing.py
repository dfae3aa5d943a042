"""Every layout in: the right tensors from the right place, and the real modules' features."""

import argparse

import pytest
import safetensors.torch
import torch
import torchvision
from interop_support import HEADS, SIZE, features_of, keys, made_up, shake
from torch import nn

from byol_fast import load_backbone
from byol_fast.errors import CheckpointError
from byol_fast.interop import load_byol, networks
from byol_fast.interop.importing import import_file
from byol_fast.model import BYOL

MM = {"0": "fc0", "1": "bn0", "3": "fc1"}
SAME = {"0": "0", "1": "1", "3": "3"}
FFCV = {"0": "0.0", "1": "0.1", "3": "1"}
# layout -> prefix of each network (in the order of the `parts` fixture), and of the head's layers
FLAT = {
    "mmpretrain": (
        ("backbone.", "neck.", "head.predictor.", "target_net.module.0.", "target_net.module.1."),
        MM,
    ),
    "mmselfsup0": (
        ("online_net.0.", "online_net.1.", "head.predictor.", "target_net.0.", "target_net.1."),
        MM,
    ),
    "solo-learn": (
        ("backbone.", "projector.", "predictor.", "momentum_backbone.", "momentum_projector."),
        SAME,
    ),
    "solo-learn-encoder": (
        ("encoder.", "projector.", "predictor.", "momentum_encoder.", "momentum_projector."),
        SAME,
    ),
    "lightly": (
        (
            "backbone.",
            "projection_head.layers.",
            "prediction_head.layers.",
            "teacher_backbone.",
            "teacher_projection_head.layers.",
        ),
        SAME,
    ),
    "byol-pytorch": (
        (
            "online_encoder.net.",
            "online_encoder.projector.",
            "online_predictor.",
            "target_encoder.net.",
            "target_encoder.projector.",
        ),
        SAME,
    ),
    "ffcv-ssl": (("net.", "projector.", "predictor.", None, None), FFCV),
    "vissl": (("_feature_blocks.", None, None, None, None), SAME),
    "torchvision": (("", None, None, None, None), SAME),
}


def flat(layout: str, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state dict a project of that layout would have saved; written out here by hand."""
    prefixes, head = FLAT[layout]
    state = {}
    for (part, tensors), prefix in zip(parts.items(), prefixes, strict=True):
        if prefix is None:
            continue
        for key, value in tensors.items():
            if not part.endswith("backbone"):
                key = head[key[0]] + key[1:]
            state[prefix + key] = value
    return state


@pytest.mark.parametrize("layout", FLAT)
def test_every_tensor_is_found(tmp_path, parts, layout):
    state = flat(layout, parts)
    torch.save({"state_dict": state, "epoch": 5}, tmp_path / "x.pth")
    found = networks.read(tmp_path / "x.pth")
    assert found.layout == layout and found.progress == {"epoch": 5} and not found.unknown
    prefixes = FLAT[layout][0]
    expected = [part for part, prefix in zip(parts, prefixes, strict=True) if prefix is not None]
    assert list(found.parts) == expected
    for part in expected:
        assert found.parts[part].keys() == parts[part].keys()
        assert all(found.parts[part][key].equal(parts[part][key]) for key in parts[part])


@pytest.mark.parametrize("network", ["online", "target"])
def test_the_backbone_asked_for_is_written(tmp_path, model, parts, network):
    torch.save({"state_dict": flat("mmpretrain", parts)}, tmp_path / "x.pth")
    done = import_file(tmp_path / "x.pth", tmp_path / "out.pth", network=network)
    assert [path.name for path in done.files] == ["out.safetensors", "out.pth"]
    expected = model.online.encoder if network == "online" else model.target
    net = load_backbone(done.files[0])
    assert torch.equal(features_of(net), features_of(expected.backbone))
    assert done.meta["source"]["layout"] == "mmpretrain" and done.meta["network"] == network


def test_a_full_state_holds_everything(tmp_path, model, parts):
    torch.save({"state_dict": flat("mmselfsup0", parts)}, tmp_path / "x.pth")
    done = import_file(tmp_path / "x.pth", tmp_path / "out", full=True, mean=(0.5, 0.4, 0.3))
    again = load_byol(done.files[2])
    state, own = again.state_dict(), model.state_dict()
    assert state.keys() == own.keys() and all(state[key].equal(own[key]) for key in own)
    assert not any(p.requires_grad for p in again.target.parameters())
    assert torch.equal(
        features_of(load_backbone(done.files[2])), features_of(model.online.encoder.backbone)
    )
    assert done.meta["mean"] == [0.5, 0.4, 0.3]
    for wrong, said in (
        ({"mean": (123.675, 116.28, 103.53)}, "is of pixels in 0–1"),
        ({"std": (0.2, 0.0, 0.2)}, "is of pixels in 0–1"),
        ({"image_size": -3}, "at least 8 pixels, got -3"),
    ):
        with pytest.raises(ValueError, match=said):
            import_file(tmp_path / "x.pth", tmp_path / "bad", **wrong)


def test_wrappers_and_nesting(tmp_path, parts):
    vissl = {"trunk": flat("vissl", parts), "heads": {"0.clf.0.weight": torch.ones(2, 2)}}
    wrapped = {
        "ddp": {"model": {f"module.{k}": v for k, v in flat("ffcv-ssl", parts).items()}},
        "compiled": {f"backbone._orig_mod.{k}": v for k, v in parts["backbone"].items()}
        | {"classifier.weight": torch.ones(1)},
        "vissl": {"classy_state_dict": {"base_model": {"model": vissl}}, "phase_idx": 3},
        "timm": {"state_dict": parts["backbone"], "arch": "resnet18"},
    }
    for name, tree in wrapped.items():
        torch.save(tree, tmp_path / name)
        found = networks.read(tmp_path / name)
        assert found.parts["backbone"].keys() == parts["backbone"].keys(), name
        assert not found.unknown


def test_aliases_are_removed_and_compared(tmp_path, parts):
    state = flat("mmselfsup0", parts)
    for key in [key for key in state if key.startswith("online_net.")]:
        _, at, inner = key.split(".", 2)
        state[f"{'backbone' if at == '0' else 'neck'}.{inner}"] = state[key]
    state["neck.bn0.weight"] = state["neck.bn0.weight"] + 1  # no alias then
    torch.save(state, tmp_path / "x.pth")
    found = networks.read(tmp_path / "x.pth")
    assert len(found.aliases) == len(parts["backbone"]) + len(parts["projector"]) - 1
    assert found.unknown == ["neck.bn0.weight"]


def test_what_is_missing_or_unexpected_is_named(tmp_path, parts):
    state = flat("mmpretrain", parts) | {"adapter.weight": torch.ones(1)}
    torch.save(state, tmp_path / "x.pth")
    notes = import_file(tmp_path / "x.pth", tmp_path / "out").notes
    assert any("unexpected, not imported: adapter.weight" in note for note in notes)
    del state["backbone.layer3.1.bn2.weight"], state["neck.fc0.weight"]
    state["backbone.gate.weight"] = torch.ones(1)
    state["backbone.layer1.0.bn1.bias"] = torch.ones(63)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        import_file(tmp_path / "x.pth", tmp_path / "bad")
    for text in (
        "missing: layer3.1.bn2.weight",
        "unexpected: gate.weight",
        "layer1.0.bn1.bias [63] instead of [64]",
    ):
        assert text in str(error.value)
    state = flat("mmpretrain", parts)
    del state["neck.fc0.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"whole BYOL model .projector: a head of 1"):
        import_file(tmp_path / "x.pth", tmp_path / "bad", full=True)
    torch.save(flat("vissl", parts), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no target backbone"):
        import_file(tmp_path / "x.pth", tmp_path / "bad", network="target")
    assert not list(tmp_path.glob("bad*"))


def test_unknown_files_are_refused(tmp_path):
    torch.save({"encoder.block.weight": torch.ones(2)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"no layout known here .encoder.block.weight"):
        networks.read(tmp_path / "vit.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"no state dict.*epoch"):
        networks.read(tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        networks.read(tmp_path / "empty.pth", "lightly")
    with pytest.raises(ValueError, match=r"no key begins with online_encoder.net"):
        networks.read(tmp_path / "vit.pth", "lucidrains")
    with pytest.raises(ValueError, match="unknown layout 'moco'"):
        networks.read(tmp_path / "vit.pth", "moco")


@pytest.mark.parametrize("name", ["mmpretrain", "solo-learn"])
def test_the_keys_of_the_real_modules(tmp_path, name):
    """check_peers.py wrote them down: all of them are understood."""
    state = made_up(keys(name))
    torch.save({"state_dict": state, "args": argparse.Namespace(x=1)}, tmp_path / "x.ckpt")
    found = networks.read(tmp_path / "x.ckpt")
    assert found.layout.startswith(name) and not found.unknown and not found.problems
    done = import_file(tmp_path / "x.ckpt", tmp_path / "out", full=True)
    assert done.meta["backbone"] == "resnet18"
    assert done.meta["padding"] == ("wide-stem" if name == "solo-learn" else "symmetric")
    target = load_byol(done.files[2]).target.backbone.state_dict()
    prefix = {"mmpretrain": "target_net.module.0.", "solo-learn": "momentum_encoder."}[name]
    if name == "solo-learn" and f"{prefix}conv1.weight" not in state:
        prefix = "momentum_backbone."
    assert target["layer4.1.conv2.weight"].equal(state[f"{prefix}layer4.1.conv2.weight"])


@pytest.mark.parametrize("trainer", ["example", "benchmark", "small images"])
def test_lightly_s_modules(tmp_path, trainer):
    lightly = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
    import copy

    if trainer == "small images":
        from lightly.models import ResNetGenerator

        children = list(ResNetGenerator("resnet-18").children())[:-1]
        backbone = nn.Sequential(*children, nn.AdaptiveAvgPool2d(1))
    else:
        resnet = torchvision.models.resnet18()
        resnet.fc = nn.Identity()
        backbone = nn.Sequential(*list(resnet.children())[:-1]) if trainer == "example" else resnet
    net = nn.Module()
    net.backbone = backbone
    net.projection_head = lightly.BYOLProjectionHead(512, 24, 12)
    net.prediction_head = lightly.BYOLPredictionHead(12, 20, 12)
    teacher = ("teacher_backbone", "teacher_projection_head")
    if trainer == "example":
        teacher = ("backbone_momentum", "projection_head_momentum")
    for name, module in zip(teacher, (net.backbone, net.projection_head), strict=True):
        setattr(net, name, shake(copy.deepcopy(module), seed=4))
    shake(net).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "x.ckpt")
    done = import_file(tmp_path / "x.ckpt", tmp_path / "out", full=True, image_size=SIZE)
    assert done.networks.layout == "lightly" and not done.networks.unknown
    model = load_byol(done.files[2]).eval()
    expected = features_of(net.backbone)
    torch.testing.assert_close(features_of(load_backbone(done.files[0])), expected)
    torch.testing.assert_close(
        features_of(model.target.backbone), features_of(getattr(net, teacher[0]))
    )
    with torch.no_grad():
        projection = net.projection_head(expected)
        torch.testing.assert_close(model.online.encoder.projector(expected), projection)
        torch.testing.assert_close(
            model.online.predictor(projection), net.prediction_head(projection)
        )


def test_byol_pytorch_s_learner(tmp_path):
    package = pytest.importorskip("byol_pytorch", reason="byol-pytorch is not installed")
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    learner = package.BYOL(
        resnet,
        image_size=SIZE,
        hidden_layer="avgpool",
        projection_size=12,
        projection_hidden_size=24,
        sync_batchnorm=False,
        use_simplicial_embeddings=False,
    )
    learner(torch.randn(2, 3, SIZE, SIZE))  # makes projector and target
    shake(learner).eval()
    torch.save(learner.state_dict(), tmp_path / "x.pt")
    done = import_file(tmp_path / "x.pt", tmp_path / "out", full=True, image_size=SIZE)
    found = done.networks
    assert found.layout == "byol-pytorch" and not found.unknown
    assert "net.conv1.weight" in found.aliases
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        projection, representation = learner(images, return_embedding=True)
        torch.testing.assert_close(load_backbone(done.files[0])(images), representation)
        model = load_byol(done.files[2]).eval()
        torch.testing.assert_close(model.online(images)[1], projection)
        torch.testing.assert_close(model.online(images)[0], learner.online_predictor(projection))
        torch.testing.assert_close(model.target(images), learner.target_encoder(images)[0])


def test_byol_pytorch_s_simplicial_projector_is_said_to_be_another(tmp_path, parts):
    state = flat("byol-pytorch", parts)
    for key in [key for key in state if ".projector." in key]:
        state[key.replace(".projector.", ".projector.2.")] = state.pop(key)
    for encoder in ("online_encoder", "target_encoder"):  # its default since 0.9: embedder first
        state[f"{encoder}.projector.0.0.weight"] = torch.ones(4, 512)
        state[f"{encoder}.projector.0.1.running_mean"] = torch.ones(4)
    torch.save(state, tmp_path / "x.pt")
    found = networks.read(tmp_path / "x.pt")
    assert found.problems.keys() == {"projector", "target_projector"}
    assert "3 linear layers" in found.problems["projector"]
    assert import_file(tmp_path / "x.pt", tmp_path / "out").meta["backbone"] == "resnet18"
    with pytest.raises(ValueError, match="3 linear layers"):
        import_file(tmp_path / "x.pt", tmp_path / "out", full=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_s_and_timm_s_networks(tmp_path, name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    made = {
        "torchvision": getattr(torchvision.models, name)(),
        "timm": timm.create_model(name, num_classes=10),
    }
    for library, net in made.items():
        shake(net).eval()
        safetensors.torch.save_file(net.state_dict(), tmp_path / f"{library}.safetensors")
        done = import_file(tmp_path / f"{library}.safetensors", tmp_path / "out", image_size=SIZE)
        assert done.meta["backbone"] == name
        assert done.networks.left_out == ["fc.bias", "fc.weight"]
        net.fc = nn.Identity()
        assert torch.equal(features_of(load_backbone(done.files[0])), features_of(net))


def test_heads_with_a_bias_keep_it(tmp_path, parts):
    state = flat("solo-learn", parts) | {
        f"{name}.3.bias": torch.full((12,), value)
        for name, value in (("projector", 0.5), ("momentum_projector", 0.25), ("predictor", 0.0))
    }
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    done = import_file(tmp_path / "x.ckpt", tmp_path / "out", full=True)
    model = load_byol(done.files[2])
    assert model.online.encoder.projector[3].bias.tolist() == [0.5] * 12
    assert model.target.projector[3].bias.tolist() == [0.25] * 12
    assert model.online.predictor[3].bias is None  # zeros add nothing
    assert isinstance(model, BYOL) and model.hyper["projector"] == HEADS["projector"]


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_another_network_of_torchvision_without_its_classifier(tmp_path, name):
    """The classifier goes by another name than a ResNet's fc."""
    net = getattr(torchvision.models, name)(num_classes=7)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    options = {"layout": "torchvision", "backbone": name, "image_size": 64}
    done = import_file(tmp_path / "x.pth", tmp_path / "out", **options)
    expected = load_backbone(tmp_path / "x.pth", backbone=name, image_size=64)
    assert torch.equal(features_of(load_backbone(done.files[0]), 64), features_of(expected, 64))


@pytest.mark.slow
def test_a_resnet_below_any_prefix(tmp_path, parts):
    """MoCo's, SimSiam's, DINO's and SwAV's files, and what people make of their own."""
    backbone = parts["backbone"]

    def below(prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{key}": value for key, value in backbone.items()}

    head = {"fc.0.weight": torch.ones(2, 512), "fc.2.bias": torch.ones(2)}
    alone = {
        "simsiam": {"state_dict": below("module.encoder.")},
        "inner": {"encoder": below(""), "optimizer": {"state": {}}},
        "lightning": {"state_dict": below("net.resnet."), "callbacks": {}},
        "swav": below("module.") | {"module.prototypes.weight": torch.ones(3, 4)},
        "backbone": {"state_dict": below("backbone.")},
    }
    alone["simsiam"]["state_dict"]["module.predictor.3.bias"] = torch.ones(2)
    alone["swav"]["module.projection_head.0.weight"] = torch.ones(4, 512)
    for name, tree in alone.items():
        torch.save(tree, tmp_path / name)
        done = import_file(tmp_path / name, tmp_path / f"{name}-out")
        state = load_backbone(done.files[0]).state_dict()
        assert all(state[key].equal(value) for key, value in backbone.items()), name
    moco = below("module.encoder_q.") | below("module.encoder_k.")
    moco |= {f"module.encoder_q.{key}": value for key, value in head.items()}
    moco["module.encoder_k.conv1.weight"] = backbone["conv1.weight"] + 1
    dino = {"student": below("module.backbone."), "teacher": below("backbone."), "epoch": 3}
    for name, tree, prefixes in (
        ("moco", {"state_dict": moco, "arch": "resnet18"}, ["encoder_k.", "encoder_q."]),
        ("dino", dino, ["student.module.backbone.", "teacher.backbone."]),
    ):
        torch.save(tree, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"below {', '.join(prefixes)}: name one with"):
            import_file(tmp_path / name, tmp_path / "bad")
        done = import_file(tmp_path / name, tmp_path / f"{name}-out", layout=prefixes[1])
        found = load_backbone(done.files[0]).state_dict()["conv1.weight"]
        assert found.equal(backbone["conv1.weight"])
    with pytest.raises(ValueError, match=r"lies below momentum\.: there are encoder_k\., e"):
        import_file(tmp_path / "moco", tmp_path / "bad", layout="momentum.")
