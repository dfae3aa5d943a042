"""The named differences of `--model.method`: they train, compile, resume, and run on two ranks."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import TINY, make_folder
from torch import nn

from byol_fast import checkpoint, config
from byol_fast.compiled import as_they_stand, compiled
from byol_fast.config import Config
from byol_fast.distributed import World, data_parallel
from byol_fast.flags import UsageError
from byol_fast.loss import pair_loss
from byol_fast.model import BYOL
from byol_fast.networks.predictors import DirectPred, closed_form
from byol_fast.optim import LARS, param_groups
from byol_fast.pretrain import main
from byol_fast.recipes import resolve
from byol_fast.settings import METHODS, ModelConfig
from byol_fast.step import train_step
from byol_fast.watching import alarms, gauges

ALONE = World(0, 1, torch.device("cpu"))
EVERY = ("simsiam", "directpred", "group-ws", "no-predictor", "simsiam+directpred+group-ws")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.again = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.after = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu_()
        return self.after(self.again(x)).relu_().mean((2, 3))


def make(method: str = "byol", dim: int = 8, seed: int = 0) -> BYOL:
    torch.manual_seed(seed)
    given = ModelConfig(method=method)
    sizes = (32, dim)
    return BYOL(
        Small(),
        image_size=16,
        projector=sizes,
        predictor=sizes if given.predictor == "mlp" else given.predictor,
        norm=given.norm,
        momentum=given.momentum,
    )


def views(step: int, batch: int = 16) -> torch.Tensor:
    """Stripes whose direction is the content; a view shifts and dims them."""
    generator = torch.Generator().manual_seed(step)
    angle, phase = torch.rand(2, batch, 1, 1, generator=generator) * 3.14
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    pair = [
        torch.sin((x * angle.cos() + y * angle.sin()) * 0.8 + phase + shift)
        for shift in torch.rand(2, 1, generator=generator) * 2
    ]
    stripes = torch.stack(pair)[:, :, None].expand(2, batch, 3, 16, 16)
    return stripes + 0.3 * torch.randn(2, batch, 3, 16, 16, generator=generator)


def train(model: BYOL, steps: int, networks=None, *, rank: int = 0, ranks: int = 1) -> list[float]:
    optimizer = LARS(param_groups(model.online, 1e-5, adapt=False), lr=0.1)
    losses = []
    for step in range(steps):
        x = views(step).chunk(ranks, dim=1)[rank]
        output = train_step(
            model, networks or as_they_stand(model), optimizer, [x], accumulate=1, decay=0.95
        )
        losses.append(output.loss.item())
    return losses


@pytest.mark.parametrize("method", EVERY)
def test_a_few_steps_lower_the_loss(method: str) -> None:
    losses = train(make(method), 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_what_the_words_build() -> None:
    model = make("simsiam+directpred+group-ws")
    assert isinstance(model.online.predictor, DirectPred)
    assert not list(model.target.parameters()) and model.target_ema_params() == []
    assert any(isinstance(m, nn.GroupNorm) for m in model.online.encoder.projector)
    assert isinstance(make("no-predictor").online.predictor, nn.Identity)
    assert ModelConfig().momentum and ModelConfig().predictor == "mlp"
    assert ModelConfig().norm == "batch"
    with pytest.raises(ValueError, match="directpred or none"):
        BYOL(Small(), image_size=16, projector=(32, 8), predictor="direct")  # type: ignore[arg-type]


def test_directpreds_step_is_the_step_by_hand() -> None:
    """Two updates written out: the predictor is constant in a step and set after it."""
    model = make("directpred")
    plain = copy.deepcopy(model)
    train(model, 2)
    optimizer = LARS(param_groups(plain.online, 1e-5, adapt=False), lr=0.1)
    weight, correlation = torch.eye(8), None
    for step in range(2):
        x = views(step).flatten(0, 1)
        optimizer.zero_grad()
        with torch.no_grad():
            target = plain.target(x)
        z = plain.online.encoder(x)
        pair_loss(z @ weight.T, target).backward()
        optimizer.step()
        for follower, leader in zip(
            plain.target_ema_params(), plain.online_ema_params(), strict=True
        ):
            follower.data.lerp_(leader.data, 0.05)
        now = z.detach().T @ z.detach() / len(z)
        correlation = now if correlation is None else 0.3 * correlation + 0.7 * now
        s, q = torch.linalg.eigh(correlation)
        weight = q @ torch.diag((s.clamp_min(0) / s.max()).sqrt() + 0.01) @ q.T
    torch.testing.assert_close(model.online.predictor.weight, weight, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "collapses"), [("simsiam+no-predictor", True), ("byol", False)])
def test_the_collapse_alarm_without_a_predictor(method: str, collapses: bool) -> None:
    model, history, told = make(method, dim=32), [], []
    optimizer = LARS(param_groups(model.online, 1e-5, adapt=False), lr=0.4)
    for step in range(75):
        output = train_step(
            model, as_they_stand(model), optimizer, [views(step)], accumulate=1, decay=0.99
        )
        if step % 5 == 4:
            z = output.projection
            values = {
                "loss": output.loss.item(),
                "embedding_std": gauges.embedding_std(z).item(),
                "rankme": gauges.rankme(z).item(),
            }
            told += alarms.alarms(values, history, dim=32)
            history.append(values)
    assert bool(told) is collapses


@pytest.mark.slow
def test_compiled_steps_are_the_steps() -> None:
    plain = make("simsiam+directpred+group-ws")
    fast = copy.deepcopy(plain)
    networks = compiled(
        fast,
        ALONE,
        batch=16,
        image_size=16,
        dtype=torch.float32,
        autocast_dtype=None,
        backend="aot_eager",
    )
    assert networks.compile_seconds is not None  # it did compile
    assert train(fast, 3, networks) == pytest.approx(train(plain, 3), rel=1e-4)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


def _rank(rank: int, file: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    model = make("directpred+group-ws")
    networks = as_they_stand(model)
    networks = dataclasses.replace(networks, online=data_parallel(networks.online, world))
    train(model, 3, networks, rank=rank, ranks=2)
    z, t = views(0)[:, :, 0, 0]
    weight = closed_form(z.chunk(2)[rank], t.chunk(2)[rank])
    torch.save([weight, *model.state_dict().values()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_train_and_solve_like_one(in_ranks, tmp_path: Path) -> None:
    """Without batch statistics two halves of a batch are the batch; moments are summed."""
    in_ranks(_rank, 2, tmp_path / "meet", tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model = make("directpred+group-ws")
    train(model, 3)
    z, t = views(0)[:, :, 0, 0]
    wanted = [closed_form(z, t), *model.state_dict().values()]
    for rank in (0, 1):
        torch.testing.assert_close(found[rank], wanted, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "train", images=32)


@pytest.mark.slow
def test_resuming_ends_bitwise_the_same(images: Path, tmp_path: Path) -> None:
    options = ["--method", "simsiam+directpred", "--epochs", "2", "--eval-every", "0"]
    short = [*TINY, "--data", str(images), *options]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*short, "--out", str(whole)]) == 0
    assert main([*short, "--out", str(parts), "--max-steps", "3"]) == 0
    assert main([*short, "--out", str(parts), "--method", "simsiam"]) == 2  # another run
    assert main([*short, "--out", str(parts)]) == 0
    a, b = (checkpoint.latest(out / "checkpoints") for out in (whole, parts))
    assert a is not None and b is not None and a["step"] == b["step"] == 4
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert not torch.equal(a["model"]["online.predictor.weight"], torch.eye(256))
    rebuilt = BYOL(**a["hyper"])
    rebuilt.load_state_dict(a["model"])
    assert isinstance(rebuilt.online.predictor, DirectPred) and rebuilt.hyper == a["hyper"]


def test_words_that_do_not_exist_or_not_together() -> None:
    for method, message in {
        "simsaim": "did you mean simsiam",
        "directpred+no-predictor": "both directpred and no-predictor",
        "byol+simsiam": "once",
        "simsiam+simsiam": "once",
        "": "must be byol",
    }.items():
        with pytest.raises(UsageError, match=message):
            config.parse([f"--method={method}"])
    assert all(word in config.FLAGS["model.method"].help for word in METHODS)


def test_the_log_says_what_is_not_the_papers() -> None:
    run = resolve(config.parse(["--method", "simsiam"]), samples=100_000, world_size=8)
    assert "weight decay 1e-06, no moving average" in run.arithmetic()
    assert "not as in the paper: simsiam (--model.method)" in run.arithmetic()
    plain = resolve(Config(), samples=100_000, world_size=8)
    assert not [line for line in plain.arithmetic() if "not as in the paper" in line]


def test_one_image_is_enough_without_batchnorm() -> None:
    argv = ["--batch-size", "8", "--no-bn-sync", "--method", "group-ws"]
    assert resolve(config.parse(argv), samples=100, world_size=8).split.micro_batch == 1


@pytest.mark.parametrize(
    ("old", "views"),
    [
        ({"blur": True, "flip": 0.5}, "byol"),
        ({"blur": False, "flip": 0.5}, "no-blur"),
        ({"blur": False, "flip": 0}, "no-blur-no-flip"),
        ({"flip": 0.0}, "no-flip"),
        ({"blur": None, "flip": None}, None),
    ],
)
def test_earlier_configurations_are_read(old: dict, views: str | None, tmp_path: Path) -> None:
    tree = {"input": {**old, "crop_area_min": 0.2}}
    assert config.from_dict(tree).input.views == views
    assert config.from_dict(tree).input.crop_area_min == 0.2
    file = tmp_path / "old.yaml"
    file.write_text(f"input: {{{', '.join(f'{k}: {v}' for k, v in old.items() if v is not None)}}}")
    assert config.parse(["--config", str(file)]).input.views == views


def test_an_earlier_flip_that_cannot_be_said_any_more() -> None:
    with pytest.raises(UsageError, match=r"input.flip in a.yaml is 0.25"):
        config.from_dict({"input": {"flip": 0.25}}, "a.yaml")
