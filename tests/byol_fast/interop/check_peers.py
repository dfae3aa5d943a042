"""Import and export against modules that the test environment does not have; run by hand.

    python tests/byol_fast/interop/check_peers.py mmpretrain solo-learn deepmind [--write-keys]

mmpretrain 1.2, solo-learn and dm-haiku need an environment of their own (docs/interop.md says
which packages). For each: weights are made by the real module, imported here, and give the same
features; exported, they load there with strict=True and give the same features again.
`--write-keys` renews `keys/*.json`, from which the tests make files of these layouts.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_fast import load_backbone
from byol_fast.interop.exporting import export_file
from byol_fast.interop.importing import import_file

KEYS = Path(__file__).parent / "keys"
SIZE = 64
TOLERANCE = 1e-5


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def shake(module: torch.nn.Module) -> None:
    """Weights and running statistics unlike the first ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in module.state_dict().values():
            noise = torch.rand(value.shape, generator=generator)
            if value.dim() > 1:
                value.mul_(1 + 0.2 * noise)
            elif value.is_floating_point():
                value.add_(0.05 * noise)


def compare(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    worst = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    print(f"{what}: largest difference {worst:.2g} (features up to {scale:.2g})", flush=True)
    assert worst <= TOLERANCE * max(scale, 1.0), what


def write_keys(name: str, made_with: str, shapes: Any) -> None:
    text = json.dumps({"made_with": made_with, "shapes": shapes}).replace("], ", "],\n")
    (KEYS / f"{name}.json").write_text(text + "\n")


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: [*value.shape] for key, value in state.items()}


def mmpretrain(folder: Path, renew: bool) -> None:
    import mmpretrain.models  # noqa: F401  registers them
    from mmpretrain.registry import MODELS

    neck = {"type": "NonLinearNeck", "num_layers": 2, "with_bias": True, "with_last_bn": False}
    predictor = {**neck, "in_channels": 32, "hid_channels": 64, "out_channels": 32}
    config = {
        "type": "BYOL",
        "backbone": {"type": "ResNet", "depth": 18, "norm_cfg": {"type": "BN"}},
        "neck": {**predictor, "in_channels": 512, "with_avg_pool": True},
        "head": {
            "type": "LatentPredictHead",
            "loss": {"type": "CosineSimilarityLoss"},
            "predictor": {**predictor, "with_avg_pool": False},
        },
    }
    model = MODELS.build(config)
    shake(model)
    model.eval()
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    torch.save(
        {
            "meta": {"epoch": 3, "iter": 12, "cfg": ConfigDict(a=1)},
            "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
            "state_dict": model.state_dict(),
        },
        folder / "there.pth",
    )
    if renew:
        write_keys(
            "mmpretrain", f"mmpretrain {version('mmpretrain')}", shapes_of(model.state_dict())
        )

    def theirs(part: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return part(images())[0].mean((2, 3))

    expected = {"online": theirs(model.backbone), "target": theirs(model.target_net.module[0])}
    for network, features in expected.items():
        import_file(
            folder / "there.pth", folder / network, network=network, image_size=SIZE, full=True
        )
        with torch.no_grad():
            compare(
                f"mmpretrain → byol_fast, {network}",
                load_backbone(folder / f"{network}.safetensors")(images()),
                features,
            )
    export_file(folder / "online.byol.safetensors", folder / "back", "mmpretrain")
    fresh = MODELS.build(config).eval()
    fresh.load_state_dict(torch.load(folder / "back.pth")["state_dict"], strict=True)
    compare("byol_fast → mmpretrain, online", theirs(fresh.backbone), expected["online"])
    compare(
        "byol_fast → mmpretrain, target", theirs(fresh.target_net.module[0]), expected["target"]
    )
    export_file(folder / "target.safetensors", folder / "backbone", "mmdet", network="target")
    alone = MODELS.build({"type": "ResNet", "depth": 18, "norm_cfg": {"type": "BN"}})
    alone.eval()  # gives nothing back there
    alone.load_state_dict(torch.load(folder / "backbone.pth")["state_dict"], strict=True)
    compare("byol_fast → mmdet/mmseg (mmpretrain's ResNet)", theirs(alone), expected["target"])


def solo_learn(folder: Path, renew: bool) -> None:
    # What solo-learn 1.0.2 imports and BYOL does not use: releases of these no longer fit together.
    for name in ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler"):
        sys.modules[name] = types.ModuleType(name)
    scheduler = sys.modules["pl_bolts.optimizers.lr_scheduler"]
    scheduler.LinearWarmupCosineAnnealingLR = object  # type: ignore[attr-defined]
    from solo.methods.byol import BYOL

    def make() -> Any:
        options = {
            "output_dim": 32,
            "proj_output_dim": 32,
            "proj_hidden_dim": 64,
            "pred_hidden_dim": 64,
            "encoder": "resnet18",
            "backbone": "resnet18",
            "backbone_args": {"cifar": True, "zero_init_residual": False},
            "num_classes": 10,
            "cifar": True,
            "zero_init_residual": False,
            "max_epochs": 1,
            "batch_size": 2,
            "num_large_crops": 2,
            "num_small_crops": 0,
            "optimizer": "sgd",
            "lars": False,
            "lr": 0.1,
            "weight_decay": 0.0,
            "classifier_lr": 0.1,
            "exclude_bias_n_norm": False,
            "accumulate_grad_batches": 1,
            "extra_optimizer_args": {},
            "scheduler": "none",
            "min_lr": 0.0,
            "warmup_start_lr": 0.0,
            "warmup_epochs": 0,
            "knn_eval": False,
            "knn_k": 20,
            "base_tau_momentum": 0.99,
            "final_tau_momentum": 1.0,
            "momentum_classifier": False,
        }
        return BYOL(**options)

    model = make()
    shake(model)
    model.eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 4}, folder / "there.ckpt")
    if renew:
        write_keys(
            "solo-learn", f"solo-learn {version('solo-learn')}", shapes_of(model.state_dict())
        )
    modern = hasattr(model, "backbone")
    online = model.backbone if modern else model.encoder
    target = model.momentum_backbone if modern else model.momentum_encoder
    for network, part in (("online", online), ("target", target)):
        import_file(folder / "there.ckpt", folder / network, network=network, full=True)
        with torch.no_grad():
            ours = load_backbone(folder / f"{network}.safetensors", image_size=SIZE)(images())
            compare(f"solo-learn → byol_fast, {network}", ours, part(images()))
    export_file(folder / "online.byol.safetensors", folder / "back", "solo-learn")
    fresh = make().eval()
    state = torch.load(folder / "back.ckpt")["state_dict"]
    if not modern:
        state = {key.replace("backbone.", "encoder."): value for key, value in state.items()}
    result = fresh.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("classifier.") for key in result.missing_keys), result.missing_keys
    with torch.no_grad():
        again = fresh.backbone if modern else fresh.encoder
        compare("byol_fast → solo-learn", again(images()), online(images()))
        projected = fresh.projector(again(images()))
        compare("byol_fast → solo-learn, projector", projected, model.projector(online(images())))


def deepmind(folder: Path, renew: bool) -> None:
    import haiku as hk
    import jax
    import jax.numpy as jnp

    class MLP(hk.Module):
        def __call__(self, x: Any, is_training: bool) -> Any:
            x = hk.Linear(64)(x)
            x = hk.BatchNorm(True, True, 0.9)(x, is_training)
            return hk.Linear(32, with_bias=False)(jax.nn.relu(x))

    def forward(x: Any, is_training: bool) -> Any:
        net = hk.nets.ResNet50(10, bn_config={"decay_rate": 0.9, "eps": 1e-5})
        projector, predictor = MLP(name="projector"), MLP(name="predictor")
        out = net.initial_batchnorm(net.initial_conv(x), is_training, False)
        out = hk.max_pool(jax.nn.relu(out), (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for group in net.block_groups:
            out = group(out, is_training, False)
        features = jnp.mean(out, axis=[1, 2])
        projection = projector(features, is_training)
        hk.Linear(10, name="classifier")(features)
        return features, projection, predictor(projection, is_training)

    network = hk.without_apply_rng(hk.transform_with_state(forward))
    init = jax.jit(network.init, static_argnums=2)
    apply = jax.jit(network.apply, static_argnums=3)
    pixels = jnp.asarray(images().permute(0, 2, 3, 1).numpy())
    nets = {}
    for seed, name in enumerate(("online", "target")):
        params, state = init(jax.random.PRNGKey(seed), pixels, True)
        rng = np.random.default_rng(seed)
        params, state = jax.tree_util.tree_map(
            lambda v, rng=rng: (
                v * (1 + 0.2 * rng.random(v.shape).astype(np.float32))
                if v.dtype == np.float32 and max(v.shape[:3], default=1) > 1
                else v + 0.05 * rng.random(v.shape).astype(v.dtype)
            ),
            (params, state),
        )
        features = apply(params, state, pixels, False)[0][0]
        nets[name] = (params, state, torch.from_numpy(np.array(features)))
    frozen = hk.data_structures.to_immutable_dict
    trees = [frozen(nets[name][part]) for part in (0, 1) for name in ("online", "target")]
    import collections

    fields = ["online_params", "target_params", "online_state", "target_state", "opt_state"]
    kind = collections.namedtuple("_ByolExperimentState", fields)
    module = types.ModuleType("byol_experiment")
    module._ByolExperimentState = kind  # type: ignore[attr-defined]
    sys.modules["byol_experiment"], kind.__module__ = module, "byol_experiment"
    content = {"experiment_state": kind(*trees, None), "step": 7, "rng": np.zeros(2, np.uint32)}
    (folder / "there.pkl").write_bytes(pickle.dumps(content, protocol=2))
    if renew:
        both = {"params": nets["online"][0], "state": nets["online"][1]}
        shapes = {
            kind: {m: {n: [*v.shape] for n, v in values.items()} for m, values in tree.items()}
            for kind, tree in both.items()
        }
        write_keys("deepmind", f"dm-haiku {version('dm-haiku')}, ResNet-50", shapes)
    for name, (_, _, features) in nets.items():
        import_file(folder / "there.pkl", folder / name, network=name, image_size=SIZE, full=True)
        with torch.no_grad():
            ours = load_backbone(folder / f"{name}.safetensors")(images())
        compare(f"haiku → byol_fast, {name}", ours, features)
    from byol_fast.interop import load_byol

    model = load_byol(folder / "online.byol.safetensors").eval()
    _, projection, prediction = apply(*nets["online"][:2], pixels, False)[0]
    with torch.no_grad():
        ours_prediction, ours_projection, _ = model.online(images())
    compare("haiku → byol_fast, projector", ours_projection, torch.from_numpy(np.array(projection)))
    compare("haiku → byol_fast, predictor", ours_prediction, torch.from_numpy(np.array(prediction)))


def main() -> None:
    checks = {"mmpretrain": mmpretrain, "solo-learn": solo_learn, "deepmind": deepmind}
    names = [word for word in sys.argv[1:] if not word.startswith("--")] or list(checks)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            checks[name](Path(folder), "--write-keys" in sys.argv)


if __name__ == "__main__":
    main()
