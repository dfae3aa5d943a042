"""The authors' checkpoints: haiku trees in, the features of a forward pass written from them."""

import collections
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interop_support import keys

from byol_fast import load_backbone
from byol_fast.errors import CheckpointError
from byol_fast.interop import load_byol, networks
from byol_fast.interop.importing import import_file

SIZE = 64
FIELDS = ["online_params", "target_params", "online_state", "target_state", "opt_state"]


class FlatMapping:
    """Pickles as haiku's: one argument, a dict."""

    def __init__(self, values):
        self.values = values

    def __reduce__(self):
        return FlatMapping, (self.values,)


@pytest.fixture(scope="module")
def experiment():
    """The modules the authors' pickles name, for as long as files are being written."""
    haiku, byol = types.ModuleType("haiku_like"), types.ModuleType("byol_experiment")
    haiku.FlatMapping = FlatMapping
    FlatMapping.__module__ = "haiku_like"
    byol._ByolExperimentState = collections.namedtuple("_ByolExperimentState", FIELDS)
    byol._ByolExperimentState.__module__ = "byol_experiment"
    sys.modules.update(haiku_like=haiku, byol_experiment=byol)
    yield byol._ByolExperimentState
    del sys.modules["haiku_like"], sys.modules["byol_experiment"]


def numbers(seed: int) -> tuple[dict, dict]:
    """Parameters and state of the shapes that haiku's own ResNet-50 has (check_peers.py)."""
    rng = np.random.default_rng(seed)
    shapes = keys("deepmind")

    def values(name, shape):
        if name in ("scale", "average"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        spread = np.sqrt(2 / max(np.prod(shape[:-1]), 1)) if name == "w" else 0.1
        return (spread * rng.standard_normal(shape)).astype(np.float32)

    return tuple(
        {m: {n: values(n, s) for n, s in leaves.items()} for m, leaves in shapes[kind].items()}
        for kind in ("params", "state")
    )


@pytest.fixture(scope="module")
def checkpoint(experiment, tmp_path_factory):
    trees = [numbers(seed) for seed in (0, 1)]
    frozen = [
        FlatMapping({m: FlatMapping(leaves) for m, leaves in trees[network][kind].items()})
        for kind in (0, 1)
        for network in (0, 1)
    ]
    content = {"experiment_state": experiment(*frozen, None), "step": 7, "rng": np.zeros(2)}
    path = tmp_path_factory.mktemp("authors") / "pretrain.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))  # theirs
    return path, trees


def forward(tree: tuple[dict, dict], images: torch.Tensor) -> torch.Tensor:
    """The authors' ResNet-50 in evaluation mode, from the haiku tree, in its own layout."""
    params, state = tree
    top = "res_net50/~/"

    def pad(x, kernel, stride, value=0.0):
        total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        low, high = total // 2, total - total // 2
        return F.pad(x, (low, high, low, high), value=value)

    def conv(x, name, stride=1):
        w = torch.from_numpy(params[top + name]["w"]).permute(3, 2, 0, 1)
        return F.conv2d(pad(x, w.shape[-1], stride), w, stride=stride)

    def norm(x, name):
        leaves = [params[top + name]["scale"], params[top + name]["offset"]]
        leaves += [state[f"{top}{name}/~/{ema}"]["average"] for ema in ("mean_ema", "var_ema")]
        scale, offset, mean, var = (torch.from_numpy(v).view(1, -1, 1, 1) for v in leaves)
        return (x - mean) * scale * torch.rsqrt(var + 1e-5) + offset

    x = F.relu(norm(conv(images, "initial_conv", 2), "initial_batchnorm"))
    x = F.max_pool2d(pad(x, 3, 2, -float("inf")), 3, 2)
    for group, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            at = f"block_group_{group}/~/block_{block}/~/"
            stride = 2 if group and not block else 1
            shortcut = x
            if not block:
                shortcut = norm(conv(x, f"{at}shortcut_conv", stride), f"{at}shortcut_batchnorm")
            y = F.relu(norm(conv(x, f"{at}conv_0"), f"{at}batchnorm_0"))
            y = F.relu(norm(conv(y, f"{at}conv_1", stride), f"{at}batchnorm_1"))
            x = F.relu(norm(conv(y, f"{at}conv_2"), f"{at}batchnorm_2") + shortcut)
    return x.mean((2, 3))


@pytest.mark.slow
def test_features_are_the_authors_(checkpoint, tmp_path):
    path, trees = checkpoint
    done = import_file(path, tmp_path / "out", network="target", image_size=SIZE, full=True)
    assert done.meta["backbone"] == "resnet50" and done.meta["padding"] == "same"
    assert done.networks.progress == {"step": 7} and not done.networks.unknown
    assert any(name.endswith("_ByolExperimentState") for name in done.networks.opaque)
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    model = load_byol(done.files[2]).eval()  # both of its networks pad SAME
    found = (model.online.encoder.backbone, model.target.backbone, load_backbone(done.files[0]))
    for net, tree in zip(found, (trees[0], trees[1], trees[1]), strict=True):
        expected = forward(tree, images)
        scale = expected.abs().max().item()
        with torch.no_grad():
            torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5 * scale)


def test_heads_are_turned(checkpoint, tmp_path):
    path, trees = checkpoint
    found = networks.read(path)
    params, state = trees[0]
    x = torch.randn(3, 2048)
    h = x @ torch.from_numpy(params["projector/linear"]["w"])
    h = h + torch.from_numpy(params["projector/linear"]["b"])
    mean, var = (
        torch.from_numpy(state[f"projector/batch_norm/~/{ema}"]["average"])
        for ema in ("mean_ema", "var_ema")
    )
    scale, offset = (
        torch.from_numpy(params["projector/batch_norm"][n]) for n in ("scale", "offset")
    )
    h = F.relu((h - mean) * torch.rsqrt(var + 1e-5) * scale + offset)
    expected = h @ torch.from_numpy(params["projector/linear_1"]["w"])
    head = found.parts["projector"]
    y = F.linear(x, head["0.weight"], head["0.bias"])
    y = F.batch_norm(
        y, head["1.running_mean"], head["1.running_var"], head["1.weight"], head["1.bias"]
    )
    torch.testing.assert_close(F.linear(F.relu(y), head["3.weight"]), expected)
    assert {"predictor", "target_projector"} <= found.parts.keys()


@pytest.mark.parametrize("kind", ["wide", "resnet18"])
def test_networks_that_torchvision_lacks_are_refused(experiment, tmp_path, kind):
    top = "res_net200/~/" if kind == "wide" else "res_net18/~/"
    width = 128 if kind == "wide" else 64
    block = f"{top}block_group_0/~/block_0/~/"
    params = {
        f"{top}initial_conv": {"w": np.zeros((7, 7, 3, width), np.float32)},
        f"{block}shortcut_conv": {"w": np.zeros((1, 1, width, width), np.float32)},
    }
    content = {"experiment_state": experiment(params, {}, {}, {}, None), "step": 1}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=2))
    reason = "2 times as wide" if kind == "wide" else "projection in their first block"
    with pytest.raises(CheckpointError, match=reason):
        networks.read(tmp_path / "x.pkl")
