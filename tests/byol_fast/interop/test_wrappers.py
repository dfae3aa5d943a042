"""Networks inside wrappers, beside averaged copies and in learners: found, and said which."""

import json

import pytest
import safetensors.torch
import torch
import torchvision
from interop_support import SIZE, features_of

from byol_fast import BYOL, load_backbone
from byol_fast.errors import CheckpointError, Exit
from byol_fast.interop import networks
from byol_fast.interop.__main__ import main
from byol_fast.interop.importing import import_file


def below(prefix: str, tensors: dict) -> dict:
    return {prefix + key: value for key, value in tensors.items()}


def more(tensors: dict, by: float) -> dict:
    return {k: v + by if v.is_floating_point() else v for k, v in tensors.items()}


@pytest.fixture(scope="module")
def state(parts):
    return dict(parts["backbone"])


def wrapped(state: dict) -> dict[str, dict]:
    """Files as wrappers write them; one network in each."""
    inside = {
        f"layer1._fsdp_wrapped_module.{k[7:]}" if "layer1" in k else k: state[k] for k in state
    }
    count = {"n_averaged": torch.tensor(3)}
    return {
        "fsdp": below("_fsdp_wrapped_module.", inside),
        "checkpointing": {
            k.replace("layer2.", "layer2._checkpoint_wrapped_module."): state[k] for k in state
        },
        "averaged": below("module.", state) | count,
        "deepspeed": {"module": below("module.", state), "buffer_names": [], "global_steps": 5},
        "forward": below("_forward_module.model.", state),
        "compiled in parallel": below("module._orig_mod.", state),
        "lightning": {
            "state_dict": below("model.backbone.", state),
            "hyper_parameters": {"lr": 0.1},
        },
        "number": {"state_dict": below("0.", state) | {"1.weight": torch.ones(2, 2)}},
        "deep": {"models": {"encoder": {"weights": state}}, "optimizer": {"lr": torch.ones(1)}},
        "scale": {"encoder": state, "temperature": torch.ones(1)},
    }


KINDS = list(wrapped({}))


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_are_taken_off(tmp_path, state, kind):
    torch.save(wrapped(state)[kind], tmp_path / "x.pth")
    found = networks.read(tmp_path / "x.pth")
    assert found.parts["backbone"].keys() == state.keys()
    assert all(value.equal(state[key]) for key, value in found.parts["backbone"].items())


@pytest.mark.parametrize(
    ("usual", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("state_dict", "ema_state_dict"),
        ("state_dict", "callbacks.EMA.weights"),
        ("state_dict", "current_model_state"),
        ("model", "teacher"),
    ],
)
def test_which_of_two_copies_is_taken_is_said(tmp_path, state, usual, average):
    inner = below("module.", more(state, 1))
    for name in reversed(average.split(".")):
        inner = {name: inner}
    torch.save({usual: state, **inner, "epoch": 5}, tmp_path / "x.pth")
    done = import_file(tmp_path / "x.pth", tmp_path / "out")
    assert f"taken from {usual}; another network lies in {average}." in " ".join(done.notes)
    for path in (f"{average}.", f"{average}.module."):
        found = networks.read(tmp_path / "x.pth", path)
        assert found.parts["backbone"]["conv1.weight"].equal(state["conv1.weight"] + 1)
        assert found.also == [f"{usual}."] and found.path == average


def test_copies_without_a_usual_name_are_not_guessed(tmp_path, state):
    torch.save({"ema": more(state, 1), "live": state}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"ResNets below ema\., live\.: name one with --from"):
        networks.read(tmp_path / "x.pth")
    assert networks.read(tmp_path / "x.pth", "live.").parts["backbone"].keys() == state.keys()
    both = below("model.", state) | below("model._orig_mod.", more(state, 1))
    torch.save(both, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds a network twice, with and without"):
        networks.read(tmp_path / "x.pth")


def test_a_module_that_was_pickled_as_a_whole(tmp_path):
    net = torchvision.models.resnet18()
    torch.save({"model": net, "epoch": 3}, tmp_path / "x.pth")
    found = networks.read(tmp_path / "x.pth")
    own = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    assert found.parts["backbone"].keys() == own.keys() and found.progress == {"epoch": 3}
    assert all(value.equal(own[key]) for key, value in found.parts["backbone"].items())
    assert "torchvision.models.resnet.ResNet" in found.opaque
    with pytest.raises(CheckpointError, match=r"program objects.*interop import"):
        load_backbone(tmp_path / "x.pth", backbone="resnet18")


LEARNER = {"image_size": SIZE, "projection_size": 8, "projection_hidden_size": 16}


@pytest.mark.parametrize("hidden", [-1, "avgpool", -2])
@pytest.mark.parametrize(
    "how",
    [
        "pt",
        pytest.param("safetensors", marks=pytest.mark.slow),
        pytest.param("lightning", marks=pytest.mark.slow),
        "nested",
    ],
)
def test_a_learner_s_own_state_dict(tmp_path, hidden, how):
    learner = BYOL(torchvision.models.resnet18(), hidden_layer=hidden, **LEARNER)
    state = {key: value.contiguous() for key, value in learner.state_dict().items()}
    path = tmp_path / ("x.safetensors" if how == "safetensors" else "x.pt")
    match how:
        case "safetensors":
            safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, path)
        case "lightning":
            other = {"probe.weight": torch.ones(2, 512)}
            torch.save({"state_dict": below("learner.", state) | other, "epoch": 3}, path)
        case _:
            torch.save({"learner": state} if how == "nested" else state, path)
    found = networks.read(path)
    assert found.layout == "byol_fast" and not found.problems
    own = torchvision.models.resnet18().state_dict()
    for part in ("backbone", "target_backbone"):
        assert found.parts[part].keys() == {key for key in own if not key.startswith("fc.")}
    assert found.unknown == (["probe.weight"] if how == "lightning" else [])
    if how in ("pt", "safetensors"):
        net = load_backbone(path, backbone="resnet18")
        assert net.conv1.weight.equal(found.parts["backbone"]["conv1.weight"])
        with pytest.raises(ValueError, match=r"does not say which network.*interop import"):
            load_backbone(path)
    else:
        with pytest.raises(CheckpointError, match=r"byol_fast's own.*interop import"):
            load_backbone(path, backbone="resnet18")


def test_a_learner_of_byol_pytorch_inside_a_larger_module(tmp_path, parts):
    """`self.learner = BYOL(net, ...)` of its own example for Lightning."""
    state = below("learner.online_encoder.net.", parts["backbone"])
    state |= below("learner.target_encoder.net.", parts["target_backbone"])
    state |= below("learner.net.", parts["backbone"]) | {"head.weight": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    for layout in (None, "byol-pytorch"):
        found = networks.read(tmp_path / "x.ckpt", layout)
        assert found.layout == "byol-pytorch" and found.unknown == ["head.weight"]
        assert len(found.aliases) == len(parts["backbone"])
        for part in ("backbone", "target_backbone"):
            assert found.parts[part]["conv1.weight"].equal(parts[part]["conv1.weight"])


def test_inspect_calls_our_own_export_ours(tmp_path, run, capsys):
    from byol_fast.interop.exporting import export_file

    (path, _) = export_file(run, tmp_path / "net", "byol_fast", network="target")
    assert main(["inspect", str(path)]) == Exit.DONE
    said = capsys.readouterr().out
    for text in (
        "byol_fast-export: byol_fast's own export",
        "describes backbone resnet18, stem cifar",
        "network target",
        "byol_fast.load_backbone(",
    ):
        assert text in said
    assert "torchvision's keys" not in said and "interop import" not in said
    net = BYOL("squeezenet1_1", image_size=64, projector=(8, 4), predictor=(8, 4))
    torch.save({"model": net.state_dict(), "hyper": net.hyper, "step": 1}, tmp_path / "s.pt")
    (path, _) = export_file(tmp_path / "s.pt", tmp_path / "squeeze", "byol_fast")
    assert main(["inspect", str(path)]) == Exit.DONE
    assert "describes backbone squeezenet1_1" in capsys.readouterr().out
    done = import_file(path, tmp_path / "again")
    assert torch.equal(
        features_of(load_backbone(done.files[0]), 64), features_of(load_backbone(path), 64)
    )


def test_names_in_a_file_cannot_command_the_terminal(tmp_path, capsys, state):
    torch.save(state | {"\x1b[2J\x1b]0;owned\x07": torch.ones(1)}, tmp_path / "x.pth")
    assert main(["inspect", str(tmp_path / "x.pth"), "--keys"]) == Exit.DONE
    assert main(["import", str(tmp_path / "x.pth"), str(tmp_path / "out")]) == Exit.USAGE
    both = capsys.readouterr()
    assert "\\x1b[2J" in both.out and "\\x1b[2J" in both.err
    assert "\x1b" not in both.out + both.err


def test_group_norm_is_imported_where_the_file_says_so(tmp_path):
    model = BYOL(
        "resnet18", image_size=SIZE, norm="group-ws", projector=(24, 12), predictor=(20, 12)
    )
    tree = {"model": model.state_dict(), "hyper": model.hyper, "step": 5}
    torch.save(tree, tmp_path / "x.pt")
    done = import_file(tmp_path / "x.pt", tmp_path / "out")
    expected = features_of(model.online.encoder.backbone)
    assert torch.equal(features_of(load_backbone(done.files[0])), expected)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="keep no running statistics"):
        import_file(tmp_path / "x.pt", tmp_path / "bad")
    assert not list(tmp_path.glob("bad*"))


def test_an_import_keeps_the_step_of_our_checkpoint(tmp_path, run):
    done = import_file(run / "checkpoints" / "step-00000012.pt", tmp_path / "out")
    with safetensors.safe_open(done.files[0], "pt") as file:
        assert json.loads(file.metadata()["byol_fast"])["steps"] == 12
